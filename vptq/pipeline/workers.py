"""Who quantizes the linears of a block: this process, or worker processes, one a GPU.

Workers read weights and Hessians from files; only names and settings go through pipes.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from vptq.errors import RunError, UsageError
from vptq.models.files import save_tensors
from vptq.models.prefetch import PrefetchingFolder
from vptq.pipeline.fold import Fold, FoldedFolder, open_folder
from vptq.pipeline.job import Job
from vptq.pipeline.pool import MOST_TRIES, LostWork, Try, WorkerPool
from vptq.pipeline.task import LinearTask, Moments, keep, make_batches, quantize_batch
from vptq.quantize.assign import smaller_chunks

SMALLER = 4  # times, the chunks of a try after a second one that ran out of memory


class Executor(Protocol):
    """Runs the tasks of one block; yields each one's figures as it is done."""

    def run(self, tasks: list[LinearTask], hessians: Mapping[str, Moments]) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


class InProcess:
    """One batch of tasks after the other, here; files are read ahead and written behind."""

    def __init__(self, job: Job, source: PrefetchingFolder, device: torch.device) -> None:
        self.job, self.source, self.device = job, source, device
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def run(self, tasks: list[LinearTask], hessians: Mapping[str, Moments]) -> Iterator[dict[str, Any]]:
        batches = make_batches(tasks, self.device)
        writing: list[Future[dict[str, Any]]] = []
        for number, batch in enumerate(batches):
            for written in writing:
                if written.done():
                    written.result()  # a full disk ends the run before more is quantized
            following = batches[number + 1 : number + 2]
            self.source.prefetch(f"{task.plan.name}.weight" for task in itertools.chain(*following))
            finished = quantize_batch(batch, self.source, hessians, self.device)
            submitted = [self.writer.submit(keep, linear, self.job, 0) for linear in finished]
            for written in writing:
                yield written.result()
            writing = submitted
        for written in writing:
            yield written.result()

    def close(self) -> None:
        self.writer.shutdown()


class Processes:
    """Tasks shared out to `count` spawned processes; worker i takes GPU i, or the CPU where there is none.

    A worker that dies, or runs out of memory, costs what it was at: that is tried again, each linear for itself. note: told
    of it.
    """

    def __init__(
        self, job: Job, source: PrefetchingFolder, device: torch.device, count: int, note: Callable[[str], None]
    ) -> None:
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        threads = max(1, (os.cpu_count() or 1) // count)
        fold = source.fold if isinstance(source, FoldedFolder) else None
        self.folder, self.device = job.folder, device
        for left in job.folder.glob("hessians-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        start = functools.partial(_start_worker, gpus, threads, job.folder, source.folder, source.base_prefix, fold)
        self.pool = WorkerPool(count, start, _quantize, note)

    def run(self, tasks: list[LinearTask], hessians: Mapping[str, Moments]) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="hessians-") as shared:
            files = _share(Path(shared), hessians)
            batches = make_batches(tasks, self.device)
            costly_first = sorted(batches, key=lambda batch: -sum(task.plan.bits.num_weights for task in batch))
            try:
                for figures in self.pool.run([_Work(batch, files) for batch in costly_first]):
                    yield from figures
            except LostWork as error:
                raise RunError(
                    f"linears could not be quantized, in {MOST_TRIES} tries each",
                    where=[f"{task.plan.name}: {'; '.join(lost.reasons)}" for lost in error.lost for task in lost.work.batch],
                    hint=f"all others are kept: go on with `vptq quantize --resume {self.folder}`, with a lower --num_gpus if "
                    "memory ran out",
                ) from None

    def close(self) -> None:
        self.pool.close()


def check_workers(device: torch.device, num_gpus: int) -> None:
    """Raise UsageError for more GPUs than there are; on a CPU any number of workers is fine."""
    available = torch.cuda.device_count() if device.type == "cuda" else num_gpus
    if num_gpus > available:
        raise UsageError(f"num_gpus is {num_gpus}, there are {available} GPUs", hint=f"set --num_gpus {available}")


def make_executor(
    job: Job, source: PrefetchingFolder, device: torch.device, num_gpus: int, note: Callable[[str], None]
) -> Executor:
    """This process where one worker is asked for, else a process for each. note: told when one dies."""
    return InProcess(job, source, device) if num_gpus == 1 else Processes(job, source, device, num_gpus, note)


def _share(folder: Path, hessians: Mapping[str, Moments]) -> dict[str, Path]:
    """Moments as files, each distinct one once."""
    files: dict[int, Path] = {}
    for moments in hessians.values():
        if id(moments.hessian) not in files:
            files[id(moments.hessian)] = folder / f"{len(files)}.safetensors"
            tensors = {"hessian": moments.hessian.cpu()}
            if moments.drift is not None:
                tensors["drift"] = moments.drift.cpu()
            save_tensors(files[id(moments.hessian)], tensors)
    return {suffix: files[id(moments.hessian)] for suffix, moments in hessians.items()}


def _load_moments(path: Path) -> Moments:
    found = load_file(path)
    return Moments(found["hessian"], found.get("drift"))


_worker: dict[str, Any] = {}  # what one worker process is given once, at its start


def _start_worker(
    gpus: int, threads: int, run_folder: Path, model_folder: Path, prefix: str, fold: Fold | None, number: int
) -> None:
    if gpus:
        device = torch.device("cuda", number % gpus)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads)
    job = Job.load(run_folder)
    job.log(f"worker {number} on {device}", number)
    _worker.update(number=number, device=device, job=job, source=open_folder(model_folder, prefix, fold, device))


@dataclass(frozen=True)
class _Work:
    """Tasks that are quantized together, and the files of their Hessians by suffix."""

    batch: list[LinearTask]
    files: Mapping[str, Path]


def _quantize(given: Try) -> list[dict[str, Any]]:
    """In a worker: the figures of a batch, whose linears are on disk then. A new try takes them one by one."""
    job, work = _worker["job"], given.work
    if not given.reasons:
        return _quantize_together(work.batch, work.files)
    found: list[dict[str, Any]] = []
    with smaller_chunks(SMALLER ** max(0, given.short_of_memory - 1)):
        for task in work.batch:
            done = job.figures(task.plan.name)
            found += _quantize_together([task], work.files) if done is None else [done]
    return found


def _quantize_together(batch: list[LinearTask], files: Mapping[str, Path]) -> list[dict[str, Any]]:
    suffixes = {task.plan.info.suffix for task in batch}
    loaded = {file: _load_moments(file) for file in {files[suffix] for suffix in suffixes}}
    hessians = {suffix: loaded[files[suffix]] for suffix in suffixes}
    finished = quantize_batch(batch, _worker["source"], hessians, _worker["device"])
    return [keep(linear, _worker["job"], _worker["number"]) for linear in finished]
