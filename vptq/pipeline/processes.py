"""Worker processes of this machine, started with `spawn`, each at the end of a pipe."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from vptq.errors import INTERRUPTED_EXIT_CODE
from vptq.pipeline.pool import DIED, DONE, FREE, PROGRESS, STARTED, Try, answer_of

SECONDS_TO_END = 5.0
PARENT_DEATH_SIGNAL = 1  # of prctl
TELL_EVERY = 0.2  # seconds
MOST_UNANSWERED = 2  # whose files are still being written
WAITING = "OMP_WAIT_POLICY"
Do = Callable[[Try, Callable[[float], None]], Callable[[], Any]]
Start = Callable[[int, Any], tuple[Do, str | None]]


@dataclass
class _Process:
    process: BaseProcess
    pipe: Connection


class ProcessCrew:
    """A `pool.Crew`.

    Args:
        warm: called first in each process, with its number, while this one still finds out what there is to do.
        start: called then, with the number and what the run is about; gives what is called with each `Try`, and with whom to
            tell of parts that are done, and what the user should know. What that gives is called for the answer on a thread of
            its own, while the next work is begun. Answers are sent back, and so are exceptions.
    """

    def __init__(self, warm: Callable[[int], None], start: Start) -> None:
        self.warm, self.start = warm, start
        self.setup: Any = None
        self._processes: dict[int, _Process] = {}

    def set_out(self, setup: Any) -> None:
        """Tell all processes what the run is about."""
        self.setup = setup
        for number in self._processes:
            self._send(number, setup)

    def begin(self, number: int) -> None:
        """Start a process; it says STARTED once it can work."""
        context = torch.multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, number, self.warm, self.start, os.getpid()), daemon=True)
        with _patient_threads():
            process.start()
        theirs.close()  # so that its end is the pipe's end
        self._processes[number] = _Process(process, ours)
        if self.setup is not None:
            self._send(number, self.setup)

    def send(self, number: int, given: Try) -> None:
        """Give it something to do."""
        self._send(number, given)

    def listen(self, seconds: float | None) -> list[tuple[int, int, Any]]:
        """What processes said, one thing each; waits for something, no longer than so many seconds if given."""
        by_pipe: dict[Any, int] = {worker.pipe: number for number, worker in self._processes.items()}
        return [(by_pipe[pipe], *self._hear(by_pipe[pipe])) for pipe in wait(list(by_pipe), seconds)]

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

    def _send(self, number: int, value: Any) -> None:
        with contextlib.suppress(OSError):  # if it is dead, `listen` will tell
            self._processes[number].pipe.send(value)

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


def _serve(pipe: Connection, number: int, warm: Callable[[int], None], start: Start, parent: int) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED_EXIT_CODE))  # files appear by rename: nothing is lost
    _die_with(parent)
    warm(number)
    voice = _Voice(pipe)
    setup = _heard(pipe)
    if setup is None:
        return
    said, found = answer_of(functools.partial(start, number, setup))
    if said != DONE:
        voice.say(said, found)
        return
    do, note = found
    voice.say(STARTED, note)
    with contextlib.suppress(OSError):
        while (given := _heard(pipe)) is not None:
            voice.untold = 0.0
            said, ending = answer_of(functools.partial(do, given, voice.tell))
            voice.answer(said, ending)
            voice.say(FREE, None)


def _heard(pipe: Connection) -> Any:
    """What the parent sends; None when it is gone."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


class _Voice:
    """Says things through a pipe. Answers are waited for in their order, by a thread."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.untold, self._told_at = pipe, 0.0, 0.0
        self._lock = threading.Lock()
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="voice")
        self._room = threading.Semaphore(MOST_UNANSWERED)

    def say(self, said: int, value: Any) -> None:
        """Say it now."""
        with self._lock:
            self.pipe.send((said, value))

    def tell(self, part: float) -> None:
        """Another part is done; said now and then."""
        self.untold += part
        if time.monotonic() - self._told_at > TELL_EVERY:
            self.say(PROGRESS, self.untold)
            self.untold, self._told_at = 0.0, time.monotonic()

    def answer(self, said: int, value: Any) -> None:
        """Say it after all answers before it; of what is DONE but for its ending, call this first. Waits while many wait."""
        self._room.acquire()
        self._waiter.submit(self._answer, said, value)

    def _answer(self, said: int, value: Any) -> None:
        try:
            if said == DONE:
                said, value = answer_of(value)
            self.say(said, value)
        finally:
            self._room.release()


def _die_with(parent: int) -> None:
    """Where the system can do it, end when the parent does, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it was quicker
            os._exit(1)
