"""What a packed linear multiplies with, from its stored tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.nn.packing import from_uint16_bits, pack_bits, unpack_bits
from vptq.nn.rings import RingMatrix, trellis_of
from vptq.nn.vectors import VectorMatrix
from vptq.quantize.codebook import expand_scales
from vptq.recipe import FLOAT_BITWIDTH

OUTLIER_BITS = 16  # of an index, as they are stored


def main_matrix(tensors: Mapping[str, Tensor], config: LayerConfig, dtype: torch.dtype) -> VectorMatrix | RingMatrix:
    """The columns after the outliers, in stored order and scale, with codebooks of type `dtype`."""
    main = stored_centroids("centroids", tensors, config, config.num_centroids[1], config.vector_lens[1]).to(dtype)
    if config.trellis_bits:
        return RingMatrix(tensors["indices"], main[0], trellis_of(config), config.out_features, config.ring_len)
    residual = None
    if config.residual_bits:
        residual = stored_centroids("res_centroids", tensors, config, config.num_res_centroids[1], config.vector_lens[1])
    return VectorMatrix(
        words=tensors["indices"],
        main=main,
        residual=None if residual is None else residual.to(dtype),
        out_features=config.out_features,
        group_size=config.group_size,
        along_out=config.vector_quant_dim == "out",
        main_bits=config.main_bits,
        residual_bits=config.residual_bits,
    )


def outlier_matrix(tensors: Mapping[str, Tensor], config: LayerConfig, dtype: torch.dtype) -> VectorMatrix | None:
    """The first columns, which have a codebook of their own; None without."""
    if not config.outlier_size:
        return None
    main = stored_centroids("outlier_centroids", tensors, config, config.num_centroids[0], config.vector_lens[0])
    return VectorMatrix(
        words=pack_bits(from_uint16_bits(tensors["outlier_indices"]), OUTLIER_BITS),
        main=main.to(dtype),
        residual=None,
        out_features=config.out_features,
        group_size=config.outlier_size,
        along_out=config.vector_quant_dim == "out",
        main_bits=OUTLIER_BITS,
        residual_bits=0,
    )


def stored_centroids(name: str, tensors: Mapping[str, Tensor], config: LayerConfig, k: int, vector_len: int) -> Tensor:
    """A stored codebook's values: (codebooks, k, vector_len) float32."""
    if config.bitwidth == FLOAT_BITWIDTH:
        return tensors[f"{name}.weight"].float().unflatten(1, (k, vector_len))
    half = 2 ** (config.bitwidth - 1)
    levels = unpack_bits(tensors[f"{name}.packed"], config.bitwidth, k * vector_len).unflatten(1, (k, vector_len)) - half
    return levels.float() * expand_scales(tensors[f"{name}.scales"].float(), config.bsize, k)
