"""Indices that point past what they index: kernels would follow them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vptq.errors import CheckpointError
from vptq.layer_config import LayerConfig
from vptq.nn.packing import from_uint16_bits, unpack_bits
from vptq.nn.vquant_linear import VQuantLinear


def check_indices(model: nn.Module) -> None:
    """Raise CheckpointError where some packed linear of a model has indices out of range, naming all."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, VQuantLinear)]
    faults = [f"{name}: {fault}" for name, own in linears for fault in index_faults(own.stored_tensors(), own.layer_config)]
    if faults:
        raise CheckpointError("indices of the checkpoint are out of range", where=faults, hint="get the folder anew")


def index_faults(tensors: Mapping[str, Tensor], layer: LayerConfig) -> list[str]:
    """Indices of one linear that point past what they index.

    Args:
        tensors: as stored, by the names of `LayerConfig.tensor_shapes`; on any device.
    """
    found = []
    if not layer.trellis_bits and not layer.weight_of and not _cannot_exceed(layer):
        values = unpack_bits(tensors["indices"], layer.main_bits + layer.residual_bits, layer.geometry.group_grid[1])
        main = values & ((1 << layer.main_bits) - 1)
        found += _past("indices", main, layer.num_centroids[1])
        if layer.residual_bits:
            found += _past("residual indices", values >> layer.main_bits, layer.num_res_centroids[1])
    if layer.outlier_size:
        found += _past("outlier_indices", from_uint16_bits(tensors["outlier_indices"]), layer.num_centroids[0])
    if layer.enable_perm:
        order = from_uint16_bits(tensors["perm"]).sort().values
        if not torch.equal(order, torch.arange(layer.in_features, device=order.device)):
            found.append(f"perm is no order of {layer.in_features} columns")
    return found


def _cannot_exceed(layer: LayerConfig) -> bool:
    """Whether every pattern of bits is an index."""
    full = layer.num_centroids[1] == 1 << layer.main_bits
    return full and (not layer.residual_bits or layer.num_res_centroids[1] == 1 << layer.residual_bits)


def _past(what: str, values: Tensor, count: int) -> list[str]:
    most = int(values.max()) if values.numel() else 0
    return [f"{what} go up to {most}, there are {count} centroids"] if most >= count else []
