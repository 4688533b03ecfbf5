"""Linears quantized with one codebook for all, rotated; refinement of both kinds."""

import pytest
import torch

from tests.conftest import correlated_hessian, problem
from vptq.config import LinearConfig
from vptq.errors import NumericalError, UsageError
from vptq.quantize.codebook import store_codebook
from vptq.quantize.gaussian import gaussian_codebook, gaussian_trellis, residual_codebook
from vptq.quantize.linear import quantize_linear, quantize_linears
from vptq.quantize.metric import proxy_error, trace_products
from vptq.quantize.problem import LinearInput, undrifted
from vptq.quantize.sensitivity import unit_error
from vptq.quantize.trellis import Trellis

CPU = torch.device("cpu")


def shared(**changes) -> LinearConfig:
    base = {"vector_lens": (-1, 4), "num_centroids": (-1, 16), "rotation": "hadamard", "codebook_scope": "shared"}
    return LinearConfig(**base | changes)


@pytest.fixture(scope="module")
def books():
    main = gaussian_codebook(4, 16, CPU)
    table = gaussian_trellis_small()
    return {"vq": [main], "residual": [main, residual_codebook(main, 8)], "trellis": [table]}


def gaussian_trellis_small():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(64, 1, generator=generator)


def stored(tables):
    return tuple(store_codebook(table[None], 16, 16, torch.float16) for table in tables)


CASES = {
    "vq": {},
    "no perm": {"enable_perm": False},
    "residual": {"num_res_centroids": (-1, 8)},
    "trellis": {"vector_lens": (-1, 1), "num_centroids": (-1, 64), "trellis_bits": 2},
    "trellis rows": {"vector_lens": (-1, 1), "num_centroids": (-1, 64), "trellis_bits": 2, "scale_scope": "row"},
    "row groups": {"row_groups": 2},
    "unrotated": {"rotation": "none"},
}


def books_of(config, books):
    kind = "trellis" if config.has_trellis else "residual" if config.has_residual else "vq"
    return stored(books[kind])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(128, 24), (150, 36)])
def test_error_is_what_the_dequantized_weight_has(case, shape, books, generator):
    config = shared(**CASES[case], refine_iters=1)
    assert config.faults() == []
    weight, hessian = problem(*shape, generator)
    quantized, report = quantize_linear(weight, hessian, config, shared=books_of(config, books))
    assert report.error == pytest.approx(proxy_error(weight, quantized.dequantize(), hessian), rel=1e-3)
    assert report.error_refined <= report.error_sweep
    assert report.weight == pytest.approx(trace_products(weight, hessian), rel=1e-4)
    assert quantized.perm is None and quantized.scale is None


@pytest.mark.ci
def test_trellis_beats_vectors_at_equal_bits_and_feedback_beats_none(generator):
    weight, hessian = problem(128, 48, generator)
    main, table = gaussian_codebook(2, 16, CPU), gaussian_trellis(1, Trellis(7, 2), CPU)
    vectors = quantize_linear(weight, hessian, shared(vector_lens=(-1, 2)), shared=stored([main]))[1].error
    config = shared(vector_lens=(-1, 1), num_centroids=(-1, 128), trellis_bits=2)
    trellis = quantize_linear(weight, hessian, config, shared=stored([table]))[1].error
    assert trellis < 0.85 * vectors


def test_sweep_pays_for_errors_as_the_metric_says(generator):
    """The predicted error, D Σ d_i, is what the sweep leaves."""
    weight = torch.randn(512, 48, generator=generator)
    hessian = correlated_hessian(48, generator)
    main = gaussian_codebook(2, 16, CPU)
    config = shared(vector_lens=(-1, 2), enable_perm=False)
    _, report = quantize_linear(weight, hessian, config, shared=stored([main]))
    from vptq.quantize.problem import rotated

    predicted = 0.1089 * unit_error(*rotated(LinearInput("x", weight, hessian), config), config.percdamp)
    assert report.error * report.weight == pytest.approx(predicted, rel=0.2)


def test_refinement_of_shared_scale_and_indices_lowers_the_error(books, generator):
    weight, hessian = problem(128, 48, generator)
    for case in ("vq", "trellis", "residual"):
        config = shared(**CASES[case], refine_iters=3, beam=4 if case == "residual" else 1)
        report = quantize_linear(weight, hessian, config, shared=books_of(config, books))[1]
        assert report.error_refined < 0.995 * report.error_sweep, case


@pytest.mark.parametrize("case", ["vq", "trellis", "row groups"])
def test_linears_together_come_out_as_alone(case, books, generator):
    config = shared(**CASES[case], refine_iters=1)
    inputs = [LinearInput(f"l{i}", *problem(128, 40, generator)) for i in range(3)]
    together = quantize_linears(inputs, config, shared=books_of(config, books))
    for linear, (quantized, report) in zip(inputs, together, strict=True):
        alone, own = quantize_linears([linear], config, shared=books_of(config, books))[0]
        assert torch.equal(quantized.indices, alone.indices)
        assert torch.equal(quantized.row_scale, alone.row_scale)
        assert report.error == own.error


