"""What there is to do for workers: each piece small enough to send, its tensors in files or, in one process, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vptq.calibration.hessian_store import HessianStore
from vptq.pipeline.hessians import HessianSource
from vptq.pipeline.plan import LinearPlan
from vptq.pipeline.task import LinearTask


@dataclass(frozen=True)
class Weigh:
    """The loss's weights of the tokens of some runs, kept in files. row_groups: of every linear, by full name."""

    runs: range
    row_groups: Mapping[str, int]


@dataclass(frozen=True)
class Calibrate:
    """Carry the states of some runs past a block; answered by its `BlockSums`.

    Attributes:
        wanted: whether sums are. last: no later block follows. sequential: see `CalibrationConfig`.
        means: of the token weights of the block's linears, by name inside it, with --hessian fisher.
        head: instead of a block's, the sums of what goes into the module of this name.
    """

    block: int
    runs: range
    wanted: bool = True
    last: bool = False
    sequential: bool = False
    means: Mapping[str, float] | None = None
    head: str = ""


@dataclass(frozen=True)
class KeepHessian:
    """Put a Hessian into the store of --hessian_path. linears: of the block, that it serves. provenance: of the text."""

    store: HessianStore
    block: int
    linears: tuple[str, ...]
    hessian: HessianSource
    provenance: Mapping[str, str]


@dataclass(frozen=True)
class MeasureLinears:
    """How sensitive linears are; answered by name. means: of their token weights, if they have any."""

    linears: tuple[LinearPlan, ...]
    hessians: Mapping[str, HessianSource]
    means: Mapping[str, float] | None


@dataclass(frozen=True)
class QuantizeLinears:
    """Linears of one shape and setting; answered by their figures. hessians: by suffix."""

    batch: tuple[LinearTask, ...]
    hessians: Mapping[str, HessianSource]


Work = Weigh | Calibrate | KeepHessian | MeasureLinears | QuantizeLinears


def linears_of(work: Work) -> list[str]:
    """The full names of the linears that a piece of work quantizes, or measures."""
    if isinstance(work, QuantizeLinears):
        return [task.plan.name for task in work.batch]
    return [linear.name for linear in work.linears] if isinstance(work, MeasureLinears) else []


def describe(work: Work) -> list[str]:
    """A line for each thing that is missing if this is not done."""
    if isinstance(work, Weigh):
        return [f"gradients of the loss, runs {work.runs.start} to {work.runs.stop - 1}"]
    if isinstance(work, Calibrate):
        return [f"calibration of {work.head or f'block {work.block}'}, runs {work.runs.start} to {work.runs.stop - 1}"]
    return [f"Hessian of {name}" for name in work.linears] if isinstance(work, KeepHessian) else linears_of(work)
