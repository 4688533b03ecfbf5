"""Sums over fixed runs of sequences in a fixed order: the same bytes, whoever computed which run.

Floating-point sums depend on how they are bracketed. Here the brackets are those of a binary tree over at most `MOST_RUNS`
runs, whatever the number of workers: each worker sums the whole subtrees that its runs make up, and hands these over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_RUNS = 16
FREE_FRACTION = 0.2  # of a GPU's memory: below this, sums wait for their siblings in main memory


@dataclass(frozen=True)
class InputSums:
    """Sums over the tokens of some runs, for one input.

    Attributes:
        total: of x xᵀ, (in_features, in_features) or with weights (groups, in_features, in_features) float32; only the upper
            triangles count. drift: of (x₀ - x) xᵀ, of the same shape, or None. num_tokens: how many were summed.
    """

    total: Tensor
    drift: Tensor | None
    num_tokens: int

    def plus(self, other: InputSums) -> InputSums:
        """The sum of both; this one's memory is taken for it."""
        device = self.total.device if self.total.is_cuda else other.total.device
        left, right = self.to(device), other.to(device)
        drift = None if left.drift is None or right.drift is None else left.drift.add_(right.drift)
        return InputSums(left.total.add_(right.total), drift, left.num_tokens + right.num_tokens)

    def to(self, device: torch.device) -> InputSums:
        """On a device."""
        return InputSums(self.total.to(device), None if self.drift is None else self.drift.to(device), self.num_tokens)


@dataclass(frozen=True)
class Subtree:
    """What was summed over the runs [index · 2^level, (index + 1) · 2^level), as far as there are so many.

    sums: an `InputSums`, something that stands for it, or None where no token came.
    """

    level: int
    index: int
    sums: Any

    @property
    def first(self) -> int:
        return self.index << self.level


class TreeSum:
    """Adds runs that come in order; siblings are joined at once, so that few sums wait. subtrees: of the runs before."""

    def __init__(self, subtrees: Iterable[Subtree] = ()) -> None:
        self.subtrees = list(subtrees)

    def add(self, subtree: Subtree) -> None:
        """The next runs: a leaf, or a subtree that another worker has summed."""
        while self.subtrees and _are_siblings(self.subtrees[-1], subtree):
            left = self.subtrees.pop()
            subtree = Subtree(left.level + 1, left.index // 2, _joined(left.sums, subtree.sums))
        self.subtrees.append(subtree)

    def make_room(self) -> None:
        """Bring all sums to main memory if the GPU they are on is short of it: bytes are the same on both."""
        if any(s.sums is not None and s.sums.total.is_cuda for s in self.subtrees):
            free, all_of_it = torch.cuda.mem_get_info()
            if free < FREE_FRACTION * all_of_it:
                moved = [s.sums if s.sums is None else s.sums.to(torch.device("cpu")) for s in self.subtrees]
                self.subtrees = [Subtree(s.level, s.index, m) for s, m in zip(self.subtrees, moved, strict=True)]

    def whole(self) -> InputSums | None:
        """The sum of all; None if no token came."""
        found = None
        for subtree in reversed(self.subtrees):
            found = _joined(subtree.sums, found)
        return found


def sum_subtrees(subtrees: Iterable[Subtree], load: Callable[[Any], InputSums | None] = lambda sums: sums) -> InputSums | None:
    """The sum of subtrees that make up all runs.

    Args:
        load: gives the `InputSums` of what stands for it; called in the order of the runs, so that few are held at a time.
    """
    tree = TreeSum()
    for subtree in sorted(subtrees, key=lambda subtree: subtree.first):
        tree.add(Subtree(subtree.level, subtree.index, load(subtree.sums)))
    return tree.whole()


def subtrees_of(runs: range) -> list[Subtree]:
    """The subtrees that some runs make up, without sums."""
    tree = TreeSum()
    for run in runs:
        tree.add(Subtree(0, run, None))
    return tree.subtrees


def split_runs(num_batches: int) -> list[range]:
    """The batches of each run: nearly equal numbers, at most MOST_RUNS runs."""
    runs = min(MOST_RUNS, num_batches)
    return [range(num_batches * run // runs, num_batches * (run + 1) // runs) for run in range(runs)]


def share_runs(num_runs: int, num_workers: int) -> list[range]:
    """The runs of each worker, some of which may have none; cut where few subtrees make up a share."""
    grain = 1
    while grain * 2 * 4 * num_workers <= num_runs:
        grain *= 2
    cuts = [round(num_runs * worker / num_workers / grain) * grain for worker in range(num_workers)] + [num_runs]
    return [range(first, end) for first, end in itertools.pairwise(cuts)]


def mean_of(sums: InputSums) -> tuple[Tensor, Tensor | None]:
    """Mean of x xᵀ, symmetric to the bit, and of (x₀ - x) xᵀ, shaped as the sums, float32."""
    count = max(sums.num_tokens, 1)
    upper = (sums.total / count).triu_()
    mean = upper + upper.triu(1).transpose(-1, -2)
    return mean, None if sums.drift is None else sums.drift / count


def _are_siblings(left: Subtree, right: Subtree) -> bool:
    return left.level == right.level and left.index % 2 == 0 and right.index == left.index + 1


def _joined(left: InputSums | None, right: InputSums | None) -> InputSums | None:
    if left is None or right is None:
        return right if left is None else left
    return left.plus(right)
