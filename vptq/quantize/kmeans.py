"""Weighted k-means, the codebook's starting point (VPTQ, arXiv:2409.17066, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.errors import NumericalError, VptqError
from vptq.quantize.clusters import Clusters, make_clusters
from vptq.quantize.layout import VectorWeights


@dataclass(frozen=True)
class KMeansResult:
    """What k-means found.

    Attributes:
        centroids: (num_centroids, vector_len) float32.
        assignments: (n,) int32 in [0, num_centroids), the nearest centroid of every vector.
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
    """Cluster weighted vectors with Lloyd's algorithm: `batched_kmeans` for one problem.

    Args:
        vectors: (n, vector_len) float32, finite. Not modified.
        weights: (n,) or (n, vector_len) float32, >= 0. All zero counts as all one.
    """
    _check(vectors, weights, num_centroids)
    batch = VectorWeights.stack([VectorWeights.of(weights, vectors.shape[1])])
    return batched_kmeans(vectors[None], batch, num_centroids, iterations=iterations, tol=tol, generators=[generator])[0]


def batched_kmeans(
    vectors: Tensor,
    weights: VectorWeights,
    num_centroids: int,
    *,
    iterations: int,
    tol: float,
    generators: Sequence[torch.Generator],
) -> list[KMeansResult]:
    """Cluster the weighted vectors of several problems of one shape with Lloyd's algorithm.

    Each minimises sum_i sum_e weights[i, e] (vectors[i, e] - centroids[a_i, e])². Starts from vectors drawn without
    replacement, each with a chance in proportion to its weight. A centroid that loses all its vectors moves to the
    vector with the greatest weighted error. Every problem stops by itself, and comes out the same bits as alone.

    Args:
        vectors: (B, n, vector_len) float32, finite. Not modified.
        weights: of the batch, >= 0. All zero counts as all one.
        num_centroids: k >= 1. If fewer than k vectors have weight, surplus centroids repeat vectors.
        iterations: most centroid updates.
        tol: stop when an update takes less than this part off the objective.
        generators: one CPU generator a problem; the same seed gives the same bits on the same kind of device.
    Raises:
        NumericalError: non-finite input.
    Cost: O(B n k vector_len) an iteration.
    """
    finite = torch.isfinite(vectors).all() & torch.isfinite(weights.whole).all() & torch.isfinite(weights.ragged).all()
    if not bool(finite):
        raise NumericalError("k-means got non-finite vectors or weights")
    weights = _never_all_zero(weights)
    clusters = make_clusters(vectors, weights, num_centroids)
    starts = [_draw_start(v, weights.entry(b), num_centroids, generators[b]) for b, v in enumerate(vectors)]
    centroids = torch.stack(starts)
    active = list(range(len(vectors)))
    clusters.assign(centroids, active)
    measured = dict(zip(active, clusters.measure(active), strict=True))
    objectives = [[measured[entry][0]] for entry in active]
    for _ in range(iterations):
        moved = _updated_centroids(clusters, centroids, {entry: measured[entry][1] for entry in active})
        clusters.assign(moved, active)
        measured = dict(zip(active, clusters.measure(active), strict=True))
        worse = [entry for entry in active if measured[entry][0] > objectives[entry][-1]]
        better = [entry for entry in active if entry not in worse]
        if worse:  # by rounding only: Lloyd's steps can't raise it
            moved[worse] = centroids[worse]
            clusters.assign(moved, worse)
        centroids = moved
        for entry in better:
            objectives[entry].append(measured[entry][0])
        active = [entry for entry in better if objectives[entry][-2] - objectives[entry][-1] > tol * objectives[entry][-2]]
        if not active:
            break
    return [KMeansResult(centroids[b], clusters.assignments[b], objective) for b, objective in enumerate(objectives)]


def _check(vectors: Tensor, weights: Tensor, num_centroids: int) -> None:
    if weights.shape not in (vectors.shape[:1], vectors.shape) or num_centroids < 1 or len(vectors) < 1:
        raise VptqError(
            "k-means needs one weight a vector or one an element, and at least one vector and centroid",
            where=[f"vectors {tuple(vectors.shape)}, weights {tuple(weights.shape)}, num_centroids {num_centroids}"],
        )


def _never_all_zero(weights: VectorWeights) -> VectorWeights:
    """Problems without any weight get weight one everywhere."""
    none = weights.sums().amax(1) <= 0
    if not bool(none.any()):
        return weights
    return VectorWeights(
        torch.where(none[:, None], torch.ones_like(weights.whole), weights.whole),
        torch.where(none[:, None, None], torch.ones_like(weights.ragged), weights.ragged),
    )


def _draw_start(vectors: Tensor, weights: VectorWeights, num_centroids: int, generator: torch.Generator) -> Tensor:
    """Vectors drawn by weight without replacement: the largest of log(weight) + Gumbel noise (Efraimidis-Spirakis).

    One pass over the vectors, whatever k is. vectors: (n, v); returns (num_centroids, v).
    """
    chance = weights.sums().double()
    noise = torch.rand(len(vectors), dtype=torch.float64, generator=generator).to(vectors.device)
    keys = chance.log() - torch.log(-torch.log(noise.clamp_(1e-300, 1 - 1e-16)))
    wanted = min(num_centroids, int((chance > 0).sum()))
    drawn = torch.topk(keys, wanted).indices
    surplus = torch.arange(num_centroids, device=vectors.device) % wanted
    return vectors[drawn[surplus]].clone()


def _updated_centroids(clusters: Clusters, centroids: Tensor, num_empty: dict[int, int]) -> Tensor:
    """Weighted means; an element without weight in a cluster keeps its value, an empty cluster moves to a bad vector.

    Args:
        centroids: (B, k, v) float32. num_empty: clusters without weight of each entry that is still at work.
    Returns:
        (B, k, v) float32.
    """
    moved = clusters.means(centroids, list(num_empty))
    for entry, count in num_empty.items():
        if count:
            count = min(count, clusters.vectors.shape[1])
            worst = torch.topk(clusters.errors[entry], count)
            useful = worst.values > 0
            moved[entry, clusters.empty(entry)[:count][useful]] = clusters.vectors[entry, worst.indices[useful]]
    return moved
