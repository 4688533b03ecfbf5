"""What quantizing a linear gives: codebooks, indices, column order and scale, and how to get a weight back from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vptq.geometry import Geometry
from vptq.quantize.rotation import NOT_ROTATED, LinearRotation


@dataclass(frozen=True)
class Codebook:
    """Centroids, and, where they are stored in few bits, the integers and scales that give them.

    Attributes:
        centroids: (num_codebooks, num_centroids, vector_len) float32; exactly the values that a reader gets back.
        levels: same shape, int8 or int16, in [-(2^(b-1) - 1), 2^(b-1) - 1]; None if stored as floats.
        scales: (num_codebooks, ceil(num_centroids / bsize)) float32; None if stored as floats.
        bitwidth: b, bits of one stored number; 16 = stored as floats.
        bsize: centroids that share a scale.
    """

    centroids: Tensor
    levels: Tensor | None = None
    scales: Tensor | None = None
    bitwidth: int = 16
    bsize: int = 1

    @property
    def num_centroids(self) -> int:
        return self.centroids.shape[1]

    @property
    def vector_len(self) -> int:
        return self.centroids.shape[2]


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized linear weight, unpacked.

    Attributes:
        geometry: how the matrix is cut.
        codebook: main codebooks, one a group.
        indices: (group_num, *geometry.group_grid) int32.
        residual_codebook, residual_indices: second stage, same shapes; None if off.
        outlier_codebook: one codebook; outlier_indices: (1, *geometry.outlier_grid) int32; None if no outliers.
        perm: (in_features,) int64, `weight[:, perm]` is what the indices describe; None for original order.
        scale, offset: (in_features,) float32 in original column order; None if not normalised.
        row_scale: (n,) float32, n = 1, row groups or rows: what rotated rows are multiplied by; None if the codebooks carry it.
        rotation: R_in and R_out; the indices describe R_out W R_inᵀ.
    """

    geometry: Geometry
    codebook: Codebook
    indices: Tensor
    residual_codebook: Codebook | None = None
    residual_indices: Tensor | None = None
    outlier_codebook: Codebook | None = None
    outlier_indices: Tensor | None = None
    perm: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    row_scale: Tensor | None = None
    rotation: LinearRotation = NOT_ROTATED

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features) float32, original column order and scale."""
        parts = []
        if self.outlier_codebook is not None and self.outlier_indices is not None:
            vectors = look_up(self.outlier_codebook.centroids, self.outlier_indices)
            parts.append(join_vectors(vectors, self.geometry, self.geometry.outlier_size))
        vectors = look_up(self.codebook.centroids, self.indices)
        if self.residual_codebook is not None and self.residual_indices is not None:
            vectors = vectors + look_up(self.residual_codebook.centroids, self.residual_indices)
        parts.append(join_vectors(vectors, self.geometry, self.geometry.group_size))
        weight = torch.cat(parts, dim=1)
        if self.perm is not None:
            weight = weight[:, torch.argsort(self.perm)]
        if self.scale is not None and self.offset is not None:
            weight = weight * self.scale + self.offset
        if self.row_scale is not None:
            weight = weight * spread_rows(self.row_scale, len(weight))
        return self.rotation.turn_back(weight)

    def absorb_perm(self) -> QuantizedWeight:
        """The same weight with its index columns in original order and no perm (one group, no outliers, vectors out)."""
        if self.perm is None:
            return self
        order = torch.argsort(self.perm)
        residual = None if self.residual_indices is None else self.residual_indices[..., order]
        return replace(self, indices=self.indices[..., order], residual_indices=residual, perm=None)


def spread_rows(scales: Tensor, rows: int) -> Tensor:
    """Scales of runs of rows (n,) -> (rows, 1)."""
    return scales.repeat_interleave(rows // len(scales))[:, None]


def look_up(centroids: Tensor, indices: Tensor) -> Tensor:
    """Centroids (G, k, v) by indices (G, rows, columns) -> vectors (G, rows, columns, v)."""
    groups, _, vector_len = centroids.shape
    picked = [torch.nn.functional.embedding(indices[g], centroids[g]) for g in range(groups)]
    return torch.stack(picked).reshape(*indices.shape, vector_len)


def join_vectors(vectors: Tensor, geometry: Geometry, columns: int) -> Tensor:
    """Vectors (G, rows, vector columns, v) -> matrix (out_features, G * columns); padding is cut off."""
    return lay_out(vectors, geometry.vector_quant_dim == "out", columns)[: geometry.out_features]


def lay_out(vectors: Tensor, along_out: bool, columns: int) -> Tensor:
    """Vectors (G, rows, vector columns, v), down columns or along rows, -> matrix (rows of it, G * columns).

    Padding of columns is cut off, that of rows is not.
    """
    groups, rows, vector_columns, vector_len = vectors.shape
    if along_out:
        return vectors.permute(1, 3, 0, 2).reshape(rows * vector_len, groups * vector_columns)
    matrix = vectors.permute(1, 0, 2, 3).reshape(rows, groups, vector_columns * vector_len)
    return matrix[:, :, :columns].reshape(rows, groups * columns)
