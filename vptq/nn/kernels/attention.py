"""Attention of one new token over a cache of fixed size, by the kernel of attend.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.nn.kernels.nvrtc import get_kernel, limits_of, pointer

DIMS = (32, 64, 128, 256)
MOST_HEADS = 8  # query heads of a key's, whose sums a thread keeps
THREADS = 128
TOKENS_OF_BLOCK = 64  # of the cache, below which a head is not shared out further


class _AttentionStruct(ctypes.Structure):
    """`Attention` of attend.cu."""

    _fields_ = [
        ("q", ctypes.c_void_p), ("k", ctypes.c_void_p), ("v", ctypes.c_void_p), ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p), ("q_norm", ctypes.c_void_p), ("k_norm", ctypes.c_void_p), ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p), ("position", ctypes.c_void_p), ("out", ctypes.c_void_p), ("parts", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p), ("scale", ctypes.c_float), ("epsilon", ctypes.c_float), ("length", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """An attention's shape and constants.

    Attributes:
        groups: heads of keys and values. each: query heads that go with one. dim: of a head. scale: of scores.
        q_norm, k_norm: (dim,) weights of norms of each head, in 16 bits; None without. epsilon: of those.
    """

    groups: int
    each: int
    dim: int
    scale: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    epsilon: float = 0.0

    def fit(self) -> bool:
        """Whether the kernel has a form for it."""
        return self.dim in DIMS and 1 <= self.each <= MOST_HEADS


def attend(
    q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], position: Tensor,
    heads: Heads, arrived: Tensor,
) -> Tensor:  # fmt: skip
    """What the new token, one row each of q, k and v, takes from all up to itself: (1, groups · each · dim) in their type.

    Its key, turned by the rotary embedding, and its value are put into the cache.

    Args:
        q: (1, groups · each · dim), k, v: (1, groups · dim), float16 or bfloat16, contiguous.
        rotary: cosine and sine for the position, (dim,) in the same type.
        cache: keys and values, (groups, length, dim), contiguous.
        position: of the token, one int64 on the GPU, below length.
        arrived: (groups,) int32, zeros before and after; not for two streams at once.
    """
    keys, values = cache
    length = keys.shape[1]
    most = max(1, 2 * limits_of(q.device).processors // heads.groups)
    splits = min(most, -(-length // TOKENS_OF_BLOCK))
    out = torch.empty_like(q)
    parts = torch.empty(heads.groups * splits * heads.each * (heads.dim + 2), dtype=torch.float32, device=q.device)
    struct = _AttentionStruct(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), cosine=rotary[0].data_ptr(), sine=rotary[1].data_ptr(),
        q_norm=pointer(heads.q_norm), k_norm=pointer(heads.k_norm),
        keys=keys.data_ptr(), values=values.data_ptr(), position=position.data_ptr(), out=out.data_ptr(),
        parts=parts.data_ptr(), arrived=arrived.data_ptr(), scale=heads.scale, epsilon=heads.epsilon, length=length,
    )  # fmt: skip
    defines = {
        "BF16": int(q.dtype == torch.bfloat16), "DIM": heads.dim, "HEADS": heads.each, "THREADS": THREADS,
        "NORM": int(heads.q_norm is not None),
    }  # fmt: skip
    kernel = get_kernel(("ptx.cuh", "numbers.cuh", "attend.cu"), "attend", tuple(sorted(defines.items())), q.device)
    kernel.launch((splits, heads.groups, 1), THREADS, 0, [struct])
    return out
