"""What is done with each block of a model, as the stages of a `BlockWalk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vptq.calibration.hessian_store import HessianStore, label_of
from vptq.calibration.runs import share_runs, subtrees_of
from vptq.data import TokenSequences
from vptq.models.architecture import Skeleton
from vptq.models.remote import remove
from vptq.pipeline.calibrate import CalibrationText
from vptq.pipeline.codebooks import codebook_file
from vptq.pipeline.cost import forward_units, hessian_units, linear_units
from vptq.pipeline.hessians import EqualInputs, HessianSource, KeptHessian, files_of
from vptq.pipeline.plan import LinearPlan, RunPlan
from vptq.pipeline.schedule import Stage
from vptq.pipeline.task import LinearTask, make_batches
from vptq.pipeline.works import Calibrate, KeepHessian, MeasureLinears, QuantizeLinears, Work

WORKERS_A_BLOCK = 2  # a block has few linears of very different size: more workers than this need further blocks to be busy


@dataclass(frozen=True)
class Passage:
    """How the calibration text goes through the blocks.

    Attributes:
        shares: runs of sequences that are carried together, one share a worker.
        means: of the loss's token weights, by full name of the linear, with --hessian fisher.
        last: the last block that it is carried past.
    """

    skeleton: Skeleton
    plan: RunPlan
    num_tokens: int
    shares: tuple[range, ...]
    last: int
    sequential: bool = False
    means: Mapping[str, float] | None = None
    weighted: bool = False  # whether there are, or will be, means

    def calibrate(self, block: int, wanted: bool) -> tuple[Calibrate, ...]:
        """The works for one block; none for one beyond the last."""
        if block > self.last:
            return ()
        means = None
        if self.means is not None and wanted:
            means = {linear.info.suffix: self.means[linear.name] for linear in self.plan.of_block(block)}
        last = block == self.last
        return tuple(Calibrate(block, runs, wanted, last, self.sequential, means) for runs in self.shares)

    def units(self, block: int, wanted: bool) -> float:
        """Of all works for one block."""
        if block > self.last:
            return 0.0
        forward = forward_units(self.plan, block, self.num_tokens)
        return forward + (hessian_units(self.plan, block, self.num_tokens) if wanted else 0.0)


def shares_of(tokens: TokenSequences, num_workers: int) -> tuple[range, ...]:
    """The runs of each worker; fewer shares than workers where there are fewer runs."""
    runs = len(CalibrationText(tokens.tokens).runs)
    return tuple(share for share in share_runs(runs, num_workers) if share)


def blocks_ahead(num_workers: int, sequential: bool) -> int:
    """How many blocks are calibrated before the linears of an earlier one are done."""
    if sequential or num_workers == 1:
        return 0
    return -(-num_workers // WORKERS_A_BLOCK)


def scratch_bytes(passage: Passage, num_workers: int) -> int:
    """Sums in files at once, at most."""
    if num_workers == 1 or passage.last < 0:
        return 0
    blocks = min(blocks_ahead(num_workers, passage.sequential) + 1, passage.last + 1)
    return blocks * sums_bytes(passage)


def sums_bytes(passage: Passage) -> int:
    """Of one block, handed over by all shares, float32: upper triangles, and drifts whole."""
    each = 3 if passage.sequential else 1
    subtrees = sum(len(subtrees_of(share)) for share in passage.shares)
    return subtrees * sum(4 * each * size * (size + 1) // 2 for size in input_sizes(passage))


def input_sizes(passage: Passage) -> list[int]:
    """in_features of every matrix summed for the first block.

    As the linears' names tell, q, k and v share one; with weighted tokens each has its own, one for every group of rows.
    """
    plan = passage.plan
    linears = plan.of_block(plan.linears[0].info.block)
    if passage.weighted:
        return [linear.info.in_features for linear in linears for _ in range(linear.layer.row_groups)]
    return list({label_of(linear.info.suffix): linear.info.in_features for linear in linears}.values())


def measuring_stages(passage: Passage) -> list[Stage]:
    """Stages that measure how sensitive every linear is."""
    return [_measuring(passage, block) for block in range(passage.last + 1)]


def _measuring(passage: Passage, block: int) -> Stage:
    linears = passage.plan.of_block(block)

    def works(hessians: Mapping[str, HessianSource]) -> list[tuple[Work, float]]:
        groups: dict[int, list[LinearPlan]] = {}
        for linear in linears:
            groups.setdefault(id(hessians.get(linear.info.suffix)), []).append(linear)
        found: list[tuple[Work, float]] = []
        for group in groups.values():
            own = {p.info.suffix: hessians[p.info.suffix] for p in group if p.info.suffix in hessians}
            found.append((MeasureLinears(tuple(group), own, _means_of(passage.means, group)), 0.0))
        return found

    phase = "sensitivity of the linears"
    return Stage(passage.calibrate(block, True), passage.units(block, True), True, works, (phase, phase), drop_files)


def _means_of(means: Mapping[str, float] | None, linears: Sequence[LinearPlan]) -> dict[str, float] | None:
    return None if means is None else {linear.name: means[linear.name] for linear in linears}


@dataclass(frozen=True)
class Quantizing:
    """What is quantized, and with what.

    Attributes:
        todo: linears and ends that are not done. codebooks: the run's folder of shared ones.
        kept: Hessian file by linear, in `store`. provenance: of the calibration text, for Hessians that will be kept.
        heads: name of an end to do -> the head that it is or stands for.
    """

    passage: Passage
    todo: tuple[LinearPlan, ...]
    device: torch.device
    codebooks: Path
    store: HessianStore | None = None
    kept: Mapping[str, Path] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)

    def stages(self) -> list[Stage]:
        """All blocks, and the ends."""
        found = [self._block(block) for block in range(len(self.passage.skeleton.blocks))]
        ends = [linear for linear in self.todo if linear in self.passage.plan.ends]
        return [*found, self._ends(ends)] if ends else found

    def _block(self, block: int) -> Stage:
        todo = [linear for linear in self.todo if linear.info.block == block and linear not in self.passage.plan.ends]
        wanted = any(linear.name not in self.kept for linear in todo)

        def works(fresh: Mapping[str, HessianSource]) -> list[tuple[Work, float]]:
            equal = {size: EqualInputs(size) for size in {linear.info.in_features for linear in todo}}
            unseen = {linear.info.suffix: equal[linear.info.in_features] for linear in todo}  # experts that no token chose
            hessians = unseen | dict(fresh) | self._kept_hessians(todo)
            keeping: list[tuple[Work, float]] = [(work, 0.0) for work in self._keeping(block, todo, fresh)]
            return keeping + self._quantizing(todo, hessians)

        phases = f"block {block}: calibrating", f"block {block}: quantizing"
        passage = self.passage
        return Stage(passage.calibrate(block, wanted), passage.units(block, wanted), wanted, works, phases, drop_files)

    def _ends(self, ends: list[LinearPlan]) -> Stage:
        """Embeddings, in which every error counts alike, and what serves as head, by what goes into it."""
        head = next((self.heads[end.name] for end in ends if end.name in self.heads), "")
        calibrate: tuple[Calibrate, ...] = ()
        if head:
            number = len(self.passage.skeleton.blocks)
            sequential = self.passage.sequential
            calibrate = tuple(Calibrate(number, runs, sequential=sequential, head=head) for runs in self.passage.shares)

        def works(fresh: Mapping[str, HessianSource]) -> list[tuple[Work, float]]:
            hessians = {
                end.info.suffix: fresh[head] if end.name in self.heads else EqualInputs(end.info.in_features) for end in ends
            }
            return self._quantizing(ends, hessians)

        phases = "head: calibrating", f"{', '.join(end.name for end in ends)}: quantizing"
        return Stage(calibrate, 0.0, bool(head), works, phases, drop_files)

    def _kept_hessians(self, todo: list[LinearPlan]) -> dict[str, HessianSource]:
        found: dict[Path, KeptHessian] = {}
        for linear in todo:
            path = self.kept.get(linear.name)
            if path is not None and self.store is not None:
                found.setdefault(path, KeptHessian(self.store, path, linear.info.in_features))
        return {p.info.suffix: found[self.kept[p.name]] for p in todo if p.name in self.kept}

    def _keeping(self, block: int, todo: list[LinearPlan], fresh: Mapping[str, HessianSource]) -> list[Work]:
        """What the store holds stays as it is."""
        if self.store is None:
            return []
        served: dict[int, list[str]] = {}
        for suffix, source in fresh.items():
            served.setdefault(id(source), []).append(suffix)
        wanted = {linear.info.suffix for linear in todo if linear.name not in self.kept}
        return [
            KeepHessian(self.store, block, tuple(suffixes), fresh[suffixes[0]], self.provenance)
            for suffixes in served.values()
            if wanted & set(suffixes)
        ]

    def _quantizing(self, linears: list[LinearPlan], hessians: Mapping[str, HessianSource]) -> list[tuple[Work, float]]:
        """Costliest first."""
        found: list[tuple[Work, float]] = []
        for batch in make_batches([self._task(linear) for linear in linears], self.device):
            own = {task.plan.info.suffix: hessians[task.plan.info.suffix] for task in batch}
            found.append((QuantizeLinears(tuple(batch), own), sum(linear_units(task.plan) for task in batch)))
        return sorted(found, key=lambda pair: -pair[1])

    def _task(self, linear: LinearPlan) -> LinearTask:
        codebook = codebook_file(self.codebooks, linear.config) if linear.config.is_shared else None
        return LinearTask(linear, self.passage.skeleton.dtype, codebook)


def drop_files(sources: Mapping[str, HessianSource]) -> None:
    """Delete sums that nobody needs any more."""
    for path in files_of(sources):
        remove(path)
