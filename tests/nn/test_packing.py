"""Bits in words: round trips, a brute-force twin, and a frozen golden file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq.errors import VptqError
from vptq.nn.packing import from_uint16_bits, pack_bits, to_uint16_bits, unpack_bits


def brute_force_pack(values: list[int], bits: int) -> list[int]:
    """Bit by bit, as DESIGN words it: bit t of value j is stream bit j*T + t; stream bit p is bit p mod 32 of word p div 32."""
    words = [0] * -(-len(values) * bits // 32)
    for j, value in enumerate(values):
        for t in range(bits):
            p = j * bits + t
            words[p // 32] |= (value >> t & 1) << (p % 32)
    return [w - (1 << 32) if w >> 31 else w for w in words]


@pytest.mark.parametrize("main_bits", range(1, 17))
@pytest.mark.parametrize("residual_bits", [0, 1, 3, 8, 15, 16])
@pytest.mark.parametrize("count", [1, 31, 32, 33])
def test_round_trip_and_brute_force(main_bits, residual_bits, count, generator):
    bits = main_bits + residual_bits
    random = torch.randint(0, 1 << bits, (3, count), generator=generator)
    for values in (random, torch.zeros_like(random), torch.full_like(random, (1 << bits) - 1)):
        packed = pack_bits(values, bits)
        assert packed.dtype == torch.int32 and packed.shape == (3, -(-count * bits // 32))
        assert torch.equal(unpack_bits(packed, bits, count), values)
        assert packed[0].tolist() == brute_force_pack(values[0].tolist(), bits)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 32).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, (1 << b) - 1), min_size=1, max_size=70)))
)
def test_any_values_come_back(case):
    bits, values = case
    assert unpack_bits(pack_bits(torch.tensor(values), bits), bits, len(values)).tolist() == values


def test_three_dimensions_equal_the_stack_of_two(generator):
    values = torch.randint(0, 1 << 11, (2, 3, 17), generator=generator)
    assert torch.equal(pack_bits(values, 11), torch.stack([pack_bits(v, 11) for v in values]))


def test_non_contiguous_input(generator):
    values = torch.randint(0, 1 << 5, (40, 6), generator=generator)
    assert torch.equal(pack_bits(values.T, 5), pack_bits(values.T.contiguous(), 5))


def test_old_words_still_open():
    """Frozen: these words were written by the first version of the format."""
    words = torch.tensor([[-1985229329, 19088743, 252645135]], dtype=torch.int32)
    assert unpack_bits(words, 12, 8).tolist() == [[3567, 2748, 1929, 1110, 291, 240, 3855, 240]]


@pytest.mark.parametrize("values", [[4], [-1]])
def test_values_out_of_range_raise(values):
    with pytest.raises(VptqError, match=r"packing needs values in \[0, 2\^2\)"):
        pack_bits(torch.tensor(values), 2)


def test_wrong_number_of_words_raises():
    with pytest.raises(VptqError, match="take 1 words, got 2"):
        unpack_bits(torch.zeros(2, dtype=torch.int32), 4, 8)


@pytest.mark.parametrize("bits", [0, 33])
def test_wrong_bits_raise(bits):
    with pytest.raises(VptqError, match="1 to 32 bits"):
        pack_bits(torch.tensor([0]), bits)


def test_uint16_round_trip():
    values = torch.tensor([0, 1, 32767, 32768, 65535])
    assert to_uint16_bits(values).dtype == torch.int16
    assert torch.equal(from_uint16_bits(to_uint16_bits(values)), values)
