"""Does the works of a run, one at a time: in this process, or in one of several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vptq.calibration.fisher import batches_at_once, token_weights
from vptq.calibration.hessian import BlockSums, Hessian
from vptq.models.architecture import Skeleton, load_skeleton
from vptq.models.device import forced_dtype
from vptq.models.experts import all_tokens
from vptq.models.files import save_tensors
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.remote import Mirror, fetch, know
from vptq.models.runner import BlockRunner
from vptq.models.stream import TensorSource
from vptq.pipeline.calibrate import CalibrationText, Calibrator, relative_weights
from vptq.pipeline.first_plan import first_plan
from vptq.pipeline.fold import Fold, open_folder
from vptq.pipeline.hessians import HessianSource, Moments, computed, store_sums
from vptq.pipeline.job import Job
from vptq.pipeline.measure import measure_linear
from vptq.pipeline.results import Results
from vptq.pipeline.task import LinearTask, keep, quantize_batch
from vptq.pipeline.works import Calibrate, KeepHessian, MeasureLinears, QuantizeLinears, Weigh, Work
from vptq.quantize.assign import smaller_chunks

SMALLER = 4  # times, the chunks of a try after a second one that ran out of memory
TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class Setup:
    """What a worker in a process of its own needs to begin: settings are in the run folder.

    Attributes:
        scratch: where sums are handed over. mirror: where the run folder really is, if that is behind a URL.
        threads: of a CPU worker, as many as one process would use alone: sums depend on how threads share them.
    """

    run_folder: Path
    scratch: Path
    mirror: Mirror | None
    model_folder: Path
    fold: Fold | None
    trust_remote_code: bool
    threads: int


class Worker:
    """Works on one device.

    Args:
        tokens: (num_sequences, seq_len) int64, of the calibration text; None if it is not needed.
        number: of this worker, for the logs. scratch: where sums are handed over in files; None to hand them over in memory.
    """

    def __init__(
        self,
        job: Job,
        skeleton: Skeleton,
        source: PrefetchingFolder,
        device: torch.device,
        tokens: Tensor | None,
        number: int = 0,
        scratch: Path | None = None,
    ) -> None:
        self.job, self.skeleton, self.source, self.device = job, skeleton, source, device
        self.number, self.scratch = number, scratch
        self.dtype = forced_dtype(device) or skeleton.dtype
        self.text = None if tokens is None else CalibrationText(tokens)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._runner: BlockRunner | None = None
        self._calibrators: dict[tuple[range, bool], Calibrator] = {}

    @classmethod
    def from_files(cls, setup: Setup, device: torch.device, number: int) -> Worker:
        """A worker in a process of its own."""
        if setup.mirror is not None:
            know(setup.mirror)
        job = Job.at(setup.run_folder)
        skeleton = load_skeleton(setup.model_folder, setup.trust_remote_code, forced_dtype(device))
        source = open_folder(skeleton, setup.fold, device)
        path = fetch(setup.scratch / TOKENS)
        tokens = load_file(path)["tokens"] if path.exists() else None
        return cls(job, skeleton, source, device, tokens, number, setup.scratch)

    def do(self, work: Work, progress: Callable[[float], None], tries: int = 0, short_of_memory: int = 0) -> Any:
        """The answer to a work, see there; futures of it where files are written, which is done while others are at work.

        Args:
            progress: called with parts of the work as they are done.
            tries: how often it failed before. short_of_memory: how often of these memory ran out.
        """
        if isinstance(work, Calibrate):
            with all_tokens(self.skeleton.model, self.job.config.calibration.moe_all_experts):
                return self._calibrate(work, progress, short_of_memory > 0)
        if isinstance(work, QuantizeLinears):
            return self._quantize(work, tries, short_of_memory)
        if isinstance(work, MeasureLinears):
            return self._measure(work)
        if isinstance(work, KeepHessian):
            return self._keep_hessian(work)
        with all_tokens(self.skeleton.model, self.job.config.calibration.moe_all_experts):
            return self._weigh(work, progress)

    def prefetch(self, work: Work | None) -> None:
        """Begin to read what a work will need."""
        if isinstance(work, QuantizeLinears):
            self.source.prefetch(f"{task.plan.name}.weight" for task in work.batch)

    def close(self) -> None:
        """Wait until all is written."""
        self.writer.shutdown()
        self._forget()

    # -- calibration ----------------------------------------------------------------------------------------------------

    def _calibrate(self, work: Calibrate, progress: Callable[[float], None], spare: bool) -> BlockSums | Future[BlockSums]:
        if spare:
            self._forget()
        try:
            calibrator = self._calibrator(work, spare)
            if work.head:
                sums = calibrator.head(work.head)
            else:
                weights = self._relative_weights(work)
                sums = calibrator.block(work.block, wanted=work.wanted, last=work.last, weights=weights, progress=progress)
        except BaseException:
            self._forget()  # states may be half past the block
            raise
        if self.scratch is None or not work.wanted:
            return sums
        name = f"{work.block}-{work.runs.start}-{self.number}"
        return self.writer.submit(store_sums, sums, self.scratch, name, computed(self.device))

    def _calibrator(self, work: Calibrate, spare: bool) -> Calibrator:
        assert self.text is not None
        key = work.runs, work.sequential
        if work.block == 0:
            self._calibrators = {k: kept for k, kept in self._calibrators.items() if k[1] == work.sequential}
        if self._runner is None:
            self._runner = BlockRunner(self.skeleton, self.source, self.device, self.dtype, spare=spare)
        if key not in self._calibrators:
            quantized = self._quantized() if work.sequential else None
            self._calibrators[key] = Calibrator(self._runner, self.text, work.runs, quantized)
        return self._calibrators[key]

    def _quantized(self) -> TensorSource:
        fold = getattr(self.source, "fold", None)
        plan = first_plan(self.job.config, self.skeleton, self.source, self.job, fold)
        return Results(self.job, self.skeleton, self.source, self.device, plan).source()

    def _relative_weights(self, work: Calibrate) -> dict[str, Tensor] | None:
        if work.means is None:
            return None
        prefix = self.skeleton.block_name(work.block)
        found: dict[str, Tensor] = {}
        for suffix, mean in work.means.items():
            kept = [self.job.token_weights(run, f"{prefix}.{suffix}") for run in work.runs]
            found[suffix] = relative_weights(kept, mean)
        return found

    def _weigh(self, work: Weigh, progress: Callable[[float], None]) -> None:
        assert self.text is not None
        self._forget()  # one runner at a time has the skeleton
        missing = [run for run in work.runs if not self.job.has_token_weights(run)]
        progress(1 - len(missing) / len(work.runs))
        runner = BlockRunner(self.skeleton, self.source, self.device, self.dtype)
        while missing:
            together = missing[: max(1, batches_at_once(runner, self.text.batches) // len(self.text.runs[0]))]
            found = token_weights(runner, self.text.of_runs(together), work.row_groups)
            first = 0
            for run in together:
                count = sum(batch.numel() for batch in self.text.of_runs([run]))
                own = {name: weights[:, first : first + count].contiguous() for name, weights in found.items()}
                save_tensors(self.job.token_weights_file(run), own)
                first += count
            progress(len(together) / len(work.runs))
            missing = missing[len(together) :]
        runner.unload()

    def _forget(self) -> None:
        self._calibrators.clear()
        if self._runner is not None:
            self._runner.unload()
            self._runner = None

    # -- linears --------------------------------------------------------------------------------------------------------

    def _quantize(self, work: QuantizeLinears, tries: int, short_of_memory: int) -> list[Future[dict[str, Any]]]:
        """A batch at once; in a new try one by one, less what is on disk by then, and with smaller chunks at last."""
        if short_of_memory:
            self._forget()
        if not tries:
            return self._quantized_now(work.batch, work.hessians)
        found: list[Future[dict[str, Any]]] = []
        with smaller_chunks(SMALLER ** max(0, short_of_memory - 1)):
            for task in work.batch:
                done = self.job.figures(task.plan.name)
                if done is not None:
                    found.append(self.writer.submit(dict, done))
                else:
                    found += self._quantized_now([task], work.hessians)
        return found

    def _quantized_now(
        self, batch: Sequence[LinearTask], hessians: Mapping[str, HessianSource]
    ) -> list[Future[dict[str, Any]]]:
        moments = self._moments(hessians, {task.plan.info.suffix for task in batch})
        finished = quantize_batch(batch, self.source, moments, self.device)
        return [self.writer.submit(keep, linear, self.job, self.number) for linear in finished]

    def _measure(self, work: MeasureLinears) -> dict[str, float]:
        moments = self._moments(work.hessians, work.hessians)
        found = {}
        for linear in work.linears:
            known = moments.get(linear.info.suffix)
            if known is None:
                found[linear.name] = 0.0  # no token reaches it: the run will say so
                continue
            weight = self.source.get(f"{linear.name}.weight").to(self.device)
            mean = None if work.means is None else work.means[linear.name]
            found[linear.name] = measure_linear(linear, weight, known.hessian, mean)
        return found

    def _moments(self, sources: Mapping[str, HessianSource], suffixes: Collection[str]) -> dict[str, Moments]:
        """Of some linears of a block; read once where several take the same input."""
        distinct = {id(sources[suffix]): sources[suffix] for suffix in suffixes}
        loaded = {key: source.load(self.device) for key, source in distinct.items()}
        return {suffix: loaded[id(sources[suffix])] for suffix in suffixes}

    def _keep_hessian(self, work: KeepHessian) -> None:
        moments = work.hessian.load(torch.device("cpu"))
        work.store.save(work.block, Hessian(moments.hessian, moments.num_tokens, work.linears), dict(work.provenance))
