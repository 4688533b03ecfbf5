"""Normalise, permute, and cut a matrix into vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.geometry import Geometry

CONSTANT_COLUMN = 1e-7


@dataclass(frozen=True)
class Normalisation:
    """W' = (W - offset) / scale, per input column. scale and offset: (in_features,) float32, as they will be stored."""

    scale: Tensor
    offset: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        return (weight - self.offset) / self.scale

    def undo(self, weight: Tensor) -> Tensor:
        return weight * self.scale + self.offset


def normalise(weight: Tensor, storage_dtype: torch.dtype) -> Normalisation:
    """Mean and standard deviation of every input column (VPTQ sec. 3.3; the reference takes minimum and range instead).

    Both are rounded to `storage_dtype` before they are used, so that the file holds what the quantizer saw. A constant
    column, and one whose deviation rounds to zero, gets scale 1.

    Args:
        weight: (out_features, in_features) float32.
    """
    wide = weight.double()
    mean = wide.mean(0)
    deviation = (wide - mean).square().mean(0).sqrt()
    scale = deviation.to(storage_dtype).float()
    usable = (deviation > CONSTANT_COLUMN * wide.abs().amax(0)) & (scale > 0) & torch.isfinite(scale)
    return Normalisation(torch.where(usable, scale, torch.ones_like(scale)), mean.to(storage_dtype).float())


def importance_order(diagonal: Tensor) -> Tensor:
    """perm: columns by falling diag(H), ties by column number. (in_features,) -> (in_features,) int64."""
    return torch.argsort(diagonal, descending=True, stable=True)


def split_vectors(matrix: Tensor, geometry: Geometry, vector_len: int) -> Tensor:
    """Matrix (out_features, columns) -> vectors (rows, vector columns, vector_len), zero-padded. See `join_vectors`."""
    out_features, columns = matrix.shape
    if geometry.vector_quant_dim == "out":
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, -out_features % vector_len))
        return padded.reshape(-1, vector_len, columns).transpose(1, 2).contiguous()
    padded = torch.nn.functional.pad(matrix, (0, -columns % vector_len))
    return padded.reshape(out_features, -1, vector_len).contiguous()


def vector_weights(diagonal: Tensor, geometry: Geometry, vector_len: int) -> Tensor:
    """k-means weights of the vectors of some columns: the column's diag(H') for every element, none for padding.

    Args:
        diagonal: (columns,) float32 >= 0.
    Returns:
        (rows * vector columns,) where all elements of a vector weigh the same and none is padding, as for `out`
        without padding, where h' of the column is exact for a diagonal H; else (rows * vector columns, vector_len).
    """
    rows, vector_columns = geometry.vector_grid(len(diagonal), vector_len)
    if geometry.vector_quant_dim == "out":
        per_vector = diagonal.repeat(rows)
        padding = -geometry.out_features % vector_len
        if not padding:
            return per_vector
        weights = per_vector[:, None].repeat(1, vector_len).view(rows, vector_columns, vector_len)
        weights[-1, :, vector_len - padding :] = 0
        return weights.view(-1, vector_len)
    padded = torch.nn.functional.pad(diagonal, (0, -len(diagonal) % vector_len))
    return padded.view(1, vector_columns, vector_len).repeat(rows, 1, 1).view(-1, vector_len)
