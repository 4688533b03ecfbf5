"""Rotations of rows of activations by the kernel of turn.cu."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from vptq.nn.kernels.nvrtc import get_kernel
from vptq.quantize.rotation import Rotation, hadamard_matrix, hartley_matrix, odd_part, random_signs

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
MOST_HEIGHT = 64  # rows of the small matrix, each a number of x that a thread reads
LONGEST_RUN = 1024
SHORTEST_RUN = 32
USUAL_RUN = 256


def cut_turn(rotation: Rotation) -> tuple[int, int] | None:
    """Height and run of the kernel for this size; None where it has none."""
    odd, power = odd_part(rotation.size // rotation.blocks)
    run = min(power, USUAL_RUN)
    while run < power and run < LONGEST_RUN and odd * (power // run) > MOST_HEIGHT // 2:
        run *= 2
    height = odd * (power // run)
    return (height, run) if run >= SHORTEST_RUN and height <= MOST_HEIGHT else None


def turn(x: Tensor, rotation: Rotation, out: torch.dtype, back: bool = False, bias: Tensor | None = None) -> Tensor:
    """R x for every row, or Rᵀ x + bias with `back`: (n, size) float -> (n, size) of type `out`; `cut_turn` says for which.

    Args:
        x: contiguous. bias: (size,) of type `out`.
    """
    cut = cut_turn(rotation)
    assert cut is not None and x.is_contiguous()
    height, run = cut
    y = torch.empty(x.shape, dtype=out, device=x.device)
    if not len(x):
        return y
    defines = {"HEIGHT": height, "RUN": run, "IN": TYPES[x.dtype], "OUT": TYPES[out], "BACK": int(back), "BF16": 0}
    kernel = get_kernel(("ptx.cuh", "turn.cu"), "turn", tuple(sorted(defines.items())), x.device)
    tensors = (x, y, _sign_bits(rotation, height, run, x.device), _small_matrix(rotation, height, run, x.device), bias)
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    kernel.launch((height, rotation.blocks, len(x)), run, 0, pointers)
    return y


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
