"""Packed tensors -> weight, in plain torch, a few rows at a time: the indices never exist unpacked as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.nn.packing import from_uint16_bits, unpack_bits
from vptq.nn.rings import unpack_rings
from vptq.quantize.codebook import expand_scales
from vptq.quantize.result import join_vectors, look_up, spread_rows
from vptq.quantize.rotation import LinearRotation
from vptq.recipe import FLOAT_BITWIDTH

CHUNK_WEIGHTS = 1 << 20


def dequantize_packed(tensors: Mapping[str, Tensor], config: LayerConfig, dtype: torch.dtype) -> Tensor:
    """The weight of one linear from its stored tensors.

    Args:
        tensors: as `LayerConfig.tensor_shapes` names them, and its codebook where another linear stores that; one device.
        dtype: of the answer; the arithmetic is float32.
    Returns:
        (out_features, in_features), original column order and scale.
    """
    weight = dequantize_rotated(tensors, config)
    return rotation_of(config).turn_back(weight).to(dtype)


def dequantize_rotated(tensors: Mapping[str, Tensor], config: LayerConfig) -> Tensor:
    """The weight as it is stored, R_out W R_inᵀ; W itself where it is not rotated: (out_features, in_features) float32."""
    main = stored_centroids("centroids", tensors, config, config.num_centroids[1], config.vector_lens[1])
    weight = torch.empty(config.out_features, config.in_features, dtype=torch.float32, device=main.device)
    if config.outlier_size:
        outlier = stored_centroids("outlier_centroids", tensors, config, config.num_centroids[0], config.vector_lens[0])
        _fill_outliers(weight, outlier, tensors["outlier_indices"], config)
    (_fill_rings if config.trellis_bits else _fill_groups)(weight, main, tensors, config)
    return _restore(weight, tensors, config)


def dequantize_rows(tensors: Mapping[str, Tensor], config: LayerConfig, rows: Tensor) -> Tensor:
    """Some rows of a weight with vectors along inputs and a scale a row: (n,) integer -> (n, in_features) float32."""
    main = stored_centroids("centroids", tensors, config, config.num_centroids[1], config.vector_lens[1])
    indices = unpack_bits(tensors["indices"][0, rows], config.main_bits, config.geometry.group_grid[1])
    found = look_up(main, indices[None])[0].flatten(1)[:, : config.in_features]
    return rotation_of(config).turn_back(found * tensors["row_scale"].float()[rows, None])


def rotation_of(config: LayerConfig) -> LinearRotation:
    """The rotations that are applied when the linear runs."""
    shape = config.out_features, config.in_features
    return LinearRotation.of(config.rotation, config.rotation_sides, shape, config.rotation_seed, config.row_groups)


def _fill_groups(weight: Tensor, main: Tensor, tensors: Mapping[str, Tensor], config: LayerConfig) -> None:
    geometry = config.geometry
    residual = None
    if config.num_res_centroids[1] > 0:
        residual = stored_centroids("res_centroids", tensors, config, config.num_res_centroids[1], config.vector_lens[1])
    rows = geometry.group_grid[0]
    step = max(1, CHUNK_WEIGHTS * rows // weight.numel())
    bits = config.main_bits + config.residual_bits
    for start in range(0, rows, step):
        values = unpack_bits(tensors["indices"][:, start : start + step], bits, geometry.group_grid[1])
        vectors = look_up(main, values & ((1 << config.main_bits) - 1))
        if residual is not None:
            vectors = vectors + look_up(residual, values >> config.main_bits)
        first = start * (geometry.vector_len if geometry.vector_quant_dim == "out" else 1)
        matrix = join_vectors(vectors, geometry, geometry.group_size)
        last = min(first + len(matrix), config.out_features)
        weight[first:last, config.outlier_size :] = matrix[: last - first]


def _fill_rings(weight: Tensor, main: Tensor, tensors: Mapping[str, Tensor], config: LayerConfig) -> None:
    geometry = config.geometry
    height = config.ring_len * geometry.vector_len
    step = max(1, CHUNK_WEIGHTS // (height * config.in_features))
    for ring in range(0, geometry.num_rings, step):
        states = unpack_rings(tensors["indices"][ring : ring + step], config)
        matrix = join_vectors(look_up(main, states[None]), geometry, geometry.group_size)
        first = ring * height
        last = min(first + len(matrix), config.out_features)
        weight[first:last] = matrix[: last - first]


def stored_centroids(name: str, tensors: Mapping[str, Tensor], config: LayerConfig, k: int, vector_len: int) -> Tensor:
    """A stored codebook's values: (codebooks, k, vector_len) float32."""
    if config.bitwidth == FLOAT_BITWIDTH:
        return tensors[f"{name}.weight"].float().unflatten(1, (k, vector_len))
    half = 2 ** (config.bitwidth - 1)
    levels = unpack_bits(tensors[f"{name}.packed"], config.bitwidth, k * vector_len).unflatten(1, (k, vector_len)) - half
    return levels.float() * expand_scales(tensors[f"{name}.scales"].float(), config.bsize, k)


def _fill_outliers(weight: Tensor, centroids: Tensor, stored: Tensor, config: LayerConfig) -> None:
    vectors = look_up(centroids, from_uint16_bits(stored))
    weight[:, : config.outlier_size] = join_vectors(vectors, config.geometry, config.outlier_size)


def _restore(weight: Tensor, tensors: Mapping[str, Tensor], config: LayerConfig) -> Tensor:
    """Original column order and scale."""
    if config.enable_perm:
        weight = weight[:, torch.argsort(from_uint16_bits(tensors["perm"]))]
    if config.enable_norm:
        weight = weight * tensors["weight_scale"].float() + tensors["weight_bias"].float()
    if config.num_scales:
        weight = weight * spread_rows(tensors["row_scale"].float(), len(weight))
    return weight
