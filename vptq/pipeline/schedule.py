"""What can be done next, and by whom: the order of works, whoever does them.

Blocks are stages: the text is carried past a block, share by share, then its linears are worked on. Unless each block is
calibrated on the quantized ones before it, later blocks are calibrated while linears of earlier ones are still under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vptq.calibration.hessian import BlockSums
from vptq.pipeline.hessians import HessianSource, sources_of
from vptq.pipeline.works import Calibrate, Work


class Schedule(Protocol):
    """Hands out works, and is told what came of them."""

    def take(self, worker: int, alive: Sequence[int]) -> Work | None:
        """The next work for a worker that is free; None if it must wait, or all is handed out."""

    def retried(self, work: Work, worker: int) -> None:
        """A work that failed is given to another worker, or to the same again."""

    @property
    def following(self) -> Work | None:
        """What is likely to be taken next."""

    def done(self, work: Work, answer: Any) -> None:
        """A work has been done."""

    def advanced(self, work: Work, part: float) -> None:
        """A part of a work has been done since this was last told."""

    @property
    def finished(self) -> bool:
        """Whether all is done."""


@dataclass
class Watch:
    """Tells of progress in units. phase: what is at work. advance: units done."""

    phase: Callable[[str], None]
    advance: Callable[[float], None]
    _told: dict[int, float] = field(default_factory=dict)

    def advanced(self, work: Work, phase: str, units: float, part: float) -> None:
        """A part of a work of so many units is done; all parts together tell of no more than these."""
        told = self._told.get(id(work), 0.0)
        part = min(part, 1 - told)
        self._told[id(work)] = told + part
        self.phase(phase)
        self.advance(units * part)

    def done(self, work: Work, phase: str, units: float) -> None:
        """All of it is done, told before or not."""
        told = self._told.pop(id(work), 0.0)
        self.phase(phase)
        if told < 1:
            self.advance(units * (1 - told))


class InOrder:
    """Works that don't depend on each other. on_done: told of each with its answer."""

    def __init__(
        self, works: Sequence[Work], units: Sequence[float], phase: str, watch: Watch, on_done: Callable[[Work, Any], None]
    ) -> None:
        self.waiting = list(works)
        self.units = {id(work): units for work, units in zip(works, units, strict=True)}
        self.phase, self.watch, self.on_done = phase, watch, on_done

    def take(self, worker: int, alive: Sequence[int]) -> Work | None:
        """The next one."""
        if self.waiting:
            self.watch.phase(self.phase)
        return self.waiting.pop(0) if self.waiting else None

    def retried(self, work: Work, worker: int) -> None:
        """Whoever does it."""

    @property
    def following(self) -> Work | None:
        """The one after."""
        return self.waiting[0] if self.waiting else None

    def done(self, work: Work, answer: Any) -> None:
        """A work has been done."""
        self.watch.done(work, self.phase, self.units.pop(id(work)))
        self.on_done(work, answer)

    def advanced(self, work: Work, part: float) -> None:
        """A part of it has."""
        self.watch.advanced(work, self.phase, self.units[id(work)], part)

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return not self.units


@dataclass(frozen=True)
class Stage:
    """A block, or what comes after the last one.

    Attributes:
        calibrate: the works that carry the text past it, one a share, made when they can begin; none if that is not needed.
        calibrate_units: of all of them.
        wanted: whether these give Hessians that `works` needs.
        works: made of the Hessians by suffix, each with its units.
        phases: what it is called while calibrated, and while worked on.
        close: called once all is done.
    """

    calibrate: tuple[Calibrate, ...]
    calibrate_units: float
    wanted: bool
    works: Callable[[Mapping[str, HessianSource]], list[tuple[Work, float]]]
    phases: tuple[str, str]
    close: Callable[[Mapping[str, HessianSource]], None]


