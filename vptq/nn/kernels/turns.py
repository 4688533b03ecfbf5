"""Rotations of rows of activations by the kernel of turn.cu."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vptq.nn.kernels.nvrtc import get_kernel
from vptq.quantize.rotation import Rotation, hadamard_matrix, hartley_matrix, odd_part, random_signs

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
MOST_HEIGHT = 64  # rows of the small matrix, each a number of x that a thread reads
LONGEST_RUN = 1024
SHORTEST_RUN = 32
USUAL_RUN = 256
MOST_TURNS = 4  # x in one launch
MANY_ROWS = 32  # from which a row is no longer shared out over several blocks


def cut_turn(rotation: Rotation) -> tuple[int, int] | None:
    """Height and run of the kernel for this size; None where it has none."""
    odd, power = odd_part(rotation.size // rotation.blocks)
    run = min(power, USUAL_RUN)
    while run < power and run < LONGEST_RUN and odd * (power // run) > MOST_HEIGHT // 2:
        run *= 2
    height = odd * (power // run)
    return (height, run) if run >= SHORTEST_RUN and height <= MOST_HEIGHT else None


class _TurnsStruct(ctypes.Structure):
    """`Turns` of turn.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p * MOST_TURNS), ("y", ctypes.c_void_p * MOST_TURNS), ("signs", ctypes.c_void_p * MOST_TURNS),
        ("bias", ctypes.c_void_p * MOST_TURNS), ("small", ctypes.c_void_p), ("rows", ctypes.c_int),
    ]  # fmt: skip


def turn(x: Tensor, rotation: Rotation, out: torch.dtype, back: bool = False, bias: Tensor | None = None) -> Tensor:
    """R x for every row, or Rᵀ x + bias with `back`: (n, size) float -> (n, size) of type `out`; `cut_turn` says for which.

    Args:
        x: contiguous. bias: (size,) of type `out`.
    """
    return turns([x], [rotation], out, back, [bias])[0]


def turns(
    xs: Sequence[Tensor], rotations: Sequence[Rotation], out: torch.dtype, back: bool, biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """As `turn`, several x of one shape, (n, size), in as few launches as can be, each with a rotation of its own."""
    found = [torch.empty(x.shape, dtype=out, device=x.device) for x in xs]
    count = len(xs[0])
    step = min(MOST_TURNS, len(xs)) if count < MANY_ROWS else 1
    for start in range(0, len(xs) if count else 0, step):
        part = slice(start, start + step)
        _launch(xs[part], found[part], rotations[part], back, biases[part])
    return found


def _launch(
    xs: Sequence[Tensor], ys: Sequence[Tensor], rotations: Sequence[Rotation], back: bool, biases: Sequence[Tensor | None]
) -> None:
    first, device, count = rotations[0], xs[0].device, len(xs[0])
    cut = cut_turn(first)
    assert cut is not None and all(x.is_contiguous() and x.shape == xs[0].shape for x in xs)
    height, run = cut
    small = _small_matrix(first, height, run, device)
    struct = _TurnsStruct(small=small.data_ptr(), rows=count)
    for i, (x, y, rotation, bias) in enumerate(zip(xs, ys, rotations, biases, strict=True)):
        struct.x[i], struct.y[i], struct.bias[i] = x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr()
        struct.signs[i] = _sign_bits(rotation, height, run, device).data_ptr()
    defines = {"HEIGHT": height, "RUN": run, "IN": TYPES[xs[0].dtype], "OUT": TYPES[ys[0].dtype], "BACK": int(back)}
    whole = count >= MANY_ROWS
    name, grid = ("turn_rows", (count, first.blocks, len(xs))) if whole else ("turn", (height, first.blocks, count * len(xs)))
    get_kernel(("ptx.cuh", "numbers.cuh", "turn.cu"), name, tuple(sorted(defines.items())), device).launch(
        grid, run, 0, [struct]
    )


@functools.lru_cache(maxsize=256)
def _sign_bits(rotation: Rotation, height: int, run: int, device: torch.device) -> Tensor:
    """Signs as the kernel reads them: (blocks, words of 32, run) int32, bit k for row k of `height`."""
    signs = random_signs(rotation.size, rotation.seed, rotation.side, torch.device("cpu"))
    with torch.inference_mode(False):
        bits = (signs < 0).long().view(rotation.blocks, height, run)
        bits = torch.nn.functional.pad(bits, (0, 0, 0, -height % 32)).unflatten(1, (-1, 32))
        words = (bits << torch.arange(32)[:, None]).sum(2)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(device, torch.int32)


@functools.lru_cache(maxsize=64)
def _small_matrix(rotation: Rotation, height: int, run: int, device: torch.device) -> Tensor:
    """What is left of the mixing when runs are mixed by Hadamard's matrix, over the root of `run`: (height, height) float32."""
    odd, _ = odd_part(rotation.size // rotation.blocks)
    with torch.inference_mode(False):
        own = torch.kron(hartley_matrix(odd, torch.float64, device), hadamard_matrix(height // odd, torch.float64, device))
        return (own / run**0.5).float().contiguous()
