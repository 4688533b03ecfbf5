"""k-means in plain torch: the twin of the kernels, and what a CPU runs."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.quantize.assign import assign_nearest, assign_nearest_two, squared_distances, weigh
from vptq.quantize.fixed_point import FixedPointSums
from vptq.quantize.layout import VectorWeights

ROUNDING_UP = 1 + 1e-5


class PlainClusters:
    """Vectors of a batch and their clusters in plain torch; the attributes and methods are those of `clusters.Clusters`.

    Most vectors stay where they are from one iteration to the next. A vector whose own centroid is nearer than a lower bound
    of its distance to all others needs no search: the bound is the distance to the second nearest when it was last searched,
    less what the centroids may have come nearer since (Hamerly, 2010). The result is that of a full search.
    """

    def __init__(self, vectors: Tensor, weights: VectorWeights, num_centroids: int) -> None:
        self.vectors, self.weights, self.num_centroids = vectors, weights, num_centroids
        self.assignments = torch.zeros(vectors.shape[:2], dtype=torch.int32, device=vectors.device)
        self.errors = torch.zeros(vectors.shape[:2], device=vectors.device)
        self._bounds = torch.zeros(vectors.shape[:2], device=vectors.device)
        self._last: list[Tensor | None] = [None] * len(vectors)  # centroids that assignments and bounds belong to
        self._sums: list[tuple[Tensor, Tensor] | None] = [None] * len(vectors)

    def assign(self, centroids: Tensor, active: list[int]) -> None:
        for entry in active:
            for run, weights in self.weights.entry(entry).parts():
                self._assign_run(entry, run, weights, centroids[entry])
            self._last[entry] = centroids[entry].clone()
            self._sums[entry] = None

    def _assign_run(self, entry: int, run: slice, weights: Tensor, centroids: Tensor) -> None:
        vectors, assigned = self.vectors[entry, run], self.assignments[entry, run]
        errors, bounds = self.errors[entry, run], self._bounds[entry, run]
        own_weights = weights if weights.ndim == 2 else None
        last = self._last[entry]
        if last is None or len(centroids) < 2:
            searched = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
        else:
            own = squared_distances(vectors, centroids, assigned, own_weights)
            bounds -= _approach(centroids - last, assigned, own_weights)
            errors.copy_(weigh(own, weights))
            searched = own.sqrt_() * ROUNDING_UP >= bounds
        number = torch.nonzero(searched)[:, 0]
        if not len(number):
            return
        chosen = slice(None) if len(number) == len(vectors) else number
        few, few_weights = vectors[chosen], weights[chosen]
        few_own = few_weights if few_weights.ndim == 2 else None
        found, second = assign_nearest_two(few, centroids, few_own)
        assigned[chosen] = found.int()
        bounds[chosen] = second
        errors[chosen] = weigh(squared_distances(few, centroids, found, few_own), few_weights)

    def nearest(self, centroids: Tensor) -> Tensor:
        for entry, vectors in enumerate(self.vectors):
            for run, weights in self.weights.entry(entry).parts():
                found = assign_nearest(vectors[run], centroids[entry], weights if weights.ndim == 2 else None)
                self.assignments[entry, run] = found.int()
            self._last[entry] = self._sums[entry] = None
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
        fixed = FixedPointSums.empty(vectors[None], VectorWeights.stack([weights]), num_centroids)
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


def _approach(moves: Tensor, assigned: Tensor, element_weights: Tensor | None) -> Tensor:
    """How much nearer any centroid but the own may have come: (n,) float32.

    Args:
        moves: (k, v) float32, what each centroid moved. assigned: (n,) int32. element_weights: None or (n, v) float32: then
            distances are weighted, and grow by at most the root of the largest weight.
    """
    lengths = moves.norm(dim=1) * ROUNDING_UP
    largest, who = torch.topk(lengths, 2)
    nearer = torch.where(assigned == who[0], largest[1], largest[0])
    return nearer if element_weights is None else nearer * element_weights.amax(1).sqrt_()
