"""Indices as a stream of bits in int32 words.

Value j of a row takes T bits, least significant first; its bit t is bit j*T + t of the row's stream, and stream bit p is
bit p mod 32 of word p div 32. A row is padded with zeros to whole words. n values of T bits take ceil(n*T/32) words.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from vptq.errors import VptqError
from vptq.geometry import WORD_BITS

LOW_WORD = (1 << WORD_BITS) - 1
WHOLE = {8: torch.uint8, 16: torch.int16}  # values that are numbers in memory as they stand


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack (..., n) integers in [0, 2^bits) into (..., ceil(n*bits/32)) int32. 1 <= bits <= 32."""
    _check_bits(bits)
    wide = values.long()
    if wide.numel() and (int(wide.min()) < 0 or int(wide.max()) >> bits):
        raise VptqError(f"packing needs values in [0, 2^{bits}), got {int(wide.min())} to {int(wide.max())}")
    count = values.shape[-1]
    word, shift = _places(count, bits, values.device)
    words = torch.zeros(*values.shape[:-1], -(-count * bits // WORD_BITS) + 1, dtype=torch.int64, device=values.device)
    words.index_add_(-1, word, (wide << shift) & LOW_WORD)
    words.index_add_(-1, word + 1, (wide << shift) >> WORD_BITS)
    words = words[..., :-1]
    return torch.where(words > LOW_WORD // 2, words - (1 << WORD_BITS), words).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: (..., W) int32 -> (..., count) int64.

    Raises:
        VptqError: `bits` out of range, or W is not ceil(count*bits/32).
    """
    _check_bits(bits)
    if words.shape[-1] != -(-count * bits // WORD_BITS):
        raise VptqError(f"{count} values of {bits} bits take {-(-count * bits // WORD_BITS)} words, got {words.shape[-1]}")
    if bits in WHOLE and words.stride(-1) == 1 and sys.byteorder == "little":
        return words.view(WHOLE[bits])[..., :count].long() & ((1 << bits) - 1)
    word, shift = _places(count, bits, words.device)
    unsigned = torch.nn.functional.pad(words.long() & LOW_WORD, (0, 1))
    pairs = unsigned[..., :-1] | (unsigned[..., 1:] << WORD_BITS)  # each word and the next one: a value lies within such a pair
    return pairs.index_select(-1, word).bitwise_right_shift_(shift).bitwise_and_((1 << bits) - 1)


def to_uint16_bits(values: Tensor) -> Tensor:
    """Integers in [0, 65536), any shape (...), as int16 with the bits of a uint16, as the file format keeps them."""
    wide = values.long()
    return torch.where(wide > 32767, wide - 65536, wide).to(torch.int16)


def from_uint16_bits(stored: Tensor) -> Tensor:
    """The inverse of `to_uint16_bits`: (...) int16 -> (...) int64."""
    return stored.long() & 0xFFFF


def _places(count: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first = torch.arange(count, device=device) * bits
    return first // WORD_BITS, first % WORD_BITS


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= WORD_BITS:
        raise VptqError(f"values take 1 to {WORD_BITS} bits, got {bits}")
