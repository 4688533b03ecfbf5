"""The Hadamard transform of short runs as one kernel: a run is a matrix in registers, transformed along both of its axes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.kernels.launch import current_device, num_programs

LARGEST = 16384  # elements of a run


def hadamard_by_kernel(rows: Tensor, power: int) -> Tensor:
    """Sylvester's Hadamard matrix, over √power, on every run of `power` elements: (..., n) -> (..., n), in the same type.

    power: a power of two, at least 2 and at most LARGEST, that divides n. The arithmetic is float32.
    """
    flat = rows.contiguous().view(-1, power)
    result = torch.empty_like(flat)
    if flat.numel():
        width = 1 << power.bit_length() // 2  # of the wider axis
        wide, high = max(16, width), max(16, power // width)
        runs = max(1, 2048 // (wide * high))
        with current_device(flat):
            _hadamard[(num_programs(len(flat), runs),)](
                flat, result, flat.numel(), POWER=power, WIDTH=width, WIDE=wide, HIGH=high, RUNS=runs,
                num_warps=4 if wide * high <= 4096 else 8,
            )  # fmt: skip
    return result.view(rows.shape)


@triton.jit
def _signs_matrix(SIZE: tl.constexpr, USED: tl.constexpr):
    """Entries ±1 of the Hadamard matrix of USED rows, zero past it: the parity of the bits that row and column share."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    shared = row & column
    shared ^= shared >> 8
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return tl.where((row < USED) & (column < USED), 1.0 - 2.0 * (shared & 1).to(tl.float32), 0.0)


@triton.jit
def _hadamard(
    x_ptr, y_ptr, total, POWER: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, HIGH: tl.constexpr, RUNS: tl.constexpr
):
    HEIGHT: tl.constexpr = POWER // WIDTH
    across, down = _signs_matrix(WIDE, WIDTH), _signs_matrix(HIGH, HEIGHT)
    row, column = tl.arange(0, HIGH)[:, None], tl.arange(0, WIDE)[None, :]
    inside = (row < HEIGHT) & (column < WIDTH)
    scale = 1.0 / tl.sqrt(POWER * 1.0)
    for number in range(RUNS):
        run = tl.program_id(0).to(tl.int64) * RUNS + number
        place = run * POWER + row * WIDTH + column
        there = inside & (place < total)
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        x = tl.dot(down, tl.dot(x, across, input_precision="ieee"), input_precision="ieee") * scale
        tl.store(y_ptr + place, x.to(y_ptr.dtype.element_ty), mask=there)
