"""Packed matrices of any form by Triton: tiles made number by number, to memory or straight into a product.

The form does not matter: both directions, any width of an index, groups, residual codebooks, rings. What `fused` has kernels
for is faster there; this is for the rest, and for GPUs that CUDA sources are not compiled for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.geometry import WORD_BITS
from vptq.nn.rings import RingMatrix
from vptq.nn.vectors import MOST_ROWS, VectorMatrix, partial_sums, partial_sums_pay
from vptq.quantize.kernels.launch import current_device, num_programs

ROWS = 32  # of the matrix, in a tile
COLUMNS = 64
LOOK_UP_ROWS = 8
MOST_COPIES = 64  # of sums of gradients: many additions to one place wait for each other
COPIED_NUMBERS = 1 << 20
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def weight_by_kernel(matrix: VectorMatrix | RingMatrix) -> Tensor:
    """The matrix, (out_features, columns), in the type of its codebooks: one of TYPES."""
    tensors, sizes, columns = _arguments(matrix)
    weight = torch.empty(matrix.out_features, columns, dtype=matrix.dtype, device=matrix.words.device)
    grid = (num_programs(matrix.out_features, ROWS), num_programs(columns, COLUMNS))
    if weight.numel():
        with current_device(weight):
            _weight[grid](weight, *tensors, matrix.out_features, columns, ROWS=ROWS, COLUMNS=COLUMNS, **sizes)
    return weight


def product_by_kernel(x: Tensor, matrix: VectorMatrix | RingMatrix) -> Tensor:
    """x Wᵀ: (n, columns) float -> (n, out_features), in x's type, n at most MOST_ROWS; sums in float32."""
    if isinstance(matrix, VectorMatrix) and not matrix.along_out and partial_sums_pay(len(x), matrix):
        return product_of_partial_sums(x, matrix)
    tensors, sizes, columns = _arguments(matrix)
    y = torch.empty(len(x), matrix.out_features, dtype=x.dtype, device=x.device)
    if y.numel():
        with current_device(x):
            _product[(num_programs(matrix.out_features, ROWS),)](
                x, y, *tensors, len(x), x.stride(0), x.stride(1), matrix.out_features, columns,
                ROWS=ROWS, COLUMNS=COLUMNS, MOST=MOST_ROWS, **sizes,
            )  # fmt: skip
    return y


def product_of_partial_sums(x: Tensor, matrix: VectorMatrix) -> Tensor:
    """As `product_by_kernel`, (n, columns) -> (n, out_features), for vectors along inputs.

    What every centroid makes of every run of inputs is made once, then looked up.
    """
    tables = [partial_sums(x.float(), book.float(), matrix) for book in matrix.books]
    words = matrix.words.contiguous()
    groups, rows, row_words = words.shape
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    with current_device(x):
        _looked_up[(num_programs(rows, LOOK_UP_ROWS),)](
            y, words, tables[0], tables[-1], row_words, rows, groups, matrix.vector_columns, len(x), tables[0].shape[1],
            tables[-1].shape[1], ROWS=LOOK_UP_ROWS, COLUMNS=COLUMNS, MOST=MOST_ROWS, BITS=matrix.main_bits,
            RES_BITS=0 if matrix.residual is None else matrix.residual_bits,
        )  # fmt: skip
    return y


