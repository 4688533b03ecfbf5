"""`Clusters` on the Triton kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.assign import assign_nearest, squared_distances, weigh
from vptq.quantize.fixed_point import FixedPointSums
from vptq.quantize.kernels.features import CentroidRows, Frame, Layout, choose_layout, make_frame, vector_rows
from vptq.quantize.kernels.launch import num_programs
from vptq.quantize.kernels.nearest import best_groups, nearest_in_group
from vptq.quantize.layout import VectorWeights

SUM_BLOCK = 4096
MEANS_BLOCK = 256


@dataclass(frozen=True)
class _Part:
    """A run of vectors that weigh the same kind of way, with all that their two passes need."""

    run: slice
    vectors: Tensor  # (B, m, v) float32
    weights: Tensor  # (B, m) or (B, m, v) float32
    layout: Layout
    frame: Frame
    rows: Tensor  # (B, m, width) float16
    far: Tensor  # (B, m) bool
    centroids: CentroidRows
    groups: Tensor  # (B, m) int32
    far_numbers: list[Tensor]  # of every entry, (few,) int64


class KernelClusters:
    """Vectors of a batch, assigned by the two passes of `kernels.nearest`.

    Args:
        vectors: (B, n, v) float32, v <= 16. weights: of the batch.
    """

    def __init__(self, vectors: Tensor, weights: VectorWeights, num_centroids: int) -> None:
        batch, count, _ = vectors.shape
        self.vectors, self.weights = vectors, weights
        self.assignments = torch.zeros(batch, count, dtype=torch.int32, device=vectors.device)
        self.errors = torch.zeros(batch, count, device=vectors.device)
        self.num_centroids = num_centroids
        self._active: tuple[list[int], Tensor] | None = None
        frame = make_frame(vectors)
        self.parts = [self._part(frame, run, part, num_centroids) for run, part in weights.parts()]

    @functools.cached_property
    def fixed(self) -> FixedPointSums:
        """The cluster sums, made when they are first wanted."""
        return FixedPointSums.empty(self.vectors, self.weights, self.num_centroids)

    def _part(self, frame: Frame, run: slice, weights: Tensor, num_centroids: int) -> _Part:
        vectors, weights = self.vectors[:, run].contiguous(), weights.contiguous()
        layout = choose_layout(vectors.shape[2], num_centroids, weighted=weights.ndim == 3)
        rows, far = vector_rows(vectors, weights if layout.weighted else None, frame, layout)
        centroids = CentroidRows.empty(len(vectors), layout, vectors.device)
        groups = torch.zeros(far.shape, dtype=torch.int32, device=vectors.device)
        far_numbers = [entry.nonzero()[:, 0] for entry in far]
        return _Part(run, vectors, weights, layout, frame, rows, far, centroids, groups, far_numbers)

    def assign(self, centroids: Tensor, active: list[int]) -> None:
        """Assign the vectors of the entries in `active` anew, in place. centroids: (B, k, v) float32."""
        self._find(centroids, active, self.fixed)

    def nearest(self, centroids: Tensor) -> Tensor:
        """Assign all, without cluster sums. centroids: (B, k, v) float32; returns (B, n) int32."""
        self._find(centroids, list(range(len(centroids))), None)
        return self.assignments

    def _find(self, centroids: Tensor, active: list[int], sums: FixedPointSums | None) -> None:
        numbers = self._numbers(active)
        centroids = centroids.contiguous()
        if sums is not None:
            sums.clear(active)
        for part in self.parts:
            part.centroids.fill(centroids, numbers, part.frame, part.layout)
            best_groups(part.rows, part.centroids, numbers, part.groups, part.layout)
            nearest_in_group(
                part.vectors, part.weights, centroids, part.centroids, numbers, part.groups, part.far,
                self.assignments, self.errors, sums, part.layout, part.run.start,
            )  # fmt: skip
            for entry in active:
                if len(part.far_numbers[entry]):
                    self._find_far(part, entry, centroids[entry], sums)

    def _find_far(self, part: _Part, entry: int, centroids: Tensor, sums: FixedPointSums | None) -> None:
        """The few vectors beyond float16's range, in plain float32."""
        numbers = part.far_numbers[entry]
        vectors, weights = part.vectors[entry, numbers], part.weights[entry, numbers]
        element_weights = weights if part.layout.weighted else None
        found = assign_nearest(vectors, centroids, element_weights)
        self.assignments[entry, part.run][numbers] = found.int()
        self.errors[entry, part.run][numbers] = weigh(squared_distances(vectors, centroids, found, element_weights), weights)
        if sums is not None:
            sums.add(entry, found, vectors, weights)

    def means(self, centroids: Tensor, active: list[int]) -> Tensor:
        """Centroids of the active entries moved to their means; see `Clusters`. centroids: (B, k, v) float32."""
        moved = centroids.clone()
        fixed, elements = self.fixed, centroids[0].numel()
        _means[(num_programs(elements, MEANS_BLOCK), len(active))](
            fixed.products, fixed.totals, fixed.element_totals, fixed.steps, moved, self._numbers(active),
            fixed.copies, elements,
            VECTOR_LEN=centroids.shape[2], RAGGED=fixed.element_totals is not None, BLOCK=MEANS_BLOCK,
        )  # fmt: skip
        return moved

    def empty(self, entry: int) -> Tensor:
        """Clusters of one entry that have no weight: (number of them,) int64."""
        totals = self.fixed.totals[entry].amax(0)
        if self.fixed.element_totals is not None:
            totals = totals + self.fixed.element_totals[entry].amax((0, 2))
        return torch.nonzero(totals <= 0)[:, 0]

    def measure(self, active: list[int]) -> list[tuple[float, int]]:
        """Objective and number of clusters without weight, of each entry in `active`: one copy to the host."""
        batch, count = self.errors.shape
        partial = torch.empty(batch, num_programs(count, SUM_BLOCK), dtype=torch.float64, device=self.errors.device)
        _block_sums[(partial.shape[1], batch)](self.errors, partial, count, BLOCK=SUM_BLOCK)
        found = torch.empty(batch, 2, dtype=torch.float64, device=self.errors.device)
        fixed = self.fixed
        _measure[(batch,)](
            partial, fixed.totals, fixed.element_totals, found, partial.shape[1], fixed.copies, fixed.totals.shape[2],
            VECTOR_LEN=self.vectors.shape[2], RAGGED=fixed.element_totals is not None, BLOCK=1024,
        )  # fmt: skip
        both = found.tolist()
        return [(both[entry][0], int(both[entry][1])) for entry in active]

    def _numbers(self, active: list[int]) -> Tensor:
        """The active entries as a tensor, kept: they change seldom. (len(active),) int32."""
        if self._active is None or self._active[0] != active:
            self._active = (list(active), torch.tensor(active, dtype=torch.int32, device=self.vectors.device))
        return self._active[1]


