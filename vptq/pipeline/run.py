"""The order of things in a `quantize` run.

plan -> tokens -> block by block: inputs, Hessians, linears, each on disk as soon as it is done -> checkpoints -> perplexity.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.bits import checkpoint_bits
from vptq.calibration.hessian import Hessian
from vptq.calibration.hessian_store import HessianStore, label_of
from vptq.checkpoint.reader import is_packed
from vptq.config import QuantConfig
from vptq.data import TokenSequences, calibration_sequences, load_tokenizer
from vptq.errors import UsageError
from vptq.evaluation.perplexity import Perplexity, progress_steps, streamed_perplexity
from vptq.models.architecture import Skeleton, load_skeleton, resolve_folder
from vptq.models.device import forced_dtype, resolve_device
from vptq.models.files import save_json, writing_to
from vptq.models.headers import fingerprint, folder_bytes
from vptq.models.runner import BlockRunner
from vptq.models.stream import TensorSource
from vptq.pipeline.calibrate import Calibrator
from vptq.pipeline.codebooks import codebook_file, prepare_codebooks
from vptq.pipeline.cost import fisher_units, forward_units, hessian_units, linear_units
from vptq.pipeline.evaluate import load_windows
from vptq.pipeline.fold import choose_fold, open_folder
from vptq.pipeline.job import FREE_ON_RESUME, Job, check_resume
from vptq.pipeline.outcome import RunResult, finished_result
from vptq.pipeline.plan import LinearPlan, RunPlan, check_disk
from vptq.pipeline.progress import Progress, Silent
from vptq.pipeline.results import Results
from vptq.pipeline.settle import TOKEN_WEIGHTS, Context, first_plan, run_notes, settle
from vptq.pipeline.task import LinearTask, Moments
from vptq.pipeline.workers import check_workers, make_executor
from vptq.quantize.trial import settle_kernels
from vptq.recipe import OFF


def quantize_model(
    config: QuantConfig,
    *,
    resume: Path | None = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Quantize a model from calibration to checkpoint.

    Args:
        config: the wishes; with `resume` those of the run folder hold instead, but for where `given` says to work.
        resume: run folder to go on with. given: what the user set this time, checked against that run's settings.
    Raises:
        UsageError: bad input, before any work. VptqError: a fault in the run, which can be resumed.
    """
    job = None
    if resume is not None:
        job = Job.load(resume)
        check_resume(job, given or {})
        if job.finished:
            return finished_result(job)
        free = {name: value for name, value in (given or {}).items() if name in FREE_ON_RESUME}
        config = QuantConfig.from_flat(job.config.to_flat() | free)
    config.validate()
    run = None
    try:
        run = _Run(config, job, progress or Silent())
        return run.execute()
    finally:
        for locked in (job, run.job if run is not None else None):
            if locked is not None:
                locked.unlock()


