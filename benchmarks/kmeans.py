#!/usr/bin/env python3
"""One iteration of weighted k-means, assignment and update, beside what else can do it.

    python -m benchmarks.kmeans [--shapes 2097152x8x65536 2796202x6x4096] [--device cuda] [--repeats 5]

A shape is vectors x vector_len x centroids. Peers that are not installed are left out: torch in chunks (our own plain path),
torch.cdist, flash-kmeans (pip install flash-kmeans), faiss, scikit-learn. Those that would take minutes run on a part of the
vectors, and the table says so. "excess" is the objective of our assignment over float64's, on 8192 of the vectors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.common import Ceilings, Timing, default_device, describe, measure_ceilings, show_table, timed, wait
from vptq.backend import use_kernels
from vptq.quantize.clusters import Clusters, make_clusters
from vptq.quantize.layout import VectorWeights
from vptq.quantize.plain_clusters import PlainClusters

GPU_SHAPES = ["2097152x8x65536", "2796202x6x4096", "2097152x8x256"]
CPU_SHAPES = ["221184x4x256", "55296x6x4096"]
CHECKED = 8192
SLOW_SCORES = 2e10  # a peer that would need more than this runs on a part


def one_iteration(clusters: Clusters, centroids: torch.Tensor) -> None:
    """Means of the last assignment, a new assignment, and the objective on the host: what Lloyd's loop does."""
    clusters.assign(clusters.means(centroids, [0]), [0])
    clusters.measure([0])


def ours(kind: Callable[..., Clusters], vectors: torch.Tensor, weights: torch.Tensor, k: int, repeats: int) -> Timing:
    batch = VectorWeights(weights[None], vectors.new_zeros(1, 0, vectors.shape[1]))
    clusters = kind(vectors[None], batch, k)
    centroids = vectors[None, :k].clone()
    clusters.assign(centroids, [0])
    return timed(lambda: one_iteration(clusters, centroids), repeats, warm=2)


