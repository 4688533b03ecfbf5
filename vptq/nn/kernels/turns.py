"""Rotations of rows of activations by the kernel of turn.cu."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.nn.kernels.given import AS_IT_IS, Given
from vptq.nn.kernels.nvrtc import get_kernel, pointer
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
        ("bias", ctypes.c_void_p * MOST_TURNS), ("residual", ctypes.c_void_p * MOST_TURNS), ("beside", ctypes.c_void_p),
        ("small", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("rows", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A tensor of rows to be turned.

    Attributes:
        x: (n, size) float, contiguous.
        bias, residual: (size,) and (n, size) in the answer's type, added after turning back.
    """

    x: Tensor
    rotation: Rotation
    bias: Tensor | None = None
    residual: Tensor | None = None


def turn(x: Tensor, rotation: Rotation, out: torch.dtype, given: Given = AS_IT_IS) -> Tensor:
    """R x for every row: (n, size) float -> (n, size) of type `out`; `cut_turn` says for which sizes.

    Args:
        x: contiguous. given: what x goes through before that; anything but AS_IT_IS only for one row of 16-bit numbers.
    """
    return turns([Turn(x, rotation)], out, False, given)[0]


def turn_back(work: Turn, out: torch.dtype) -> Tensor:
    """Rᵀ x + bias + residual for every row: (n, size) of type `out`."""
    return turns([work], out, True)[0]


def turns(works: Sequence[Turn], out: torch.dtype, back: bool, given: Given = AS_IT_IS) -> list[Tensor]:
    """As `turn` or `turn_back`, several x of one shape, (n, size), in as few launches as can be."""
    given.check(works[0].x)
    found = [torch.empty(work.x.shape, dtype=out, device=work.x.device) for work in works]
    count = len(works[0].x)
    step = min(MOST_TURNS, len(works)) if count < MANY_ROWS else 1
    for start in range(0, len(works) if count else 0, step):
        _launch(works[start : start + step], found[start : start + step], back, given)
    return found


def _launch(works: Sequence[Turn], ys: Sequence[Tensor], back: bool, given: Given) -> None:
    first, shape, device = works[0].rotation, works[0].x.shape, ys[0].device
    cut = cut_turn(first)
    assert cut is not None and all(work.x.is_contiguous() and work.x.shape == shape for work in works)
    height, run = cut
    small = _small_matrix(first, height, run, device)
    struct = _TurnsStruct(small=small.data_ptr(), rows=shape[0], beside=pointer(given.beside), epsilon=given.epsilon)
    for i, (work, y) in enumerate(zip(works, ys, strict=True)):
        struct.x[i], struct.y[i] = work.x.data_ptr(), y.data_ptr()
        struct.bias[i], struct.residual[i] = pointer(work.bias), pointer(work.residual)
        struct.signs[i] = _sign_bits(work.rotation, height, run, device).data_ptr()
    defines = {
        "HEIGHT": height, "RUN": run, "IN": TYPES[works[0].x.dtype], "OUT": TYPES[ys[0].dtype], "BACK": int(back),
        "GIVEN": given.kind,
    }  # fmt: skip
    whole = shape[0] >= MANY_ROWS
    grid = (shape[0], first.blocks, len(works)) if whole else (height, first.blocks, shape[0] * len(works))
    kernel = get_kernel(
        ("ptx.cuh", "numbers.cuh", "turn.cu"), "turn_rows" if whole else "turn", tuple(sorted(defines.items())), device
    )
    kernel.launch(grid, run, 0, [struct])


@functools.cache  # captured steps read them: never dropped
def _sign_bits(rotation: Rotation, height: int, run: int, device: torch.device) -> Tensor:
    """Signs as the kernel reads them: (blocks, words of 32, run) int32, bit k for row k of `height`."""
    signs = random_signs(rotation.size, rotation.seed, rotation.side, torch.device("cpu"))
    with torch.inference_mode(False):
        bits = (signs < 0).long().view(rotation.blocks, height, run)
        bits = torch.nn.functional.pad(bits, (0, 0, 0, -height % 32)).unflatten(1, (-1, 32))
        words = (bits << torch.arange(32)[:, None]).sum(2)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(device, torch.int32)


@functools.cache
def _small_matrix(rotation: Rotation, height: int, run: int, device: torch.device) -> Tensor:
    """What is left of the mixing when runs are mixed by Hadamard's matrix, over the root of `run`: (height, height) float32."""
    odd, _ = odd_part(rotation.size // rotation.blocks)
    with torch.inference_mode(False):
        own = torch.kron(hartley_matrix(odd, torch.float64, device), hadamard_matrix(height // odd, torch.float64, device))
        return (own / run**0.5).float().contiguous()
