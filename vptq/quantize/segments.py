"""What a sweep is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of permuted columns that share codebooks: the outliers, or one group.

    Attributes:
        start, end: first and past-the-last column.
        stages: main, then residual codebook if there is one; (num_centroids, vector_len) float32 each.
    """

    start: int
    end: int
    stages: tuple[Tensor, ...]

    @property
    def vector_len(self) -> int:
        return self.stages[0].shape[1]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep chose.

    Attributes:
        quantized: (out_features, in_features) float32, permuted and normalised like the input.
        leftover: same shape, what each column was to become (with the errors to its left made up for) minus `quantized`.
        indices: for every segment, for every stage, (rows, vector columns) int64.
    """

    quantized: Tensor
    leftover: Tensor
    indices: tuple[tuple[Tensor, ...], ...]