def excess(vectors: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> float:
    """Weighted squared error of our assignment over that of an assignment in float64, minus one."""
    batch = VectorWeights(weights[None], vectors.new_zeros(1, 0, vectors.shape[1]))
    clusters = make_clusters(vectors[None], batch, len(centroids))
    clusters.assign(centroids[None], [0])
    centroids = clusters.means(centroids[None], [0])[0]
    found = clusters.nearest(centroids[None])[0, :CHECKED].long()
    reached = best = 0.0
    for start in range(0, CHECKED, 512):
        x, c = vectors[start : start + 512].double(), centroids.double()
        squares = torch.stack([(x[:, None, e] - c[None, :, e]).square() for e in range(x.shape[1])]).sum(0)
        squares *= weights[start : start + 512, None]
        reached += squares.gather(1, found[start : start + 512, None]).sum().item()
        best += squares.amin(1).sum().item()
    return reached / best - 1


def peers(vectors: torch.Tensor, weights: torch.Tensor, k: int, repeats: int) -> list[tuple[str, float, str]]:
    """(name, seconds an iteration, what was done)"""
    found = []
    for name, run in (("torch.cdist", _cdist), ("flash-kmeans", _flash), ("faiss", _faiss), ("scikit-learn", _sklearn)):
        try:
            found.append((name, *run(vectors, weights, k, repeats)))
        except ImportError:
            continue
    return found


def _cdist(vectors: torch.Tensor, _weights: torch.Tensor, k: int, repeats: int) -> tuple[float, str]:
    part = max(1, int(len(vectors) * k / SLOW_SCORES))
    some, centroids = vectors[: len(vectors) // part], vectors[:k]
    chunk = max(1, (1 << 30) // k) if vectors.is_cuda else max(1, (1 << 20) // k)
    seconds = timed(lambda: [torch.cdist(piece, centroids).argmin(1) for piece in some.split(chunk)], min(repeats, 3)).median
    return seconds * part, f"assignment only{'' if part == 1 else f', 1/{part} of the vectors'}"


def _flash(vectors: torch.Tensor, _weights: torch.Tensor, k: int, _repeats: int) -> tuple[float, str]:
    from flash_kmeans import batch_kmeans_Euclid

    if not vectors.is_cuda:
        raise ImportError
    best = {}
    for dtype in (torch.float32, torch.float16):
        data = vectors[None].to(dtype)

        def run(iterations: int, data: torch.Tensor = data) -> float:
            return timed(lambda: batch_kmeans_Euclid(data, n_clusters=k, max_iters=iterations, tol=-1), 3).median

        best[str(dtype)] = (run(7) - run(2)) / 5
    name = min(best, key=best.__getitem__)
    return best[name], f"unweighted, {name.removeprefix('torch.')}, the faster of two types"


def _faiss(vectors: torch.Tensor, weights: torch.Tensor, k: int, _repeats: int) -> tuple[float, str]:
    import faiss

    if vectors.is_cuda:
        raise ImportError
    data, seconds = vectors.numpy(), []
    for iterations in (1, 4):
        # faiss samples 256 vectors a centroid unless told otherwise
        model = faiss.Kmeans(vectors.shape[1], k, niter=iterations, max_points_per_centroid=len(data) // k + 1, seed=0)
        started = time.perf_counter()
        model.train(data, weights=weights.numpy())
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / 3, "weighted, CPU"


def _sklearn(vectors: torch.Tensor, weights: torch.Tensor, k: int, _repeats: int) -> tuple[float, str]:
    from sklearn.cluster import KMeans

    if vectors.is_cuda:
        raise ImportError
    seconds = []
    for iterations in (1, 4):
        model = KMeans(k, init=vectors[:k].numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
        started = time.perf_counter()
        model.fit(vectors.numpy(), sample_weight=weights.numpy())
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / 3, "weighted, CPU"


def floor_seconds(count: int, vector_len: int, k: int, ceilings: Ceilings, kernels: bool) -> float:
    """Operations of the scores, rows padded to 16 on tensor cores, over the rate; or bytes read once over bandwidth."""
    width, rate = (16, ceilings.matrix) if kernels else (vector_len + 1, ceilings.matrix32)
    return max(2.0 * count * k * width / rate, count * (4.0 * vector_len + 8) / ceilings.copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="NxVxK")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_peers", action="store_true")
    given = parser.parse_args()
    kernels = use_kernels(given.device)
    print(describe(given.device))
    ceilings = measure_ceilings(given.device)
    print(ceilings)
    for shape in given.shapes or (GPU_SHAPES if given.device.type == "cuda" else CPU_SHAPES):
        count, vector_len, k = (int(word) for word in shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(count, vector_len, generator=generator).to(given.device)
        weights = (torch.rand(count, generator=generator) + 0.5).to(given.device)
        mine = ours(make_clusters, vectors, weights, k, given.repeats)
        floor = floor_seconds(count, vector_len, k, ceilings, kernels)
        rows = [["vptq", str(mine), "1", f"{floor / mine.median:.0%} of {floor * 1e3:.2f} ms", f"weighted, kernels {kernels}"]]
        if not given.no_peers:
            if kernels:
                plain = ours(PlainClusters, vectors, weights, k, 2)
                rows.append(
                    ["torch in chunks", str(plain), f"{plain.median / mine.median:.1f}", "", "our plain path, weighted"]
                )
            for name, seconds, note in peers(vectors, weights, k, given.repeats):
                rows.append([name, f"{seconds * 1e3:.1f} ms", f"{seconds / mine.median:.1f}", "", note])
        wait()
        print(f"\n{count} vectors of {vector_len}, {k} centroids; excess {excess(vectors, weights, vectors[:k]):.1e}")
        show_table(["one iteration", "median (range)", "times ours", "share of the floor", "what"], rows)


if __name__ == "__main__":
    main()
