"""Quantizing one linear, whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.conftest import correlated_hessian, problem
from vptq.config import LinearConfig
from vptq.errors import NumericalError, UsageError
from vptq.quantize.linear import quantize_linear
from vptq.quantize.metric import proxy_error


def settings(**changes) -> LinearConfig:
    return LinearConfig(**{"vector_lens": (-1, 4), "num_centroids": (-1, 16), "kiter": 20} | changes)


CASES = {
    "out": {},
    "in": {"vector_quant_dim": "in"},
    "residual": {"num_res_centroids": (-1, 8)},
    "in residual groups": {"vector_quant_dim": "in", "num_res_centroids": (-1, 8), "group_num": 3},
    "outliers groups": {"vector_lens": (2, 4), "num_centroids": (8, 16), "npercent": 4, "group_num": 5},
    "in outliers": {"vector_lens": (2, 4), "num_centroids": (8, 16), "npercent": 4, "vector_quant_dim": "in"},
    "no norm": {"enable_norm": False},
    "no perm": {"enable_perm": False},
    "absorbed perm": {"absorb_perm": True, "num_res_centroids": (-1, 8)},
    "8 bits": {"bitwidth": 8},
    "2 bits": {"bitwidth": 2, "bsize": 3},
    "11 bits residual outliers": {
        "bitwidth": 11, "num_res_centroids": (-1, 8), "vector_lens": (2, 4), "num_centroids": (8, 16), "npercent": 4,
    },
    "uniform": {"kmeans_mode": "uniform"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_reported_error_is_the_error_of_the_stored_weight(generator, case, device):
    weight, hessian = (t.to(device) for t in problem(30, 48, generator))  # 30 rows: padding for vectors of 4
    quantized, report = quantize_linear(weight, hessian, settings(**CASES[case]))
    found = proxy_error(weight, quantized.dequantize(), hessian)
    assert found == pytest.approx(report.error, rel=1e-3)
    assert 0 < report.error < 0.9 and report.error_sweep < report.error_kmeans
    assert report.error == (report.error_residual if report.error_residual is not None else report.error_sweep)


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("seed", range(5))
def test_sweep_beats_nearest_centroid_on_correlated_inputs(seed, direction):
    weight, hessian = problem(32, 40, torch.Generator().manual_seed(seed))
    _, report = quantize_linear(weight, hessian, settings(vector_quant_dim=direction))
    assert report.error_sweep < 0.9 * report.error_kmeans


@pytest.mark.parametrize("direction", ["out", "in"])
def test_residual_stage_lowers_the_error(generator, direction):
    weight, hessian = problem(32, 40, generator)
    _, report = quantize_linear(weight, hessian, settings(num_res_centroids=(-1, 16), vector_quant_dim=direction))
    assert report.error_residual < 0.5 * report.error_sweep


@pytest.mark.parametrize("seed", range(5))
def test_normalising_with_its_metric_beats_not_normalising(seed):
    """Columns of very different size: one codebook for all of them needs the scale, and the scale needs H' = S H S."""
    weight, hessian = problem(64, 40, torch.Generator().manual_seed(seed))
    normalised = quantize_linear(weight, hessian, settings())[1].error
    plain = quantize_linear(weight, hessian, settings(enable_norm=False))[1].error
    assert normalised < plain


def test_incoming_column_order_is_irrelevant_with_sorting(generator):
    weight, hessian = problem(24, 20, generator)
    order = torch.randperm(20, generator=generator)
    first, _ = quantize_linear(weight, hessian, settings())
    second, _ = quantize_linear(weight[:, order], hessian[order][:, order], settings())
    assert torch.allclose(second.dequantize(), first.dequantize()[:, order], atol=1e-5)


def test_absorbed_perm_is_the_same_weight(generator):
    weight, hessian = problem(24, 20, generator)
    kept, _ = quantize_linear(weight, hessian, settings(num_res_centroids=(-1, 8)))
    absorbed, _ = quantize_linear(weight, hessian, settings(num_res_centroids=(-1, 8), absorb_perm=True))
    assert absorbed.perm is None and kept.perm is not None
    assert torch.equal(kept.dequantize(), absorbed.dequantize())


