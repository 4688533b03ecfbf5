"""Nearest centroid, in chunks: the full distance matrix never exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

CPU_CHUNK_SCORES = 1 << 20
GPU_CHUNK_SCORES = 1 << 27
ROUNDING = 4e-6  # of squared sizes: what a float32 score may be off by


_smaller = [1]  # the last one holds


@contextlib.contextmanager
def smaller_chunks(times: int) -> Iterator[None]:
    """Fewer scores at once, where memory is short. Sums may then be rounded in another way."""
    _smaller.append(times)
    try:
        yield
    finally:
        _smaller.pop()


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
    return _search(vectors, centroids, weights, second=False)[0]


def assign_nearest_two(vectors: Tensor, centroids: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`assign_nearest`, and a lower bound of the (weighted) distance to the second nearest, (n,) float32.

    The bound is the distance itself less what rounding may have added; infinite if there is one centroid only.
    """
    found, second = _search(vectors, centroids, weights, second=True)
    squares = vectors.square() if weights is None else vectors.square() * weights
    own, largest = squares.sum(1), centroids.square().sum(1).max()
    rounding = ROUNDING * (own + (largest if weights is None else largest * weights.amax(1)))
    return found, (own - 2 * second - rounding).clamp_min_(0).sqrt_()


def _search(vectors: Tensor, centroids: Tensor, weights: Tensor | None, second: bool) -> tuple[Tensor, Tensor]:
    """Index of the greatest score and, if asked for, the second greatest score."""
    half_norms = centroids.square() * -0.5
    if weights is None:
        left = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], 1)
        right = torch.cat([centroids, half_norms.sum(1, keepdim=True)], 1).T
    else:
        left = torch.cat([vectors * weights, weights], 1)
        right = torch.cat([centroids, half_norms], 1).T
    most = (GPU_CHUNK_SCORES if vectors.is_cuda else CPU_CHUNK_SCORES) // _smaller[-1]
    chunk = max(1, min(most // len(centroids), len(vectors)))
    scores = left.new_empty(chunk, len(centroids))  # written again and again: it stays in cache
    best = left.new_empty(chunk)
    found = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    others = left.new_empty(len(vectors) if second else 0)
    for start in range(0, len(vectors), chunk):
        here = slice(start, min(start + chunk, len(vectors)))
        count = here.stop - start
        torch.mm(left[here], right, out=scores[:count])
        torch.max(scores[:count], 1, out=(best[:count], found[here]))
        if second:
            scores[:count].scatter_(1, found[here, None], float("-inf"))
            torch.amax(scores[:count], 1, out=others[here])
    return found, others


def squared_distances(vectors: Tensor, centroids: Tensor, assignments: Tensor, element_weights: Tensor | None = None) -> Tensor:
    """(Weighted) squared distance of every vector to its centroid: (n,) float32.

    Args:
        vectors: (n, v). centroids: (k, v). assignments: (n,) integer. element_weights: None or (n, v).
    """
    squares = (vectors - centroids[assignments]).square_()
    return (squares if element_weights is None else squares.mul_(element_weights)).sum(1)


def weigh(distances: Tensor, weights: Tensor) -> Tensor:
    """Weighted errors of `squared_distances`, (n,): times weights (n,); weights (n, v), one an element, are in them already."""
    return distances * weights if weights.ndim == 1 else distances