class _Run:
    """One execution. Everything that can be refused is refused in `__init__`, before anything is written."""

    def __init__(self, config: QuantConfig, job: Job | None, progress: Progress) -> None:
        self.started = time.perf_counter()
        self.config, self.progress = config, progress
        if job is not None:
            job.lock()
        self.device = resolve_device(config.device)
        self.slow = settle_kernels(self.device)
        check_workers(self.device, config.num_gpus)
        folder = resolve_folder(config.model_name)
        self.skeleton: Skeleton = load_skeleton(folder, config.trust_remote_code, forced_dtype(self.device))
        if is_packed(folder):
            raise UsageError(f"`{folder}` is quantized already", hint="give the original model")
        self.fold = choose_fold(config, self.skeleton)
        self.source = open_folder(folder, self.skeleton.source_prefix, self.fold, self.device)
        self.dtype = forced_dtype(self.device) or self.skeleton.dtype
        self.plan: RunPlan = first_plan(config, self.skeleton, self.source, job, self.fold)
        self.fingerprint = fingerprint(self.source.entries)
        if job is not None and job.fingerprint != self.fingerprint:
            raise UsageError(f"`{folder}` is not the model that `{job.folder}` was started with", hint="start a new run")
        hessian_path = config.calibration.hessian_path
        self.store = HessianStore(Path(hessian_path).expanduser(), self.fingerprint) if hessian_path else None
        self.kept = self._find_kept_hessians()
        self.figures = self._finished(job)
        self.todo = [
            linear for linear in self.plan.everything if linear.name not in self.figures and not linear.layer.weight_of
        ]
        self.tokens = self._calibration_tokens()
        self.windows = self._evaluation_windows()
        self._check_disk(job)
        if self.store is not None:
            self.store.prepare()
        if config.sensitivity_path:
            folder = Path(config.sensitivity_path).expanduser().parent
            with writing_to(folder):
                folder.mkdir(parents=True, exist_ok=True)
        if job is None:
            job = Job.create(config, self.fingerprint, self._facts())
            job.lock()
        job.check_facts(self._facts())
        self.job = job
        self.executor = make_executor(self.job, self.source, self.device, config.num_gpus, self._note)

    def _finished(self, job: Job | None) -> dict[str, dict[str, Any]]:
        """Linears that a stopped run left whole, and their figures."""
        if job is None:
            return {}
        found = {linear.name: job.figures(linear.name) for linear in self.plan.everything}
        return {name: figures for name, figures in found.items() if figures is not None}

    # -- before any work ------------------------------------------------------------------------------------------------

    def _find_kept_hessians(self) -> dict[str, Path]:
        """Linear name -> Hessian file, for those that --hessian_path holds. Sizes are checked here, all at once."""
        if self.store is None or not self.store.folder.exists():
            return {}
        found: dict[str, Path] = {}
        for block in range(len(self.skeleton.blocks)):
            linears = {linear.info.suffix: linear for linear in self.plan.of_block(block)}
            for suffix, path in self.store.find(block, list(linears)).items():
                if suffix in linears:
                    found[linears[suffix].name] = path
        for path in set(found.values()):
            size = next(linear.info.in_features for linear in self.plan.linears if found.get(linear.name) == path)
            self.store.check_size(path, size)
        return found

    @property
    def last_forward_block(self) -> int:
        """The last block whose inputs are needed: some linear of it has no Hessian yet. -1 if none."""
        if any(linear in self.plan.ends and self._served_head(linear) for linear in self.todo):
            return len(self.skeleton.blocks) - 1
        todo = [linear for linear in self.todo if linear not in self.plan.ends]
        return max((linear.info.block for linear in todo if linear.name not in self.kept), default=-1)

    def _calibration_tokens(self) -> TokenSequences | None:
        if self.last_forward_block < 0:
            return None
        calibration = self.config.calibration
        tokenizer = load_tokenizer(self.skeleton.folder, self.config.trust_remote_code)
        return calibration_sequences(
            self.plan.calibration_dataset,
            tokenizer,
            nsamples=calibration.nsamples,
            seq_len=self.plan.seq_len,
            seed=calibration.seed,
        )

    def _evaluation_windows(self) -> dict[str, Tensor]:
        return load_windows(
            self.skeleton,
            self.plan.eval_datasets,
            seq_len=self.plan.seq_len,
            stride=None,
            limit=None if self.config.eval_nsamples == OFF else self.config.eval_nsamples,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _facts(self) -> dict[str, Any]:
        """What the settings came to: kept with the run, and what a resumed run must find again."""
        facts: dict[str, Any] = {"seq_len": self.plan.seq_len, "dataset": self.plan.calibration_dataset}
        if self.tokens is not None:
            facts["tokens"] = hashlib.sha256(self.tokens.tokens.numpy().tobytes()).hexdigest()
        return facts

    def _check_disk(self, job: Job | None) -> None:
        fresh = {
            (i.block, label_of(i.suffix), i.in_features)
            for i in (linear.info for linear in self.todo)
            if i.name not in self.kept
        }
        hessians = sum(4 * size**2 for _, _, size in fresh) if self.store is not None else 0
        already = folder_bytes(job.folder) if job is not None else 0
        check_disk(self.config, self.plan, self.source, already=already, hessians=hessians)

    # -- the work -------------------------------------------------------------------------------------------------------

    def execute(self) -> RunResult:
        try:
            self._announce()
            self._quantize_blocks()
        finally:
            self.executor.close()
            self.source.close()
        self._results().write(self.config, self.progress)
        perplexities = self._evaluate()
        return self._conclude(perplexities)

    def _note(self, text: str) -> None:
        self.progress.note(text)
        self.job.log(text)

    def _announce(self) -> None:
        self.progress.run_folder(self.job.folder)
        for warning in self.plan.warnings:
            self._note(f"warning: {warning}")
        kept = [(self.store, path) for path in set(self.kept.values())] if self.store is not None else []
        for text in run_notes(self.slow, self.fold, kept, len(self.kept), self.tokens):
            self._note(text)
        total = sum(linear_units(linear) for linear in self.plan.everything)
        done = total - sum(linear_units(linear) for linear in self.todo)
        for block in range(self.last_forward_block + 1):
            total += self._forward_units(block) * (1 if self.config.bits is None else 2)
        if self.config.calibration.hessian == "fisher" and self.tokens is not None:
            total += fisher_units(self.plan, self.tokens.tokens.numel())
        total += 2 * sum(self._evaluation_units(windows) for windows in self.windows.values())
        self.progress.start(total, done)

    def _forward_units(self, block: int) -> float:
        assert self.tokens is not None
        count = self.tokens.tokens.numel()
        return forward_units(self.plan, block, count) + (hessian_units(self.plan, block, count) if self._needs(block) else 0)

    def _evaluation_units(self, windows: Tensor) -> float:
        return sum(forward_units(self.plan, block, windows.numel()) for block in range(len(self.skeleton.blocks)))

    def _needs(self, block: int) -> list[LinearPlan]:
        """Linears of a block that are to do and whose Hessian must be made."""
        return [linear for linear in self.todo if linear.info.block == block and linear.name not in self.kept]

    def _settle(self) -> Context | None:
        """Choose what was left open. None where all Hessians are at hand and no text is needed."""
        context, weights = None, None
        if self.tokens is not None:
            parts = self.skeleton, self.source, self.device, self.dtype, self.tokens
            context = Context(self.config, *parts, self.job, self.progress, self.fold)
            self.plan, weights = settle(context, self.plan)
            left = {linear.name for linear in self.todo}
            self.todo = [linear for linear in self.plan.everything if linear.name in left]
        self.weights = weights
        names = [linear.name for linear in self.plan.linears]
        prepare_codebooks(self.job.codebooks, [linear.config for linear in self.todo], self.device, self.source, names)
        return context

    def _quantize_blocks(self) -> None:
        context = self._settle()
        calibrator = None
        if context is not None:
            self.progress.phase("calibrating")
            quantized = self._results().source() if self.config.calibration.sequential else None
            calibrator = context.calibrator(self.weights, quantized)
        for block in range(len(self.skeleton.blocks)):
            fresh: list[Hessian] = []
            if calibrator is not None and block <= self.last_forward_block:
                self.progress.phase(f"block {block}: calibrating")
                fresh = self._run_block(calibrator, block)
            self._quantize_block(block, fresh)
            if calibrator is not None and block < self.last_forward_block:
                calibrator.follow(block)
        self._quantize_ends(calibrator)
        if calibrator is not None:
            calibrator.close()

    def _quantize_ends(self, calibrator: Calibrator | None) -> None:
        """Embeddings, in which every error counts alike, and what serves as head, by what goes into it."""
        for linear in [linear for linear in self.todo if linear in self.plan.ends]:
            self.progress.phase(f"{linear.name}: quantizing")
            head = self._served_head(linear)
            alike = torch.eye(linear.info.in_features)
            hessian = calibrator.head(head) if head and calibrator is not None else alike
            self._execute([linear], {linear.info.suffix: Moments(hessian)})

    def _served_head(self, end: LinearPlan) -> str:
        """The head that an end is or, tied, stands for; empty if neither."""
        twins = [other.name for other in self.plan.ends if other.layer.weight_of == end.name]
        info = self.skeleton.end("head")
        return twins[0] if twins else end.name if info is not None and info.name == end.name else ""

    def _results(self) -> Results:
        return Results(self.job, self.skeleton, self.source, self.device, self.plan)

    def _run_block(self, calibrator: Calibrator, block: int) -> list[Hessian]:
        """Carry the states past a block; on the way, its Hessians where they are needed, kept where that is asked for."""
        units = self._forward_units(block) / calibrator.num_batches
        last = block == self.last_forward_block
        fresh = calibrator.block(block, bool(self._needs(block)), last, lambda: self.progress.advance(units))
        if self.store is not None and self.tokens is not None:
            provenance = {
                "dataset": self.tokens.dataset,
                "nsamples": str(self.tokens.num_sequences),
                "seq_len": str(self.tokens.seq_len),
                "seed": str(self.config.calibration.seed),
            }
            wanted = {linear.info.suffix for linear in self._needs(block)}
            for hessian in fresh:
                if wanted & set(hessian.linears):  # what the folder holds stays as it is
                    self.store.save(block, hessian, provenance)
        return fresh

    def _quantize_block(self, block: int, fresh: list[Hessian]) -> None:
        todo = [linear for linear in self.todo if linear.info.block == block]
        if not todo:
            return
        self.progress.phase(f"block {block}: quantizing")
        part = self.config.calibration.drift_frac
        drifts = {id(hessian): None if hessian.drift is None else hessian.drift * part for hessian in fresh}
        moments = {id(hessian): Moments(hessian.matrix, drifts[id(hessian)]) for hessian in fresh}
        made = {suffix: moments[id(hessian)] for hessian in fresh for suffix in hessian.linears}
        loaded: dict[Path, Moments] = {}
        hessians: dict[str, Moments] = {}
        for linear in todo:
            path = self.kept.get(linear.name)
            if path is not None and self.store is not None:
                if path not in loaded:
                    loaded[path] = Moments(self.store.load(path, linear.info.in_features))
                hessians[linear.info.suffix] = loaded[path]
            elif linear.info.suffix in made:
                hessians[linear.info.suffix] = made[linear.info.suffix]
        unseen = [linear.name for linear in todo if linear.info.suffix not in hessians]
        if unseen:
            raise UsageError(
                "no calibration token reaches these linears",
                where=unseen,
                hint="calibrate with more text (--nsamples, --dataset)",
            )
        self._execute(todo, hessians)

    def _execute(self, todo: list[LinearPlan], hessians: Mapping[str, Moments]) -> None:
        units = {linear.name: linear_units(linear) for linear in todo}
        for figures in self.executor.run([self._task(linear) for linear in todo], hessians):
            self.figures[figures["name"]] = figures
            self.progress.advance(units[figures["name"]])

    def _task(self, linear: LinearPlan) -> LinearTask:
        codebook = codebook_file(self.job.codebooks, linear.config) if linear.config.is_shared else None
        return LinearTask(linear, self.skeleton.dtype, codebook)

    # -- what comes out -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> tuple[tuple[str, Perplexity, Perplexity], ...]:
        if not self.windows:
            return ()
        quantized = self._results().source()
        before = self._perplexities("original", self.skeleton.source())
        after = self._perplexities("quantized", quantized)
        return tuple((name, before[name], after[name]) for name in self.windows)

    def _perplexities(self, which: str, source: TensorSource) -> dict[str, Perplexity]:
        self.progress.phase(f"perplexity of the {which} model")
        runner = BlockRunner(self.skeleton, source, self.device, self.dtype)
        found = {}
        for name, windows in self.windows.items():
            units = self._evaluation_units(windows) / progress_steps(runner, windows)

            def advance(units: float = units) -> None:
                self.progress.advance(units)

            found[name] = streamed_perplexity(runner, windows, stride=None, dataset=name, progress=advance)
        runner.unload()
        return found

    def _conclude(self, perplexities: tuple[tuple[str, Perplexity, Perplexity], ...]) -> RunResult:
        packed = self.job.folder / "packed_model"
        bits = checkpoint_bits(packed) if packed.exists() else self.plan.bits
        figures = tuple(self.figures[linear.name] for linear in self.plan.everything if linear.name in self.figures)
        if perplexities:
            results: dict[str, Any] = {f"ctx_{self.plan.seq_len}": {}}
            for name, before, after in perplexities:
                results[f"ctx_{self.plan.seq_len}"][name] = {"original": before.to_dict(), "quantized": after.to_dict()}
            results["bits"] = {k: v for k, v in bits.to_dict().items() if k.endswith("per_weight")}
            save_json(self.job.folder / "ppl_results.json", results)
        save_json(self.job.folder / "linears.json", list(figures))
        self.job.save(finished=True)
        (self.job.folder / TOKEN_WEIGHTS).unlink(missing_ok=True)
        if packed.exists():
            self.job.drop_work()
        self.progress.finish()
        mended = [
            f"{f['name']}: damping raised to {f['damping_frac']:g} ({f['damping_retries']} retries)"
            for f in figures
            if f.get("damping_retries")
        ]
        seconds = time.perf_counter() - self.started
        return RunResult(self.job.folder, figures, bits, perplexities, (*self.plan.warnings, *mended), seconds)