def test_enough_centroids_give_zero_loss(generator):
    """Every vector can be a centroid of its own: the float32 codebook holds the weight exactly."""
    weight, hessian = problem(8, 6, generator)
    config = settings(num_centroids=(-1, 16), enable_norm=False)
    quantized, report = quantize_linear(weight, hessian, config, storage_dtype=torch.float32)
    assert report.error < 1e-10 and torch.allclose(quantized.dequantize(), weight, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_values_fit_the_storage_type(generator, dtype):
    quantized, _ = quantize_linear(*problem(30, 20, generator), settings(num_res_centroids=(-1, 4)), storage_dtype=dtype)
    for values in (quantized.codebook.centroids, quantized.residual_codebook.centroids, quantized.scale, quantized.offset):
        assert torch.equal(values, values.to(dtype).float())


@pytest.mark.parametrize(("bitwidth", "bsize"), [(2, 1), (5, 3), (8, 16), (15, 64)])
def test_quantized_codebook_is_levels_times_scales(generator, bitwidth, bsize):
    quantized, _ = quantize_linear(*problem(32, 24, generator), settings(bitwidth=bitwidth, bsize=bsize))
    book = quantized.codebook
    top = 2 ** (bitwidth - 1) - 1
    assert book.levels.abs().max() <= top and book.scales.shape == (1, math.ceil(16 / bsize))
    for run in range(book.scales.shape[1]):
        part = slice(run * bsize, (run + 1) * bsize)
        assert torch.equal(book.centroids[0, part], book.levels[0, part].float() * book.scales[0, run])


def test_more_codebook_bits_are_better(generator):
    weight, hessian = problem(64, 40, generator)
    errors = [quantize_linear(weight, hessian, settings(bitwidth=b))[1].error for b in (2, 4, 8, 16)]
    assert errors[0] > errors[1] > errors[2] and errors[2] == pytest.approx(errors[3], rel=0.1)


def test_groups_have_codebooks_of_their_own(generator):
    quantized, _ = quantize_linear(*problem(64, 40, generator), settings(group_num=4))
    books = quantized.codebook.centroids
    assert books.shape == (4, 16, 4)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(books, 2))


def test_same_seed_same_bits_and_name_matters(generator):
    weight, hessian = problem(32, 24, generator)
    a, b, c = (quantize_linear(weight, hessian, settings(), name=n)[0] for n in ("x", "x", "y"))
    assert torch.equal(a.indices, b.indices) and torch.equal(a.codebook.centroids, b.codebook.centroids)
    assert not torch.equal(a.codebook.centroids, c.codebook.centroids)


def test_dead_column_constant_column_and_one_token_hessian(generator):
    weight, _ = problem(32, 24, generator)
    weight[:, 3] = 0.25
    token = torch.randn(24, generator=generator)
    token[7] = 0
    quantized, report = quantize_linear(weight, torch.outer(token, token), settings())
    assert torch.isfinite(quantized.dequantize()).all() and quantized.scale[3] == 1 and quantized.offset[3] == 0.25
    assert report.damping_frac >= 0.01


def test_raised_damping_is_in_the_report(generator):
    weight, _ = problem(16, 4, generator)
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 2.0
    _, report = quantize_linear(weight, hessian, settings(enable_norm=False))
    assert report.damping_retries > 0 and report.damping_frac > 0.01


def test_fewer_vectors_than_centroids_work(generator):
    _, report = quantize_linear(*problem(16, 4, generator), settings(num_centroids=(-1, 256)))
    assert report.error < 1e-4


@pytest.mark.parametrize("which", ["weight", "hessian"])
def test_non_finite_input_is_named(generator, which):
    weight, hessian = problem(16, 8, generator)
    (weight if which == "weight" else hessian)[1, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"non-finite.*\n.*block\.q"):
        quantize_linear(weight, hessian, settings(), name="block.q")


def test_settings_that_do_not_fit_raise(generator):
    with pytest.raises(UsageError, match="group_num=3"):
        quantize_linear(*problem(16, 8, generator), settings(group_num=3))


def test_arguments_are_not_changed(generator):
    weight, hessian = problem(30, 24, generator)
    kept = weight.clone(), hessian.clone()
    quantize_linear(weight, hessian, settings(num_res_centroids=(-1, 4), percdamp=0.5))
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


def test_padding_rows_have_no_part(generator):
    """30 rows in vectors of 4: what would stand in rows 31 and 32 moves nothing. Same result as a lone partial vector."""
    weight, hessian = torch.randn(2, 6, generator=generator), correlated_hessian(6, generator)
    config = settings(num_centroids=(-1, 64), enable_norm=False)
    _, report = quantize_linear(weight, hessian, config, storage_dtype=torch.float32)
    assert report.error < 1e-10
