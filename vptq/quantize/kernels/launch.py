"""What all launches need."""

from __future__ import annotations

import torch

from vptq.backend import interpreting


def num_programs(size: int, block: int) -> int:
    """Programs of `block` that cover `size`."""
    return -(-size // block)


def packed_maximum() -> bool:
    """Whether a maximum of two float16 numbers in one register can be had (an NVIDIA instruction, not in the interpreter)."""
    return not interpreting() and torch.version.hip is None
