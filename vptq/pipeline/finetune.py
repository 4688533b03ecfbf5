"""The order of things in a `finetune` run.

models -> text -> perplexity before -> training -> checkpoint -> perplexity after. What is done is on disk: the text, each
block or the state of the training, the checkpoint; a stopped run goes on from there.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import open_packed, packed_tensors
from vptq.checkpoint.writer import is_whole, write_changed, write_unpacked
from vptq.data import check_dataset
from vptq.errors import RunError, UsageError, is_out_of_memory
from vptq.evaluation.perplexity import Perplexity, progress_steps, streamed_perplexity
from vptq.finetune.additions import with_additions
from vptq.finetune.curves import save_curves
from vptq.finetune_config import FinetuneConfig
from vptq.layer_config import LayerConfig
from vptq.models.architecture import DEMO, load_skeleton, resolve_folder
from vptq.models.device import forced_dtype, resolve_device
from vptq.models.files import save_json
from vptq.models.headers import fingerprint
from vptq.models.stream import FolderSource
from vptq.nn.reference import dequantize_packed
from vptq.pipeline.card import describe_run
from vptq.pipeline.evaluate import load_windows, make_runner, resolve_seq_len
from vptq.pipeline.facts import command_of, run_facts
from vptq.pipeline.prediction_pass import check_room
from vptq.pipeline.progress import Progress, Silent
from vptq.pipeline.teacher import Teacher
from vptq.pipeline.team import Alone, Launched, Team, is_launched
from vptq.pipeline.tune_adapters import AdapterTuning, check_adapters
from vptq.pipeline.tune_blocks import BlockTuning
from vptq.pipeline.tune_indices import IndexTuning, NewIndices, check_forms
from vptq.pipeline.tune_job import TEXT, TuneJob
from vptq.pipeline.tune_models import Pair
from vptq.pipeline.tune_result import TuneResult, finished_result
from vptq.pipeline.tune_text import check_length, datasets_of, tuning_tokens
from vptq.pipeline.tune_whole import WholeTuning

BEFORE = "before"
TRAINED = "trained"
CURVES = {"block": "loss", "e2e": "loss, nats a token", "lora": "loss, nats a token"}
LOSSES = {"block": "KL of the whole model", "e2e": "loss", "lora": "loss"}
Weights = Iterator[tuple[str, Tensor]]  # linear name, weight


def finetune_model(
    config: FinetuneConfig,
    *,
    resume: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> TuneResult | None:
    """Fine-tune a packed checkpoint.

    Of several processes that a launcher has started, the first gives the result.

    Args:
        config: the wishes; with `resume` those of the run folder hold instead, but for where `given` says to work.
        resume: run folder, or its URL, to go on with. given: what the user set this time, checked against that run's settings.
        folder: under which a new run's folder stands; None for the usual place.
    Raises:
        UsageError: bad input, before any work. VptqError: a fault in the run, which can be resumed.
    """
    with contextlib.ExitStack() as ending:
        given = given or {}
        team: Team = Launched(config.device) if is_launched() else Alone()
        job = None if resume is None else _load(resume, team, ending)
        if job is not None:
            job.check_resume(given)
            free = {name: value for name, value in given.items() if name in job.free_on_resume}
            config = FinetuneConfig.from_flat(job.config.to_flat() | free)
            if job.finished:
                team.leave()
                return finished_result(job) if team.rank == 0 else None
        config.validate()
        if team.world > 1 and (config.mode != "e2e" or config.new_indices):
            what = "--train indices" if config.new_indices else f"mode {config.mode}"
            raise UsageError(f"{what} works in one process", hint="start it without a launcher")
        device = team.device if isinstance(team, Launched) else resolve_device(config.device)
        known = [config]
        with _told_of_memory(known):
            run = _Run(config, job, progress or Silent(), device, team, ending, folder)
            known.append(run.config)
            return run.execute()


def _load(resume: str | Path, team: Team, ending: contextlib.ExitStack) -> TuneJob:
    """The run to go on with. The first process fetches what lies behind a URL."""
    here = None
    if team.rank == 0:
        job = TuneJob.load(resume)
        ending.callback(job.unlock)
        here = str(job.folder)
    here = team.share(here)
    return job if team.rank == 0 else TuneJob.at(Path(here))


class _Run:
    """One execution. Everything that can be refused is refused in `__init__`, before anything is written."""

    def __init__(
        self,
        config: FinetuneConfig,
        job: TuneJob | None,
        progress: Progress,
        device: torch.device,
        team: Team,
        ending: contextlib.ExitStack,
        folder: Path | None,
    ) -> None:
        self.started = time.perf_counter()
        self.progress, self.device, self.team = progress if team.rank == 0 else Silent(), device, team
        self.original, self.given = resolve_folder(config.original), resolve_folder(config.model_name)
        pair = Pair.open(self.original, self.given, device, config.bf16, config.trust_remote_code)
        resolve_seq_len(config.seq_len, pair.original.max_seq_len)
        self.config = config.resolved(pair.num_parameters, pair.original.max_seq_len)
        datasets_of(self.config)
        if self.config.mode != "lora" and not self.config.add and not self.config.only_indices:  # what is added learns
            pair.check_kinds(self.config.mode, self.config.kept_kinds)
        if self.config.new_indices:
            check_forms(pair)
        if self.config.save_model and any(layer.added_bias for layer in pair.layers.values()):
            raise UsageError("a dequantized model has no place for added biases", hint="leave out --save_model")
        if self.config.mode == "lora":
            check_adapters(self.config, pair)
        if job is None and self.config.mode == "block" and "predictions" in self.config.passes:
            check_room(pair, (self.config.nsamples or 0) * (self.config.seq_len or 0))
        self.windows = self._windows(pair)
        marks = [fingerprint(FolderSource(path).entries) for path in (self.original, self.given)]
        if job is not None and job.fingerprint != " ".join(marks):
            raise UsageError(f"the models are not those that `{job.shown}` was started with", hint="start a new run")
        if job is None:
            job = self._create(" ".join(marks), config, pair, folder)
            self.config = job.config
            ending.callback(job.unlock)
        if team.rank == 0:
            job.lock()
        self.job, self.tokens = job, job.tokens()
        self.pair = pair
        distils = self.config.mode == "e2e" and self.config.kl_weight > 0
        self.teacher = Teacher(pair, self.config, self.tokens, job, team) if distils else None
        common = pair, self.config, self.tokens, job, self._told, self._note, team, self.teacher
        self.indices = IndexTuning(*common) if self.config.new_indices else None

    def _windows(self, pair: Pair) -> dict[str, Tensor]:
        names = _eval_datasets(self.config)
        for name in names:
            check_dataset(name)
        assert self.config.seq_len is not None
        return load_windows(
            pair.original,
            names,
            seq_len=self.config.seq_len,
            stride=None,
            limit=None if self.config.eval_nsamples < 0 else self.config.eval_nsamples,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _create(self, marks: str, asked: FinetuneConfig, pair: Pair, folder: Path | None) -> TuneJob:
        """The run folder, with its text; made by the first process. asked: the settings before they were resolved."""
        made = None
        if self.team.rank == 0:
            tokens = tuning_tokens(self.config, self.original, self.device, self._told, short=asked.nsamples is None)
            there = replace(asked, nsamples=len(tokens)).resolved(pair.num_parameters, pair.original.max_seq_len)
            check_length(there)
            job = TuneJob.create(there, marks, {"tokens": tokens.numel()}, folder)
            job.save_tensors(TEXT, {TEXT: tokens})
            made = str(job.folder)
        return TuneJob.at(Path(self.team.share(made)))

    # -- the work -------------------------------------------------------------------------------------------------------

    def execute(self) -> TuneResult | None:
        self.progress.run_folder(self.job.shown)
        models = {"original": self.original, BEFORE: self.given}
        self.progress.start(self._units() + (len(models) + 1) * self._evaluation_units(), 0)
        self._announce()
        measured = self._measure(models)
        found = self.indices.run() if self.indices else None
        start = self._start(found.folder if found else self.given)
        pair = Pair.open(self.original, start, self.device, self.config.bf16, self.config.trust_remote_code)
        tuning = None if self.config.only_indices else self._tuning(pair)
        if isinstance(tuning, AdapterTuning):
            histories = tuning.run()
            self._write_model(pair, start, tuning.merged)
            measured["after"] = self._measure_adapters(tuning)
            return self._conclude(start, measured, histories, tuning.held_out)
        packed = self.job.folder / "packed_model"
        histories, held_out = self._train(tuning, pair, packed, found)
        self.team.leave()
        if self.team.rank > 0:
            return None
        self._write_model(pair, packed)
        measured |= self._measure({"after": packed})
        return self._conclude(packed, measured, histories, held_out)

    def _units(self) -> float:
        """Of all that trains."""
        before = sum(part.units() for part in (self.teacher, self.indices) if part)
        return before + (0.0 if self.config.only_indices else self._tuning(self.pair).units())

    def _train(
        self, tuning: BlockTuning | WholeTuning | None, pair: Pair, packed: Path, found: NewIndices | None
    ) -> tuple[dict[str, list[dict[str, Any]]], tuple[float, float]]:
        """Train and write the checkpoint, unless a stopped run has; the histories, and the held-out loss before and after.

        tuning: None where nothing trains but indices. found: these, if they are new.
        """
        kept = self.job.load_tensors(TRAINED) if is_whole(packed) else None
        if kept is not None:
            self._told("training", sum(part.units() for part in (self.teacher, tuning) if part))
            return kept[1]["histories"], tuple(kept[1]["held_out"])
        changed, histories = tuning.run() if tuning else ({}, {})
        if self.teacher:
            self.teacher.forget()
        before, after = tuning.held_out if tuning else (math.nan, math.nan)
        if found is not None:
            histories = {"indices": found.history} | histories
            before, after = found.held_out[0], after if tuning else found.held_out[1]
        if self.team.rank == 0:
            self.job.save_tensors(TRAINED, {}, {"histories": histories, "held_out": (before, after)})
            self.progress.phase("writing packed_model")
            write_changed(packed, pair.packed_source, _parameters(pair.packed), pair.layers, changed)
        return histories, (before, after)

    def _tuning(self, pair: Pair) -> BlockTuning | WholeTuning | AdapterTuning:
        if self.config.mode == "block":
            return BlockTuning(pair, self.config, self.tokens, self.job, self._told, self._note)
        if self.config.mode == "lora":
            return AdapterTuning(pair, self.config, self.tokens, self.job, self._told, self._note)
        return WholeTuning(pair, self.config, self.tokens, self.job, self._told, self._note, self.team, self.teacher)

    def _announce(self) -> None:
        held_out = self.config.num_held_out or 0
        trained = (len(self.tokens) - held_out) * self.tokens.shape[1]
        self._note(
            f"text: {', '.join(datasets_of(self.config))}; {trained:,} tokens to train on, {held_out} sequences held out"
        )
        if self.indices:
            self._note(self.indices.description)
        if not self.config.only_indices:
            rate = f"learning rate {self.config.learning_rate:g}"
            self._note(f"{self.config.steps} steps of {self.config.batch_size} sequences, {rate}")

    def _start(self, given: Path) -> Path:
        """The checkpoint that training starts from: `given`, or with tensors more."""
        if not self.config.add:
            return given
        folder = self.job.work / "start"
        if self.team.rank == 0 and not is_whole(folder):
            skeleton, source, layers = open_packed(given, forced_dtype(self.device), self.config.trust_remote_code)
            more, tensors = with_additions(source, layers, skeleton.dtype, self.config.add, skeleton.blocks_name)
            write_changed(folder, source, _parameters(skeleton), more, tensors)
        self.team.wait()
        return folder

    def _write_model(self, pair: Pair, packed: Path, merged: Callable[[Weights], Weights] = lambda weights: weights) -> None:
        """The dequantized checkpoint, if it is asked for. merged: puts adapters into its weights."""
        folder = self.job.folder / "model"
        if self.config.save_model and not is_whole(folder):
            self.progress.phase("writing model")
            source = FolderSource(packed, pair.packed_source.base_prefix)
            weights = _dequantized(source, pair.layers, pair.packed.dtype, self.device)
            write_unpacked(folder, source, pair.packed.form, pair.layers, merged(weights))

    def _evaluation_units(self) -> float:
        return float(sum(cut.numel() for cut in self.windows.values()) * len(self.pair.original.blocks))

    def _measure(self, models: Mapping[str, Path]) -> dict[str, dict[str, Perplexity]]:
        """Perplexities by dataset of each model, by its name; those that a stopped run has measured are taken over."""
        known = self.job.load_tensors("perplexities")
        found = {key: dict(values) for key, values in (known[1] if known else {}).items()}
        for which, folder in models.items():
            if which in found or self.team.rank > 0:
                continue
            skeleton = load_skeleton(folder, self.config.trust_remote_code, forced_dtype(self.device))
            runner = make_runner(skeleton, self.device)
            found[which] = {}
            for name, windows in self.windows.items():
                self.progress.phase(f"perplexity, {which}")
                units = windows.numel() * len(skeleton.blocks) / progress_steps(runner, windows)

                def advance(units: float = units) -> None:
                    self.progress.advance(units)

                figures = streamed_perplexity(runner, windows, stride=None, dataset=name, progress=advance)
                found[which][name] = figures.to_dict()
            runner.unload()
            self.job.save_tensors("perplexities", {}, found)
        return {which: {name: Perplexity.from_dict(figures) for name, figures in of.items()} for which, of in found.items()}

    def _measure_adapters(self, tuning: AdapterTuning) -> dict[str, Perplexity]:
        found = {}
        for name, windows in self.windows.items():
            self.progress.phase("perplexity, after")
            units = windows.shape[1] * len(tuning.pair.original.blocks)

            def advance(units: float = units) -> None:
                self.progress.advance(units)

            found[name] = tuning.perplexity(windows, name, advance)
        return found

    def _conclude(
        self,
        packed: Path,
        measured: Mapping[str, Mapping[str, Perplexity]],
        histories: Mapping[str, Any],
        held_out: tuple[float, float],
    ) -> TuneResult:
        perplexities = {name: {which: of[name] for which, of in measured.items()} for name in self.windows}
        bits = checkpoint_bits(packed)
        if not save_curves(self.job.folder, histories, CURVES[self.config.mode]):
            self._note("no picture of the curves: pip install matplotlib")
        figures = {name: {which: p.to_dict() for which, p in of.items()} for name, of in perplexities.items()}
        results: dict[str, Any] = {f"ctx_{self.config.seq_len}": figures} if figures else {}
        loss = LOSSES[self.config.mode]
        results["held_out"] = {"loss": loss, "before": held_out[0], "after": held_out[1]}
        results["tokens"] = self.tokens.numel()
        results["training_seconds"] = sum(entries[-1].get("seconds", 0.0) for entries in histories.values())
        results["bits"] = {k: v for k, v in bits.to_dict().items() if k.endswith("per_weight")}
        save_json(self.job.folder / "ppl_results.json", results)
        seconds = time.perf_counter() - self.started
        command = command_of("finetune", self.config.to_flat(), FinetuneConfig().to_flat())
        facts = run_facts(command, seconds, self.device, ())
        describe_run(self.job.folder, facts, self.original, self.config.original, self._note)
        self.job.save(finished=True)
        self.job.drop_work()
        self.progress.finish()
        return TuneResult(self.job.folder, bits, held_out, loss, perplexities, seconds)

    def _told(self, phase: str, units: float) -> None:
        self.progress.phase(phase)
        self.progress.advance(units)

    def _note(self, text: str) -> None:
        if self.team.rank == 0:
            self.progress.note(text)
            self.job.log(text)


def _eval_datasets(config: FinetuneConfig) -> list[str]:
    """What perplexity is measured on; the demo model's held-out text where nothing is asked for."""
    names = ["wikitext2"] if config.eval or config.new_eval else []
    names += ["c4"] if config.eval else []
    names += ["c4-new"] if config.new_eval else []
    names += config.eval_dataset or ()
    return names or ([str(DEMO / "evaluation.txt")] if config.original is None else [])


