"""Workers that may die: what one of them was at is done again, by whichever is free.

What workers are is a crew's business: processes of this machine (`processes.py`), or actors of a Ray cluster (`ray.py`).
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vptq.errors import RunError, VptqError

MOST_TRIES = 3  # of one piece of work
MOST_FAILED_STARTS = 3  # in a row, of workers that die before they can work
STARTED, PROGRESS, FREE, DONE, NO_MEMORY, FAILED, DIED = range(7)  # what a worker says, or what is found of it


@dataclass(frozen=True)
class Try:
    """A piece of work, and why it was not done in the tries before."""

    work: Any
    reasons: tuple[str, ...] = ()
    short_of_memory: int = 0

    def again(self, reason: str, short_of_memory: bool = False) -> Try:
        return Try(self.work, (*self.reasons, reason), self.short_of_memory + short_of_memory)


class Works(Protocol):
    """What there is to do: see `schedule.Schedule`, which this is."""

    def take(self, worker: int, alive: Sequence[int]) -> Any: ...

    def done(self, work: Any, answer: Any) -> None: ...

    def advanced(self, work: Any, part: float) -> None: ...

    @property
    def finished(self) -> bool: ...


class Crew(Protocol):
    """Workers by number.

    Methods:
        begin: start a worker, or see that a dead one comes back; it says STARTED when it is there.
        send: give a worker something to do. What it says is FREE once it can take another, and, in the order in which it was
            given them, DONE, NO_MEMORY or FAILED with a value for each; PROGRESS of the last one on the way. When it is found
            dead: DIED, with the reason.
        listen: what workers said, (number, what, value) each; waits for something.
        end: stop all, whatever they are at.
    """

    def begin(self, number: int) -> None: ...

    def send(self, number: int, given: Try) -> None: ...

    def listen(self) -> list[tuple[int, int, Any]]: ...

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
        self._begun: set[int] = set()
        self._started: set[int] = set()
        self._dead: set[int] = set()  # that are not back yet
        self._free: set[int] = set()
        self._given: dict[int, deque[Try]] = {number: deque() for number in range(count)}  # and not answered
        self._failed_starts = 0

    def begin(self) -> None:
        """Start all workers, without waiting for them."""
        for number in range(self.count):
            if number not in self._begun:
                self._begun.add(number)
                self.crew.begin(number)

    def run(self, works: Works) -> None:
        """Do all works.

        Raises:
            LostWork: once all else that can be is done, for what failed MOST_TRIES times. RunError: workers don't start.
        """
        waiting: deque[Try] = deque()
        lost: list[Try] = []
        self.begin()
        while not works.finished:
            self._hand_out(waiting, works)
            if self._is_idle():
                raise LostWork(lost) if lost else RunError("no worker finds anything to do, though not all is done")
            for number, said, value in self.crew.listen():
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
                    self._went_wrong(number, said, value, waiting, lost)
        if lost:  # what others did not depend on
            raise LostWork(lost)

    def close(self) -> None:
        """End all workers, whatever they are at."""
        self.crew.end()
        for numbers in (self._begun, self._started, self._dead, self._free):
            numbers.clear()
        for given in self._given.values():
            given.clear()

    def _hand_out(self, waiting: deque[Try], works: Works) -> None:
        alive = [number for number in range(self.count) if number not in self._dead]
        for number in sorted(self._free):
            work = waiting.popleft() if waiting else works.take(number, alive)
            if work is not None:
                self._free.discard(number)
                self._given[number].append(work if isinstance(work, Try) else Try(work))
                self.crew.send(number, self._given[number][-1])

    def _is_idle(self) -> bool:
        """Whether all that live have answered, are free, and were given nothing, and nobody is still to come."""
        answered = not any(self._given.values())
        return bool(answered and self._started == self._free and self._free) and self._started | self._dead == self._begun

    def _welcome(self, number: int, note: str | None) -> None:
        self._started.add(number)
        self._free.add(number)
        self._dead.discard(number)
        self._failed_starts = 0
        if note:
            self.note(f"worker {number}: {note}")

    def _went_wrong(self, number: int, said: int, value: str, waiting: deque[Try], lost: list[Try]) -> None:
        """Memory ran out for the oldest that a worker was given, or it died with all that it was given."""
        self.note(f"worker {number}: {value}" if said == NO_MEMORY else value)
        given = self._given[number]
        for failed in [given.popleft()] if said == NO_MEMORY else list(given):
            again = failed.again(value, short_of_memory=said == NO_MEMORY)
            (lost if len(again.reasons) >= MOST_TRIES else waiting).append(again)
        if said == DIED:
            given.clear()
            self._failed_starts += number not in self._started
            self._started.discard(number)
            self._free.discard(number)
            self._dead.add(number)
            if self._failed_starts >= MOST_FAILED_STARTS:
                hint = "their own messages are above; or use --num_gpus 1"
                raise RunError("worker processes don't start", where=[value], hint=hint)
            self.crew.begin(number)


def answer_of(make: Callable[[], Any]) -> tuple[int, Any]:
    """In a worker: what it says of something it was given to do."""
    try:
        return DONE, make()
    except (MemoryError, torch.OutOfMemoryError) as error:
        text = (str(error).splitlines() or [""])[0][:200]
    except VptqError as error:
        return FAILED, error
    except Exception as error:
        return FAILED, RunError(f"a worker failed: {type(error).__name__}: {error}", where=traceback.format_exc().splitlines())
    if torch.cuda.is_initialized():  # here the traceback is gone, and with it what it held
        torch.cuda.empty_cache()
    return NO_MEMORY, f"ran out of memory: {text}"
