"""The order of things in a `quantize` run.

plan -> tokens -> block by block: inputs, Hessians, linears, each on disk as soon as it is done -> checkpoints -> perplexity.
Who does the work of a block, this process or others, is the executor's business; in which order, that of the stages.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.bits import checkpoint_bits
from vptq.calibration.hessian_store import HessianStore, label_of
from vptq.checkpoint.reader import refuse_packed
from vptq.config import QuantConfig
from vptq.data import TokenSequences, calibration_sequences, load_tokenizer
from vptq.errors import UsageError
from vptq.evaluation.perplexity import Perplexity, progress_steps, streamed_perplexity
from vptq.models.architecture import Skeleton, load_skeleton, resolve_folder
from vptq.models.device import forced_dtype, resolve_device
from vptq.models.files import save_json, writing_to
from vptq.models.headers import fingerprint, folder_bytes
from vptq.models.remote import is_url
from vptq.models.runner import BlockRunner
from vptq.models.stream import TensorSource
from vptq.pipeline.card import describe_run
from vptq.pipeline.codebooks import prepare_codebooks
from vptq.pipeline.cost import fisher_units, forward_units, linear_units
from vptq.pipeline.evaluate import load_windows
from vptq.pipeline.executors import make_executor
from vptq.pipeline.facts import command_of, run_facts
from vptq.pipeline.first_plan import ALLOCATION, first_plan
from vptq.pipeline.fold import choose_fold, open_folder
from vptq.pipeline.job import Job
from vptq.pipeline.outcome import RunResult, finished_result
from vptq.pipeline.plan import LinearPlan, RunPlan, check_disk
from vptq.pipeline.progress import Progress, Silent
from vptq.pipeline.results import Results
from vptq.pipeline.schedule import BlockWalk, Watch
from vptq.pipeline.settle import Context, run_notes, settle
from vptq.pipeline.stages import Passage, Quantizing, blocks_ahead, scratch_bytes, shares_of
from vptq.pipeline.workers import Executor, Given, InProcess
from vptq.pipeline.works import QuantizeLinears, Work
from vptq.quantize.trial import settle_kernels
from vptq.recipe import OFF


def quantize_model(
    config: QuantConfig,
    *,
    resume: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Quantize a model from calibration to checkpoint.

    Args:
        config: the wishes; with `resume` those of the run folder hold instead, but for where `given` says to work.
        resume: run folder, or its URL, to go on with. given: what the user set this time, checked against that run's settings.
    Raises:
        UsageError: bad input, before any work. VptqError: a fault in the run, which can be resumed.
    """
    with contextlib.ExitStack() as ending:
        job = None
        if resume is not None:
            job = Job.load(resume)
            ending.callback(job.unlock)
            job.check_resume(given or {})
            if job.finished:
                return finished_result(job)
            free = {name: value for name, value in (given or {}).items() if name in job.free_on_resume}
            config = QuantConfig.from_flat(job.config.to_flat() | free)
        config.validate()
        if job is not None:
            job.lock()
        device = resolve_device(config.device)
        executor = make_executor(config, device)
        ending.callback(executor.close)
        return _Run(config, job, progress or Silent(), device, executor, ending).execute()


