"""Weighted k-means, the codebook's starting point (VPTQ, arXiv:2409.17066, sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.errors import NumericalError, VptqError
from vptq.quantize.assign import assign_nearest, squared_distances

FIXED_POINT_BITS = 61


@dataclass(frozen=True)
class KMeansResult:
    """What k-means found.

    Attributes:
        centroids: (num_centroids, vector_len) float32.
        assignments: (n,) int64 in [0, num_centroids), the nearest centroid of every vector.
        objective: weighted squared error after each assignment, float64, never rising; its last entry belongs to `centroids`.
    """

    centroids: Tensor
    assignments: Tensor
    objective: list[float]

    @property
    def iterations(self) -> int:
        return len(self.objective) - 1


def weighted_kmeans(
    vectors: Tensor, weights: Tensor, num_centroids: int, *, iterations: int, tol: float, generator: torch.Generator
) -> KMeansResult:
    """Cluster weighted vectors with Lloyd's algorithm.

    Minimises sum_i sum_e weights[i, e] (vectors[i, e] - centroids[a_i, e])². Starts from vectors drawn without
    replacement, each with a chance in proportion to its weight. A centroid that loses all its vectors moves to the
    vector with the greatest weighted error.

    Args:
        vectors: (n, vector_len) float32, finite. Not modified.
        weights: (n,) or (n, vector_len) float32, >= 0. All zero counts as all one.
        num_centroids: k >= 1. If fewer than k vectors have weight, surplus centroids repeat vectors.
        iterations: most centroid updates.
        tol: stop when an update takes less than this part off the objective.
        generator: CPU generator; the same seed gives the same bits on the same kind of device.
    Raises:
        VptqError: shapes that don't match.   NumericalError: non-finite input.
    Cost: O(n k vector_len) an iteration.
    """
    _check(vectors, weights, num_centroids)
    if not bool((weights > 0).any()):
        weights = torch.ones_like(weights)
    element_weights = weights if weights.ndim == 2 else None
    centroids = _draw_start(vectors, weights, num_centroids, generator)
    assignments = assign_nearest(vectors, centroids, element_weights)
    errors = squared_distances(vectors, centroids, assignments, weights)
    objective = [errors.double().sum().item()]
    for _ in range(iterations):
        moved = _update_centroids(vectors, weights, assignments, centroids, errors)
        new_assignments = assign_nearest(vectors, moved, element_weights)
        new_errors = squared_distances(vectors, moved, new_assignments, weights)
        reached = new_errors.double().sum().item()
        if reached > objective[-1]:  # rounding only: Lloyd's steps can't raise it
            break
        centroids, assignments, errors = moved, new_assignments, new_errors
        gain = objective[-1] - reached
        objective.append(reached)
        if gain <= tol * objective[-2]:
            break
    return KMeansResult(centroids, assignments, objective)


def _check(vectors: Tensor, weights: Tensor, num_centroids: int) -> None:
    if weights.shape not in (vectors.shape[:1], vectors.shape) or num_centroids < 1 or len(vectors) < 1:
        raise VptqError(
            "k-means needs one weight a vector or one an element, and at least one vector and centroid",
            where=[f"vectors {tuple(vectors.shape)}, weights {tuple(weights.shape)}, num_centroids {num_centroids}"],
        )
    if not bool(torch.isfinite(vectors).all() & torch.isfinite(weights).all()):
        raise NumericalError("k-means got non-finite vectors or weights")


def _draw_start(vectors: Tensor, weights: Tensor, num_centroids: int, generator: torch.Generator) -> Tensor:
    """Vectors drawn by weight without replacement: the largest of log(weight) + Gumbel noise (Efraimidis-Spirakis)."""
    chance = (weights.sum(1) if weights.ndim == 2 else weights).double()
    noise = torch.rand(len(vectors), dtype=torch.float64, generator=generator).to(vectors.device)
    keys = chance.log() - torch.log(-torch.log(noise.clamp_(1e-300, 1 - 1e-16)))
    wanted = min(num_centroids, int((chance > 0).sum()))
    drawn = torch.topk(keys, wanted).indices
    surplus = torch.arange(num_centroids, device=vectors.device) % wanted
    return vectors[drawn[surplus]].clone()


def _update_centroids(vectors: Tensor, weights: Tensor, assignments: Tensor, centroids: Tensor, errors: Tensor) -> Tensor:
    """Weighted means; an element without weight in a cluster keeps its value, an empty cluster moves to a bad vector."""
    sums, totals = _cluster_sums(vectors, weights, assignments, len(centroids))
    means = torch.where(totals > 0, sums / totals.clamp_min(1e-300), centroids.double()).float()
    empty = torch.nonzero(totals.amax(1) <= 0).flatten()
    if len(empty):
        count = min(len(empty), len(vectors))
        worst = torch.topk(errors, count)
        useful = worst.values > 0
        means[empty[:count][useful]] = vectors[worst.indices[useful]]
    return means


def _cluster_sums(vectors: Tensor, weights: Tensor, assignments: Tensor, num_centroids: int) -> tuple[Tensor, Tensor]:
    """Σ w x and Σ w of every cluster, (k, vector_len) float64, the same bits every run.

    A CPU adds in order. A GPU adds in any order, so there the terms are rounded to fixed point first: integers add up
    to the same sum in every order.
    """
    wide_weights = weights if weights.ndim == 2 else weights[:, None]
    products = vectors * wide_weights
    if vectors.is_cuda:
        sums = _fixed_point_sums(products, assignments, num_centroids)
        totals = _fixed_point_sums(wide_weights, assignments, num_centroids)
    else:
        sums = _ordered_sums(products, assignments, num_centroids)
        totals = _ordered_sums(wide_weights, assignments, num_centroids)
    return sums, totals.expand(-1, vectors.shape[1])


def _ordered_sums(values: Tensor, assignments: Tensor, num_centroids: int) -> Tensor:
    columns = [torch.bincount(assignments, column.double(), num_centroids) for column in values.unbind(1)]
    return torch.stack(columns, 1)


def _fixed_point_sums(values: Tensor, assignments: Tensor, num_centroids: int) -> Tensor:
    largest = values.abs().max().double().clamp_min(1e-300)
    headroom = 2.0 ** (FIXED_POINT_BITS - len(values).bit_length())
    step = largest / headroom
    sums = torch.zeros(num_centroids, values.shape[1], dtype=torch.int64, device=values.device)
    sums.index_add_(0, assignments, (values.double() / step).round_().long())
    return sums.double() * step
