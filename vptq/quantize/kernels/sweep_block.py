"""One block of columns of the sweep in one launch.

Rows don't see each other: a program takes 16 vectors of a column, or 16 rows where vectors run along inputs, keeps their
part of the block in registers, and goes through the columns by itself. Each unit is: take the column out, find the nearest
centroid (float16 scores for the group, exact float32 distances inside it, as in `kernels.nearest`), the residual one too,
divide by U_tt, and subtract the error times U's row from what is still to come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.kernels.features import FAR_VECTOR, LANES, CentroidRows, Frame, Layout, choose_layout, make_frame
from vptq.quantize.kernels.launch import num_programs, packed_maximum, register_width
from vptq.quantize.kernels.nearest import MINUS_INFINITY_TWICE, best_group

ROWS = 16  # vectors a program: the least the tensor cores take


@dataclass(frozen=True)
class Stage:
    """One codebook, ready to be searched.

    Attributes:
        centroids: (L, k, v) float32, of L linears; what is subtracted.
        rows: what is searched, (L * sets, ...): set s of linear l is entry l * sets + s. Vectors along outputs: set 0 is the
            codebook, set 1, where there is padding, the same without the padded elements. Along inputs: one a tile.
    """

    centroids: Tensor
    layout: Layout
    frame: Frame
    rows: CentroidRows
    sets: int


def make_stage(centroids: Tensor, searched: Tensor) -> Stage:
    """Prepare a codebook. centroids: (L, k, v); searched: (L, sets, k, v), what distances are taken to; float32."""
    linears, sets, num_centroids, vector_len = searched.shape
    layout = choose_layout(vector_len, num_centroids, weighted=False)
    searched = searched.reshape(linears * sets, num_centroids, vector_len)
    frame = make_frame(searched)
    rows = CentroidRows.empty(linears * sets, layout, centroids.device)
    rows.fill(searched, torch.arange(linears * sets, dtype=torch.int32, device=centroids.device), frame, layout)
    return Stage(centroids.contiguous(), layout, frame, rows, sets)


def sweep_block_out(
    remaining: Tensor,
    inv_chol: Tensor,
    errors: Tensor,
    stages: list[Stage],
    indices: list[Tensor],
    first: int,
    start: int,
    end: int,
) -> None:
    """Columns [start, end), vectors along outputs. In place: errors[..., start:end] and the indices.

    Args:
        remaining, errors: (L, out, in) float32. inv_chol: (L, in, in) float32.
        indices: a stage: (L, rows, columns) int32, written from column start - first on.
    """
    out_features, vector_len = remaining.shape[1], stages[0].layout.vector_len
    full, padded = divmod(out_features, vector_len)
    full_programs = num_programs(full, ROWS)
    programs, width = full_programs + bool(padded), register_width(vector_len)
    own = (start - first, full, full_programs)
    _launch(_sweep_out, programs, width, remaining, inv_chol, errors, stages, indices, start, end, own)


def sweep_block_in(
    remaining: Tensor,
    inv_chol: Tensor,
    inverse_tiles: Tensor,
    errors: Tensor,
    stages: list[Stage],
    indices: list[Tensor],
    first: int,
    start: int,
    end: int,
) -> None:
    """Columns [start, end), vectors along inputs: as `sweep_block_out`.

    Args:
        inverse_tiles: (L, tiles, width, width) float32, U_tt⁻¹ of each tile of the block, zero-padded to a power of two.
        indices: a stage: (L, rows, tiles of the segment) int32, written from tile (start - first) / v on.
    """
    programs, width = num_programs(remaining.shape[1], ROWS), inverse_tiles.shape[-1]
    own = ((start - first) // stages[0].layout.vector_len, inverse_tiles.shape[1], inverse_tiles)
    _launch(_sweep_in, programs, width, remaining, inv_chol, errors, stages, indices, start, end, own)


def _launch(
    kernel: triton.JITFunction,
    programs: int,
    width: int,
    remaining: Tensor,
    inv_chol: Tensor,
    errors: Tensor,
    stages: list[Stage],
    indices: list[Tensor],
    start: int,
    end: int,
    own: tuple[int | Tensor, ...],
) -> None:
    """Launch `programs` for each linear. own: the arguments that only this kernel has, its last ones."""
    linears, out_features, in_features = remaining.shape
    scratch = torch.empty(linears * programs, ROWS, width, device=remaining.device)
    kernel[(programs, linears)](
        remaining, inv_chol, errors, scratch, *_stage_arguments(stages, indices),
        out_features, in_features, start, end, *own,
        **_constants(stages, width, end - start), num_warps=8,
    )  # fmt: skip


def _stage_arguments(stages: list[Stage], indices: list[Tensor]) -> list[Tensor | int]:
    """Pointers of both stages; the first stands in for a residual stage that is not there."""
    found: list[Tensor | int] = [stages[0].sets, indices[0].shape[1], indices[0].shape[2]]
    for number in (0, min(1, len(stages) - 1)):
        stage = stages[number]
        found += [stage.rows.rows, stage.rows.grouped, stage.centroids, stage.frame.centre, stage.frame.scale]
        found += [indices[number], stage.layout.num_centroids, stage.layout.supers]
    return found


def _constants(stages: list[Stage], width: int, columns: int) -> dict[str, object]:
    main, residual = stages[0].layout, stages[-1].layout
    return {
        "VECTOR_LEN": main.vector_len, "WIDTH": width, "COLUMNS": triton.next_power_of_2(columns), "ROWS": ROWS,
        "FEATURES": main.width, "ELEMENTS": main.elements, "SPLIT": main.split, "TILES": main.tiles,
        "RESIDUAL_TILES": residual.tiles,
        "RESIDUAL": len(stages) > 1, "LANES": LANES, "PACKED": packed_maximum(), "NOTHING": MINUS_INFINITY_TWICE,
        "FAR": FAR_VECTOR,
    }  # fmt: skip


@triton.jit
def _features(
    x, scratch, centre_ptr, scale, VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    ELEMENTS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x (ROWS, WIDTH) as float16 rows, as in `features.vector_rows`, and their squared norms. x is in `scratch` too."""
    row, element, column = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    OF_X: tl.constexpr = (3 if SPLIT else 1) * ELEMENTS
    run, place = column // 16, column % 16
    part, source = place // ELEMENTS, run * ELEMENTS + place % ELEMENTS
    of_x = (place < OF_X) & (source < VECTOR_LEN)
    values = tl.load(scratch + row[:, None] * WIDTH + source[None, :], mask=of_x[None, :], other=0.0, volatile=True)
    values = (values - tl.load(centre_ptr + source, mask=of_x, other=0.0)[None, :]) * scale
    high = values.to(tl.float16).to(tl.float32)
    if SPLIT:
        high = tl.where((part == 1)[None, :], values - high, high)
    real = element < VECTOR_LEN
    centred = (x - tl.load(centre_ptr + element, mask=real, other=0.0)[None, :]) * scale
    squares = tl.where(real[None, :], centred * centred, 0.0)
    features = tl.where(of_x[None, :], high, 0.0)
    for number in tl.static_range((VECTOR_LEN + ELEMENTS - 1) // ELEMENTS):
        norm = -0.5 * tl.sum(tl.where((element // ELEMENTS == number)[None, :], squares, 0.0), 1)
        top = norm.to(tl.float16).to(tl.float32)
        here = run == number
        features = tl.where((here & (place >= OF_X) & (place < OF_X + 2))[None, :], 1.0, features)
        features = tl.where((here & (place == OF_X + 2))[None, :], top[:, None], features)
        features = tl.where((here & (place == OF_X + 3))[None, :], (norm - top)[:, None], features)
    return features.to(tl.float16), tl.sum(squares, 1)


@triton.jit
def _nearest_of_group(
    scratch, grouped_ptr, group, VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """Least squared distance inside each row's group, and its place there: (ROWS,) float32, (ROWS,) int32."""
    row, member = tl.arange(0, ROWS), tl.arange(0, GROUP)
    centroids = grouped_ptr + (group * (GROUP * VECTOR_LEN))[:, None] + member[None, :]
    distances = tl.zeros((ROWS, GROUP), tl.float32)
    for e in tl.static_range(VECTOR_LEN):
        x = tl.load(scratch + row * WIDTH + e, volatile=True)
        apart = x[:, None] - tl.load(centroids + e * GROUP)
        distances += apart * apart
    return tl.min(distances, 1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _search(
    x, there, scratch, rows_ptr, grouped_ptr, centre_ptr, scale_ptr, num_centroids, supers, entry,
    VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, ELEMENTS: tl.constexpr,
    SPLIT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr,
    NOTHING: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Index of the nearest centroid of each row of x (ROWS, WIDTH) that is `there`; the first of equals.

    `entry`: which set of centroids.
    """
    GROUP: tl.constexpr = 2 * TILES
    padded = supers * (TILES * LANES)
    grouped_ptr += entry * padded * VECTOR_LEN
    row, element = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tl.debug_barrier()  # all have read what is there from the last time
    tl.store(scratch + row[:, None] * WIDTH + element[None, :], x)
    tl.debug_barrier()
    features, square = _features(
        x,
        scratch,
        centre_ptr + entry * VECTOR_LEN,
        tl.load(scale_ptr + entry),
        VECTOR_LEN,
        WIDTH,
        FEATURES,
        ELEMENTS,
        SPLIT,
        ROWS,
    )
    MANY: tl.constexpr = TILES if TILES < 4 else 4
    rows_ptr += entry * padded * FEATURES
    group = best_group(features, rows_ptr, supers, FEATURES, TILES, MANY, ROWS, LANES, PACKED, NOTHING, 3)
    least, place = _nearest_of_group(scratch, grouped_ptr, group, VECTOR_LEN, WIDTH, GROUP, ROWS)
    found = group * GROUP + place
    far = there & (square > FAR * FAR)
    if tl.max(far.to(tl.int32), 0) > 0:  # beyond float16: every group, exactly
        least = tl.full((ROWS,), float("inf"), tl.float32)
        for number in range(supers * (LANES // 2)):
            reached, place = _nearest_of_group(scratch, grouped_ptr, group * 0 + number, VECTOR_LEN, WIDTH, GROUP, ROWS)
            better = far & (reached < least)
            found = tl.where(better, number * GROUP + place, found)
            least = tl.where(better, reached, least)
    return tl.minimum(found, num_centroids - 1)


@triton.jit
def _choose(
    searched, rest, there, kept, place, linear, entry, scratch,
    rows_ptr, grouped_ptr, book_ptr, centre_ptr, scale_ptr, index_ptr, num_centroids, supers,
    VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, ELEMENTS: tl.constexpr,
    SPLIT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr,
    NOTHING: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One stage: find the centroids nearest to `searched`, store their indices, and take them off `rest`.

    searched, rest: (ROWS, WIDTH); there: (ROWS,), rows that are; kept: elements that are; place: (ROWS,) of the indices.
    """
    found = _search(
        searched, there, scratch, rows_ptr, grouped_ptr, centre_ptr, scale_ptr, num_centroids, supers, entry,
        VECTOR_LEN, WIDTH, FEATURES, ELEMENTS, SPLIT, TILES, ROWS, LANES, PACKED, NOTHING, FAR,
    )  # fmt: skip
    tl.store(index_ptr + place, found, mask=there)
    book = book_ptr + (linear * num_centroids + found)[:, None] * VECTOR_LEN + tl.arange(0, WIDTH)[None, :]
    return tl.where(kept, rest - tl.load(book, mask=kept, other=0.0), 0.0)


@triton.jit
def _sweep_out(
    w_ptr, u_ptr, e_ptr, scratch, sets, index_rows, index_columns,
    rows_ptr, grouped_ptr, book_ptr, centre_ptr, scale_ptr, index_ptr, num_centroids, supers,
    rows2_ptr, grouped2_ptr, book2_ptr, centre2_ptr, scale2_ptr, index2_ptr, num_centroids2, supers2,
    out_features, in_features, start, end, index_start, full, full_programs,
    VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    ELEMENTS: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr, RESIDUAL_TILES: tl.constexpr, RESIDUAL: tl.constexpr,
    LANES: tl.constexpr, PACKED: tl.constexpr, NOTHING: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    program, linear = tl.program_id(0), tl.program_id(1).to(tl.int64)
    scratch += (linear * tl.num_programs(0) + program) * (ROWS * WIDTH)
    w_ptr += linear * out_features * in_features
    e_ptr += linear * out_features * in_features
    u_ptr += linear * in_features * in_features
    padding = program >= full_programs  # the last program has the one row of vectors that is not whole
    first = tl.where(padding, full, program * ROWS)
    limit = tl.where(padding, full + 1, full)
    entry = linear * sets + padding
    row, element, column = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    flat = tl.arange(0, ROWS * WIDTH)
    flat_row = (first + flat // WIDTH) * VECTOR_LEN + flat % WIDTH
    flat_valid = (first + flat // WIDTH < limit) & (flat % WIDTH < VECTOR_LEN) & (flat_row < out_features)
    vector = first + row
    out_row = vector[:, None] * VECTOR_LEN + element[None, :]
    valid = (vector < limit)[:, None] & (element < VECTOR_LEN)[None, :] & (out_row < out_features)
    inside = start + column < end
    block = tl.load(
        w_ptr + flat_row.to(tl.int64)[:, None] * in_features + start + column[None, :],
        mask=flat_valid[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    for j in tl.range(0, end - start, num_stages=1):
        x = tl.reshape(tl.sum(tl.where((column == j)[None, :], block, 0.0), 1), (ROWS, WIDTH))
        place = (linear * index_rows + vector) * index_columns + index_start + j
        x = _choose(
            x, x, vector < limit, valid, place, linear, entry, scratch,
            rows_ptr, grouped_ptr, book_ptr, centre_ptr, scale_ptr, index_ptr, num_centroids, supers,
            VECTOR_LEN, WIDTH, FEATURES, ELEMENTS, SPLIT, TILES, ROWS, LANES, PACKED, NOTHING, FAR,
        )  # fmt: skip
        if RESIDUAL:
            x = _choose(
                x, x, vector < limit, valid, place, linear, entry, scratch,
                rows2_ptr, grouped2_ptr, book2_ptr, centre2_ptr, scale2_ptr, index2_ptr, num_centroids2, supers2,
                VECTOR_LEN, WIDTH, FEATURES, ELEMENTS, SPLIT, RESIDUAL_TILES, ROWS, LANES, PACKED, NOTHING, FAR,
            )  # fmt: skip
        u_row = u_ptr + (start + j).to(tl.int64) * in_features + start
        error = x / tl.load(u_row + j)
        tl.store(e_ptr + out_row.to(tl.int64) * in_features + start + j, error, mask=valid)
        coming = tl.load(u_row + column, mask=inside, other=0.0)
        block -= tl.reshape(error, (ROWS * WIDTH,))[:, None] * coming[None, :]


@triton.jit
def _sweep_in(
    w_ptr, u_ptr, e_ptr, scratch, sets, index_rows, index_columns,
    rows_ptr, grouped_ptr, book_ptr, centre_ptr, scale_ptr, index_ptr, num_centroids, supers,
    rows2_ptr, grouped2_ptr, book2_ptr, centre2_ptr, scale2_ptr, index2_ptr, num_centroids2, supers2,
    out_features, in_features, start, end, index_start, tiles, inverse_ptr,
    VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    ELEMENTS: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr, RESIDUAL_TILES: tl.constexpr, RESIDUAL: tl.constexpr,
    LANES: tl.constexpr, PACKED: tl.constexpr, NOTHING: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    program, linear = tl.program_id(0), tl.program_id(1).to(tl.int64)
    scratch += (linear * tl.num_programs(0) + program) * (ROWS * WIDTH)
    w_ptr += linear * out_features * in_features
    e_ptr += linear * out_features * in_features
    u_ptr += linear * in_features * in_features
    element, column = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    row = program * ROWS + tl.arange(0, ROWS)
    valid = row < out_features
    inside = start + column < end
    block = tl.load(
        w_ptr + row.to(tl.int64)[:, None] * in_features + start + column[None, :],
        mask=valid[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    for tile in tl.range(0, tiles, num_stages=1):
        entry = linear * sets + tile
        taken = (column[:, None] == tile * VECTOR_LEN + element[None, :]) & (element < VECTOR_LEN)[None, :]
        left = tl.sum(tl.where(taken[None, :, :], block[:, :, None], 0.0), 1)
        there = (element < VECTOR_LEN) & (start + tile * VECTOR_LEN + element < end)
        inverse = inverse_ptr + (linear * tiles + tile) * (WIDTH * WIDTH)
        inverse = tl.load(inverse + element[:, None] * WIDTH + element[None, :])
        place = (linear * index_rows + row) * index_columns + index_start + tile
        left = _choose(
            tl.sum(left[:, :, None] * inverse[None, :, :], 1), left, valid, there[None, :], place, linear, entry, scratch,
            rows_ptr, grouped_ptr, book_ptr, centre_ptr, scale_ptr, index_ptr, num_centroids, supers,
            VECTOR_LEN, WIDTH, FEATURES, ELEMENTS, SPLIT, TILES, ROWS, LANES, PACKED, NOTHING, FAR,
        )  # fmt: skip
        if RESIDUAL:
            left = _choose(
                tl.sum(left[:, :, None] * inverse[None, :, :], 1), left, valid, there[None, :], place, linear, entry, scratch,
                rows2_ptr, grouped2_ptr, book2_ptr, centre2_ptr, scale2_ptr, index2_ptr, num_centroids2, supers2,
                VECTOR_LEN, WIDTH, FEATURES, ELEMENTS, SPLIT, RESIDUAL_TILES, ROWS, LANES, PACKED, NOTHING, FAR,
            )  # fmt: skip
        error = tl.sum(left[:, :, None] * inverse[None, :, :], 1)
        here = start + tile * VECTOR_LEN + element
        target = e_ptr + row.to(tl.int64)[:, None] * in_features + here[None, :]
        tl.store(target, error, mask=valid[:, None] & there[None, :])
        for e in tl.static_range(VECTOR_LEN):
            u_row = u_ptr + (start + tile * VECTOR_LEN + e).to(tl.int64) * in_features + start
            below = column * 0 + start + tile * VECTOR_LEN + e < end  # a last tile may be narrower
            coming = tl.load(u_row + column, mask=inside & below, other=0.0)
            share = tl.sum(tl.where((element == e)[None, :], error, 0.0), 1)
            block -= share[:, None] * coming[None, :]
