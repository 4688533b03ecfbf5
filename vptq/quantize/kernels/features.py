"""Vectors and centroids as short float16 rows whose inner product orders the centroids by distance.

Nearest means the greatest x·c - ‖c‖²/2. Written as an inner product of 16 to 64 float16 numbers it is one to four steps of
the tensor cores. What keeps it exact enough (measured: at most 1e-5 more objective than float64, see docs/performance.md):

- both sides are centred on the median and scaled by a power of two, so that differences use float16's range;
- numbers that must be sharp are split in two float16 parts: ‖c‖²/2 always, vectors and centroids where they are short;
- ‖x‖²/2 is taken off, so that scores near the winner are near zero, where a float16 sum is finest; and since sums are
  rounded every 16 numbers, each run of 16 holds all that belongs to its elements: -‖x - c‖²/2 of those alone.

A vector with a weight for every element has x·c replaced by (w x)·c and ‖c‖²/2 by w·(c²/2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.kernels.launch import num_programs

USUAL_SIZE = 1.5  # scaled vectors have elements of about this size
SAMPLE = 1 << 14  # vectors that centre and scale are taken from
FAR_NORM = 240.0  # of centroids: half its square still fits float16
FAR_VECTOR = FAR_NORM / 2  # a centroid that is left out is farther from nearer vectors than the centre of all is
RUN = 16  # numbers that the tensor cores take in one step
LANES = 128  # centroids of one tile of the product
NEVER = -60000.0  # a score that loses


@dataclass(frozen=True)
class Layout:
    """How many float16 numbers a row has and how centroids are ordered in it.

    Attributes:
        vector_len: v. weighted: whether every element has a weight.
        split: whether vectors and centroids are split into two parts each.
        elements: elements that share a run of 16 numbers. width: numbers a row, 16, 32, 64.
        num_centroids: k. tiles: tiles of `LANES` centroids that one running maximum covers.
        supers: runs of `tiles` tiles.
    """

    vector_len: int
    weighted: bool
    split: bool
    elements: int
    width: int
    num_centroids: int
    tiles: int
    supers: int

    @property
    def group(self) -> int:
        """Centroids, consecutive ones, that share one running maximum: two lanes of all tiles of a run."""
        return 2 * self.tiles

    @property
    def num_groups(self) -> int:
        return self.supers * LANES // 2

    @property
    def padded(self) -> int:
        return self.num_groups * self.group


def choose_layout(vector_len: int, num_centroids: int, weighted: bool) -> Layout:
    """The narrowest rows that stay exact, and groups that keep both passes short.

    Args:
        vector_len: 1 to 16.
    """
    if weighted:  # three numbers an element, five if split, and two more
        split = vector_len <= 6
        elements = 2 if split else 4
    else:  # one number an element, three if split, and four more
        split = vector_len <= 4
        elements = 4 if split else 12 if vector_len <= 12 else 8
    runs = -(-vector_len // elements)
    width = RUN << (runs - 1).bit_length()
    tiles = -(-num_centroids // LANES)
    most = 32 if tiles >= 128 else 16
    run = next(run for run in (32, 16, 8, 4, 2, 1) if run <= most and (run == 1 or -(-tiles // run) * run <= 1.07 * tiles))
    return Layout(vector_len, weighted, split, elements, width, num_centroids, run, -(-tiles // run))


@dataclass(frozen=True)
class Frame:
    """The scaled coordinates of a batch: (x - centre) * scale. centre: (B, v); scale: (B,), powers of two; float32."""

    centre: Tensor
    scale: Tensor


def make_frame(vectors: Tensor) -> Frame:
    """Centre and scale from medians of a sample, which a few wild vectors don't move. vectors: (B, n, v) float32.

    Medians are no sums: each batch entry's come out the same bits in any batch.
    """
    sample = vectors[:, :: max(1, vectors.shape[1] // SAMPLE)]
    centre = sample.median(1).values
    apart = (sample - centre[:, None]).abs_().flatten(1)
    size = apart.median(1).values
    size = torch.where(size > 0, size, apart.amax(1))
    exponent = torch.log2(USUAL_SIZE / size.clamp_min(1e-30)).round().clamp(-100, 100)
    return Frame(centre, torch.exp2(exponent))


def vector_rows(vectors: Tensor, weights: Tensor | None, frame: Frame, layout: Layout) -> tuple[Tensor, Tensor]:
    """Rows of the vectors, and which vectors are too far out for float16.

    Args:
        vectors: (B, n, v) float32. weights: None, or (B, n, v) float32 >= 0.
    Returns:
        (B, n, width) float16; (B, n) bool.
    """
    batch, count, vector_len = vectors.shape
    rows = torch.zeros(batch, count, layout.width, dtype=torch.float16, device=vectors.device)
    far = torch.empty(batch, count, dtype=torch.bool, device=vectors.device)
    block = 256
    _vector_rows[(num_programs(count, block), batch)](
        vectors, weights, frame.centre, frame.scale, rows, far, count,
        VECTOR_LEN=vector_len, WIDTH=layout.width, ELEMENTS=layout.elements, WEIGHTED=layout.weighted, SPLIT=layout.split,
        FAR=FAR_VECTOR, BLOCK=block,
    )  # fmt: skip
    return rows, far


@dataclass(frozen=True)
class CentroidRows:
    """Room for what the two passes read of centroids.

    Attributes:
        rows: (B, padded, width) float16, in the order of tiles.
        grouped: (B, num_groups, v, group) float32: the centroids themselves, for the exact second pass.
    """

    rows: Tensor
    grouped: Tensor

    @staticmethod
    def empty(batch: int, layout: Layout, device: torch.device) -> CentroidRows:
        return CentroidRows(
            torch.zeros(batch, layout.padded, layout.width, dtype=torch.float16, device=device),
            torch.empty(batch, layout.num_groups, layout.vector_len, layout.group, device=device),
        )

    def fill(self, centroids: Tensor, active: Tensor, frame: Frame, layout: Layout) -> None:
        """Write the rows of some batch entries. centroids: (B, k, v) float32; active: (entries,) int32."""
        block = 128
        _centroid_rows[(num_programs(layout.padded, block), len(active))](
            centroids, active, frame.centre, frame.scale, self.rows, self.grouped, layout.num_centroids,
            VECTOR_LEN=layout.vector_len, WIDTH=layout.width, ELEMENTS=layout.elements, WEIGHTED=layout.weighted,
            SPLIT=layout.split, TILES=layout.tiles, PADDED=layout.padded, HALF_LANES=LANES // 2,
            FAR=FAR_NORM, NEVER=NEVER, BLOCK=block,
        )  # fmt: skip


@triton.jit
def _half(x):
    """x rounded to float16, as float32."""
    return x.to(tl.float16).to(tl.float32)


# In a run of 16 numbers: parts of the elements, OF_X of them; then, of vectors, weights (twice) or two ones, and -‖x‖²/2 in
# two parts; of centroids, -c²/2 of each element, or of all, in two parts, and two ones.


@triton.jit
def _vector_rows(
    x_ptr, w_ptr, centre_ptr, scale_ptr, rows_ptr, far_ptr, count,
    VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, ELEMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SPLIT: tl.constexpr,
    FAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    OF_X: tl.constexpr = (3 if SPLIT else 1) * ELEMENTS
    LAST: tl.constexpr = OF_X + (2 * ELEMENTS if WEIGHTED else 2)
    entry = tl.program_id(1)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    vector = entry.to(tl.int64) * count + number
    scale = tl.load(scale_ptr + entry)
    most = tl.zeros((BLOCK,), tl.float32)
    if WEIGHTED:
        for e in tl.static_range(VECTOR_LEN):
            most = tl.maximum(most, tl.load(w_ptr + vector * VECTOR_LEN + e, mask=inside, other=0.0))
    norm = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for e in tl.static_range(VECTOR_LEN):
        out = rows_ptr + vector * WIDTH + (e // ELEMENTS) * 16
        place = e % ELEMENTS
        x = tl.load(x_ptr + vector * VECTOR_LEN + e, mask=inside, other=0.0)
        x = (x - tl.load(centre_ptr + entry * VECTOR_LEN + e)) * scale
        square += x * x
        scaled = x
        if WEIGHTED:
            w = tl.load(w_ptr + vector * VECTOR_LEN + e, mask=inside, other=0.0)
            w = _half(tl.where(most > 0, w / tl.where(most > 0, most, 1.0), 0.0))
            scaled = w * x
            tl.store(out + OF_X + place, w.to(tl.float16), mask=inside)
            tl.store(out + OF_X + ELEMENTS + place, w.to(tl.float16), mask=inside)
        norm += -0.5 * scaled * x
        high = _half(scaled)
        tl.store(out + place, high.to(tl.float16), mask=inside)
        if SPLIT:
            tl.store(out + ELEMENTS + place, (scaled - high).to(tl.float16), mask=inside)
            tl.store(out + 2 * ELEMENTS + place, high.to(tl.float16), mask=inside)
        if e == VECTOR_LEN - 1 or place == ELEMENTS - 1:
            if not WEIGHTED:
                tl.store(out + LAST - 2, tl.full((BLOCK,), 1.0, tl.float16), mask=inside)
                tl.store(out + LAST - 1, tl.full((BLOCK,), 1.0, tl.float16), mask=inside)
            top = _half(norm)
            tl.store(out + LAST, top.to(tl.float16), mask=inside)
            tl.store(out + LAST + 1, (norm - top).to(tl.float16), mask=inside)
            norm = tl.zeros((BLOCK,), tl.float32)
    tl.store(far_ptr + vector, square > FAR * FAR, mask=inside)


@triton.jit
def _centroid_rows(
    c_ptr, active_ptr, centre_ptr, scale_ptr, rows_ptr, grouped_ptr, num_centroids,
    VECTOR_LEN: tl.constexpr, WIDTH: tl.constexpr, ELEMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SPLIT: tl.constexpr,
    TILES: tl.constexpr, PADDED: tl.constexpr, HALF_LANES: tl.constexpr, FAR: tl.constexpr, NEVER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    OF_X: tl.constexpr = (3 if SPLIT else 1) * ELEMENTS
    LAST: tl.constexpr = OF_X + (2 * ELEMENTS if WEIGHTED else 2)
    GROUP: tl.constexpr = 2 * TILES
    entry = tl.load(active_ptr + tl.program_id(1))
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = number < num_centroids
    group = number // GROUP
    tile = (group // HALF_LANES) * TILES + (number % GROUP) // 2
    position = (tile * HALF_LANES + group % HALF_LANES) * 2 + number % 2
    scale = tl.load(scale_ptr + entry)
    grouped = grouped_ptr + (entry.to(tl.int64) * PADDED + group * GROUP) * VECTOR_LEN + number % GROUP
    source = c_ptr + (entry.to(tl.int64) * num_centroids + number) * VECTOR_LEN
    square = tl.zeros((BLOCK,), tl.float32)
    for e in tl.static_range(VECTOR_LEN):
        c = (tl.load(source + e, mask=real, other=0.0) - tl.load(centre_ptr + entry * VECTOR_LEN + e)) * scale
        square += c * c
    usable = real & (square <= FAR * FAR)
    norm = tl.zeros((BLOCK,), tl.float32)
    for e in tl.static_range(VECTOR_LEN):
        out = rows_ptr + (entry.to(tl.int64) * PADDED + position) * WIDTH + (e // ELEMENTS) * 16
        place = e % ELEMENTS
        original = tl.load(source + e, mask=real, other=1e18)
        tl.store(grouped + e * GROUP, original)
        c = (original - tl.load(centre_ptr + entry * VECTOR_LEN + e)) * scale
        c = tl.where(usable, c, 0.0)
        high = _half(c)
        kept = high
        tl.store(out + place, high.to(tl.float16))
        if SPLIT:
            low = _half(c - high)
            kept = high + low
            tl.store(out + ELEMENTS + place, high.to(tl.float16))
            tl.store(out + 2 * ELEMENTS + place, low.to(tl.float16))
        if WEIGHTED:
            half_square = tl.where(usable, -0.5 * kept * kept, NEVER)
            top = _half(half_square)
            tl.store(out + OF_X + place, top.to(tl.float16))
            tl.store(out + OF_X + ELEMENTS + place, (half_square - top).to(tl.float16))
        norm += -0.5 * kept * kept
        if e == VECTOR_LEN - 1 or place == ELEMENTS - 1:
            if not WEIGHTED:
                norm = tl.where(usable, norm, NEVER)
                top = _half(norm)
                tl.store(out + LAST - 2, top.to(tl.float16))
                tl.store(out + LAST - 1, (norm - top).to(tl.float16))
            tl.store(out + LAST, tl.full((BLOCK,), 1.0, tl.float16))
            tl.store(out + LAST + 1, tl.full((BLOCK,), 1.0, tl.float16))
            norm = tl.zeros((BLOCK,), tl.float32)
