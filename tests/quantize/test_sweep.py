"""The sweep against a float64 twin that follows the mathematics word by word."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import correlated_hessian
from vptq.config import LinearConfig
from vptq.geometry import plan_geometry
from vptq.quantize.metric import factor_inverse
from vptq.quantize.segments import Segment
from vptq.quantize.sweep import quantize_nearest, sweep


def make_geometry(out_features, in_features, vector_len, direction, group_num=1):
    config = LinearConfig(vector_lens=(-1, vector_len), num_centroids=(-1, 4), vector_quant_dim=direction, group_num=group_num)
    geometry, faults = plan_geometry(out_features, in_features, config)
    assert not faults
    return geometry


def make_case(generator, direction, out_features=7, in_features=11, vector_len=3, stages=1, k=6):
    weight = torch.randn(out_features, in_features, generator=generator)
    inv_chol = factor_inverse(correlated_hessian(in_features, generator), 0.01).inv_chol
    books = tuple(torch.randn(k, vector_len, generator=generator) / (s + 1) for s in range(stages))
    geometry = make_geometry(out_features, in_features, vector_len, direction)
    return weight, inv_chol, [Segment(0, in_features, books)], geometry


def twin_sweep(weight, inv_chol, segments, direction):
    """Unit by unit, vector by vector, centroid by centroid; each unit's error goes at once to all columns to its right."""
    w, u = weight.double().clone(), inv_chol.double()
    out_features = w.shape[0]
    quantized = torch.zeros_like(w)
    for segment in segments:
        v = segment.vector_len
        unit = 1 if direction == "out" else v
        for left in range(segment.start, segment.end, unit):
            right = min(left + unit, segment.end)
            tile_inverse = torch.linalg.inv(u[left:right, left:right])
            rows = range(0, out_features, v) if direction == "out" else range(out_features)
            for row in rows:
                rows_here = slice(row, min(row + v, out_features)) if direction == "out" else slice(row, row + 1)
                done = torch.zeros_like(w[rows_here, left:right])
                for centroids in segment.stages:
                    best, best_cost = None, None
                    for c in centroids.double():
                        candidate = c[: done.shape[0]][:, None] if direction == "out" else c[: right - left][None]
                        cost = ((w[rows_here, left:right] - done - candidate) @ tile_inverse).square().sum()
                        if best_cost is None or cost < best_cost:
                            best, best_cost = candidate, cost
                    done = done + best
                quantized[rows_here, left:right] = done
            error = (w[:, left:right] - quantized[:, left:right]) @ tile_inverse
            w[:, right:] -= error @ u[left:right, right:]
    return quantized


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("out_features", "in_features"), [(6, 9), (7, 11)])
def test_sweep_equals_the_float64_twin(generator, direction, stages, out_features, in_features, device):
    case = make_case(generator, direction, out_features, in_features, stages=stages)
    weight, inv_chol, segments, geometry = case
    expected = twin_sweep(weight, inv_chol, segments, direction)
    moved = [Segment(s.start, s.end, tuple(b.to(device) for b in s.stages)) for s in segments]
    found = sweep(weight.to(device), inv_chol.to(device), moved, geometry, blocksize=4)
    assert torch.allclose(found.quantized.cpu().double(), expected, atol=1e-4)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_sweep_with_outlier_segment_equals_the_twin(generator, direction):
    weight, inv_chol, _, _ = make_case(generator, direction, out_features=8, in_features=12)
    config = LinearConfig(vector_lens=(2, 4), num_centroids=(4, 4), npercent=20, group_num=3, vector_quant_dim=direction)
    geometry, _ = plan_geometry(8, 12, config)
    assert geometry.outlier_size == 3 and geometry.group_size == 3
    segments = [Segment(0, 3, (torch.randn(5, 2, generator=generator),))]
    segments += [Segment(*geometry.group_columns(g), (torch.randn(5, 4, generator=generator),)) for g in range(3)]
    found = sweep(weight, inv_chol, segments, geometry, blocksize=5)
    assert torch.allclose(found.quantized.double(), twin_sweep(weight, inv_chol, segments, direction), atol=1e-4)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_blocked_equals_unblocked(generator, direction):
    weight, inv_chol, segments, geometry = make_case(generator, direction, 9, 40, stages=2)
    results = [sweep(weight, inv_chol, segments, geometry, blocksize=b) for b in (1, 7, 128)]
    for other in results[1:]:
        assert torch.allclose(other.quantized, results[0].quantized, atol=1e-5)
        for mine, theirs in zip(other.indices[0], results[0].indices[0], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_representable_weight_has_zero_loss(generator, direction):
    """A weight made of centroids comes back as it is: nothing is left to feed forward."""
    weight, inv_chol, segments, geometry = make_case(generator, direction, 6, 9)
    made = quantize_nearest(weight, segments, geometry, torch.ones(9))
    found = sweep(made, inv_chol, segments, geometry, blocksize=4)
    assert torch.allclose(found.quantized, made, atol=1e-5)
    assert found.leftover.abs().max() < 1e-5


@pytest.mark.parametrize("direction", ["out", "in"])
def test_diagonal_metric_gives_the_nearest_centroid(generator, direction):
    weight, _, segments, geometry = make_case(generator, direction, 6, 9)
    diagonal = torch.rand(9, generator=generator) + 0.5
    inv_chol = factor_inverse(torch.diag(diagonal), 0.0).inv_chol
    found = sweep(weight, inv_chol, segments, geometry, blocksize=4)
    assert torch.allclose(found.quantized, quantize_nearest(weight, segments, geometry, diagonal), atol=1e-6)


def test_leftover_is_target_minus_quantized(generator):
    """With nothing to the left, the first column's target is the weight itself."""
    weight, inv_chol, segments, geometry = make_case(generator, "out")
    found = sweep(weight, inv_chol, segments, geometry, blocksize=4)
    assert torch.allclose(found.leftover[:, 0], weight[:, 0] - found.quantized[:, 0])


def test_arguments_are_not_changed(generator):
    weight, inv_chol, segments, geometry = make_case(generator, "in")
    kept = weight.clone(), inv_chol.clone()
    sweep(weight, inv_chol, segments, geometry, blocksize=4)
    assert torch.equal(weight, kept[0]) and torch.equal(inv_chol, kept[1])
