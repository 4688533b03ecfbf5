"""Who does the works of a run: this process, or workers, one a GPU."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vptq.errors import RunError, UsageError
from vptq.models.architecture import Skeleton
from vptq.models.files import save_tensors
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.remote import mirror_of
from vptq.pipeline.fold import FoldedFolder
from vptq.pipeline.job import Job
from vptq.pipeline.pool import MOST_TRIES, Crew, LostWork, Try, WorkerPool
from vptq.pipeline.processes import Do, ProcessCrew
from vptq.pipeline.schedule import Schedule
from vptq.pipeline.worker import TOKENS, Setup, Worker
from vptq.pipeline.works import Work, describe
from vptq.quantize.trial import settle_kernels


class Executor(Protocol):
    """Does all works of a schedule.

    Attributes:
        count: workers that it has. device: kind of device that they work on.
    """

    count: int
    device: torch.device

    def begin(self, run: Given) -> None: ...

    def run(self, schedule: Schedule) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Given:
    """What a run is about, once it is known. tokens: (num_sequences, seq_len) int64, or None. note: tells the user."""

    job: Job
    skeleton: Skeleton
    source: PrefetchingFolder
    tokens: Tensor | None
    trust_remote_code: bool
    note: Callable[[str], None]

    def hand_over(self) -> Setup:
        """Put what workers need where they find it."""
        scratch = self.job.make_scratch().absolute()
        if self.tokens is not None:
            save_tensors(scratch / TOKENS, {"tokens": self.tokens})
        fold = self.source.fold if isinstance(self.source, FoldedFolder) else None
        folder = self.job.folder.absolute()  # others may work in another folder
        model, threads = self.source.folder.absolute(), torch.get_num_threads()
        return Setup(folder, scratch, mirror_of(folder), model, fold, self.trust_remote_code, threads)


class InProcess:
    """One work after the other, here; files are read ahead and written behind."""

    count = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.worker: Worker | None = None

    def begin(self, run: Given) -> None:
        """Make the worker."""
        run.job.drop_scratch()  # of a run that was killed
        self.worker = Worker(run.job, run.skeleton, run.source, self.device, run.tokens)

    def run(self, schedule: Schedule) -> None:
        """Do all works of a schedule. Raises what a work raises."""
        assert self.worker is not None
        writing: list[tuple[Work, Any]] = []
        while not schedule.finished:
            work = schedule.take(0, [0])
            answered: list[tuple[Work, Any]] = []
            if work is not None:
                for _, answer in writing:
                    _raise_failed(answer)
                self.worker.prefetch(schedule.following)
                answered.append((work, self.worker.do(work, functools.partial(schedule.advanced, work))))
            for before, answer in writing:
                schedule.done(before, settled(answer))
            writing = [(work, answer) for work, answer in answered if _futures(answer)]
            for work, answer in answered:
                if not _futures(answer):
                    schedule.done(work, answer)

    def close(self) -> None:
        """Wait until all is written."""
        if self.worker is not None:
            self.worker.close()


class Pooled:
    """Works shared out to a crew of `count`."""

    def __init__(self, count: int, device: torch.device, crew: Crew) -> None:
        self.count, self.device, self.crew = count, device, crew
        self.pool = WorkerPool(count, crew)
        self.job: Job | None = None
        self.scratch: Path | None = None

    def begin(self, run: Given) -> None:
        """Tell the crew what it is about; `run.note` is told of workers that die or run out of memory."""
        run.job.drop_scratch()  # of a run that was killed
        self.job, self.pool.note = run.job, run.note
        setup = run.hand_over()
        self.scratch = setup.scratch
        self.crew.set_out(setup)

    def run(self, schedule: Schedule) -> None:
        """Do all works of a schedule.

        Raises:
            RunError: works that failed in every try. VptqError: what a work raises.
        """
        assert self.job is not None
        try:
            self.pool.run(schedule)
        except LostWork as error:
            raise RunError(
                f"some work could not be done, in {MOST_TRIES} tries each",
                where=[f"{what}: {'; '.join(lost.reasons)}" for lost in error.lost for what in describe(lost.work)],
                hint=f"all else is kept: `vptq quantize --resume {self.job.shown}` goes on; "
                "if memory ran out, with a lower --num_gpus",
            ) from None

    def close(self) -> None:
        """End all workers."""
        self.pool.close()
        if self.job is not None and self.scratch is not None:
            self.job.drop_scratch(self.scratch)
            self.scratch = None


def start_processes(device: torch.device, count: int) -> Pooled:
    """An executor with processes of this machine; worker i takes GPU i, or the CPU where there is none.

    They start at once, while it is still found out what there is to do.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    found = Pooled(count, device, ProcessCrew(functools.partial(_warm, gpus), functools.partial(_start_process, gpus)))
    found.pool.begin()
    return found


def settled(answer: Any) -> Any:
    """An answer whose files are written."""
    if isinstance(answer, Future):
        return answer.result()
    return [future.result() for future in answer] if _futures(answer) else answer


def doing(worker: Worker) -> Do:
    """What a worker of a pool does with each `Try`."""

    def do(given: Try, progress: Callable[[float], None]) -> Callable[[], Any]:
        answer = worker.do(given.work, progress, len(given.reasons), given.short_of_memory)
        return functools.partial(settled, answer)

    return do


def _futures(answer: Any) -> list[Future]:
    parts = answer if isinstance(answer, list) else [answer]
    return [part for part in parts if isinstance(part, Future)]


def _raise_failed(answer: Any) -> None:
    """A full disk ends the run before more is quantized."""
    for future in _futures(answer):
        if future.done():
            future.result()


def _device_of(gpus: int, number: int) -> torch.device:
    return torch.device("cuda", number % gpus) if gpus else torch.device("cpu")


def _warm(gpus: int, number: int) -> None:
    """What takes long and needs no knowledge of the run: imports, a GPU's context, its kernels."""
    import transformers.models.llama.modeling_llama  # noqa: F401 (most models are like it)

    device = _device_of(gpus, number)
    if gpus:
        torch.cuda.set_device(device)
        with contextlib.suppress(UsageError):  # said where the user can be told
            settle_kernels(device)


def start_worker(device: torch.device, setup: Setup, number: int) -> tuple[Do, str | None]:
    """In a process of its own: a worker on a device, and what the user should know of it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(setup.threads)
    slow = settle_kernels(device)
    worker = Worker.from_files(setup, device, number)
    worker.job.log(f"worker {number} on {device} of {socket.gethostname()}", number)
    return doing(worker), slow


def _start_process(gpus: int, number: int, setup: Setup) -> tuple[Do, str | None]:
    return start_worker(_device_of(gpus, number), setup, number)
