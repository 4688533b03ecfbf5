"""Worker processes that may die: what one of them was at is done again, by whichever is free."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from vptq.errors import INTERRUPTED_EXIT_CODE, RunError, VptqError

MOST_TRIES = 3  # of one piece of work
MOST_FAILED_STARTS = 3  # in a row, of workers that die before they can work
SECONDS_TO_END = 5.0
PARENT_DEATH_SIGNAL = 1  # of prctl
STARTED, DONE, NO_MEMORY, FAILED, DIED = range(5)  # what a worker says, or what is found of it


@dataclass(frozen=True)
class Try:
    """A piece of work, and why it was not done in the tries before: an empty text for a first one."""

    work: Any
    reasons: tuple[str, ...] = ()
    short_of_memory: int = 0

    def again(self, reason: str, short_of_memory: bool = False) -> Try:
        return Try(self.work, (*self.reasons, reason), self.short_of_memory + short_of_memory)


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    pipe: Connection
    started: bool = False
    busy: Try | None = None


class LostWork(RunError):
    """Work that failed in every try. lost: each piece with its reasons."""

    def __init__(self, lost: Sequence[Try]) -> None:
        super().__init__("work was lost with the workers that did it")
        self.lost = tuple(lost)


@dataclass
class WorkerPool:
    """Processes, started with `spawn` when there is work, again when one has died.

    Attributes:
        count: of processes. start: called once in each, with its number. do: called in it with each `Try`; its answer is sent
            back, and its exceptions are raised where `run` is; running out of memory is not: that is tried again.
        note: told of every death and every new try.
    """

    count: int
    start: Callable[[int], None]
    do: Callable[[Try], Any]
    note: Callable[[str], None]
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _failed_starts: int = 0

    def run(self, works: Sequence[Any]) -> Iterator[Any]:
        """The answers, as they come; works are handed out in their order.

        Raises:
            LostWork: once all others are done, for what failed MOST_TRIES times. RunError: workers don't start.
        """
        waiting = deque(Try(work) for work in works)
        lost: list[Try] = []
        while waiting or any(worker.busy for worker in self._workers.values()):
            self._hand_out(waiting)
            for worker in self._speaking():
                said, value = self._listen(worker)
                given, worker.busy = worker.busy, None
                if said == STARTED:
                    worker.started, worker.busy, self._failed_starts = True, given, 0
                elif said == DONE:
                    yield value
                elif said == FAILED:
                    raise value
                elif given is not None:  # it ran out of memory, or died
                    again = given.again(value, short_of_memory=said == NO_MEMORY)
                    (lost if len(again.reasons) >= MOST_TRIES else waiting).append(again)
        if lost:
            raise LostWork(lost)

    def close(self) -> None:
        """End all processes, whatever they are at."""
        for worker in self._workers.values():
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()

    def _hand_out(self, waiting: deque[Try]) -> None:
        free = [worker for worker in self._workers.values() if worker.started and not worker.busy]
        while waiting and free:
            worker = free.pop(0)
            try:
                worker.pipe.send(waiting[0])
                worker.busy = waiting.popleft()
            except OSError:  # it is dead: heard of in the next round
                continue
        missing = [number for number in range(self.count) if number not in self._workers]
        coming = sum(not worker.started for worker in self._workers.values())
        for number in missing[: max(0, len(waiting) - coming)]:
            self._workers[number] = self._new(number)

    def _new(self, number: int) -> _Worker:
        context = torch.multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, number, self.start, self.do, os.getpid()), daemon=True)
        process.start()
        theirs.close()  # so that its end is the pipe's end
        return _Worker(number, process, ours)

    def _speaking(self) -> list[_Worker]:
        """Those that said something, or died; waits for one."""
        by_pipe: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers.values()}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe))]

    def _listen(self, worker: _Worker) -> tuple[int, Any]:
        """What it said; of one that died, that it has no answer, and why."""
        try:
            said: tuple[int, Any] = worker.pipe.recv()
            if said[0] == NO_MEMORY:
                self.note(f"worker {worker.number}: {said[1]}")
            return said
        except (EOFError, OSError):
            return DIED, self._bury(worker)

    def _bury(self, worker: _Worker) -> str:
        worker.pipe.close()
        worker.process.join()
        del self._workers[worker.number]
        reason = f"worker {worker.number} {_ending(worker.process.exitcode)}"
        self.note(reason)
        self._failed_starts += not worker.started
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise RunError(
                "worker processes don't start", where=[reason], hint="their own messages are above; or use --num_gpus 1"
            )
        return reason


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was killed ({name})" + (", as happens when memory runs out" if -code == signal.SIGKILL else "")
    return f"ended with code {code}"


def _serve(pipe: Connection, number: int, start: Callable[[int], None], do: Callable[[Try], Any], parent: int) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED_EXIT_CODE))  # files appear by rename: nothing is lost
    _die_with(parent)
    start(number)
    pipe.send((STARTED, None))
    while True:
        try:
            given: Try = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(_answer(do, given))


def _answer(do: Callable[[Try], Any], given: Try) -> tuple[int, Any]:
    try:
        return DONE, do(given)
    except (MemoryError, torch.OutOfMemoryError) as error:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return NO_MEMORY, f"ran out of memory: {(str(error).splitlines() or [''])[0][:200]}"
    except VptqError as error:
        return FAILED, error
    except Exception as error:
        return FAILED, RunError(f"a worker failed: {type(error).__name__}: {error}", where=traceback.format_exc().splitlines())


def _die_with(parent: int) -> None:
    """Where the system can do it, end when the parent does, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it was quicker
            os._exit(1)
