"""Packed tensors -> weight, in plain torch float32, a few rows at a time: the indices never exist unpacked as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.nn.operands import main_matrix, outlier_matrix, stored_centroids
from vptq.nn.ops import weight as unpacked
from vptq.nn.packing import from_uint16_bits, unpack_bits
from vptq.quantize.result import look_up, spread_rows
from vptq.quantize.rotation import LinearRotation


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
    weight = unpacked(main_matrix(tensors, config, torch.float32))
    outliers = outlier_matrix(tensors, config, torch.float32)
    if outliers is not None:
        weight = torch.cat([unpacked(outliers), weight], 1)
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


def _restore(weight: Tensor, tensors: Mapping[str, Tensor], config: LayerConfig) -> Tensor:
    """Original column order and scale."""
    if config.enable_perm:
        weight = weight[:, torch.argsort(from_uint16_bits(tensors["perm"]))]
    if config.enable_norm:
        weight = weight * tensors["weight_scale"].float() + tensors["weight_bias"].float()
    if config.num_scales:
        weight = weight * spread_rows(tensors["row_scale"].float(), len(weight))
    return weight
