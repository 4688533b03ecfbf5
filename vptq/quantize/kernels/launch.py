"""What all launches need."""

from __future__ import annotations

import contextlib

import torch

from vptq.backend import interpreting


def current_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device: make it that of a tensor (of any shape)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def num_programs(size: int, block: int) -> int:
    """Programs of `block` that cover `size`."""
    return -(-size // block)


def register_width(vector_len: int) -> int:
    """Elements that a vector takes in registers: a power of two, at least 2."""
    return max(2, 1 << (vector_len - 1).bit_length())


def packed_maximum() -> bool:
    """Whether a maximum of two float16 numbers in one register can be had (an NVIDIA instruction, not in the interpreter)."""
    return not interpreting() and torch.version.hip is None