def _parameters(skeleton: Any) -> list[str]:
    return [name for name, _ in skeleton.model.named_parameters()]


def _dequantized(source: FolderSource, layers: Mapping[str, LayerConfig], dtype: torch.dtype, device: torch.device) -> Weights:
    """The weights of the quantized linears that store one."""
    for name, layer in layers.items():
        if not layer.weight_of:
            tensors = {key: tensor.to(device) for key, tensor in packed_tensors(source, name, layer).items()}
            yield name, dequantize_packed(tensors, layer, dtype).cpu()


@contextlib.contextmanager
def _told_of_memory(known: list[FinetuneConfig]) -> Iterator[None]:
    """Say what to lower where memory runs out. known: the settings, the last the most resolved."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        config = known[-1]
        ways = [f"--micro_batch_size (now {config.micro_batch_size})"] if config.at_once > 1 else []
        if config.mode == "e2e" and config.teacher == "live":
            ways.append("--teacher cached")
        if config.mode != "block" and not config.gradient_checkpointing:
            ways.append("--gradient_checkpointing True")
        if config.new_indices:
            ways.append("in a new run --train without indices, which takes all weights as floats")
        if config.mode != "lora" and config.unpack is not False:
            ways.append("--unpack False")
        ways.append("a smaller --seq_len in a new run")
        raise RunError(
            "memory ran out", where=[str(error).split("\n")[0][:200]], hint=f"to use less: {', '.join(ways)}"
        ) from error
