"""Sums that come out the same in whatever order a GPU adds: terms are rounded to 64-bit integers first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.quantize.layout import VectorWeights

FIXED_POINT_BITS = 61
MOST_COPIES = 16
SPREAD = 4096  # clusters, or copies of clusters, that are enough not to crowd a GPU's atomic additions


@dataclass(frozen=True)
class FixedPointSums:
    """Σ w x and Σ w of every cluster of a batch, as integers.

    There are several copies, so that few clusters don't make everyone add to the same place; what counts is their sum.

    Attributes:
        products: (B, copies, k, v) int64.
        totals: (B, copies, k) int64, of vectors whose elements weigh the same.
        element_totals: (B, copies, k, v) int64, of those with a weight for every element; None if there are none.
        steps: (B, 2) float64, powers of two: what terms of products and of totals are multiplied by.
        memory: what holds all sums, so that one call clears them.
    """

    products: Tensor
    totals: Tensor
    element_totals: Tensor | None
    steps: Tensor
    memory: Tensor

    @staticmethod
    def empty(vectors: Tensor, weights: VectorWeights, num_centroids: int) -> FixedPointSums:
        """Zeros, with steps as fine as can be without overflow. vectors: (B, n, v) float32; weights: of a batch."""
        batch, count, vector_len = vectors.shape
        copies = max(1, min(MOST_COPIES, SPREAD // num_centroids))
        clusters = batch * copies * num_centroids
        elements = clusters * vector_len
        memory = torch.zeros(clusters + elements * (2 if weights.num_ragged else 1), dtype=torch.int64, device=vectors.device)
        shape = (batch, copies, num_centroids)
        products = memory[:elements].view(*shape, vector_len)
        totals = memory[elements : elements + clusters].view(shape)
        ragged = memory[elements + clusters :].view(*shape, vector_len) if weights.num_ragged else None
        return FixedPointSums(products, totals, ragged, _steps(vectors, weights, count), memory)

    @property
    def copies(self) -> int:
        return self.products.shape[1]

    def clear(self, entries: list[int]) -> None:
        """In place: the sums of some batch entries zero again, those of others as they were."""
        if len(entries) == len(self.products):
            self.memory.zero_()
            return
        sums = [self.products, self.totals] + ([] if self.element_totals is None else [self.element_totals])
        for tensor in sums:
            for entry in entries:
                tensor[entry].zero_()

    def add(self, entry: int, clusters: Tensor, vectors: Tensor, weights: Tensor) -> None:
        """Take in vectors of one batch entry. clusters: (m,) int64; vectors: (m, v); weights: (m,) or (m, v), float32."""
        product_step, weight_step = self.steps[entry]
        wide = weights if weights.ndim == 2 else weights[:, None]
        self.products[entry, 0].index_add_(0, clusters, _rounded((vectors * wide).double() * product_step))
        totals = self.totals if weights.ndim == 1 else self.element_totals
        assert totals is not None
        totals[entry, 0].index_add_(0, clusters, _rounded(weights.double() * weight_step))

    def decode(self) -> tuple[Tensor, Tensor]:
        """Σ w x, (B, k, v) float64, and Σ w, (B, k, v), or (B, k, 1) where no vector has a weight for every element."""
        totals = self.totals.sum(1)[:, :, None]
        if self.element_totals is not None:
            totals = totals + self.element_totals.sum(1)
        return self.products.sum(1).double() / self.steps[:, :1, None], totals.double() / self.steps[:, 1:, None]


def index_sums(index: Tensor, values: Tensor, count: int) -> Tensor:
    """Σ values over equal indices, the same bits in whatever order they are added.

    Args:
        index: (n,) int64 in [0, count). values: (n, v) float.
    Returns:
        (count, v) float32.
    """
    _, exponent = torch.frexp(values.abs().amax().double().clamp_min(1e-300))
    step = torch.exp2((FIXED_POINT_BITS - len(values).bit_length() - exponent).clamp(-1000, 1000).double())
    sums = torch.zeros(count, values.shape[1], dtype=torch.int64, device=values.device)
    sums.index_add_(0, index, _rounded(values.double() * step))
    return (sums.double() / step).float()


def _rounded(values: Tensor) -> Tensor:
    return (values + 0.5).floor_().long()


def _steps(vectors: Tensor, weights: VectorWeights, count: int) -> Tensor:
    """Powers of two that bring `count` of the largest terms just under 2^61; (B, 2) float64."""
    products, totals = [], []
    for run, part in weights.parts():
        wide = part if part.ndim == 3 else part[:, :, None]
        products.append((vectors[:, run] * wide).abs().amax((1, 2)))
        totals.append(part.flatten(1).amax(1))
    largest = torch.stack([torch.stack(products).amax(0), torch.stack(totals).amax(0)], 1).double()
    _, exponent = torch.frexp(largest.clamp_min(1e-300))
    return torch.exp2((FIXED_POINT_BITS - count.bit_length() - exponent).clamp(-1000, 1000).double())
