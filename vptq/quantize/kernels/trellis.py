"""The Viterbi algorithm of `quantize.trellis`, and the sweep of a block of columns with it: a program a ring.

All states are in the registers of a program, those that lead to an overlap with one thread. From step to step the least cost of
every overlap changes threads, since the states that continue it are with others; the choices of the last steps travel with it
as one word, so that following the best path back takes one read for a word's worth of steps.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.kernels.launch import current_device

TILE_NUMBERS = 2048  # of the columns still to come that are updated at once
WORD_BITS = 32


def viterbi_by_kernel(
    sequences: Tensor, weights: Tensor | None, table: Tensor, state_bits: int, step_bits: int, seam: Tensor | None
) -> Tensor:
    """See `trellis.viterbi`. sequences: (n, steps, vector_len) float32; returns (n, steps) int32 states."""
    count, steps, vector_len = sequences.shape
    states = torch.empty(count, steps, dtype=torch.int32, device=table.device)
    own_weights = weights is not None and weights.ndim == 2
    with current_device(table):
        _viterbi[(count,)](
            sequences.contiguous(), sequences if weights is None else weights.contiguous(), table.contiguous(),
            sequences if seam is None else seam.int().contiguous(), _one(table.device),
            _history(count, steps, state_bits, step_bits, table.device), states, steps,
            VECTOR_LEN=vector_len, STATE_BITS=state_bits, STEP_BITS=step_bits, WEIGHTED=weights is not None,
            OWN_WEIGHTS=own_weights, HELD=seam is not None, num_warps=_warps(state_bits, step_bits, vector_len),
        )  # fmt: skip
    return states


def sweep_rings_by_kernel(
    remaining: Tensor, inv_chols: Tensor, table: Tensor, state_bits: int, step_bits: int, ring_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a block of columns one after the other, each corrected for the errors of those before it.

    Args:
        remaining: (B, columns, rows) float32, what is to be quantized; modified in place, rows in one run of memory.
        inv_chols: (B or 1, columns, columns) float32, upper: the block's part of U.
        table: (2^L, vector_len) float32; rows are a multiple of vector_len.
    Returns:
        quantized and errors over U's diagonal, (B, columns, rows) float32, and states, (B, columns, vectors) int32, with
        those of the padding that makes rows whole rings.
    """
    problems, columns, rows = remaining.shape
    vector_len = table.shape[1]
    rings = -(-rows // (ring_len * vector_len))
    quantized, errors = (torch.empty(problems, columns, rows, device=table.device) for _ in range(2))
    states = torch.empty(problems, columns, rings * ring_len, dtype=torch.int32, device=table.device)
    factors = inv_chols.contiguous()
    span = triton.next_power_of_2(ring_len * vector_len)
    with current_device(table):
        _sweep_rings[(problems * rings,)](
            remaining, factors, table.contiguous(), _one(table.device),
            _history(problems * rings, ring_len, state_bits, step_bits, table.device), states, quantized, errors,
            rings, rows, columns, ring_len, remaining.stride(0), remaining.stride(1),
            factors.stride(0) if len(factors) > 1 else 0, factors.stride(1),
            VECTOR_LEN=vector_len, STATE_BITS=state_bits, STEP_BITS=step_bits,
            PADDED=rows % (ring_len * vector_len) > 0, SPAN=span, TILE=max(1, TILE_NUMBERS // span),
            num_warps=_warps(state_bits, step_bits, vector_len),
        )  # fmt: skip
    return quantized, errors, states


def _warps(state_bits: int, step_bits: int, vector_len: int) -> int:
    """No more threads than overlaps, so that each has all branches of one, and as few as hold their states in registers."""
    overlaps = 1 << (state_bits - step_bits)
    enough = 4 if state_bits <= 12 and (step_bits > 3 or vector_len > 1) else 8
    return max(min(overlaps // 32, enough), (1 << state_bits) // 2048, 1)


@functools.lru_cache(maxsize=16)
def _one(device: torch.device) -> Tensor:
    """A factor that the compiler can't see is one: places times it are in no order that it knows of, so it leaves numbers
    with the threads that have them, where it would exchange them to write in runs of four."""
    return torch.ones(1, dtype=torch.int32, device=device)


def _history(count: int, steps: int, state_bits: int, step_bits: int, device: torch.device) -> Tensor:
    """Room for the words of choices of each overlap."""
    words = -(-steps // (WORD_BITS // step_bits))
    return torch.empty(count, words, 1 << (state_bits - step_bits), dtype=torch.int32, device=device)


@triton.jit
def _cheaper(cost, carried, other_cost, other_carried):
    """Of two paths the one with the lower cost, the first of equals; with what it carries."""
    other = other_cost < cost
    return tl.where(other, other_cost, cost), tl.where(other, other_carried, carried)


@triton.jit
def _of_cheapest(cost, carried, OVERLAPS: tl.constexpr):
    """What the cheapest of all overlaps carries (int32 >= 0), the least of equals."""
    bits = cost.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    packed = (ordered.to(tl.int64) << 32) | carried.to(tl.int64)
    return tl.min(tl.reshape(packed, (OVERLAPS,)), 0).to(tl.int32)


@triton.jit
def _overlaps(STATE_BITS: tl.constexpr, STEP_BITS: tl.constexpr):
    """0 to 2^(L-b) - 1 as (middle, high) bits."""
    OVERLAPS: tl.constexpr = 1 << (STATE_BITS - STEP_BITS)
    MIDDLES: tl.constexpr = OVERLAPS >> STEP_BITS if OVERLAPS >> STEP_BITS > 0 else 1
    return tl.arange(0, OVERLAPS // MIDDLES)[None, :] * MIDDLES + tl.arange(0, MIDDLES)[:, None]


@triton.jit
def _walk(
    x_ptr, weight_ptr, table_ptr, one_ptr, history_ptr, steps, there, shift, mark, seam,
    VECTOR_LEN: tl.constexpr, STATE_BITS: tl.constexpr, STEP_BITS: tl.constexpr, WEIGHTED: tl.constexpr,
    PADDED: tl.constexpr, HELD: tl.constexpr, TRACED: tl.constexpr,
):  # fmt: skip
    """Forward over a ring from place `shift` on. Returns for each overlap, (middles, highs), the least cost, and what its path
    carries: the last choices (TRACED), or the overlap it passed after step `mark`."""
    OVERLAPS: tl.constexpr = 1 << (STATE_BITS - STEP_BITS)
    BRANCHES: tl.constexpr = 1 << STEP_BITS
    MIDDLES: tl.constexpr = OVERLAPS // BRANCHES if OVERLAPS > BRANCHES else 1
    HIGHS: tl.constexpr = OVERLAPS // MIDDLES
    SYMBOLS: tl.constexpr = 32 // STEP_BITS
    # A state is (high, middle, branch) bits, the overlap it leads to (high, middle), the one it continues (middle, branch).
    middle, branch = tl.arange(0, MIDDLES), tl.arange(0, BRANCHES)
    one = tl.load(one_ptr)
    overlap = _overlaps(STATE_BITS, STEP_BITS)
    entry_ptr = table_ptr + (overlap[:, :, None] * BRANCHES + branch[None, None, :]) * (one * VECTOR_LEN)
    first = tl.load(entry_ptr)
    half = first * first * 0.5
    second = first
    if VECTOR_LEN > 1:
        second = tl.load(entry_ptr + 1)
        half += second * second * 0.5
    for e in tl.static_range(2, VECTOR_LEN):
        centroid = tl.load(entry_ptr + e)
        half += centroid * centroid * 0.5
    before = tl.zeros((MIDDLES, 1, BRANCHES), dtype=tl.float32)
    if HELD:
        continued = (middle[:, None, None] * BRANCHES + branch[None, None, :]) & (OVERLAPS - 1)
        before = tl.where(continued == seam, 0.0, float("inf"))
    carried = tl.zeros((MIDDLES, 1, BRANCHES), dtype=tl.int32)
    least = tl.zeros((MIDDLES, HIGHS), dtype=tl.float32)
    told = tl.zeros((MIDDLES, HIGHS), dtype=tl.int32)
    at = shift
    x = tl.load(x_ptr + at * VECTOR_LEN, mask=at < there, other=0.0)
    for step in tl.range(0, steps, num_stages=1):
        cost = half - x * first
        if VECTOR_LEN > 1:
            cost -= tl.load(x_ptr + at * VECTOR_LEN + 1, mask=at < there, other=0.0) * second
        for e in tl.static_range(2, VECTOR_LEN):
            cost -= tl.load(x_ptr + at * VECTOR_LEN + e, mask=at < there, other=0.0) * tl.load(entry_ptr + e)
        if WEIGHTED:
            cost *= tl.load(weight_ptr + at)
        if PADDED:
            cost = tl.where(at < there, cost, 0.0)
        following = tl.where(at + 1 >= steps, 0, at + 1)
        x = tl.load(x_ptr + following * VECTOR_LEN, mask=following < there, other=0.0)  # on its way while this step is taken
        at = following
        cost += before
        if TRACED:
            carried = (carried << STEP_BITS) | branch[None, None, :]
        least, told = tl.reduce((cost, tl.broadcast_to(carried, cost.shape)), 2, _cheaper)
        if TRACED:
            if (step + 1 == steps) | (step % SYMBOLS == SYMBOLS - 1):
                tl.store(history_ptr + (step // SYMBOLS) * OVERLAPS + overlap * one, told)
        else:
            told = tl.where(step == mark, overlap, told)
        # Overlap (high, middle) is what some states continue as (middle, branch): the same bits, otherwise cut. Both numbers
        # change threads as one.
        both = (least.to(tl.int32, bitcast=True).to(tl.int64) << 32) | told.to(tl.uint32, bitcast=True).to(tl.int64)
        if OVERLAPS > BRANCHES:
            both = tl.reshape(tl.trans(both), (MIDDLES, BRANCHES))[:, None, :]
        else:
            both = tl.reshape(tl.broadcast_to(both, (BRANCHES // OVERLAPS, OVERLAPS)), (1, 1, BRANCHES))
        before = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        carried = both.to(tl.int32)
    return least, told


@triton.jit
def _trace(history_ptr, state_ptr, last, steps, STATE_BITS: tl.constexpr, STEP_BITS: tl.constexpr):
    """Write down the path that ends in overlap `last`."""
    OVERLAPS: tl.constexpr = 1 << (STATE_BITS - STEP_BITS)
    BRANCHES: tl.constexpr = 1 << STEP_BITS
    SYMBOLS: tl.constexpr = 32 // STEP_BITS
    words = (steps + SYMBOLS - 1) // SYMBOLS
    for back in tl.range(0, words, num_stages=1):
        word = words - 1 - back
        choices = tl.load(history_ptr + word * OVERLAPS + last)
        count = tl.minimum(steps - word * SYMBOLS, SYMBOLS)
        for i in tl.range(0, count, num_stages=1):
            found = (last << STEP_BITS) | (choices & (BRANCHES - 1))
            tl.store(state_ptr + word * SYMBOLS + count - 1 - i, found)
            choices = choices >> STEP_BITS
            last = found & (OVERLAPS - 1)


@triton.jit
def _viterbi(
    x_ptr, weight_ptr, table_ptr, seam_ptr, one_ptr, history_ptr, state_ptr, steps,
    VECTOR_LEN: tl.constexpr, STATE_BITS: tl.constexpr, STEP_BITS: tl.constexpr, WEIGHTED: tl.constexpr,
    OWN_WEIGHTS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    OVERLAPS: tl.constexpr = 1 << (STATE_BITS - STEP_BITS)
    SYMBOLS: tl.constexpr = 32 // STEP_BITS
    x_ptr += program * steps * VECTOR_LEN
    history_ptr += program * ((steps + SYMBOLS - 1) // SYMBOLS) * OVERLAPS
    if OWN_WEIGHTS:
        weight_ptr += program * steps
    seam = 0
    if HELD:
        seam = tl.load(seam_ptr + program).to(tl.int32)
    least, _ = _walk(
        x_ptr, weight_ptr, table_ptr, one_ptr, history_ptr, steps, steps, 0, 0, seam,
        VECTOR_LEN, STATE_BITS, STEP_BITS, WEIGHTED, False, HELD, True,
    )  # fmt: skip
    tl.debug_barrier()
    last = seam
    if not HELD:
        last = _of_cheapest(least, _overlaps(STATE_BITS, STEP_BITS), OVERLAPS)
    _trace(history_ptr, state_ptr + program * steps, last, steps, STATE_BITS, STEP_BITS)


@triton.jit
def _sweep_rings(
    left_ptr, chol_ptr, table_ptr, one_ptr, history_ptr, state_ptr, quantized_ptr, error_ptr,
    rings, rows, columns, steps, left_problem, left_column, chol_problem, chol_row,
    VECTOR_LEN: tl.constexpr, STATE_BITS: tl.constexpr, STEP_BITS: tl.constexpr, PADDED: tl.constexpr,
    SPAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    problem, ring = program // rings, (program % rings).to(tl.int32)
    OVERLAPS: tl.constexpr = 1 << (STATE_BITS - STEP_BITS)
    SYMBOLS: tl.constexpr = 32 // STEP_BITS
    first = ring * steps * VECTOR_LEN
    left_ptr += problem * left_problem + first
    chol_ptr += problem * chol_problem
    history_ptr += program * ((steps + SYMBOLS - 1) // SYMBOLS) * OVERLAPS
    out = problem * columns * rows + first
    own = tl.arange(0, SPAN)
    here = (own < steps * VECTOR_LEN) & (first + own < rows)
    there = (rows - first) // VECTOR_LEN  # whole vectors before the padding
    half = steps // 2
    for column in tl.range(0, columns, num_stages=1):
        x_ptr = left_ptr + column * left_column
        # First freely, cut at the far side: what passes at the seam. Then exactly, the seam held to that.
        least, told = _walk(
            x_ptr, x_ptr, table_ptr, one_ptr, history_ptr, steps, there, half, steps - half - 1, 0,
            VECTOR_LEN, STATE_BITS, STEP_BITS, False, PADDED, False, False,
        )  # fmt: skip
        seam = _of_cheapest(least, told, OVERLAPS)
        _walk(
            x_ptr, x_ptr, table_ptr, one_ptr, history_ptr, steps, there, 0, 0, seam,
            VECTOR_LEN, STATE_BITS, STEP_BITS, False, PADDED, True, True,
        )  # fmt: skip
        tl.debug_barrier()
        found_ptr = state_ptr + ((problem * columns + column) * rings + ring) * steps
        _trace(history_ptr, found_ptr, seam, steps, STATE_BITS, STEP_BITS)
        tl.debug_barrier()
        states = tl.load(found_ptr + own // VECTOR_LEN, mask=here, other=0)
        values = tl.load(table_ptr + states * VECTOR_LEN + own % VECTOR_LEN, mask=here, other=0.0)
        target = tl.load(x_ptr + own, mask=here, other=0.0)
        error = (target - values) / tl.load(chol_ptr + column * chol_row + column)
        tl.store(quantized_ptr + out + column * rows + own, values, mask=here)
        tl.store(error_ptr + out + column * rows + own, error, mask=here)
        for start in tl.range(column + 1, columns, TILE, num_stages=1):
            coming = start + tl.arange(0, TILE)
            factor = tl.load(chol_ptr + column * chol_row + coming, mask=coming < columns, other=0.0)
            tile_ptr = left_ptr + coming[:, None] * left_column + own[None, :]
            inside = (coming < columns)[:, None] & here[None, :]
            tile = tl.load(tile_ptr, mask=inside, other=0.0)
            tl.store(tile_ptr, tile - factor[:, None] * error[None, :], mask=inside)
        tl.debug_barrier()
