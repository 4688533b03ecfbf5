"""Centroids as they will be stored: rounded to the model's float, or to b-bit integers with shared scales."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.quantize.result import Codebook


def store_codebook(centroids: Tensor, bitwidth: int, bsize: int, storage_dtype: torch.dtype) -> Codebook:
    """Round centroids to what the file will hold.

    Below 16 bits: symmetric, scale = absmax / (2^(b-1) - 1) for each run of `bsize` centroids.

    Args:
        centroids: (num_codebooks, num_centroids, vector_len) float32. Not modified.
        storage_dtype: float type of stored centroids or scales.
    """
    if bitwidth >= 16:
        return Codebook(centroids.to(storage_dtype).float())
    num_codebooks, num_centroids, vector_len = centroids.shape
    top = 2 ** (bitwidth - 1) - 1
    runs = -(-num_centroids // bsize)
    padded = torch.nn.functional.pad(centroids, (0, 0, 0, runs * bsize - num_centroids))
    absmax = padded.view(num_codebooks, runs, bsize * vector_len).abs().amax(2)
    scales = (absmax / top).to(storage_dtype).float()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    a_centroid = expand_scales(scales, bsize, num_centroids)
    levels = (centroids / a_centroid).round().clamp(-top, top)
    kind = torch.int8 if bitwidth <= 8 else torch.int16
    return Codebook(levels * a_centroid, levels.to(kind), scales, bitwidth, bsize)


def expand_scales(scales: Tensor, bsize: int, num_centroids: int) -> Tensor:
    """Scales of runs (num_codebooks, runs) -> scales of centroids (num_codebooks, num_centroids, 1)."""
    return scales.repeat_interleave(bsize, dim=1)[:, :num_centroids, None]
