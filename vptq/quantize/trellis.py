"""The bitshift trellis: vectors that share bits of their indices with their neighbours (QTIP, arXiv:2406.11235, sec. 3).

A plain vector quantizer spends log2 k bits a vector to name one of k centroids. Here each vector adds only b new bits to a
window of log2 k = L bits that slides over one stream, so k centroids are within reach at b bits a vector, and a sequence of
vectors is chosen as a whole, by the Viterbi algorithm. State s of a vector is its centroid; its low L - b bits are the high
ones of the state before it:

    s_t = (s_{t-1} >> b) | (u_t << (L - b)),   u_t the b new bits

The stream is closed to a ring (the first state continues the last one), so nothing but the u_t is stored. b = L is plain
vector quantization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.backend import use_kernels

COSTS_AT_ONCE = 1 << 24  # of all states of the sequences in work
MOST_KERNEL_BITS = 14  # of a state: so many states fit in a program's registers


@dataclass(frozen=True)
class Trellis:
    """Sizes of a trellis: `state_bits` L, so 2^L centroids; `step_bits` b stored for each vector."""

    state_bits: int
    step_bits: int

    @staticmethod
    def over(num_centroids: int, step_bits: int) -> Trellis:
        """A trellis whose states are so many centroids, a power of two."""
        return Trellis(num_centroids.bit_length() - 1, step_bits)

    @property
    def overlap_bits(self) -> int:
        """Bits of a state that its predecessor shares."""
        return self.state_bits - self.step_bits


def encode_sequences(sequences: Tensor, weights: Tensor | None, table: Tensor, trellis: Trellis) -> Tensor:
    """States of the rings of vectors nearest to `sequences`.

    Two passes: the first finds, freely, what a ring cut at its far side passes through at the seam; the second is exact
    with the seam held to that. (The exact ring would take a pass for each of the 2^(L-b) seams.)

    Args:
        sequences: (n, steps, vector_len) float32, steps · b at least L - b. weights: None or (steps,) or (n, steps) float32
            >= 0, of each vector.
        table: (2^L, vector_len) float32.
    Returns:
        (n, steps) int32 states.
    """
    steps = sequences.shape[1]
    half = steps // 2
    rolled = torch.roll(sequences, -half, 1)
    rolled_weights = None if weights is None else torch.roll(weights, -half, -1)
    middle = viterbi(rolled, rolled_weights, table, trellis, None)[:, steps - half - 1]
    return viterbi(sequences, weights, table, trellis, middle >> trellis.step_bits)


def encode_again(sequences: Tensor, weights: Tensor | None, table: Tensor, trellis: Trellis, states: Tensor) -> Tensor:
    """States no worse than `states` (n, steps) for other `sequences`: exact with their seam. See `encode_sequences`."""
    return viterbi(sequences, weights, table, trellis, states[:, -1] >> trellis.step_bits)


def viterbi(sequences: Tensor, weights: Tensor | None, table: Tensor, trellis: Trellis, seam: Tensor | None) -> Tensor:
    """The best path of states for each sequence: least sum of (weighted) squared distances, the first of equals.

    Args:
        sequences: (n, steps, vector_len) float32. weights: None, (steps,) or (n, steps). table: (2^L, vector_len).
        seam: (n,) integer in [0, 2^(L-b)), which the first state continues and the last one leads to; None for free ends.
    Returns:
        (n, steps) int32.
    """
    if kernels_serve(table, trellis):
        from vptq.quantize.kernels.trellis import viterbi_by_kernel

        return viterbi_by_kernel(sequences, weights, table, trellis.state_bits, trellis.step_bits, seam)
    return plain_viterbi(sequences, weights, table, trellis, seam)


def kernels_serve(table: Tensor, trellis: Trellis) -> bool:
    """Whether work with a table, (2^L, vector_len), goes to the kernels."""
    return use_kernels(table.device) and trellis.state_bits <= MOST_KERNEL_BITS


def plain_viterbi(sequences: Tensor, weights: Tensor | None, table: Tensor, trellis: Trellis, seam: Tensor | None) -> Tensor:
    """`viterbi` in plain torch, (n, steps) int32, a part of the sequences at a time."""
    most = max(1, COSTS_AT_ONCE >> trellis.state_bits)
    found = []
    for start in range(0, len(sequences), most):
        here = slice(start, start + most)
        own = weights[here] if weights is not None and weights.ndim == 2 else weights
        found.append(_viterbi(sequences[here], own, table, trellis, None if seam is None else seam[here]))
    return torch.cat(found)


def _viterbi(sequences: Tensor, weights: Tensor | None, table: Tensor, trellis: Trellis, seam: Tensor | None) -> Tensor:
    count, steps, _ = sequences.shape
    overlaps, branches = 1 << trellis.overlap_bits, 1 << trellis.step_bits
    halves = table.square().sum(1) / 2
    reached = sequences.new_zeros(count, overlaps)
    if seam is not None:
        reached.fill_(float("inf")).scatter_(1, seam.long()[:, None], 0.0)
    kind = torch.uint8 if trellis.step_bits <= 8 else torch.int16
    came_from = torch.empty(steps, count, overlaps, dtype=kind, device=table.device)
    for step in range(steps):
        cost = torch.addmm(halves, sequences[:, step], table.T, alpha=-1)  # half the distance, but for ‖x‖²/2
        if weights is not None:
            cost *= weights[step] if weights.ndim == 1 else weights[:, step, None]
        cost.view(count, branches, overlaps).add_(reached[:, None])
        reached, best = cost.view(count, overlaps, branches).min(2)
        came_from[step] = best
    last = reached.argmin(1) if seam is None else seam.long()
    return _trace_back(came_from, last, trellis)


def _trace_back(came_from: Tensor, overlap: Tensor, trellis: Trellis) -> Tensor:
    """States from the choices at every step and the overlap (n,) that each path ends in."""
    steps, count, _ = came_from.shape
    states = torch.empty(count, steps, dtype=torch.int32, device=came_from.device)
    mask = (1 << trellis.overlap_bits) - 1
    for step in range(steps - 1, -1, -1):
        low = came_from[step].gather(1, overlap[:, None])[:, 0].long() & ((1 << trellis.step_bits) - 1)
        state = (overlap << trellis.step_bits) | low
        states[:, step] = state
        overlap = state & mask
    return states


def new_bits(states: Tensor, trellis: Trellis) -> Tensor:
    """What is stored of states (..., steps): the top `step_bits` of each, in their type."""
    return states >> trellis.overlap_bits
