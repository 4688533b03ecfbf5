"""The state of k-means for a batch of problems: who belongs to which centroid, at what cost, and the sums that follow."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vptq.backend import use_kernels
from vptq.quantize.assign import assign_nearest, squared_distances
from vptq.quantize.fixed_point import FixedPointSums
from vptq.quantize.layout import VectorWeights


class Clusters(Protocol):
    """Vectors of a batch, assigned to centroids.

    Attributes:
        vectors: (B, n, v) float32. weights: of the batch.
        assignments: (B, n) int32. errors: (B, n) float32, the weighted squared distance of each vector.
    """

    vectors: Tensor
    weights: VectorWeights
    assignments: Tensor
    errors: Tensor

    def assign(self, centroids: Tensor, active: list[int]) -> None:
        """Assign the vectors of the entries in `active` anew, in place. centroids: (B, k, v) float32."""

    def nearest(self, centroids: Tensor) -> Tensor:
        """Assign all and forget sums. centroids: (B, k, v) float32; returns assignments, (B, n) int32."""

    def means(self, centroids: Tensor, active: list[int]) -> Tensor:
        """Centroids moved to the weighted mean of their vectors, the same bits every run.

        A cluster, or an element of it, that has no weight keeps its value; so does every entry that is not in `active`.

        Args:
            centroids: (B, k, v) float32. Not modified.
        """

    def empty(self, entry: int) -> Tensor:
        """Clusters of one entry that have no weight: (number of them,) int64."""

    def measure(self, active: list[int]) -> list[tuple[float, int]]:
        """Objective and number of clusters without weight, of each entry in `active`."""


def make_clusters(vectors: Tensor, weights: VectorWeights, num_centroids: int) -> Clusters:
    """The kernels' or the plain kind, as `backend` chooses. vectors: (B, n, v) float32."""
    if use_kernels(vectors.device) and vectors.shape[2] <= 16:
        from vptq.quantize.kernels.clusters import KernelClusters

        return KernelClusters(vectors, weights, num_centroids)
    return PlainClusters(vectors, weights, num_centroids)


def find_nearest(vectors: Tensor, weights: VectorWeights, centroids: Tensor) -> Tensor:
    """The nearest centroid of every vector, by the kernels or plainly. (n, v), of n vectors, (k, v) -> (n,) int64."""
    batch = VectorWeights(weights.whole[None], weights.ragged[None])
    clusters = make_clusters(vectors[None], batch, len(centroids))
    return clusters.nearest(centroids[None])[0].long()


class PlainClusters:
    """`Clusters` in plain torch."""

    def __init__(self, vectors: Tensor, weights: VectorWeights, num_centroids: int) -> None:
        self.vectors, self.weights, self.num_centroids = vectors, weights, num_centroids
        self.assignments = torch.zeros(vectors.shape[:2], dtype=torch.int32, device=vectors.device)
        self.errors = torch.zeros(vectors.shape[:2], device=vectors.device)
        self._sums: list[tuple[Tensor, Tensor] | None] = [None] * len(vectors)

    def assign(self, centroids: Tensor, active: list[int]) -> None:
        for entry in active:
            for run, weights in self.weights.entry(entry).parts():
                vectors = self.vectors[entry, run]
                found = assign_nearest(vectors, centroids[entry], weights if weights.ndim == 2 else None)
                self.assignments[entry, run] = found.int()
                self.errors[entry, run] = squared_distances(vectors, centroids[entry], found, weights)
            self._sums[entry] = None

    def nearest(self, centroids: Tensor) -> Tensor:
        self.assign(centroids, list(range(len(centroids))))
        return self.assignments

    def means(self, centroids: Tensor, active: list[int]) -> Tensor:
        moved = centroids.clone()
        for entry in active:
            sums, totals = self.sums(entry)
            moved[entry] = torch.where(totals > 0, sums / totals.clamp_min(1e-300), centroids[entry].double()).float()
        return moved

    def empty(self, entry: int) -> Tensor:
        return torch.nonzero(self.sums(entry)[1].amax(1) <= 0)[:, 0]

    def sums(self, entry: int) -> tuple[Tensor, Tensor]:
        """Σ w x (k, v) and Σ w (k, v or 1) of every cluster of one entry, float64."""
        found = self._sums[entry]
        if found is None:
            found = cluster_sums(self.vectors[entry], self.weights.entry(entry), self.assignments[entry], self.num_centroids)
            self._sums[entry] = found
        return found

    def measure(self, active: list[int]) -> list[tuple[float, int]]:
        return [(self.errors[entry].double().sum().item(), len(self.empty(entry))) for entry in active]


def cluster_sums(vectors: Tensor, weights: VectorWeights, assignments: Tensor, num_centroids: int) -> tuple[Tensor, Tensor]:
    """Σ w x and Σ w of every cluster of one problem, (k, v) and (k, v or 1) float64, the same bits every run.

    A CPU adds in order, in float64. A GPU adds in any order, so there terms are rounded to fixed point first.
    """
    if vectors.is_cuda:
        batch = VectorWeights(weights.whole[None], weights.ragged[None])
        fixed = FixedPointSums.empty(vectors[None], batch, num_centroids)
        for run, part in weights.parts():
            fixed.add(0, assignments[run].long(), vectors[run], part)
        products, totals = fixed.decode()
        return products[0], totals[0]
    wide = [part if part.ndim == 2 else part[:, None] for _, part in weights.parts()]
    products = torch.cat([vectors[run] * part for (run, _), part in zip(weights.parts(), wide, strict=True)])
    elements = max(part.shape[1] for part in wide)
    totals = torch.cat([part.expand(-1, elements) for part in wide])
    return _ordered_sums(products, assignments, num_centroids), _ordered_sums(totals, assignments, num_centroids)


def _ordered_sums(values: Tensor, assignments: Tensor, num_centroids: int) -> Tensor:
    """Column by column, (n, columns) -> (num_centroids, columns): `bincount` adds in order."""
    columns = [torch.bincount(assignments, column.double(), num_centroids) for column in values.unbind(1)]
    return torch.stack(columns, 1)
