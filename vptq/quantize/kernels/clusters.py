"""`Clusters` on the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vptq.quantize.assign import assign_nearest, squared_distances
from vptq.quantize.fixed_point import FixedPointSums
from vptq.quantize.kernels.features import CentroidRows, Frame, Layout, choose_layout, make_frame, vector_rows
from vptq.quantize.kernels.launch import num_programs
from vptq.quantize.kernels.nearest import best_groups, nearest_in_group
from vptq.quantize.layout import VectorWeights

SUM_BLOCK = 4096


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
        self.fixed = FixedPointSums.empty(vectors, weights, num_centroids)
        frame = make_frame(vectors)
        self.parts = [self._part(frame, run, part, num_centroids) for run, part in weights.parts()]

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
        numbers = torch.tensor(active, dtype=torch.int32, device=centroids.device)
        centroids = centroids.contiguous()
        if sums is not None:
            sums.clear()
        for part in self.parts:
            part.centroids.fill(centroids, numbers, part.frame, part.layout)
            best_groups(part.rows, part.centroids, numbers, part.groups, part.layout)
            nearest_in_group(
                part.vectors, part.weights, part.centroids, numbers, part.groups, part.far,
                self.assignments, self.errors, sums, part.layout, part.run.start,
            )  # fmt: skip
            for entry in active:
                if len(part.far_numbers[entry]):
                    self._find_far(part, entry, centroids[entry], sums)

    def _find_far(self, part: _Part, entry: int, centroids: Tensor, sums: FixedPointSums | None) -> None:
        """The few vectors beyond float16's range, in plain float32."""
        numbers = part.far_numbers[entry]
        vectors, weights = part.vectors[entry, numbers], part.weights[entry, numbers]
        found = assign_nearest(vectors, centroids, weights if part.layout.weighted else None)
        self.assignments[entry, part.run][numbers] = found.int()
        self.errors[entry, part.run][numbers] = squared_distances(vectors, centroids, found, weights)
        if sums is not None:
            sums.add(entry, found, vectors, weights)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Σ w x (B, k, v) and Σ w (B, k, v or 1) of every cluster, float64, the same bits every run."""
        return self.fixed.decode()

    def measure(self, active: list[int]) -> list[tuple[float, int]]:
        """Objective and number of clusters without weight, of each entry in `active`: one copy to the host."""
        totals = self.fixed.totals.amax(1)
        if self.fixed.element_totals is not None:
            totals = totals + self.fixed.element_totals.amax((1, 3))
        empty = (totals <= 0).sum(1)
        both = torch.stack([entry_sums(self.errors), empty.double()], 1).tolist()
        return [(both[entry][0], int(both[entry][1])) for entry in active]


def entry_sums(values: Tensor) -> Tensor:
    """Sums in float64, (B, n) float32 -> (B,) float64: each entry's bits are the same in any batch, as torch's are not."""
    while values.shape[1] > 1 or values.dtype != torch.float64:
        batch, count = values.shape
        partial = torch.empty(batch, num_programs(count, SUM_BLOCK), dtype=torch.float64, device=values.device)
        _block_sums[(partial.shape[1], batch)](values, partial, count, BLOCK=SUM_BLOCK)
        values = partial
    return values[:, 0]


@triton.jit
def _block_sums(values_ptr, sums_ptr, count, BLOCK: tl.constexpr):
    entry = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + entry * count + number, mask=number < count, other=0.0)
    tl.store(sums_ptr + entry * tl.num_programs(0) + tl.program_id(0), tl.sum(values.to(tl.float64), 0))
