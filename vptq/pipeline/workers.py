"""Who does the works of a run: this process, or workers, one a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

from vptq.errors import RunError, UsageError
from vptq.models.architecture import Skeleton
from vptq.models.files import save_tensors
from vptq.models.prefetch import PrefetchingFolder
from vptq.pipeline.fold import FoldedFolder
from vptq.pipeline.job import Job
from vptq.pipeline.pool import MOST_TRIES, LostWork, Try, WorkerPool
from vptq.pipeline.processes import Do, ProcessCrew
from vptq.pipeline.schedule import Schedule
from vptq.pipeline.worker import TOKENS, Setup, Worker
from vptq.pipeline.works import Work, describe
from vptq.quantize.trial import settle_kernels


class Executor(Protocol):
    """Does all works of a schedule.

    Attributes:
        count: workers that it has.
    """

    count: int

    def run(self, schedule: Schedule) -> None: ...

    def close(self) -> None: ...


class InProcess:
    """One work after the other, here; files are read ahead and written behind."""

    count = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(self, schedule: Schedule) -> None:
        """Do all works of a schedule. Raises what a work raises."""
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
            writing = [(work, answer) for work, answer in answered if _is_writing(answer)]
            for work, answer in answered:
                if not _is_writing(answer):
                    schedule.done(work, answer)

    def close(self) -> None:
        """Wait until all is written."""
        self.worker.close()


class Processes:
    """Works shared out to `count` spawned processes; worker i takes GPU i, or the CPU where there is none.

    Args:
        note: told of workers that die or run out of memory: what these were at is tried again.
    """

    def __init__(
        self,
        job: Job,
        source: PrefetchingFolder,
        device: torch.device,
        tokens: Tensor | None,
        count: int,
        note: Callable[[str], None],
    ) -> None:
        self.count, self.job = count, job
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        setup = hand_over(job, source, tokens)
        self.pool = WorkerPool(count, ProcessCrew(functools.partial(_start_worker, gpus, setup)), note)
        self.pool.begin()

    def run(self, schedule: Schedule) -> None:
        """Do all works of a schedule.

        Raises:
            RunError: works that failed in every try. VptqError: what a work raises.
        """
        try:
            self.pool.run(schedule)
        except LostWork as error:
            raise lost_works(error, self.job) from None

    def close(self) -> None:
        """End all processes."""
        self.pool.close()
        self.job.drop_scratch()


def check_workers(device: torch.device, num_gpus: int) -> None:
    """Raise UsageError for more GPUs than there are; on a CPU any number of workers is fine."""
    available = torch.cuda.device_count() if device.type == "cuda" else num_gpus
    if num_gpus > available:
        raise UsageError(f"num_gpus is {num_gpus}, there are {available} GPUs", hint=f"set --num_gpus {available}")


def make_executor(
    job: Job,
    skeleton: Skeleton,
    source: PrefetchingFolder,
    device: torch.device,
    tokens: Tensor | None,
    note: Callable[[str], None],
) -> Executor:
    """This process where one worker is asked for, else a process for each.

    Args:
        tokens: (num_sequences, seq_len) int64, of the calibration text; None if it is not needed.
    """
    job.drop_scratch()  # of a run that was killed
    if device.type != "cuda":
        torch.set_num_threads(torch.get_num_threads())  # else MKL takes fewer where it sees fit, and sums differ
    count = job.config.num_gpus
    if count == 1:
        return InProcess(Worker(job, skeleton, source, device, tokens))
    return Processes(job, source, device, tokens, count, note)


def hand_over(job: Job, source: PrefetchingFolder, tokens: Tensor | None) -> Setup:
    """Put what workers need where they find it. tokens: (num_sequences, seq_len) int64, or None."""
    job.make_scratch()
    if tokens is not None:
        save_tensors(job.scratch / TOKENS, {"tokens": tokens})
    fold = source.fold if isinstance(source, FoldedFolder) else None
    return Setup(job.folder, source.folder, source.base_prefix, fold, torch.get_num_threads())


def settled(answer: Any) -> Any:
    """An answer whose files are written."""
    return [future.result() for future in answer] if _is_writing(answer) else answer


def lost_works(error: LostWork, job: Job) -> RunError:
    """What the user is told of works that failed in every try."""
    return RunError(
        f"some work could not be done, in {MOST_TRIES} tries each",
        where=[f"{what}: {'; '.join(lost.reasons)}" for lost in error.lost for what in describe(lost.work)],
        hint=f"all else is kept: go on with `vptq quantize --resume {job.folder}`, with a lower --num_gpus if memory ran out",
    )


def doing(worker: Worker) -> Do:
    """What a worker of a pool does with each `Try`."""

    def do(given: Try, progress: Callable[[float], None]) -> Any:
        return settled(worker.do(given.work, progress, len(given.reasons), given.short_of_memory))

    return do


def _is_writing(answer: Any) -> bool:
    return isinstance(answer, list) and all(isinstance(part, Future) for part in answer)


def _raise_failed(answer: Any) -> None:
    """A full disk ends the run before more is quantized."""
    for future in answer:
        if future.done():
            future.result()


def _start_worker(gpus: int, setup: Setup, number: int) -> tuple[Do, str | None]:
    if gpus:
        device = torch.device("cuda", number % gpus)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(setup.threads)
    slow = settle_kernels(device)
    worker = Worker.from_files(setup, device, number)
    worker.job.log(f"worker {number} on {device}", number)
    return doing(worker), slow
