"""What a packed linear multiplies with, from its stored tensors, and the product itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.nn.ops import product
from vptq.nn.packing import from_uint16_bits, unpack_bits
from vptq.nn.rings import RingMatrix, trellis_of
from vptq.nn.vectors import VectorMatrix
from vptq.quantize.codebook import expand_scales
from vptq.quantize.result import spread_rows
from vptq.recipe import FLOAT_BITWIDTH

OUTLIER_BITS = 16  # of an index, as they are stored


@dataclass(frozen=True)
class Operands:
    """A packed weight as a product takes it: x is scaled and brought into stored order, not the weight out of it.

    Attributes:
        main, outliers: columns in stored order, the outliers' first. perm: (in_features,) int64, the column of x that each is.
        scale, offset: (in_features,) float32 of the columns of x. row_scale: (1 or out_features,) float32.
    """

    main: VectorMatrix | RingMatrix
    outliers: VectorMatrix | None
    perm: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    row_scale: Tensor | None

    @staticmethod
    def of(tensors: Mapping[str, Tensor], config: LayerConfig, main: VectorMatrix | RingMatrix) -> Operands:
        """From stored tensors, on one device; `main` as `main_matrix` makes it."""
        return Operands(
            main=main,
            outliers=outlier_matrix(tensors, config, main.dtype),
            perm=from_uint16_bits(tensors["perm"]) if config.enable_perm else None,
            scale=tensors["weight_scale"].float() if config.enable_norm else None,
            offset=tensors["weight_bias"].float() if config.enable_norm else None,
            row_scale=row_scales(tensors, config),
        )

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ: (n, in_features) float -> (n, out_features) in x's type; W rotated as it is stored.

        Scales and offsets act in float32, the rest in the type of the codebooks. Gradients go wherever they are asked for.
        """
        inputs = x
        if self.scale is not None:
            inputs = inputs.float() * self.scale
        added = None if self.offset is None else (x.float() * self.offset).sum(1)  # no product that autocast would round
        inputs = inputs.to(self.main.dtype)
        if self.perm is not None:
            inputs = inputs.index_select(1, self.perm)
        if self.outliers is not None:
            first = self.outliers.group_size
            found = product(inputs[:, :first], self.outliers) + product(inputs[:, first:], self.main)
        else:
            found = product(inputs, self.main)
        if added is not None:
            found = found + added[:, None]
        if self.row_scale is not None:
            found = found * self.row_scale
        return found.to(x.dtype)


def row_scales(tensors: Mapping[str, Tensor], config: LayerConfig) -> Tensor | None:
    """What the rows are multiplied by: (1 or out_features,) float32; None for nothing."""
    if not config.num_scales:
        return None
    stored = tensors["row_scale"].float()
    return stored if config.num_scales == 1 else spread_rows(stored, config.out_features)[:, 0].contiguous()


def main_matrix(tensors: Mapping[str, Tensor], config: LayerConfig, dtype: torch.dtype) -> VectorMatrix | RingMatrix:
    """The columns after the outliers, in stored order and scale, with codebooks of type `dtype`."""
    main = stored_centroids("centroids", tensors, config, config.num_centroids[1], config.vector_lens[1], dtype)
    if config.trellis_bits:
        return RingMatrix(tensors["indices"], main[0], trellis_of(config), config.out_features, config.ring_len)
    residual = None
    if config.residual_bits:
        residual = stored_centroids("res_centroids", tensors, config, config.num_res_centroids[1], config.vector_lens[1], dtype)
    return VectorMatrix(
        words=tensors["indices"],
        main=main,
        residual=residual,
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
    main = stored_centroids("outlier_centroids", tensors, config, config.num_centroids[0], config.vector_lens[0], dtype)
    indices = tensors["outlier_indices"]
    indices = torch.nn.functional.pad(indices, (0, indices.shape[-1] % 2)).contiguous()
    return VectorMatrix(
        words=indices.view(torch.int32),
        main=main,
        residual=None,
        out_features=config.out_features,
        group_size=config.outlier_size,
        along_out=config.vector_quant_dim == "out",
        main_bits=OUTLIER_BITS,
        residual_bits=0,
    )


def stored_centroids(
    name: str, tensors: Mapping[str, Tensor], config: LayerConfig, k: int, vector_len: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A stored codebook's values: (codebooks, k, vector_len) of type `dtype`."""
    if config.bitwidth == FLOAT_BITWIDTH:
        return tensors[f"{name}.weight"].to(dtype).unflatten(1, (k, vector_len))
    half = 2 ** (config.bitwidth - 1)
    levels = unpack_bits(tensors[f"{name}.packed"], config.bitwidth, k * vector_len).unflatten(1, (k, vector_len)) - half
    return (levels.float() * expand_scales(tensors[f"{name}.scales"].float(), config.bsize, k)).to(dtype)
