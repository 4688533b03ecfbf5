"""Workers that may die: what one of them was at is done again, by whichever is free.

What workers are is a crew's business: processes of this machine (`processes.py`), or actors of a Ray cluster (`ray.py`).
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vptq.errors import RunError, VptqError, is_out_of_memory
from vptq.pipeline.schedule import Schedule

MOST_TRIES = 3  # of one piece of work
MOST_FAILED_STARTS = 3  # in a row, of one worker that dies before it can work
PATIENCE = 120.0  # seconds until others take over from one that has not started
LOOK_AGAIN = 5.0  # seconds
STARTED, PROGRESS, FREE, DONE, NO_MEMORY, FAILED, DIED = range(7)  # what a worker says, or what is found of it


@dataclass(frozen=True)
class Try:
    """A piece of work, and why it was not done in the tries before."""

    work: Any
    reasons: tuple[str, ...] = ()
    short_of_memory: int = 0

    def again(self, reason: str, short_of_memory: bool = False) -> Try:
        return Try(self.work, (*self.reasons, reason), self.short_of_memory + short_of_memory)


class Crew(Protocol):
    """Workers by number.

    Methods:
        set_out: tell all of them, those still to come as well, what the run is about.
        begin: start a worker, or see that a dead one comes back; it says STARTED when it is there.
        send: give a worker something to do. What it says is FREE once it can take another, and, in the order in which it was
            given them, DONE, NO_MEMORY or FAILED with a value for each; PROGRESS of the last one on the way. When it is found
            dead: DIED, with the reason.
        listen: what workers said, (number, what, value) each; waits for something, no longer than so many seconds if given.
        end: stop all, whatever they are at.
    """

    def set_out(self, setup: Any) -> None: ...

    def begin(self, number: int) -> None: ...

    def send(self, number: int, given: Try) -> None: ...

    def listen(self, seconds: float | None) -> list[tuple[int, int, Any]]: ...

    def end(self) -> None: ...


class LostWork(RunError):
    """Work that failed in every try. lost: each piece with its reasons."""

    def __init__(self, lost: Sequence[Try]) -> None:
        super().__init__("work was lost with the workers that did it")
        self.lost = tuple(lost)


class WorkerPool:
    """Hands out works to a crew of `count`.

    Args:
        note: told of every death, and of memory that ran out.
    """

    def __init__(self, count: int, crew: Crew, note: Callable[[str], None] = lambda text: None) -> None:
        self.count, self.crew, self.note = count, crew, note
        self._begun: dict[int, float] = {}  # when a worker was last asked for
        self._started: set[int] = set()
        self._dead: set[int] = set()  # that are not back yet
        self._late: set[int] = set()  # that never came, so far
        self._free: set[int] = set()
        self._given: dict[int, deque[Try]] = {number: deque() for number in range(count)}  # and not answered
        self._told = False  # that nobody has come
        self._failed_starts = dict.fromkeys(range(count), 0)

    def begin(self) -> None:
        """Start all workers, without waiting for them."""
        for number in range(self.count):
            if number not in self._begun:
                self._begun[number] = time.monotonic()
                self.crew.begin(number)

    def run(self, works: Schedule) -> None:
        """Do all works.

        Raises:
            LostWork: once all else that can be is done, for what failed MOST_TRIES times. RunError: workers don't start.
        """
        waiting: deque[Try] = deque()
        lost: list[Try] = []
        self.begin()
        for number in self._coming():  # until now they had not been told what to do
            self._begun[number] = time.monotonic()
        while not works.finished:
            self._hand_out(waiting, works)
            if self._is_idle():
                raise LostWork(lost) if lost else RunError("no worker finds anything to do, though not all is done")
            if self._count_late():
                continue  # what was kept for them can be handed out
            self._tell_if_nobody_comes()
            waits = LOOK_AGAIN if self._coming() or not self._started else None
            for number, said, value in self.crew.listen(waits):
                if said == STARTED:
                    self._welcome(number, value)
                elif said == FREE:
                    self._free.add(number)
                elif said == PROGRESS:
                    works.advanced(self._given[number][-1].work, value)
                elif said == DONE:
                    works.done(self._given[number].popleft().work, value)
                elif said == FAILED:
                    raise value
                else:
                    self._went_wrong(number, said, str(value), waiting, lost)
        if lost:  # what others did not depend on
            raise LostWork(lost)

    def close(self) -> None:
        """End all workers, whatever they are at."""
        self.crew.end()
        self._begun.clear()
        for numbers in (self._started, self._dead, self._late, self._free):
            numbers.clear()
        for given in self._given.values():
            given.clear()

    def _hand_out(self, waiting: deque[Try], works: Schedule) -> None:
        alive = [number for number in range(self.count) if number not in self._dead | self._late]
        for number in sorted(self._free):
            if waiting:
                given = waiting.popleft()
                works.retried(given.work, number)
            else:
                work = works.take(number, alive)
                if work is None:
                    continue
                given = Try(work)
            self._free.discard(number)
            self._given[number].append(given)
            self.crew.send(number, given)

    def _coming(self) -> list[int]:
        return [number for number in self._begun if number not in self._started | self._dead | self._late]

    def _count_late(self) -> bool:
        """Whether more of those that were waited for are given up for now."""
        late = [n for n in self._coming() if self._started and time.monotonic() - self._begun[n] > PATIENCE]
        for number in late:
            self._late.add(number)
            self.note(f"worker {number} has not started in {PATIENCE:.0f} s: others do its work until it does")
        return bool(late)

    def _tell_if_nobody_comes(self) -> None:
        if not self._started and not self._told and time.monotonic() - max(self._begun.values()) > PATIENCE:
            self._told = True
            self.note(f"no worker has started in {PATIENCE:.0f} s: still waiting")

    def _is_idle(self) -> bool:
        """Whether all that live have answered, are free, and were given nothing, and nobody is still to come."""
        answered = not any(self._given.values())
        return bool(answered and self._free and self._started == self._free and not self._coming())

    def _welcome(self, number: int, note: str | None) -> None:
        self._told = False
        self._started.add(number)
        self._free.add(number)
        self._dead.discard(number)
        self._late.discard(number)
        self._failed_starts[number] = 0
        if note:
            self.note(f"worker {number}: {note}")

    def _went_wrong(self, number: int, said: int, value: str, waiting: deque[Try], lost: list[Try]) -> None:
        """Memory ran out for the oldest that a worker was given, or it died with all that it was given."""
        self.note(f"worker {number}: {value}" if said == NO_MEMORY else value)
        given = self._given[number]
        for failed in [given.popleft()] if said == NO_MEMORY and given else list(given):
            again = failed.again(value, short_of_memory=said == NO_MEMORY)
            (lost if len(again.reasons) >= MOST_TRIES else waiting).append(again)
        if said == DIED or number not in self._started:
            given.clear()
            self._bring_back(number, value)

    def _bring_back(self, number: int, reason: str) -> None:
        self._failed_starts[number] += number not in self._started
        self._started.discard(number)
        self._free.discard(number)
        self._late.discard(number)
        self._dead.add(number)
        if self._failed_starts[number] < MOST_FAILED_STARTS:
            self._begun[number] = time.monotonic()
            self.crew.begin(number)
        elif all(tries >= MOST_FAILED_STARTS for tries in self._failed_starts.values()):
            raise RunError(
                "workers don't start", where=[reason], hint="what they said is above, or in Ray's logs; or --num_gpus 1"
            )
        else:
            self.note(f"worker {number} has died {MOST_FAILED_STARTS} times before it could work: the others go on")


def answer_of(make: Callable[[], Any]) -> tuple[int, Any]:
    """In a worker: what it says of something it was given to do."""
    try:
        return DONE, make()
    except VptqError as error:
        return FAILED, error
    except Exception as error:
        is_plain = isinstance(error, (MemoryError, torch.OutOfMemoryError))  # the text says it all
        text = str(error) if is_plain else f"{type(error).__name__}: {error}"
        if not is_out_of_memory(error):
            return FAILED, RunError(f"a worker failed: {text}", where=traceback.format_exc().splitlines())
        text = (text.splitlines() or [""])[0][:200]
    if torch.cuda.is_initialized():  # here the traceback is gone, and with it what it held
        torch.cuda.empty_cache()
    return NO_MEMORY, f"ran out of memory: {text}"
