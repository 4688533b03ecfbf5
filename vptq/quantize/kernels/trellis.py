"""The Viterbi algorithm of `quantize.trellis` as one kernel: a program a sequence, all states in its registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.kernels.launch import current_device


def viterbi_by_kernel(
    sequences: Tensor, weights: Tensor | None, table: Tensor, state_bits: int, step_bits: int, seam: Tensor | None
) -> Tensor:
    """See `trellis.viterbi`. sequences: (n, steps, vector_len) float32; returns (n, steps) int32 states."""
    count, steps, vector_len = sequences.shape
    overlaps = 1 << (state_bits - step_bits)
    kind = torch.uint8 if step_bits <= 8 else torch.int16
    came_from = torch.empty(count, steps, overlaps, dtype=kind, device=table.device)
    reached = torch.empty(count, 2, overlaps, dtype=torch.float32, device=table.device)
    states = torch.empty(count, steps, dtype=torch.int32, device=table.device)
    own_weights = weights is not None and weights.ndim == 2
    with current_device(table):
        _viterbi[(count,)](
            sequences.contiguous(), sequences if weights is None else weights.contiguous(), table.contiguous(),
            sequences if seam is None else seam.int().contiguous(), came_from, reached, states, steps,
            VECTOR_LEN=vector_len, STATE_BITS=state_bits, STEP_BITS=step_bits, WEIGHTED=weights is not None,
            OWN_WEIGHTS=own_weights, HELD=seam is not None, num_warps=_warps(state_bits),
        )  # fmt: skip
    return states


def _warps(state_bits: int) -> int:
    return max(1, min(16, (1 << state_bits) // 512))


@triton.jit
def _viterbi(
    x_ptr, weight_ptr, table_ptr, seam_ptr, came_ptr, reached_ptr, state_ptr, steps,
    VECTOR_LEN: tl.constexpr, STATE_BITS: tl.constexpr, STEP_BITS: tl.constexpr, WEIGHTED: tl.constexpr,
    OWN_WEIGHTS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    STATES: tl.constexpr = 1 << STATE_BITS
    OVERLAPS: tl.constexpr = 1 << (STATE_BITS - STEP_BITS)
    BRANCHES: tl.constexpr = 1 << STEP_BITS
    x_ptr += program * steps * VECTOR_LEN
    came_ptr += program * steps * OVERLAPS
    reached_ptr += program * 2 * OVERLAPS
    state_ptr += program * steps
    if OWN_WEIGHTS:
        weight_ptr += program * steps
    state, overlap, branch = tl.arange(0, STATES), tl.arange(0, OVERLAPS), tl.arange(0, BRANCHES)
    half = tl.zeros((STATES,), dtype=tl.float32)
    for e in tl.static_range(VECTOR_LEN):
        centroid = tl.load(table_ptr + state * VECTOR_LEN + e)
        half += centroid * centroid * 0.5
    before = tl.zeros((STATES,), dtype=tl.float32)
    if HELD:
        seam = tl.load(seam_ptr + program)
        before = tl.where((state & (OVERLAPS - 1)) == seam, 0.0, float("inf"))
    for step in tl.range(0, steps, num_stages=1):
        cost = half
        for e in tl.static_range(VECTOR_LEN):
            cost -= tl.load(x_ptr + step * VECTOR_LEN + e) * tl.load(table_ptr + state * VECTOR_LEN + e)
        if WEIGHTED:
            cost *= tl.load(weight_ptr + step)
        cost = tl.reshape(cost + before, (OVERLAPS, BRANCHES))
        least = tl.min(cost, 1)
        best = tl.min(tl.where(cost == least[:, None], branch[None, :], BRANCHES), 1)
        tl.store(came_ptr + step * OVERLAPS + overlap, best.to(came_ptr.dtype.element_ty))
        # Through memory (the nearest cache) to every state that continues an overlap; two places, so that one barrier a step
        # is enough.
        place = reached_ptr + (step % 2) * OVERLAPS
        tl.store(place + overlap, least)
        tl.debug_barrier()
        before = tl.load(place + (state & (OVERLAPS - 1)))
    if HELD:
        last = tl.load(seam_ptr + program).to(tl.int32)
    else:
        last = tl.argmin(tl.load(reached_ptr + ((steps - 1) % 2) * OVERLAPS + overlap), 0)
    for back in tl.range(0, steps, num_stages=1):
        step = steps - 1 - back
        low = tl.load(came_ptr + step * OVERLAPS + last).to(tl.int32) & (BRANCHES - 1)
        found = (last << STEP_BITS) | low
        tl.store(state_ptr + step, found)
        last = found & (OVERLAPS - 1)