# Sums are ordered by entry, in the same way in every batch: torch's own choose their order by the shape of the batch.


@triton.jit
def _block_sums(values_ptr, sums_ptr, count, BLOCK: tl.constexpr):
    entry = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + entry * count + number, mask=number < count, other=0.0)
    tl.store(sums_ptr + entry * tl.num_programs(0) + tl.program_id(0), tl.sum(values.to(tl.float64), 0))


@triton.jit
def _measure(
    partial_ptr, totals_ptr, element_totals_ptr, found_ptr, partials, copies, num_centroids,
    VECTOR_LEN: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, partials, BLOCK):
        sums += tl.load(partial_ptr + entry * partials + first + place, mask=first + place < partials, other=0.0)
    tl.store(found_ptr + 2 * entry, tl.sum(sums, 0))
    empty = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_centroids, BLOCK):
        there = first + place < num_centroids
        total = tl.zeros((BLOCK,), tl.int64)
        for copy in range(copies):
            cluster = (entry * copies + copy) * num_centroids + first + place
            total += tl.load(totals_ptr + cluster, mask=there, other=0)
            if RAGGED:
                for e in tl.static_range(VECTOR_LEN):
                    total += tl.load(element_totals_ptr + cluster * VECTOR_LEN + e, mask=there, other=0)
        empty += (there & (total <= 0)).to(tl.int32)
    tl.store(found_ptr + 2 * entry + 1, tl.sum(empty, 0).to(tl.float64))


@triton.jit
def _means(
    products_ptr, totals_ptr, element_totals_ptr, steps_ptr, moved_ptr, active_ptr, copies, elements,
    VECTOR_LEN: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.load(active_ptr + tl.program_id(1)).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = number < elements
    product = tl.zeros((BLOCK,), tl.int64)
    total = tl.zeros((BLOCK,), tl.int64)
    for copy in range(copies):
        first = (entry * copies + copy) * elements
        product += tl.load(products_ptr + first + number, mask=there, other=0)
        total += tl.load(totals_ptr + (first + number) // VECTOR_LEN, mask=there, other=0)
        if RAGGED:
            total += tl.load(element_totals_ptr + first + number, mask=there, other=0)
    old = tl.load(moved_ptr + entry * elements + number, mask=there, other=0.0)
    weight = tl.where(total > 0, total, 1).to(tl.float64) / tl.load(steps_ptr + 2 * entry + 1)
    mean = product.to(tl.float64) / tl.load(steps_ptr + 2 * entry) / weight
    tl.store(moved_ptr + entry * elements + number, tl.where(total > 0, mean.to(tl.float32), old), mask=there)
