"""Our names and types -> the tensors of the file format; `nn.reference` goes the other way."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.errors import CheckpointError
from vptq.layer_config import LayerConfig
from vptq.nn.packing import pack_bits, to_uint16_bits
from vptq.nn.rings import pack_rings
from vptq.quantize.result import Codebook, QuantizedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = {"int32": (torch.int32,), "int16": (torch.int16,), "float": FLOATS}


def to_tensors(weight: QuantizedWeight, config: LayerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of one linear, on the CPU, without its bias (shapes: `LayerConfig.tensor_shapes`).

    dtype: the model's float type.
    """
    tensors = codebook_tensors(weight, dtype) if config.stores_codebook else {}
    if config.trellis_bits:
        tensors["indices"] = pack_rings(weight.indices[0], config)
    else:
        values = weight.indices.long()
        if weight.residual_indices is not None:
            values = values | (weight.residual_indices.long() << config.main_bits)
        tensors["indices"] = pack_bits(values, config.main_bits + config.residual_bits)
    if weight.outlier_codebook is not None and weight.outlier_indices is not None:
        tensors |= _codebook_to_tensors("outlier_centroids", weight.outlier_codebook, dtype)
        tensors["outlier_indices"] = to_uint16_bits(weight.outlier_indices)
    if config.enable_perm and weight.perm is not None:
        tensors["perm"] = to_uint16_bits(weight.perm)
    if config.enable_norm:
        ones = torch.ones(config.in_features)
        tensors["weight_scale"] = (ones if weight.scale is None else weight.scale).to(dtype)
        tensors["weight_bias"] = (torch.zeros_like(ones) if weight.offset is None else weight.offset).to(dtype)
    if weight.row_scale is not None:
        tensors["row_scale"] = weight.row_scale.to(dtype)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def codebook_tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Main and residual codebook as they are stored (see `LayerConfig.codebook_shapes`). dtype: the model's float type."""
    tensors = _codebook_to_tensors("centroids", weight.codebook, dtype)
    if weight.residual_codebook is not None:
        tensors |= _codebook_to_tensors("res_centroids", weight.residual_codebook, dtype)
    return tensors


def check_tensors(found: dict[str, tuple[tuple[int, ...], torch.dtype]], config: LayerConfig, name: str) -> None:
    """Raise CheckpointError unless every stored tensor of the linear is there with its shape and type."""
    faults = []
    for key, (shape, kind) in config.tensor_shapes().items():
        if key not in found:
            faults.append(f"{name}.{key}: missing")
        elif found[key][0] != shape or found[key][1] not in DTYPES[kind]:
            faults.append(f"{name}.{key}: is {found[key][0]} {found[key][1]}, should be {shape} {kind}")
    if faults:
        raise CheckpointError(
            "tensors of a quantized linear do not fit its settings", where=faults, hint="get the checkpoint anew"
        )


def _codebook_to_tensors(name: str, codebook: Codebook, dtype: torch.dtype) -> dict[str, Tensor]:
    if codebook.levels is None or codebook.scales is None:
        return {f"{name}.weight": codebook.centroids.flatten(1).to(dtype)}
    half = 2 ** (codebook.bitwidth - 1)
    unsigned = codebook.levels.flatten(1).long() + half
    return {f"{name}.packed": pack_bits(unsigned, codebook.bitwidth), f"{name}.scales": codebook.scales.to(dtype)}