def test_groups_of_rows_have_metrics_of_their_own(books, generator):
    """Each half quantized under its own metric is better there than under the mean of both."""
    weight = torch.randn(128, 24, generator=generator)
    metrics = torch.stack([correlated_hessian(24, generator), correlated_hessian(24, generator).flip(0, 1)])
    config = shared(row_groups=2)
    own, report = quantize_linear(weight, metrics, config, shared=books_of(config, books))
    mean, _ = quantize_linear(weight, metrics.mean(0), config, shared=books_of(config, books))

    def cost(quantized):
        error = weight - quantized.dequantize()
        return sum(trace_products(error[64 * i : 64 * i + 64], metrics[i]) for i in range(2))

    assert cost(own) < 0.95 * cost(mean)
    assert own.row_scale.shape == (2,)
    assert report.error * report.weight == pytest.approx(cost(own), rel=1e-3)


def test_weight_that_makes_up_for_drift_is_the_least_squares_one(generator):
    original = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    drifted = original @ (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)).double()
    weight = torch.randn(6, 12, generator=generator)
    hessian = drifted.T @ drifted / 400
    drift = (original - drifted).T @ drifted / 400
    found = undrifted(weight, hessian.float(), drift.float(), 0.0)
    expected = torch.linalg.lstsq(drifted, original @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(undrifted(weight, hessian.float(), torch.zeros(12, 12), 0.01), weight)


def test_faults_are_named(books, generator):
    weight, hessian = problem(128, 24, generator)
    with pytest.raises(UsageError, match="shared needs the codebook"):
        quantize_linear(weight, hessian, shared())
    weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="non-finite weights"):
        quantize_linear(weight, hessian, shared(), shared=books_of(shared(), books))


OWN = {
    "out": {},
    "in": {"vector_quant_dim": "in"},
    "residual": {"num_res_centroids": (-1, 8), "beam": 4},
    "in residual": {"vector_quant_dim": "in", "num_res_centroids": (-1, 8), "beam": 2},
    "outliers groups residual": {
        "vector_lens": (2, 4), "num_centroids": (8, 16), "npercent": 4, "group_num": 5, "num_res_centroids": (-1, 4),
    },
    "8 bits": {"bitwidth": 8},
    "rotated": {"rotation": "hadamard"},
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("shape", [(64, 40), (50, 36)])
def test_refinement_of_own_codebooks_lowers_the_error(case, shape, generator):
    config = LinearConfig(**{"vector_lens": (-1, 4), "num_centroids": (-1, 16), "kiter": 20, "refine_iters": 3} | OWN[case])
    assert config.faults() == []
    weight, hessian = problem(*shape, generator)
    quantized, report = quantize_linear(weight, hessian, config)
    before = report.error_sweep if report.error_residual is None else report.error_residual
    assert report.error_refined < 0.98 * before
    assert report.error == pytest.approx(proxy_error(weight, quantized.dequantize(), hessian), rel=1e-3)


def test_refitted_centroids_are_the_least_squares_ones(generator):
    """Gradients of the error with respect to every centroid vanish where conjugate gradients have ended."""
    from vptq.geometry import plan_geometry
    from vptq.quantize.codebook import store_codebook as store
    from vptq.quantize.problem import prepare
    from vptq.quantize.refine import Books, Chosen, Decoder, _fit_centroids
    from vptq.quantize.sweep import sweep

    config = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 8), kiter=5)
    weight, hessian = problem(32, 24, generator)
    task = prepare(LinearInput("x", weight, hessian), config, torch.float32)
    geometry, _ = plan_geometry(32, 24, config)
    books = Books(None, store(torch.randn(1, 8, 4, generator=generator), 16, 16, torch.float32))
    swept = sweep(task.weight, task.factor.inv_chol, books.segments(geometry), geometry, 8)
    metric = task.metric()
    found = _fit_centroids(task, metric, Chosen(swept, books), config, geometry, torch.float32)
    decoder = Decoder(books.segments(geometry), swept.indices, geometry)
    slope = decoder.adjoint((task.weight - found.swept.quantized) @ metric)
    before = decoder.adjoint((task.weight - swept.quantized) @ metric)
    assert slope.norm() < 1e-3 * before.norm()


@pytest.mark.parametrize("case", ["trellis", "residual"])
def test_blocksize_changes_the_speed_not_the_answer(case, books, generator):
    weight, hessian = problem(128, 40, generator)
    errors = [
        quantize_linear(weight, hessian, shared(**CASES[case], refine_iters=1, blocksize=size), shared=books_of(
            shared(**CASES[case]), books))[1]
        for size in (8, 128)
    ]  # fmt: skip
    assert errors[0].error_sweep == pytest.approx(errors[1].error_sweep, rel=1e-3)
    assert errors[0].error_refined == pytest.approx(errors[1].error_refined, rel=1e-3)


def test_a_scale_that_makes_it_worse_is_not_kept(books, generator, monkeypatch):
    monkeypatch.setattr("vptq.quantize.shared_codebook._best_scale", lambda rows: rows.scale.double() * 2)
    weight, hessian = problem(128, 40, generator)
    config = shared(refine_iters=2)
    quantized, report = quantize_linear(weight, hessian, config, shared=books_of(config, books))
    assert report.error_refined <= report.error_sweep
    assert report.error == pytest.approx(proxy_error(weight, quantized.dequantize(), hessian), rel=1e-3)
