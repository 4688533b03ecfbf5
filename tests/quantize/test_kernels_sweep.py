"""The sweep kernels against the float64 twin: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import correlated_hessian, problem
from tests.quantize.test_sweep import make_case, make_geometry, twin_sweep
from vptq.config import LinearConfig
from vptq.geometry import plan_geometry
from vptq.quantize.linear import LinearInput, quantize_linears
from vptq.quantize.metric import factor_inverse
from vptq.quantize.segments import Segment
from vptq.quantize.sweep import plain_sweep, sweep, sweep_linears

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's


def to(segments, device):
    return [Segment(s.start, s.end, tuple(book.to(device) for book in s.stages)) for s in segments]


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("out_features", "in_features", "vector_len", "k"), [(6, 9, 3, 6), (7, 11, 2, 40), (45, 16, 6, 300)])
@pytest.mark.ci
def test_kernels_equal_the_float64_twin(direction, stages, out_features, in_features, vector_len, k, generator, kernel_device):
    case = make_case(generator, direction, out_features, in_features, vector_len, stages, k)
    weight, inv_chol, segments, geometry = case
    expected = plain_twin(weight, inv_chol, segments, geometry, direction)
    found = sweep(weight.to(kernel_device), inv_chol.to(kernel_device), to(segments, kernel_device), geometry, blocksize=8)
    assert torch.allclose(found.quantized.cpu(), expected.quantized, atol=1e-4)
    assert torch.allclose(found.leftover.cpu(), expected.leftover, atol=1e-3)
    for mine, theirs in zip(found.indices[0], expected.indices[0], strict=True):
        assert torch.equal(mine.cpu(), theirs)


def plain_twin(weight, inv_chol, segments, geometry, direction):
    """The plain sweep, itself checked against float64 where that is quick."""
    found = plain_sweep(weight, inv_chol, segments, geometry, blocksize=128)
    if segments[0].stages[0].shape[0] < 50:
        assert torch.allclose(found.quantized.double(), twin_sweep(weight, inv_chol, segments, direction), atol=1e-4)
    return found


@pytest.mark.parametrize("direction", ["out", "in"])
def test_outliers_and_groups_with_their_own_codebooks(generator, direction, kernel_device):
    weight, inv_chol, _, _ = make_case(generator, direction, out_features=10, in_features=12)
    config = LinearConfig(vector_lens=(2, 4), num_centroids=(4, 4), npercent=20, group_num=3, vector_quant_dim=direction)
    geometry, _ = plan_geometry(10, 12, config)
    segments = [Segment(0, 3, (torch.randn(5, 2, generator=generator),))]
    segments += [Segment(*geometry.group_columns(g), (torch.randn(5, 4, generator=generator),)) for g in range(3)]
    found = sweep(weight.to(kernel_device), inv_chol.to(kernel_device), to(segments, kernel_device), geometry, blocksize=5)
    assert torch.allclose(found.quantized.cpu().double(), twin_sweep(weight, inv_chol, segments, direction), atol=1e-4)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_vector_beyond_float16_is_searched_exactly(generator, direction, kernel_device):
    weight, inv_chol, segments, geometry = make_case(generator, direction, 8, 9, 3, k=20)
    weight[4, 1] = 3e5
    expected = plain_sweep(weight, inv_chol, segments, geometry, 128)
    found = sweep(weight.to(kernel_device), inv_chol.to(kernel_device), to(segments, kernel_device), geometry, blocksize=128)
    first_wild = 1 if direction == "out" else 0
    for mine, theirs in zip(found.indices[0], expected.indices[0], strict=True):
        assert torch.equal(mine[:, : first_wild + 1].cpu(), theirs[:, : first_wild + 1])


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.ci
def test_linears_together_give_what_each_gives_alone(generator, direction, kernel_device):
    cases = [make_case(generator, direction, 14, 12, 4, stages=2, k=20) for _ in range(3)]
    geometry = cases[0][3]
    weights = torch.stack([case[0] for case in cases]).to(kernel_device)
    inv_chols = torch.stack([case[1] for case in cases]).to(kernel_device)
    segments = [to(case[2], kernel_device) for case in cases]
    together = sweep_linears(weights, inv_chols, segments, geometry, 8)
    for i, found in enumerate(together):
        alone = sweep(weights[i], inv_chols[i], segments[i], geometry, 8)
        assert torch.equal(found.quantized, alone.quantized) and torch.equal(found.leftover, alone.leftover)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize(
    ("vector_len", "k", "residual"), [(8, 65536, 0), (6, 4096, 0), (4, 256, 256), (16, 4096, 0), (2, 64, 0)]
)
def test_large_linears_are_swept_as_well_as_by_the_twin(generator, direction, vector_len, k, residual, monkeypatch):
    """Choices feed back, so that one tie decides all that follows in its row: what must agree is the error."""
    out_features, in_features = 520, 512
    weight = torch.randn(out_features, in_features, generator=generator).cuda()
    metric = correlated_hessian(in_features, generator)
    inv_chol = factor_inverse(metric, 0.01).inv_chol.cuda()
    books = [torch.randn(k, vector_len, generator=generator).cuda()]
    if residual:
        books.append(0.3 * torch.randn(residual, vector_len, generator=generator).cuda())
    geometry = make_geometry(out_features, in_features, vector_len, direction)
    segments = [Segment(0, in_features, tuple(books))]
    costs = {}
    for kernels in ("triton", "torch"):
        monkeypatch.setenv("VPTQ_KERNELS", kernels)
        found = sweep(weight, inv_chol, segments, geometry, blocksize=128)
        error = (weight - found.quantized).double()
        costs[kernels] = ((error @ metric.cuda().double()) * error).sum().item()
    assert costs["triton"] == pytest.approx(costs["torch"], rel=5e-3)


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.ci
def test_quantized_together_or_alone_gives_the_same_bits(direction, generator, kernel_device):
    settings = {"vector_lens": (-1, 4), "num_centroids": (-1, 8), "num_res_centroids": (-1, 4), "kiter": 1}
    config = LinearConfig(**settings, vector_quant_dim=direction, group_num=2)
    linears = []
    for name in ("a", "b"):
        weight, hessian = problem(10, 12, generator)
        if name == "b":
            hessian[3], hessian[:, 3] = 0, 0  # an input that is always zero
        linears.append(LinearInput(name, weight.to(kernel_device), hessian.to(kernel_device)))
    together = quantize_linears(linears, config)
    for linear, (quantized, report) in zip(linears, together, strict=True):
        alone, alone_report = quantize_linears([linear], config)[0]
        assert torch.equal(quantized.indices, alone.indices)
        assert torch.equal(quantized.residual_indices, alone.residual_indices)
        assert torch.equal(quantized.codebook.centroids, alone.codebook.centroids)
        assert report.kmeans_objectives == alone_report.kmeans_objectives and len(report.kmeans_iterations) == 4


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("size", [40, 75, 150])
@pytest.mark.ci
def test_a_vector_about_the_limit_of_float16_takes_its_centroid(direction, size, generator, kernel_device):
    weight, inv_chol, segments, geometry = make_case(generator, direction, 8, 8, 4, k=300)
    inv_chol = torch.eye(8)
    weight[0, 0] = size
    book = segments[0].stages[0]
    vector = weight[:4, 0] if direction == "out" else weight[0, :4]
    book[7] = vector * 1.01
    found = sweep(weight.to(kernel_device), inv_chol.to(kernel_device), to(segments, kernel_device), geometry, blocksize=8)
    assert found.indices[0][0][0, 0] == 7
