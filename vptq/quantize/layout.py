"""Normalise, permute, and cut a matrix into vectors."""

from __future__ import annotations

from collections.abc import Sequence
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


def as_batch(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape (...) as (number of them, ...); one alone is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


@dataclass(frozen=True)
class VectorWeights:
    """How much the vectors of k-means matter: first those whose elements all weigh the same, then those with a weight each.

    Attributes:
        whole: (..., m) float32 >= 0: one weight for each of the first m vectors.
        ragged: (..., n - m, vector_len) float32 >= 0: a weight for every element of the others.
    """

    whole: Tensor
    ragged: Tensor

    @staticmethod
    def of(weights: Tensor, vector_len: int) -> VectorWeights:
        """From one weight a vector, (n,), or one an element, (n, vector_len)."""
        if weights.ndim == 1:
            return VectorWeights(weights, weights.new_zeros(0, vector_len))
        return VectorWeights(weights.new_zeros(0), weights)

    @staticmethod
    def stack(entries: Sequence[VectorWeights]) -> VectorWeights:
        """Several of one shape as a batch."""
        return VectorWeights(as_batch([e.whole for e in entries]), as_batch([e.ragged for e in entries]))

    def entry(self, number: int) -> VectorWeights:
        """One entry of a batch."""
        return VectorWeights(self.whole[number], self.ragged[number])

    @property
    def num_whole(self) -> int:
        return self.whole.shape[-1]

    @property
    def num_ragged(self) -> int:
        return self.ragged.shape[-2]

    def parts(self) -> list[tuple[slice, Tensor]]:
        """The runs of vectors that there are, each with its weights, (..., m) or (..., n - m, vector_len)."""
        runs = []
        if self.num_whole:
            runs.append((slice(0, self.num_whole), self.whole))
        if self.num_ragged:
            runs.append((slice(self.num_whole, self.num_whole + self.num_ragged), self.ragged))
        return runs

    def sums(self) -> Tensor:
        """What each vector weighs in all: (..., n)."""
        return torch.cat([self.whole * self.ragged.shape[-1], self.ragged.sum(-1)], -1)

    def one_a_vector(self, padded: bool) -> VectorWeights:
        """The mean weight of a vector's elements for all of them.

        Where vectors may be padded, an element without weight keeps none.
        """
        if not padded:
            return VectorWeights(torch.cat([self.whole, self.ragged.mean(-1)], -1), self.ragged[..., :0, :])
        present = (self.ragged > 0).float()
        mean = self.ragged.sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp_min(1)
        return VectorWeights(self.whole, present * mean)


def vector_weights(diagonal: Tensor, geometry: Geometry, vector_len: int) -> VectorWeights:
    """k-means weights of the vectors of some columns: the column's diag(H') for every element, none for padding.

    For `out` all elements of a vector weigh h' of its column (exact for a diagonal H); only the last row of vectors may
    hold padding. For `in` every element has a column, and so a weight, of its own.

    Args:
        diagonal: (columns,) float32 >= 0.
    Returns:
        Weights of the vectors of `split_vectors`, rows first.
    """
    rows, vector_columns = geometry.vector_grid(len(diagonal), vector_len)
    if geometry.vector_quant_dim == "out":
        padding = -geometry.out_features % vector_len
        last = diagonal[:, None].repeat(1 if padding else 0, vector_len)
        last[:, vector_len - padding :] = 0
        return VectorWeights(diagonal.repeat(rows - bool(padding)), last)
    padded = torch.nn.functional.pad(diagonal, (0, -len(diagonal) % vector_len))
    return VectorWeights.of(padded.view(1, vector_columns, vector_len).repeat(rows, 1, 1).view(-1, vector_len), vector_len)