class BlockWalk:
    """Stages in their order.

    Args:
        ahead: how many stages may be calibrated beyond the first that is not done; 0 where each needs what came before.
        drift_frac: see `CalibrationConfig`. on_done: told of each work of a stage with its answer.
    """

    def __init__(
        self, stages: Sequence[Stage], ahead: int, drift_frac: float, watch: Watch, on_done: Callable[[Work, Any], None]
    ) -> None:
        self.stages, self.ahead, self.drift_frac = list(stages), ahead, drift_frac
        self.watch, self.on_done = watch, on_done
        self.current = 0  # the first stage that is not done
        self._opened = 0  # stages whose calibration is done or not needed, all before them too
        self._left: dict[int, int] = {}  # works of an opened stage that are not done
        self._ready: list[Work] = []
        self._units: dict[int, float] = {}
        self._stage_of: dict[int, int] = {}  # of works that are out or ready, by identity
        self._sums: dict[int, dict[range, BlockSums]] = {}
        self._sources: dict[int, Mapping[str, HessianSource]] = {}
        self._next = {work.runs: 0 for stage in stages for work in stage.calibrate}  # stage that a share comes to next
        self._owner = {runs: number for number, runs in enumerate(self._next)}
        self._out: set[range] = set()
        self._advance()

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.current == len(self.stages)

    def take(self, worker: int, alive: Sequence[int]) -> Work | None:
        """Calibration comes first, since works wait for it; a share stays with who has its states, while that one lives."""
        for runs in sorted(self._next, key=lambda runs: self._owner[runs] != worker):
            if runs not in self._out and self._may_have(worker, runs, alive):
                work = self._calibrate_next(runs)
                if work is not None:
                    self._owner[runs] = worker
                    self._out.add(runs)
                    return self._handed_out(work)
        return self._handed_out(self._ready.pop(0)) if self._ready else None

    def retried(self, work: Work, worker: int) -> None:
        """Who carries a share now has its states."""
        if isinstance(work, Calibrate):
            self._owner[work.runs] = worker

    @property
    def following(self) -> Work | None:
        """The next work that no share of the text has to be carried for."""
        return self._ready[0] if self._ready else None

    def done(self, work: Work, answer: Any) -> None:
        """A work has been done."""
        number = self._stage_of.pop(id(work))
        self.watch.done(work, self._phase(work, number), self._units.pop(id(work)))
        if isinstance(work, Calibrate):
            self._out.discard(work.runs)
            self._next[work.runs] = number + 1
            self._sums.setdefault(number, {})[work.runs] = answer
        else:
            self._left[number] -= 1
            self.on_done(work, answer)
        self._advance()

    def advanced(self, work: Work, part: float) -> None:
        """A part of a work has been done."""
        number = self._stage_of[id(work)]
        self.watch.advanced(work, self._phase(work, number), self._units[id(work)], part)

    def _may_have(self, worker: int, runs: range, alive: Sequence[int]) -> bool:
        """Its own share; or, without one, that of a worker that is gone or has taken over several."""
        owner, owners = self._owner[runs], list(self._owner.values())
        return owner == worker or owner not in alive or (worker not in owners and owners.count(owner) > 1)

    def _calibrate_next(self, runs: range) -> Calibrate | None:
        number = self._next[runs]
        if number >= len(self.stages) or number > self.current + self.ahead:
            return None
        stage = self.stages[number]
        found = next((work for work in stage.calibrate if work.runs == runs), None)
        if found is not None and id(found) not in self._units:
            total = sum(len(work.runs) for work in stage.calibrate)
            self._units[id(found)] = stage.calibrate_units * len(runs) / total
            self._stage_of[id(found)] = number
        return found

    def _handed_out(self, work: Work) -> Work:
        self.watch.phase(self._phase(work, self._stage_of[id(work)]))
        return work

    def _phase(self, work: Work, number: int) -> str:
        return self.stages[number].phases[0 if isinstance(work, Calibrate) else 1]

    def _advance(self) -> None:
        """Open the stages that can be worked on, close those that are done."""
        while True:
            if self._opened < len(self.stages) and self._can_open(self._opened):
                self._open(self._opened)
                self._opened += 1
            elif self.current < self._opened and not self._left[self.current]:
                self.stages[self.current].close(self._sources.pop(self.current))
                self.current += 1
            else:
                return

    def _can_open(self, number: int) -> bool:
        stage = self.stages[number]
        if stage.calibrate:
            return len(self._sums.get(number, ())) == len(stage.calibrate)
        return number <= self.current + self.ahead

    def _open(self, number: int) -> None:
        stage = self.stages[number]
        shares = self._sums.pop(number, {})
        ordered = {work.runs: shares[work.runs] for work in stage.calibrate}
        sources: Mapping[str, HessianSource] = sources_of(ordered, self.drift_frac) if stage.wanted else {}
        self._sources[number] = sources
        works = stage.works(sources)
        for work, units in works:
            self._units[id(work)], self._stage_of[id(work)] = units, number
        self._left[number] = len(works)
        self._ready += [work for work, _ in works]
