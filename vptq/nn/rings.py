"""The bits of a trellis as they are stored, ring by ring, and matrices made of them, in plain torch.

Word w of ring r and column c holds bits 32 w to 32 w + 31 of the ring's stream, words of neighbouring columns side by side;
vector t adds bits t b to t b + b - 1. The state of a vector is the L bits that end with its own, so it is read from the stream
as it stands, and so are several vectors at once from a window that is wider by b for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.geometry import WORD_BITS
from vptq.layer_config import LayerConfig
from vptq.nn.packing import LOW_WORD, pack_bits
from vptq.nn.vectors import BAG_INDICES, CHUNK_WEIGHTS, assemble, bags, multiply, sums_pay
from vptq.quantize.trellis import Trellis, new_bits

WIDEST_WINDOW = 18  # bits: a table of 2^18 entries still lies in a core's cache
WIDEST_ENTRY = 8  # numbers


@dataclass(frozen=True)
class RingMatrix:
    """A matrix (out_features, columns) as rings of a trellis down its columns.

    Attributes:
        words: (rings, ring_len · b / 32, columns) int32. table: (2^L, vector_len) float. trellis: L and b.
        run_table: (2^(L + (m - 1) b), m · vector_len), what windows of m vectors stand for; None for one at a time.
    """

    words: Tensor
    table: Tensor
    trellis: Trellis
    out_features: int
    ring_len: int
    run_table: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def height(self) -> int:
        """Rows of a ring."""
        return self.ring_len * self.table.shape[1]

    def windows(self, rings: slice, run: int) -> Tensor:
        """The stream's bits of every `run` vectors one after the other: (rings, ring_len / run, columns) int64."""
        step, width = run * self.trellis.step_bits, self.trellis.state_bits + (run - 1) * self.trellis.step_bits
        unsigned = self.words[rings].long() & LOW_WORD
        pairs = unsigned | (torch.roll(unsigned, -1, 1) << WORD_BITS)  # each word and the next one, the first after the last
        count = self.ring_len // run
        start = (torch.arange(1, count + 1, device=pairs.device) * step - width) % (self.ring_len * self.trellis.step_bits)
        found = pairs.index_select(1, start // WORD_BITS).bitwise_right_shift_((start % WORD_BITS)[:, None])
        return found.bitwise_and_((1 << width) - 1)


def longest_run(trellis: Trellis, vector_len: int) -> int:
    """Vectors that one window is worth reading at once."""
    run = 1
    while trellis.state_bits + (2 * run - 1) * trellis.step_bits <= WIDEST_WINDOW and 2 * run * vector_len <= WIDEST_ENTRY:
        run *= 2
    return run


def make_run_table(table: Tensor, trellis: Trellis, run: int) -> Tensor:
    """What a window of `run` vectors stands for: (2^L, v) -> (2^(L + (run - 1) b), run · v)."""
    windows = torch.arange(1 << (trellis.state_bits + (run - 1) * trellis.step_bits), device=table.device)
    states = torch.stack([(windows >> (i * trellis.step_bits)) & (len(table) - 1) for i in range(run)], 1)
    return torch.nn.functional.embedding(states, table).flatten(1)


def ring_weight(matrix: RingMatrix) -> Tensor:
    """The matrix, (out_features, columns), in the type of its table."""
    return assemble(_parts(matrix), matrix.out_features, matrix.words.shape[2], matrix.table)


def ring_product(x: Tensor, matrix: RingMatrix) -> Tensor:
    """x Wᵀ: (n, columns) float -> (n, out_features), in x's type; the arithmetic is in that of the table."""
    wide = x.to(matrix.dtype)
    if sums_pay(len(x), x.device):
        return _sums_of_runs(wide, matrix).to(x.dtype)
    return multiply(wide, _parts(matrix), matrix.out_features).to(x.dtype)


def _parts(matrix: RingMatrix) -> Iterator[tuple[int, Tensor]]:
    """The matrix some rings at a time: the first row's number, and (rows, columns)."""
    rings, _, columns = matrix.words.shape
    step = max(1, CHUNK_WEIGHTS // (matrix.height * columns))
    for ring in range(0, rings, step):
        vectors = torch.nn.functional.embedding(matrix.windows(slice(ring, ring + step), 1), matrix.table)
        first = ring * matrix.height
        yield first, vectors.transpose(2, 3).reshape(-1, columns)[: matrix.out_features - first]


def _sums_of_runs(x: Tensor, matrix: RingMatrix) -> Tensor:
    """As `vectors._sums_of_centroids`, a run of vectors at a time."""
    table = matrix.table if matrix.run_table is None else matrix.run_table
    run = table.shape[1] // matrix.table.shape[1]
    rings, _, columns = matrix.words.shape
    count = matrix.ring_len // run
    step = max(1, BAG_INDICES // (columns * count))
    repeated = x[:, None].repeat(1, min(step, rings) * count, 1)
    sums = x.new_empty(len(x), rings * count, table.shape[1])
    for ring in range(0, rings, step):
        indices = matrix.windows(slice(ring, ring + step), run).flatten(0, 1)
        for own, factors in zip(sums, repeated, strict=True):
            own[ring * count : ring * count + len(indices)] = bags(indices, table, factors)
    return sums.flatten(1)[:, : matrix.out_features].contiguous()


def trellis_of(config: LayerConfig) -> Trellis:
    """The trellis of a linear's indices."""
    return Trellis(config.main_bits, config.trellis_bits)


def pack_rings(states: Tensor, config: LayerConfig) -> Tensor:
    """States (vectors, in_features) of all rings, below one another -> (rings, words, in_features) int32."""
    rings = states.reshape(-1, config.ring_len, states.shape[1]).transpose(1, 2)
    packed = pack_bits(new_bits(rings, trellis_of(config)), config.trellis_bits)
    return packed.transpose(1, 2).contiguous()