def gradients_by_kernel(matrix: VectorMatrix | RingMatrix, gradient: Tensor) -> list[Tensor]:
    """From the gradient of the matrix, (out_features, columns) float, to those of its codebooks, float32 in their shapes.

    Sums are made by atomic additions, in several copies that are added up after: in no order that could be told beforehand.
    """
    tensors, sizes, columns = _arguments(matrix)
    books = [matrix.table] if isinstance(matrix, RingMatrix) else matrix.books
    copies = max(1, min(MOST_COPIES, COPIED_NUMBERS // max(book.numel() for book in books)))
    sums = [torch.zeros(copies, *book.shape, dtype=torch.float32, device=gradient.device) for book in books]
    gradient = gradient.contiguous()
    grid = (num_programs(matrix.out_features, ROWS), num_programs(columns, COLUMNS))
    if gradient.numel():
        with current_device(gradient):
            _gradients[grid](
                gradient, tensors[0], sums[0], sums[-1], *tensors[3:], matrix.out_features, columns, copies,
                books[0].numel(), books[-1].numel(), ROWS=ROWS, COLUMNS=COLUMNS, **sizes,
            )  # fmt: skip
    return [own.sum(0) if copies > 1 else own[0] for own in sums]


def _arguments(matrix: VectorMatrix | RingMatrix) -> tuple[list[Any], dict[str, Any], int]:
    """Tensors and sizes as both kernels take them, and the columns of the matrix."""
    words = matrix.words.contiguous()
    if isinstance(matrix, RingMatrix):
        table = matrix.table.contiguous()
        sizes = {
            "LENGTH": table.shape[1], "BITS": matrix.trellis.state_bits, "RES_BITS": 0, "STEP_BITS": matrix.trellis.step_bits,
            "ALONG_OUT": True, "RING": matrix.ring_len,
        }  # fmt: skip
        return [words, table, table, words.shape[1], 1, words.shape[2], 0, 0], sizes, words.shape[2]
    main = matrix.main.contiguous()
    residual = main if matrix.residual is None else matrix.residual.contiguous()
    groups, rows, row_words = words.shape
    sizes = {
        "LENGTH": matrix.vector_len, "BITS": matrix.main_bits, "STEP_BITS": 0,
        "RES_BITS": 0 if matrix.residual is None else matrix.residual_bits, "ALONG_OUT": matrix.along_out, "RING": 0,
    }  # fmt: skip
    strides = [row_words, rows, matrix.group_size, main.shape[1], residual.shape[1]]
    return [words, main, residual, *strides], sizes, groups * matrix.group_size


WORD: tl.constexpr = tl.constexpr(WORD_BITS)


@triton.jit
def _bits_at(words_ptr, first, following, shift, inside, BITS: tl.constexpr):
    """BITS bits from `shift` on of the word at `first`, and the one at `following`."""
    low = tl.load(words_ptr + first, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    if BITS > 1:
        high = tl.load(words_ptr + following, mask=inside & (shift + BITS > WORD), other=0)
        low = low | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    return (low >> shift.to(tl.uint64)) & ((1 << BITS) - 1)


@triton.jit
def _places(
    words_ptr, row_words, group_rows, group_size, main_size, residual_size, row, column, inside,
    LENGTH: tl.constexpr, BITS: tl.constexpr, RES_BITS: tl.constexpr, STEP_BITS: tl.constexpr, ALONG_OUT: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Where the numbers at some rows and columns lie in the codebooks: main, and residual (the same again without one)."""
    if RING > 0:
        # row_words: words of a ring. group_size: columns, which is the way from one word of a ring to the next.
        ring, place = row // (RING * LENGTH), row % (RING * LENGTH)
        start = ((place // LENGTH + 1) * STEP_BITS + RING * STEP_BITS - BITS) % (RING * STEP_BITS)
        word = start // WORD
        base = (ring * row_words).to(tl.int64) * group_size + column
        following = tl.where(word + 1 == row_words, 0, word + 1)
        index = _bits_at(words_ptr, base + word * group_size, base + following * group_size, start % WORD, inside, BITS)
        main = index.to(tl.int32) * LENGTH + place % LENGTH
        residual = main
    else:
        group, own = column // group_size, column % group_size
        if ALONG_OUT:
            line, vector, element = row // LENGTH, own, row % LENGTH
        else:
            line, vector, element = row, own // LENGTH, own % LENGTH
        bit = vector.to(tl.int64) * (BITS + RES_BITS)
        first = (group.to(tl.int64) * group_rows + line) * row_words + bit // WORD
        index = _bits_at(words_ptr, first, first + 1, bit % WORD, inside, BITS + RES_BITS)
        main = (group * main_size + (index & ((1 << BITS) - 1)).to(tl.int32)) * LENGTH + element
        residual = main
        if RES_BITS > 0:
            residual = (group * residual_size + (index >> BITS).to(tl.int32)) * LENGTH + element
    return main, residual


@triton.jit
def _tile(
    words_ptr, main_ptr, residual_ptr, row_words, group_rows, group_size, main_size, residual_size, row, column, inside,
    LENGTH: tl.constexpr, BITS: tl.constexpr, RES_BITS: tl.constexpr, STEP_BITS: tl.constexpr, ALONG_OUT: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """The numbers at some rows and columns, (rows, columns) float32."""
    main, residual = _places(
        words_ptr, row_words, group_rows, group_size, main_size, residual_size, row, column, inside,
        LENGTH, BITS, RES_BITS, STEP_BITS, ALONG_OUT, RING,
    )  # fmt: skip
    value = tl.load(main_ptr + main, mask=inside, other=0.0).to(tl.float32)
    if RES_BITS > 0:
        value += tl.load(residual_ptr + residual, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _gradients(
    gradient_ptr, words_ptr, main_ptr, residual_ptr, row_words, group_rows, group_size, main_size, residual_size,
    out_features, columns, copies, main_numbers, residual_numbers, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr, BITS: tl.constexpr, RES_BITS: tl.constexpr, STEP_BITS: tl.constexpr, ALONG_OUT: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < out_features) & (column < columns)
    main, residual = _places(
        words_ptr, row_words, group_rows, group_size, main_size, residual_size, row, column, inside,
        LENGTH, BITS, RES_BITS, STEP_BITS, ALONG_OUT, RING,
    )  # fmt: skip
    slope = tl.load(gradient_ptr + row.to(tl.int64) * columns + column, mask=inside, other=0.0).to(tl.float32)
    copy = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) % copies
    tl.atomic_add(main_ptr + copy * main_numbers + main, slope, mask=inside, sem="relaxed")
    if RES_BITS > 0:
        tl.atomic_add(residual_ptr + copy * residual_numbers + residual, slope, mask=inside, sem="relaxed")


@triton.jit
def _weight(
    weight_ptr, words_ptr, main_ptr, residual_ptr, row_words, group_rows, group_size, main_size, residual_size, out_features,
    columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr, RES_BITS: tl.constexpr,
    STEP_BITS: tl.constexpr, ALONG_OUT: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < out_features) & (column < columns)
    tile = _tile(
        words_ptr, main_ptr, residual_ptr, row_words, group_rows, group_size, main_size, residual_size, row, column, inside,
        LENGTH, BITS, RES_BITS, STEP_BITS, ALONG_OUT, RING,
    )  # fmt: skip
    tl.store(weight_ptr + row.to(tl.int64) * columns + column, tile.to(weight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    x_ptr, y_ptr, words_ptr, main_ptr, residual_ptr, row_words, group_rows, group_size, main_size, residual_size, count,
    x_stride, x_step, out_features, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr,
    LENGTH: tl.constexpr, BITS: tl.constexpr, RES_BITS: tl.constexpr, STEP_BITS: tl.constexpr, ALONG_OUT: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    number = tl.arange(0, MOST)[None, :]
    sums = tl.zeros((ROWS, MOST), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < out_features) & (column[None, :] < columns)
        tile = _tile(
            words_ptr, main_ptr, residual_ptr, row_words, group_rows, group_size, main_size, residual_size, row,
            column[None, :], inside, LENGTH, BITS, RES_BITS, STEP_BITS, ALONG_OUT, RING,
        )  # fmt: skip
        x = tl.load(
            x_ptr + number * x_stride + column[:, None] * x_step,
            mask=(number < count) & (column[:, None] < columns), other=0.0,
        )  # fmt: skip
        sums += tl.dot(tile, x.to(tl.float32), input_precision="ieee")
    place = number * out_features + row
    tl.store(y_ptr + place, sums.to(y_ptr.dtype.element_ty), mask=(number < count) & (row < out_features))


@triton.jit
def _looked_up(
    y_ptr, words_ptr, main_ptr, residual_ptr, row_words, rows, groups, vector_columns, count, main_size, residual_size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr, BITS: tl.constexpr, RES_BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    number = tl.arange(0, MOST)[None, :]
    sums = tl.zeros((ROWS, MOST), tl.float32)
    for group in range(groups):
        for start in range(0, vector_columns, COLUMNS):
            vector = start + tl.arange(0, COLUMNS)[None, :]
            inside = (row < rows) & (vector < vector_columns)
            bit = vector.to(tl.int64) * (BITS + RES_BITS)
            first = (group * rows + row).to(tl.int64) * row_words + bit // WORD
            index = _bits_at(words_ptr, first, first + 1, bit % WORD, inside, BITS + RES_BITS)
            main = group * main_size + (index & ((1 << BITS) - 1)).to(tl.int32)
            place = (main.to(tl.int64) * vector_columns + vector) * count
            second = place
            if RES_BITS > 0:
                residual = group * residual_size + (index >> BITS).to(tl.int32)
                second = (residual.to(tl.int64) * vector_columns + vector) * count
            for n in range(count):
                value = tl.load(main_ptr + place + n, mask=inside, other=0.0)
                if RES_BITS > 0:
                    value += tl.load(residual_ptr + second + n, mask=inside, other=0.0)
                sums += tl.where(number == n, tl.sum(value, 1)[:, None], 0.0)
    tl.store(y_ptr + number * rows + row, sums.to(y_ptr.dtype.element_ty), mask=(number < count) & (row < rows))
