"""Where a linear's Hessian comes from: sums over the calibration text in memory or in files, a kept file, or none at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from vptq.calibration.hessian import BlockSums
from vptq.calibration.hessian_store import HessianStore
from vptq.calibration.runs import InputSums, Subtree, mean_of, subtrees_of, sum_subtrees
from vptq.errors import RunError
from vptq.models.files import whole_stream
from vptq.models.remote import reading
from vptq.models.staging import room_for

ROWS_AT_ONCE = 1024  # of a matrix on its way to or from a file


@dataclass(frozen=True)
class Moments:
    """What is known of a linear's inputs: see `LinearInput`. num_tokens: that it rests on; 0 where that is not known."""

    hessian: Tensor
    drift: Tensor | None = None
    num_tokens: int = 0


class HessianSource(Protocol):
    """Small enough to send: matrices are named, not carried, unless they stay in this process."""

    def load(self, device: torch.device) -> Moments: ...


@dataclass(frozen=True)
class SummedHessian:
    """Of the calibration text. subtrees: of all runs, with `InputSums` or `StoredSums`. drift_frac: part that counts."""

    subtrees: tuple[Subtree, ...]
    drift_frac: float = 1.0

    def load(self, device: torch.device) -> Moments:
        """Add up and average, on a device."""
        several = len(self.subtrees) > 1
        sums = sum_subtrees(self.subtrees, lambda sums: _loaded(sums, device, several))
        assert sums is not None, "linears that no token reaches are refused before"
        hessian, drift = mean_of(sums)
        return Moments(hessian, None if drift is None else drift.mul_(self.drift_frac), sums.num_tokens)


@dataclass(frozen=True)
class KeptHessian:
    """A file of --hessian_path."""

    store: HessianStore
    path: Path
    in_features: int

    def load(self, device: torch.device) -> Moments:
        """Read it."""
        return Moments(self.store.load(self.path, self.in_features).to(device))


@dataclass(frozen=True)
class EqualInputs:
    """Every input alike: the Hessian is the identity."""

    in_features: int

    def load(self, device: torch.device) -> Moments:
        """The identity."""
        return Moments(torch.eye(self.in_features, device=device))


@dataclass(frozen=True)
class StoredSums:
    """`InputSums` in a file: upper triangles by strips of rows, then drifts whole, all float32."""

    path: Path
    shape: tuple[int, ...]
    has_drift: bool
    num_tokens: int

    @classmethod
    def save(cls, path: Path, sums: InputSums) -> StoredSums:
        """Write sums, complete or not at all."""
        staging = _staging(sums.total.shape, sums.total.is_cuda)
        with whole_stream(path) as file:
            for matrices, upper in ((sums.total, True), (sums.drift, False)):
                for strip in [] if matrices is None else _strips(matrices, upper):
                    _write(file, strip, staging)
        return cls(path, tuple(sums.total.shape), sums.drift is not None, sums.num_tokens)

    def load(self, device: torch.device) -> InputSums:
        """Read them; the lower triangle of the total is left empty."""
        total = torch.zeros(self.shape, device=device)
        drift = torch.empty(self.shape, device=device) if self.has_drift else None
        staging = _staging(self.shape, device.type == "cuda")
        with reading(self.path) as file:
            for matrices, upper in ((total, True), (drift, False)):
                for strip in [] if matrices is None else _strips(matrices, upper):
                    _read_into(file, strip, staging, self.path)
        return InputSums(total, drift, self.num_tokens)