class _Run:
    """One execution. Everything that can be refused is refused in `__init__`, before anything is written."""

    def __init__(
        self,
        config: QuantConfig,
        job: Job | None,
        progress: Progress,
        device: torch.device,
        executor: Executor,
        ending: contextlib.ExitStack,
    ) -> None:
        self.started = time.perf_counter()
        self.config, self.progress, self.device, self.executor = config, progress, device, executor
        self._last_phase = ""
        self.slow = settle_kernels(device) if isinstance(executor, InProcess) else None  # else workers find out
        folder = resolve_folder(config.model_name)
        self.skeleton: Skeleton = load_skeleton(folder, config.trust_remote_code, forced_dtype(self.device))
        refuse_packed(folder)
        self.fold = choose_fold(config, self.skeleton)
        self.source = open_folder(self.skeleton, self.fold, self.device)
        ending.callback(self.source.close)
        self.dtype = forced_dtype(self.device) or self.skeleton.dtype
        self.plan: RunPlan = first_plan(config, self.skeleton, self.source, job, self.fold)
        self.fingerprint = fingerprint(self.source.entries)
        if job is not None and job.fingerprint != self.fingerprint:
            raise UsageError(f"`{folder}` is not the model that `{job.shown}` was started with", hint="start a new run")
        hessian_path = config.calibration.hessian_path
        self.store = HessianStore(Path(hessian_path).expanduser().absolute(), self.fingerprint) if hessian_path else None
        self.kept = self._find_kept_hessians()
        self.figures = self._finished(job)
        self.todo = [
            linear for linear in self.plan.everything if linear.name not in self.figures and not linear.layer.weight_of
        ]
        self.tokens = self._calibration_tokens()
        self.shares = () if self.tokens is None else shares_of(self.tokens, config.num_gpus)
        self.watch = Watch(self._phase, self.progress.advance)
        self.windows = self._evaluation_windows()
        self._check_disk(job)
        if self.store is not None:
            self.store.prepare()
        if config.sensitivity_path:
            folder = Path(config.sensitivity_path).expanduser().parent
            with writing_to(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self.resumed = job is not None
        if job is None:
            job = Job.create(config, self.fingerprint, self._facts())
            ending.callback(job.unlock)
            job.lock()
        job.check_facts(self._facts())
        self.job = job
        tokens = None if self.tokens is None else self.tokens.tokens
        self.executor.begin(Given(self.job, self.skeleton, self.source, tokens, config.trust_remote_code, self._note))

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
        if self.tokens is not None and not is_url(self.config.output_dir):  # what is handed over does not lie here, then
            hessians += scratch_bytes(self._passage(None), self.executor.count)
        already = folder_bytes(job.folder) if job is not None else 0
        check_disk(self.config, self.plan, self.source, already=already, hessians=hessians)

    def _passage(self, means: Mapping[str, float] | None) -> Passage:
        """How the calibration text goes through the blocks."""
        tokens = 0 if self.tokens is None else self.tokens.tokens.numel()
        sequential = self.config.calibration.sequential
        weighted = self.config.calibration.hessian == "fisher"
        return Passage(self.skeleton, self.plan, tokens, self.shares, self.last_forward_block, sequential, means, weighted)

    # -- the work -------------------------------------------------------------------------------------------------------

    def execute(self) -> RunResult:
        try:
            self._announce()
            self._quantize()
        finally:
            self.executor.close()
            self.source.close()
        errors = {name: figures["error"] for name, figures in self.figures.items() if figures.get("error") is not None}
        self._results().write(self.config, self.progress, errors)
        perplexities = self._evaluate()
        return self._conclude(perplexities)

    def _phase(self, text: str) -> None:
        if text != self._last_phase:
            self._last_phase = text
            self.progress.phase(text)

    def _note(self, text: str) -> None:
        self.progress.note(text)
        self.job.log(text)

    def _announce(self) -> None:
        self.progress.run_folder(self.job.shown)
        for warning in self.plan.warnings:
            self._note(f"warning: {warning}")
        kept = [(self.store, path) for path in set(self.kept.values())] if self.store is not None else []
        for text in run_notes(self.slow, self.fold, kept, len(self.kept), self.tokens):
            self._note(text)
        total = sum(linear_units(linear) for linear in self.plan.everything)
        done = total - sum(linear_units(linear) for linear in self.todo)
        if self.tokens is not None:
            total += self._calibration_units(self.tokens.tokens.numel())
        total += 2 * sum(self._evaluation_units(windows) for windows in self.windows.values())
        self.progress.start(total, done)

    def _calibration_units(self, tokens: int) -> float:
        passage = self._passage(None)
        new = {linear.info.block for linear in self.todo if linear.name not in self.kept}
        total = sum(passage.units(block, block in new) for block in range(passage.last + 1))
        if self.config.bits is not None and not (self.job.folder / ALLOCATION).exists():
            total += sum(passage.units(block, True) for block in range(len(self.skeleton.blocks)))
        return total + (fisher_units(self.plan, tokens) if self.config.calibration.hessian == "fisher" else 0.0)

    def _evaluation_units(self, windows: Tensor) -> float:
        return sum(forward_units(self.plan, block, windows.numel()) for block in range(len(self.skeleton.blocks)))

    def _settle(self) -> dict[str, float] | None:
        """Choose what was left open; gives the means of token weights, if there are any."""
        means = None
        if self.tokens is not None:
            parts = self.skeleton, self.source, self.tokens, self.job, self.progress, self.fold
            context = Context(self.config, *parts, self.executor, self.shares, self.watch)
            self.plan, means = settle(context, self.plan)
            left = {linear.name for linear in self.todo}
            self.todo = [linear for linear in self.plan.everything if linear.name in left]
        names = [linear.name for linear in self.plan.linears]
        prepare_codebooks(self.job.codebooks, [linear.config for linear in self.todo], self.device, self.source, names)
        return means

    def _quantize(self) -> None:
        means = self._settle()
        calibration, passage = self.config.calibration, self._passage(means)
        heads = {end.name: head for end in self.todo if (head := self._served_head(end))}
        quantizing = Quantizing(
            passage,
            tuple(self.todo),
            self.executor.device,
            self.job.codebooks,
            self.store,
            self.kept,
            self._provenance(),
            heads,
        )
        ahead = blocks_ahead(self.executor.count, calibration.sequential)
        self.executor.run(BlockWalk(quantizing.stages(), ahead, calibration.drift_frac, self.watch, self._done))

    def _done(self, work: Work, answer: Any) -> None:
        self.job.check_lock()
        if isinstance(work, QuantizeLinears):
            self.figures |= {figures["name"]: figures for figures in answer}

    def _provenance(self) -> dict[str, str]:
        """What kept Hessians say of their text."""
        if self.tokens is None:
            return {}
        count, length = str(self.tokens.num_sequences), str(self.tokens.seq_len)
        return {
            "dataset": self.tokens.dataset, "nsamples": count, "seq_len": length, "seed": str(self.config.calibration.seed)
        }  # fmt: skip

    def _served_head(self, end: LinearPlan) -> str:
        """The head that an end is or, tied, stands for; empty if neither."""
        twins = [other.name for other in self.plan.ends if other.layer.weight_of == end.name]
        info = self.skeleton.end("head")
        return twins[0] if twins else end.name if info is not None and info.name == end.name else ""

    def _results(self) -> Results:
        return Results(self.job, self.skeleton, self.source, self.device, self.plan)

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
        mended = [
            f"{f['name']}: damping raised to {f['damping_frac']:g} ({f['damping_retries']} retries)"
            for f in figures
            if f.get("damping_retries")
        ]
        seconds = time.perf_counter() - self.started
        warnings = (*self.plan.warnings, *self._starved(figures), *mended)
        flat = self.config.to_flat()
        command = command_of("quantize", flat, QuantConfig().to_flat())
        shared = not isinstance(self.executor, InProcess)
        facts = run_facts(command, seconds, self.device, warnings, resumed=self.resumed, shared=shared)
        describe_run(self.job.folder, facts, self.skeleton.folder, self.config.model_name, self._note)
        self.job.save(finished=True)
        self.job.drop_token_weights()
        if packed.exists():
            self.job.drop_work()
        self.progress.finish()
        return RunResult(self.job.folder, figures, bits, perplexities, warnings, seconds)

    def _starved(self, figures: Sequence[Mapping[str, Any]]) -> list[str]:
        """Linears, of experts most likely, that saw fewer tokens than others, and than they have inputs."""
        asked = {linear.name for linear in self.plan.linears} - set(self.kept)
        known = [f for f in figures if f["name"] in asked and "tokens" in f]
        most = max((f["tokens"] for f in known), default=0)
        few = [f for f in known if f["tokens"] < min(most, f["shape"][1])]
        if not few:
            return []
        worst = min(few, key=lambda f: f["tokens"])
        way = "more text" if self.config.calibration.moe_all_experts else "--moe_all_experts True, or more text,"
        return [f"{len(few)} linears saw too few tokens, {worst['name']} {worst['tokens']}: {way} may help"]
