"""Worker processes of this machine, started with `spawn`, each at the end of a pipe."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from vptq.errors import INTERRUPTED_EXIT_CODE
from vptq.pipeline.pool import DIED, PROGRESS, STARTED, Try, answer_to

SECONDS_TO_END = 5.0
PARENT_DEATH_SIGNAL = 1  # of prctl
TELL_EVERY = 0.2  # seconds
WAITING = "OMP_WAIT_POLICY"
Do = Callable[[Try, Callable[[float], None]], Any]
Start = Callable[[int], tuple[Do, str | None]]


@dataclass
class _Process:
    process: BaseProcess
    pipe: Connection


class ProcessCrew:
    """A `pool.Crew`.

    Args:
        start: called once in each process, with its number; gives what is then called with each `Try`, and with whom to tell
            of parts that are done, and what the user should know. Its answers are sent back, and so are its exceptions.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self._processes: dict[int, _Process] = {}

    def begin(self, number: int) -> None:
        """Start a process; it says STARTED once it can work."""
        context = torch.multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, number, self.start, os.getpid()), daemon=True)
        with _patient_threads():
            process.start()
        theirs.close()  # so that its end is the pipe's end
        self._processes[number] = _Process(process, ours)

    def send(self, number: int, given: Try) -> None:
        """Give it something to do; if it is dead, `listen` will tell."""
        with contextlib.suppress(OSError):
            self._processes[number].pipe.send(given)

    def listen(self) -> list[tuple[int, int, Any]]:
        """What processes said, one thing each; waits for something."""
        by_pipe: dict[Any, int] = {worker.pipe: number for number, worker in self._processes.items()}
        return [(by_pipe[pipe], *self._hear(by_pipe[pipe])) for pipe in wait(list(by_pipe))]

    def end(self) -> None:
        """End all, whatever they are at."""
        for worker in self._processes.values():
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._processes.values():
            worker.process.join(SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._processes.clear()

    def _hear(self, number: int) -> tuple[int, Any]:
        worker = self._processes[number]
        try:
            said: tuple[int, Any] = worker.pipe.recv()
            return said
        except (EOFError, OSError):
            worker.pipe.close()
            worker.process.join()
            del self._processes[number]
            return DIED, f"worker {number} {_ending(worker.process.exitcode)}"


@contextlib.contextmanager
def _patient_threads() -> Iterator[None]:
    """CPU workers have more threads than there are cores, between them: those that wait must not keep others from working."""
    before = os.environ.get(WAITING)
    os.environ.setdefault(WAITING, "PASSIVE")
    try:
        yield
    finally:
        if before is None:
            del os.environ[WAITING]


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was killed ({name})" + (", as happens when memory runs out" if -code == signal.SIGKILL else "")
    return f"ended with code {code}"


def _serve(pipe: Connection, number: int, start: Start, parent: int) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED_EXIT_CODE))  # files appear by rename: nothing is lost
    _die_with(parent)
    do, note = start(number)
    pipe.send((STARTED, note))
    teller = _Teller(pipe)
    while True:
        try:
            given: Try = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(answer_to(lambda given: do(given, teller.tell), given))
        teller.untold = 0.0


class _Teller:
    """Tells of parts that are done, not too often."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.untold, self.told_at = pipe, 0.0, 0.0

    def tell(self, part: float) -> None:
        """Another part is done."""
        self.untold += part
        if time.monotonic() - self.told_at > TELL_EVERY:
            self.pipe.send((PROGRESS, self.untold))
            self.untold, self.told_at = 0.0, time.monotonic()


def _die_with(parent: int) -> None:
    """Where the system can do it, end when the parent does, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it was quicker
            os._exit(1)
