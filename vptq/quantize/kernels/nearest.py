"""The nearest centroid of every vector in two passes, without a distance matrix.

First pass: scores from the tensor cores, tile after tile, and one running maximum for each lane of the tile, a single
instruction for two scores. A lane and its neighbour stand for a *group* of consecutive centroids; the best group wins.
Second pass: exact float32 distances inside the winning group, the first of equals; on the way the weighted error of each
vector and, in fixed point so that any order of adding gives the same bits, the sums of each cluster.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.fixed_point import FixedPointSums
from vptq.quantize.kernels.features import LANES, CentroidRows, Layout
from vptq.quantize.kernels.launch import num_programs, packed_maximum

ROWS = 128  # vectors a program of the first pass
REFINE_ROWS = 32
MINUS_INFINITY_TWICE = -67044352  # 0xFC00FC00: two float16 infinities in one register


def best_groups(rows: Tensor, centroids: CentroidRows, active: Tensor, groups: Tensor, layout: Layout) -> None:
    """First pass, in place: groups[b, i] of the batch entries in `active`.

    Args:
        rows: (B, n, width) float16. groups: (B, n) int32.
    """
    _, count, width = rows.shape
    _best_groups[(num_programs(count, ROWS), len(active))](
        rows, centroids.rows, active, groups, count, layout.supers,
        TILES=layout.tiles, WIDTH=width, ROWS=ROWS, LANES=LANES, PACKED=packed_maximum(),
        NOTHING=MINUS_INFINITY_TWICE, STAGES=4 if width == 16 else 3, num_warps=4,
    )  # fmt: skip


def nearest_in_group(
    vectors: Tensor,
    weights: Tensor,
    centroids: Tensor,
    rows: CentroidRows,
    active: Tensor,
    groups: Tensor,
    far: Tensor,
    assignments: Tensor,
    errors: Tensor,
    sums: FixedPointSums | None,
    layout: Layout,
    first: int = 0,
) -> None:
    """Second pass, in place: assignments and errors of the entries in `active`, and their cluster sums if wanted.

    Args:
        vectors: (B, n, v) float32. weights: (B, n) float32, or (B, n, v) where the layout is weighted.
        centroids: (B, k, v) float32, as they are in `rows`.
        far: (B, n) bool; such vectors are left to the caller.
        assignments: (B, total) int32, any centroids, kept where they are nearer than what is found. errors: (B, total)
            float32, the weighted squared distance. Both are written from column `first` on.
    """
    _, count, vector_len = vectors.shape
    products = totals = steps = None
    if sums is not None:
        products, steps = sums.products, sums.steps
        totals = sums.element_totals if layout.weighted else sums.totals
    _nearest_in_group[(num_programs(count, REFINE_ROWS), len(active))](
        vectors, weights, centroids, rows.grouped, active, groups, far, assignments, errors,
        products, totals, steps, sums.copies if sums is not None else 1,
        count, layout.num_centroids, assignments.shape[1], first,
        VECTOR_LEN=vector_len, GROUP=layout.group, PADDED=layout.padded, WEIGHTED=layout.weighted, SUMS=sums is not None,
        ROWS=REFINE_ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _halves_in_one(pair_first, pair_second):
    return tl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [pair_first, pair_second], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _maximum_of_halves(a, b):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _first_half(packed):
    return (packed & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _second_half(packed):
    return (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def best_group(
    features, rows_ptr, supers, FEATURES: tl.constexpr, TILES: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PACKED: tl.constexpr, NOTHING: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The group with the greatest score for each of `features` (ROWS, FEATURES): (ROWS,) int32. MANY tiles at a time."""
    WIDE: tl.constexpr = MANY * LANES
    source = rows_ptr + tl.arange(0, WIDE)[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    found = tl.zeros((ROWS,), tl.int32)
    for run in range(supers):
        if PACKED:
            lanes = tl.full((ROWS, WIDE // 2), NOTHING, tl.int32)
        else:
            lanes = tl.full((ROWS, WIDE // 2), float("-inf"), tl.float16)
        for step in tl.range(0, TILES // MANY, num_stages=STAGES):
            centroids = tl.load(source + (run * TILES + step * MANY) * (LANES * FEATURES))
            scores = tl.dot(features, centroids.T, out_dtype=tl.float16)
            first, second = tl.split(tl.reshape(scores, (ROWS, WIDE // 2, 2)))
            if PACKED:
                lanes = _maximum_of_halves(lanes, _halves_in_one(first, second))
            else:
                lanes = tl.maximum(lanes, tl.maximum(first, second))
        if PACKED:
            reached = tl.maximum(_first_half(lanes), _second_half(lanes)).to(tl.float32)
        else:
            reached = lanes.to(tl.float32)
        if MANY > 1:
            reached = tl.max(tl.reshape(reached, (ROWS, MANY, LANES // 2)), 1)
        value, lane = tl.max(reached, 1, return_indices=True, return_indices_tie_break_left=True)
        better = value > best
        found = tl.where(better, run * (LANES // 2) + lane, found)
        best = tl.where(better, value, best)
    return found


@triton.jit
def _best_groups(
    rows_ptr, centroids_ptr, active_ptr, groups_ptr, count, supers,
    TILES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr,
    NOTHING: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    entry = tl.load(active_ptr + tl.program_id(1)).to(tl.int64)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = rows_ptr + (entry * count + number)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    vectors = tl.load(source, mask=number[:, None] < count, other=0.0)
    centroids_ptr += entry * supers * (TILES * LANES * WIDTH)
    found = best_group(vectors, centroids_ptr, supers, WIDTH, TILES, 1, ROWS, LANES, PACKED, NOTHING, STAGES)
    tl.store(groups_ptr + entry * count + number, found, mask=number < count)


@triton.jit
def _nearest_in_group(
    x_ptr, w_ptr, c_ptr, grouped_ptr, active_ptr, groups_ptr, far_ptr, assignments_ptr, errors_ptr,
    sums_ptr, totals_ptr, steps_ptr, copies,
    count, num_centroids, total, first,
    VECTOR_LEN: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, WEIGHTED: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    entry = tl.load(active_ptr + tl.program_id(1)).to(tl.int64)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    vector = entry * count + number
    near = number < count
    near = near & (tl.load(far_ptr + vector, mask=near, other=1) == 0)
    group = tl.load(groups_ptr + vector, mask=near, other=0)
    member = tl.arange(0, GROUP)
    centroids = grouped_ptr + (entry * PADDED + group * GROUP)[:, None] * VECTOR_LEN + member[None, :]
    distances = tl.zeros((ROWS, GROUP), tl.float32)
    for e in tl.static_range(VECTOR_LEN):
        x = tl.load(x_ptr + vector * VECTOR_LEN + e, mask=near, other=0.0)
        apart = x[:, None] - tl.load(centroids + e * GROUP)
        if WEIGHTED:
            w = tl.load(w_ptr + vector * VECTOR_LEN + e, mask=near, other=0.0)
            distances += w[:, None] * (apart * apart)
        else:
            distances += apart * apart
    error, member_number = tl.min(distances, 1, return_indices=True, return_indices_tie_break_left=True)
    # A vector without weight is as near to the room behind the last centroid as to any.
    nearest = tl.minimum(group * GROUP + member_number, num_centroids - 1)
    place = entry * total + first + number
    # Where the first pass was wrong, the last centroid may be the nearer one still: so that the objective never rises.
    last = tl.load(assignments_ptr + place, mask=near, other=0)
    last_error = tl.zeros((ROWS,), tl.float32)
    for e in tl.static_range(VECTOR_LEN):
        x = tl.load(x_ptr + vector * VECTOR_LEN + e, mask=near, other=0.0)
        apart = x - tl.load(c_ptr + (entry * num_centroids + last) * VECTOR_LEN + e, mask=near, other=0.0)
        if WEIGHTED:
            w = tl.load(w_ptr + vector * VECTOR_LEN + e, mask=near, other=0.0)
            last_error += w * (apart * apart)
        else:
            last_error += apart * apart
    nearest = tl.where(last_error < error, last, nearest)
    error = tl.minimum(error, last_error)
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if not WEIGHTED:
        weight = tl.load(w_ptr + vector, mask=near, other=0.0)
    tl.store(assignments_ptr + place, nearest, mask=near)
    tl.store(errors_ptr + place, error * weight, mask=near)
    if SUMS:
        cluster = (entry * copies + tl.program_id(0) % copies) * num_centroids + nearest
        product_step = tl.load(steps_ptr + 2 * entry)
        weight_step = tl.load(steps_ptr + 2 * entry + 1)
        for e in tl.static_range(VECTOR_LEN):
            x = tl.load(x_ptr + vector * VECTOR_LEN + e, mask=near, other=0.0)
            w = weight
            if WEIGHTED:
                w = tl.load(w_ptr + vector * VECTOR_LEN + e, mask=near, other=0.0)
                term = tl.floor(w.to(tl.float64) * weight_step + 0.5).to(tl.int64)
                tl.atomic_add(totals_ptr + cluster * VECTOR_LEN + e, term, mask=near, sem="relaxed")
            product = tl.floor((w * x).to(tl.float64) * product_step + 0.5).to(tl.int64)
            tl.atomic_add(sums_ptr + cluster * VECTOR_LEN + e, product, mask=near, sem="relaxed")
        if not WEIGHTED:
            term = tl.floor(weight.to(tl.float64) * weight_step + 0.5).to(tl.int64)
            tl.atomic_add(totals_ptr + cluster, term, mask=near, sem="relaxed")
