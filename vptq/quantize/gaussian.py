"""Codebooks of a unit Gaussian, which rotated weights follow: made from their definition, the same every time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.quantize.assign import assign_nearest
from vptq.quantize.columns import make_quantizer
from vptq.quantize.fixed_point import FixedPointSums
from vptq.quantize.kmeans import batched_kmeans
from vptq.quantize.layout import VectorWeights
from vptq.quantize.trellis import Trellis, viterbi

SAMPLES_A_CENTROID = 64
FEWEST_SAMPLES, MOST_SAMPLES = 1 << 18, 1 << 22
KMEANS_ITERATIONS = 60
TRELLIS_SEQUENCES, TRELLIS_STEPS, TRELLIS_ITERATIONS = 2048, 256, 40
TEST_NUMBERS = 1 << 20
PRIOR = 2.0  # samples that a state's old value counts for
SEED = 0


def gaussian_codebook(vector_len: int, num_centroids: int, device: torch.device) -> Tensor:
    """k-means of standard normal vectors: (num_centroids, vector_len) float32 on `device`."""
    count = min(max(num_centroids * SAMPLES_A_CENTROID, FEWEST_SAMPLES), MOST_SAMPLES)
    generator = torch.Generator().manual_seed(SEED)
    samples = torch.randn(count, vector_len, generator=generator).to(device)
    return train_codebook(samples, num_centroids, generator)


def residual_codebook(main: Tensor, num_centroids: int, samples: Tensor | None = None) -> Tensor:
    """k-means of what the main codebook (k, vector_len) leaves of `samples`, or of a Gaussian: (num_centroids, vector_len)."""
    generator = torch.Generator().manual_seed(SEED + 1)
    if samples is None:
        samples = torch.randn(FEWEST_SAMPLES, main.shape[1], generator=generator).to(main.device)
    return train_codebook(samples - main[assign_nearest(samples, main)], num_centroids, generator)


def train_codebook(vectors: Tensor, num_centroids: int, generator: torch.Generator) -> Tensor:
    """k-means, all weights equal: vectors (n, vector_len) float32 -> (num_centroids, vector_len)."""
    weights = VectorWeights.stack([VectorWeights.of(vectors.new_ones(len(vectors)), vectors.shape[1])])
    found = batched_kmeans(
        vectors[None], weights, num_centroids, iterations=KMEANS_ITERATIONS, tol=1e-4, generators=[generator]
    )
    return found[0].centroids


def gaussian_trellis(vector_len: int, trellis: Trellis, device: torch.device) -> Tensor:
    """The table of a trellis for standard normal numbers: (2^L, vector_len) float32 on `device`.

    Lloyd's algorithm with paths for clusters: encode fresh samples, move every state's value to the mean of what it stands
    for. For single numbers it starts from a table whose states, wherever the path is, offer an evenly spread choice.
    """
    generator = torch.Generator().manual_seed(SEED)
    table = _first_table(vector_len, trellis, generator).to(device)
    shape = (TRELLIS_SEQUENCES, TRELLIS_STEPS, vector_len)
    for _ in range(TRELLIS_ITERATIONS):
        samples = torch.randn(shape, generator=generator).to(device)
        states = viterbi(samples, None, table, trellis, None).long().view(-1)
        flat = samples.view(1, -1, vector_len)
        weights = VectorWeights.stack([VectorWeights.of(flat.new_ones(flat.shape[1]), vector_len)])
        sums = FixedPointSums.empty(flat, weights, len(table))
        sums.add(0, states, flat[0], weights.whole[0])
        products, counts = (found[0] for found in sums.decode())
        table = ((products + PRIOR * table.double()) / (counts + PRIOR)).float()
    return table


def _first_table(vector_len: int, trellis: Trellis, generator: torch.Generator) -> Tensor:
    overlaps, branches = 1 << trellis.overlap_bits, 1 << trellis.step_bits
    if vector_len > 1:
        return torch.randn(overlaps * branches, vector_len, generator=generator)
    # The branches out of an overlap take one value from each of as many equal parts of the distribution, at a place in them
    # that differs from overlap to overlap, in random order.
    place = (torch.randperm(overlaps, generator=generator).double() + 0.5) / overlaps
    part = torch.stack([torch.randperm(branches, generator=generator) for _ in range(overlaps)], 1).double()
    quantile = ((part + place) / branches).view(-1, 1)
    return (torch.erfinv(2 * quantile - 1) * math.sqrt(2)).float()


def mean_squared_error(config: LinearConfig, main: Tensor, residual: Tensor | None = None, rows: int = 256) -> float:
    """Error a number of fresh standard normal columns, with rings as long as those of a linear with `rows` output rows.

    Args:
        main, residual: (k, vector_len) float32, the codebooks of `config`.
    """
    rows = -(-rows // config.vector_len) * config.vector_len
    generator = torch.Generator().manual_seed(SEED + 2)
    columns = torch.randn(TEST_NUMBERS // rows, rows, generator=generator).to(main.device)
    stages = (main,) if residual is None else (main, residual)
    quantizer = make_quantizer(stages, config, rows, ring_len=rows // config.vector_len)
    return (columns - quantizer.decode(quantizer.encode(columns))).square().mean().item()