def computed(device: torch.device) -> torch.cuda.Event | None:
    """When all that has been asked of a GPU so far is computed; None elsewhere."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def store_sums(sums: BlockSums, folder: Path, name: str, ready: torch.cuda.Event | None = None) -> BlockSums:
    """Sums whose matrices are in files now.

    Args:
        name: that tells these from others in the folder. ready: when they are computed; what is asked of the GPU later is not
            waited for.
    """
    if ready is not None:
        with torch.cuda.stream(torch.cuda.Stream(ready.device)):
            torch.cuda.current_stream(ready.device).wait_event(ready)
            return store_sums(sums, folder, name)
    stored: dict[str, list[Subtree]] = {}
    for number, (leader, subtrees) in enumerate(sums.subtrees.items()):
        stored[leader] = []
        for subtree in subtrees:
            path = folder / f"{name}-{number}-{subtree.first}.sums"
            kept = None if subtree.sums is None else StoredSums.save(path, subtree.sums)
            stored[leader].append(Subtree(subtree.level, subtree.index, kept))
    return BlockSums(stored, sums.leaders)


def sources_of(shares: Mapping[range, BlockSums], drift_frac: float) -> dict[str, SummedHessian]:
    """The Hessian of every linear that some token reached, by its name inside the block; one object for one input.

    shares: what was summed over each share of the runs; together they are all of them.
    """
    found: dict[tuple[str | None, ...], SummedHessian] = {}
    sources: dict[str, SummedHessian] = {}
    for suffix in dict.fromkeys(suffix for sums in shares.values() for suffix in sums.leaders):
        leaders = tuple(sums.leaders.get(suffix) for sums in shares.values())
        if leaders not in found:
            pairs = zip(leaders, shares.items(), strict=True)
            subtrees = tuple(s for leader, (runs, sums) in pairs for s in _subtrees_of(leader, runs, sums))
            found[leaders] = SummedHessian(subtrees, drift_frac)
        sources[suffix] = found[leaders]
    return sources


def files_of(sources: Mapping[str, HessianSource]) -> list[Path]:
    """The files of sums among these."""
    summed = {id(source): source for source in sources.values() if isinstance(source, SummedHessian)}
    return [s.sums.path for source in summed.values() for s in source.subtrees if isinstance(s.sums, StoredSums)]


def _subtrees_of(leader: str | None, runs: range, sums: BlockSums) -> list[Subtree]:
    return subtrees_of(runs) if leader is None else sums.subtrees[leader]


def _loaded(sums: InputSums | StoredSums | None, device: torch.device, changes: bool) -> InputSums | None:
    """On a device; a copy if it is in memory and will be added to."""
    if isinstance(sums, InputSums):
        there = sums.to(device)
        if changes and there.total.data_ptr() == sums.total.data_ptr():
            return InputSums(sums.total.clone(), None if sums.drift is None else sums.drift.clone(), sums.num_tokens)
        return there
    return None if sums is None else sums.load(device)


def _strips(matrices: Tensor, upper: bool) -> Iterator[Tensor]:
    """Rows of (n, n) or (groups, n, n), some at a time, from the diagonal on for an upper triangle."""
    for matrix in matrices if matrices.ndim == 3 else matrices[None]:
        for first in range(0, len(matrix), ROWS_AT_ONCE):
            yield matrix[first : first + ROWS_AT_ONCE, first if upper else 0 :]


def _staging(shape: Sequence[int], pin: bool) -> Tensor:
    return room_for(torch.empty(ROWS_AT_ONCE * shape[-1], device="meta"), pin)


def _write(file: BinaryIO, strip: Tensor, staging: Tensor) -> None:
    rows = staging[: math.prod(strip.shape)].view(strip.shape)
    rows.copy_(strip)
    data = memoryview(rows.numpy().reshape(-1)).cast("B")  # type: ignore[arg-type]
    while data:
        data = data[file.write(data) :]


def _read_into(file: BinaryIO, strip: Tensor, staging: Tensor, path: Path) -> None:
    rows = staging[: math.prod(strip.shape)].view(strip.shape)
    data = memoryview(rows.numpy().reshape(-1)).cast("B")  # type: ignore[arg-type]
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise RunError(f"`{path}` has been cut short", hint="go on with `vptq quantize --resume RUN_FOLDER`")
        data = data[count:]
    strip.copy_(rows)
