"""Nearest centroid, in chunks: the full distance matrix never exists."""

from __future__ import annotations

import torch
from torch import Tensor

CPU_CHUNK_SCORES = 1 << 20
GPU_CHUNK_SCORES = 1 << 27


def assign_nearest(vectors: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Index of the centroid with the least (weighted) squared distance.

    ‖x - c‖² is least where x·c - ‖c‖²/2 is greatest; with a weight for every element, where (w x)·c - w·c²/2 is.

    Args:
        vectors: (n, vector_len) float32.
        centroids: (k, vector_len) float32.
        weights: None, or (n, vector_len) float32 >= 0: the weight of every element. A weight a vector changes nothing.
    Returns:
        (n,) int64; the first of equals.
    """
    half_norms = centroids.square() * -0.5
    if weights is None:
        left = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], 1)
        right = torch.cat([centroids, half_norms.sum(1, keepdim=True)], 1).T
    else:
        left = torch.cat([vectors * weights, weights], 1)
        right = torch.cat([centroids, half_norms], 1).T
    most = GPU_CHUNK_SCORES if vectors.is_cuda else CPU_CHUNK_SCORES
    chunk = max(1, min(most // len(centroids), len(vectors)))
    scores = left.new_empty(chunk, len(centroids))  # written again and again: it stays in cache
    best = left.new_empty(chunk)
    found = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), chunk):
        count = min(chunk, len(vectors) - start)
        torch.mm(left[start : start + count], right, out=scores[:count])
        torch.max(scores[:count], 1, out=(best[:count], found[start : start + count]))
    return found


def squared_distances(vectors: Tensor, centroids: Tensor, assignments: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared distance of every vector to its centroid: (n,) float32. weights: (n,) or (n, vector_len)."""
    squares = (vectors - centroids[assignments]).square_()
    if weights.ndim == 1:
        return squares.sum(1).mul_(weights)
    return squares.mul_(weights).sum(1)
