"""Packed tensors -> weight, in plain torch, a few rows at a time: the indices never exist unpacked as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vptq.config import FLOAT_BITWIDTH
from vptq.layer_config import LayerConfig
from vptq.nn.packing import from_uint16_bits, unpack_bits
from vptq.quantize.codebook import expand_scales
from vptq.quantize.result import join_vectors, look_up

CHUNK_WEIGHTS = 1 << 20


def dequantize_packed(tensors: Mapping[str, Tensor], config: LayerConfig, dtype: torch.dtype) -> Tensor:
    """The weight of one linear from its stored tensors.

    Args:
        tensors: as `LayerConfig.tensor_shapes` names them, all on one device.
        dtype: of the answer; the arithmetic is float32.
    Returns:
        (out_features, in_features), original column order and scale.
    """
    geometry = config.geometry
    main = stored_centroids("centroids", tensors, config, config.num_centroids[1], config.vector_lens[1])
    residual = outlier = None
    if config.num_res_centroids[1] > 0:
        residual = stored_centroids("res_centroids", tensors, config, config.num_res_centroids[1], config.vector_lens[1])
    if config.outlier_size:
        outlier = stored_centroids("outlier_centroids", tensors, config, config.num_centroids[0], config.vector_lens[0])
    weight = torch.empty(config.out_features, config.in_features, dtype=torch.float32, device=main.device)
    if outlier is not None:
        _fill_outliers(weight, outlier, tensors["outlier_indices"], config)
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
    return _restore(weight, tensors, config).to(dtype)


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
    return weight
