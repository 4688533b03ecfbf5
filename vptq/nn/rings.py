"""The bits of a trellis as they are stored: ring by ring, words of neighbouring columns side by side."""

from __future__ import annotations

from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.nn.packing import pack_bits, unpack_bits
from vptq.quantize.trellis import Trellis, new_bits, states_of


def trellis_of(config: LayerConfig) -> Trellis:
    """The trellis of a linear's indices."""
    return Trellis(config.main_bits, config.trellis_bits)


def pack_rings(states: Tensor, config: LayerConfig) -> Tensor:
    """States (vectors, in_features) of all rings, below one another -> (rings, words, in_features) int32.

    Word w of ring r and column c holds bits 32 w to 32 w + 31 of the ring's stream; vector t adds bits t b to t b + b - 1.
    """
    rings = states.reshape(-1, config.ring_len, states.shape[1]).transpose(1, 2)
    packed = pack_bits(new_bits(rings, trellis_of(config)), config.trellis_bits)
    return packed.transpose(1, 2).contiguous()


def unpack_rings(words: Tensor, config: LayerConfig) -> Tensor:
    """The inverse of `pack_rings`: (rings, words, in_features) int32 -> (vectors, in_features) int64."""
    stored = unpack_bits(words.transpose(1, 2), config.trellis_bits, config.ring_len)
    states = states_of(stored, trellis_of(config))
    return states.transpose(1, 2).reshape(-1, words.shape[2])
