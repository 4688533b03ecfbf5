"""The state of k-means for a batch of problems: who belongs to which centroid, at what cost, and the sums that follow."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vptq.backend import use_kernels
from vptq.quantize.layout import VectorWeights
from vptq.quantize.plain_clusters import PlainClusters


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
        """Assign all, and that alone: no errors, no sums. centroids: (B, k, v) float32; returns (B, n) int32."""

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
    clusters = make_clusters(vectors[None], VectorWeights.stack([weights]), len(centroids))
    return clusters.nearest(centroids[None])[0].long()
