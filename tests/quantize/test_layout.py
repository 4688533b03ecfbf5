"""Cutting a matrix into vectors and putting it together again."""

from __future__ import annotations

import pytest
import torch

from vptq.config import LinearConfig
from vptq.geometry import geometry_warnings, plan_geometry
from vptq.quantize.layout import VectorWeights, importance_order, normalise, split_vectors, vector_weights
from vptq.quantize.result import join_vectors


def geometry_of(out_features, in_features, **changes):
    config = LinearConfig(**{"vector_lens": (-1, 4), "num_centroids": (-1, 16)} | changes)
    geometry, faults = plan_geometry(out_features, in_features, config)
    assert not faults
    return geometry


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 12), (9, 13), (1, 1), (3, 50)])
def test_split_then_join_is_the_matrix(generator, direction, out_features, in_features):
    geometry = geometry_of(out_features, in_features, vector_quant_dim=direction)
    matrix = torch.randn(out_features, in_features, generator=generator)
    vectors = split_vectors(matrix, geometry, 4)
    assert vectors.shape == (*geometry.group_grid, 4)
    assert torch.equal(join_vectors(vectors[None], geometry, in_features), matrix)


def test_vectors_run_along_the_named_direction():
    matrix = torch.arange(64.0).view(8, 8)
    along_out = split_vectors(matrix, geometry_of(8, 8), 4)
    along_in = split_vectors(matrix, geometry_of(8, 8, vector_quant_dim="in"), 4)
    assert along_out[1, 3].tolist() == [35, 43, 51, 59]  # rows 4 to 7 of column 3
    assert along_in[3, 1].tolist() == [28, 29, 30, 31]  # row 3, columns 4 to 7


def test_weights_are_the_columns_diagonal_and_padding_has_none():
    diagonal = torch.tensor([3.0, 2.0, 1.0])
    whole = vector_weights(diagonal, geometry_of(8, 3), 4)
    assert whole.whole.tolist() == [3, 2, 1, 3, 2, 1] and whole.num_ragged == 0
    padded = vector_weights(diagonal, geometry_of(6, 3), 4)
    assert padded.whole.tolist() == [3, 2, 1]
    assert padded.ragged.tolist() == [[3, 3, 0, 0], [2, 2, 0, 0], [1, 1, 0, 0]]
    along_in = vector_weights(diagonal, geometry_of(2, 3, vector_quant_dim="in"), 4)
    assert along_in.ragged.tolist() == [[3, 2, 1, 0], [3, 2, 1, 0]] and along_in.num_whole == 0


def test_one_weight_a_vector_leaves_padding_without():
    padded = VectorWeights(torch.zeros(0), torch.tensor([[4.0, 2, 0], [1, 1, 1]]))
    assert padded.one_a_vector(padded=True).ragged.tolist() == [[3, 3, 0], [1, 1, 1]]
    whole = VectorWeights(torch.zeros(0), torch.tensor([[4.0, 2], [1, 3]])).one_a_vector(padded=False)
    assert whole.whole.tolist() == [3, 2] and whole.num_ragged == 0


def test_importance_order_falls_and_is_stable():
    assert importance_order(torch.tensor([1.0, 3.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_normalise_gives_mean_zero_deviation_one(generator):
    weight = torch.randn(50, 6, generator=generator) * 0.01 + 0.2
    weight[:, 2] = 0.7
    found = normalise(weight, torch.float32)
    normal = found.apply(weight)
    varied = [0, 1, 3, 4, 5]
    assert torch.allclose(normal[:, varied].mean(0), torch.zeros(5), atol=1e-3)
    assert torch.allclose(normal[:, varied].std(0, correction=0), torch.ones(5), atol=1e-3)
    assert found.scale[2] == 1 and torch.allclose(found.undo(normal), weight, atol=1e-6)


@pytest.mark.parametrize(
    ("in_features", "npercent", "group_num", "outliers", "group_size"),
    [(100, 1, 1, 1, 99), (4096, 1, 16, 48, 253), (256, 1, 16, 16, 15), (100, 0, 4, 0, 25), (128, 2.5, 5, 8, 24)],
)
def test_outliers_take_what_groups_leave(in_features, npercent, group_num, outliers, group_size):
    extra = {"vector_lens": (4, 4), "num_centroids": (16, 16)} if npercent else {}
    found = geometry_of(8, in_features, npercent=npercent, group_num=group_num, **extra)
    assert (found.outlier_size, found.group_size) == (outliers, group_size)
    assert found.outlier_size + found.group_num * found.group_size == in_features


def test_columns_that_fit_nowhere_are_an_error():
    config = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 16), group_num=3)
    geometry, faults = plan_geometry(8, 100, config)
    assert geometry is None and "group_num=3" in faults[0]


def test_group_size_sets_the_groups():
    assert geometry_of(8, 96, group_size=24).group_num == 4
    config = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 16), group_size=24, group_num=3)
    assert plan_geometry(8, 96, config)[0] is None


def test_waste_is_told():
    config = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 4096), group_num=4)
    geometry, _ = plan_geometry(64, 64, config)
    assert "256 vectors but 4096 centroids" in geometry_warnings(geometry, config)[0]
    residual = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 16), num_res_centroids=(-1, 4096), group_num=4)
    assert "256 vectors but 4096 residual centroids" in geometry_warnings(geometry, residual)[0]
    assert geometry_warnings(geometry_of(64, 64), LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 16))) == []
