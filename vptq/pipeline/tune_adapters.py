"""`finetune --mode lora`: adapters by peft on the packed linears, trained by transformers' Trainer."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vptq.checkpoint.reader import load_quantized
from vptq.errors import UsageError
from vptq.evaluation.perplexity import Perplexity, whole_perplexity
from vptq.finetune.fit import DIVERGED
from vptq.finetune.peft_bridge import packed_linears
from vptq.finetune.unpacked import FREE_FRACTION
from vptq.finetune_config import FinetuneConfig
from vptq.models.device import free_memory
from vptq.models.files import save_tensors
from vptq.models.remote import publish_folder
from vptq.nn.vquant_linear import cache_weights
from vptq.pipeline.block_pass import Told
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair

ADAPTER = "adapter"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"  # a folder that has it is whole
BACKWARD = 3.0  # times a forward pass, that included


def check_adapters(config: FinetuneConfig, pair: Pair) -> None:
    """Raise UsageError without peft, or for adapters on what is not packed."""
    try:
        import peft  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise UsageError("mode lora needs the package `peft`", hint="pip install 'vptq[lora]'") from error
    if pair.device.type == "cuda" and (pair.device.index or 0) > 0:
        raise UsageError(
            f"mode lora works on the first GPU that it sees, not on {pair.device}",
            hint=f"CUDA_VISIBLE_DEVICES={pair.device.index} vptq finetune ...",
        )
    ends = {name for name, layer in pair.layers.items() if layer.weight_of or not name.startswith(pair.packed.blocks_name)}
    known = sorted({name.rpartition(".")[2] for name in pair.layers.keys() - ends})
    missing = [
        target
        for target in config.target_modules or ()
        if not any(name == target or name.endswith(f".{target}") for name in pair.layers.keys() - ends)
    ]
    if missing:
        raise UsageError("no packed linear has this name", where=missing, hint=f"--target_modules {' '.join(known)}")


class AdapterTuning:
    """Adapters on a packed model.

    Args: as for `tune_blocks.BlockTuning`.
    """

    def __init__(
        self, pair: Pair, config: FinetuneConfig, tokens: Tensor, job: TuneJob, told: Told, note: Callable[[str], None]
    ) -> None:
        self.pair, self.config, self.tokens, self.job, self.told, self.note = pair, config, tokens, job, told, note
        self.stopped = ""
        self.held_out = (math.nan, math.nan)  # the loss, before and after
        self.model: Any = None

    def units(self) -> float:
        """What `told` is told in all: tokens that went forward through a block."""
        assert self.config.steps is not None
        return self.config.steps * self._step_units()

    def _step_units(self) -> float:
        times = BACKWARD + self.config.gradient_checkpointing
        tokens = (self.config.batch_size or 1) * self.tokens.shape[1]
        return times * tokens * len(self.pair.original.blocks)

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Train, leave the best adapters in `model`; the history."""
        folder = self.job.folder / ADAPTER
        kept = self.job.load_tensors(ADAPTER) if (folder / CONFIG).exists() else None
        if kept is not None:  # trained before the run was stopped
            self.model = self._with_adapters(folder)
            self.held_out = tuple(kept[1]["held_out"])
            return kept[1]["histories"]
        histories = {"adapters": self._train()}
        self._save(folder)
        self.job.save_tensors(ADAPTER, {}, {"histories": histories, "held_out": self.held_out})
        return histories

    def _train(self) -> list[dict[str, Any]]:
        trainer = self._trainer()
        trainer.evaluate()
        first = trainer.state.log_history[-1]["eval_loss"]
        last = _last_checkpoint(Path(trainer.args.output_dir))
        ended = None if last is None else _ended(last, self.config.steps or 1)
        if ended is None:
            trainer.train(resume_from_checkpoint=last)
            log = trainer.state.log_history
        else:  # stopped between its last step and its end: one more step would be one too many
            log = ended["log_history"]
            self._load_adapters(Path(ended["best_model_checkpoint"] or last or ""))
        self.model.eval()
        history = [{"step": 0, "held_out": first}, *_history(log)]
        best = min(entry["held_out"] for entry in history if "held_out" in entry)
        self.held_out = first, best
        self.note(f"held-out loss {first:.4f} -> {best:.4f}" + (f"; stopped: {self.stopped}" if self.stopped else ""))
        if best >= first:
            self._forget_all()
            self.note("warning: adapters only made it worse, and are left at nought. Lower --learning_rate, or give more text")
        return history

    def _save(self, folder: Path) -> None:
        """Write the adapters in the model's own float type, half of what they train in, and go on with what was written."""
        stored = self.pair.packed.dtype
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(parameter.to(stored))
        self.model.save_pretrained(folder)
        path = folder / WEIGHTS
        save_tensors(path, {name: tensor.to(stored) for name, tensor in load_file(path).items()})
        publish_folder(folder, last=CONFIG)

    def _load_adapters(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict  # noqa: PLC0415 (an extra)

        set_peft_model_state_dict(self.model, load_file(folder / WEIGHTS))

    @torch.no_grad()
    def _forget_all(self) -> None:
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    def perplexity(self, windows: Tensor, dataset: str, progress: Callable[[], None]) -> Perplexity:
        """Of the model with its adapters, on windows (num_windows, seq_len) int64."""
        return whole_perplexity(self.model, windows, stride=None, dataset=dataset, progress=progress)

    def merged(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Dequantized weights, (out_features, in_features) each, with what the adapters add to them."""
        modules = {name.removeprefix("base_model.model."): module for name, module in self.model.named_modules()}
        for name, weight in weights:
            module = modules[name]
            if hasattr(module, "get_delta_weight"):
                for adapter in module.active_adapters:
                    delta = module.get_delta_weight(adapter).detach().to("cpu", torch.float32)
                    weight = (weight.float() + delta).to(weight.dtype)
            yield name, weight

    # -- with peft and transformers -------------------------------------------------------------------------------------

    def _trainer(self) -> Any:
        from transformers import EarlyStoppingCallback, Trainer  # noqa: PLC0415 (slow import)

        logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
        self.model = self._with_adapters()
        held_out = self.config.num_held_out or 1
        trainer = Trainer(
            model=self.model,
            args=self._arguments(),
            train_dataset=_Sequences(self.tokens[: len(self.tokens) - held_out]),
            eval_dataset=_Sequences(self.tokens[len(self.tokens) - held_out :]),
            callbacks=[EarlyStoppingCallback(self.config.patience), self._listener()],
        )
        printing = [
            c for c in trainer.callback_handler.callbacks if type(c).__name__ in ("PrinterCallback", "ProgressCallback")
        ]
        for callback in printing:
            trainer.remove_callback(callback)
        return trainer

    def _with_adapters(self, saved: Path | None = None) -> Any:
        """The packed model with new adapters, or with those of a folder."""
        from peft import LoraConfig, PeftModel, TaskType, get_peft_model  # noqa: PLC0415 (an extra)

        config = self.config
        dtype = torch.float32 if self.pair.device.type == "cpu" else None
        trust = self.pair.trust_remote_code
        model = load_quantized(self.pair.packed.folder, self.pair.device, dtype=dtype, trust_remote_code=trust)
        room = FREE_FRACTION * free_memory(self.pair.device)
        cache_weights(model, limit=room)  # they don't learn, and unpacking them twice a step takes longer than all else
        model.config.use_cache = False
        model.name_or_path = str(self.pair.packed.folder)  # where the adapters will look for it
        targets = list(config.target_modules) if config.target_modules else sorted(packed_linears(model))
        torch.manual_seed(config.seed)
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # any number does
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            task_type=TaskType.CAUSAL_LM,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, of what peft calls
            return get_peft_model(model, settings) if saved is None else PeftModel.from_pretrained(model, str(saved)).eval()

    def _arguments(self) -> Any:
        from transformers import TrainingArguments  # noqa: PLC0415 (slow import)

        config, steps = self.config, self.config.steps or 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            arguments = TrainingArguments(
                output_dir=str(self.job.work / "trainer"),
                max_steps=steps,
                per_device_train_batch_size=config.at_once,
                per_device_eval_batch_size=config.at_once,
                gradient_accumulation_steps=max(1, (config.batch_size or 1) // config.at_once),
                learning_rate=config.learning_rate or 0.0,
                warmup_steps=config.warmup_steps,
                lr_scheduler_type="cosine",
                weight_decay=config.weight_decay,
                eval_strategy="steps",
                eval_steps=config.eval_every or steps,
                save_strategy="steps",
                save_steps=config.eval_every or steps,
                save_total_limit=2,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=False,
                logging_steps=1,
                logging_nan_inf_filter=False,
                seed=config.seed,
                bf16=self.pair.compute == torch.bfloat16,
                use_cpu=self.pair.device.type == "cpu",
                gradient_checkpointing=config.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                restore_callback_states_from_checkpoint=True,  # how long there has been no gain
                report_to=[],
                disable_tqdm=True,
            )
        arguments._n_gpu = min(1, arguments.n_gpu)  # else it copies the model to every GPU that it sees
        return arguments

    def _listener(self) -> Any:
        from transformers import TrainerCallback  # noqa: PLC0415 (slow import)

        tuning, first = self, []

        class Listener(TrainerCallback):
            """Tells of progress, and ends a training that diverges."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
                tuning.told("training", tuning._step_units())

            def on_save(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
                tuning.job.check_lock()
                publish_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}", last="trainer_state.json")

            def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                logs: Mapping[str, float] = others["logs"]
                loss = logs.get("loss", logs.get("eval_loss"))
                if loss is None:
                    return
                if "eval_loss" in logs:
                    first.append(loss)
                worse = state.global_step > 0 and bool(first) and loss > DIVERGED * first[0]
                if worse or not math.isfinite(loss):
                    tuning.stopped = f"diverged at step {state.global_step}: the loss is {loss:.4g}"
                    control.should_training_stop = True

        return Listener()


class _Sequences(torch.utils.data.Dataset):
    """Token sequences as Trainer takes them. tokens: (num_sequences, seq_len) int64."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[number], "labels": self.tokens[number]}


def _last_checkpoint(folder: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint  # noqa: PLC0415 (slow import)

    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _ended(checkpoint: str, steps: int) -> dict[str, Any] | None:
    """The Trainer's state of a checkpoint that was the last; None for one to go on from."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state if state["global_step"] >= steps else None


def _history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """Trainer's log as ours: one entry a step."""
    found: dict[int, dict[str, float]] = {}
    for entry in log:
        own = found.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        for theirs, name in (("loss", "loss"), ("learning_rate", "learning_rate"), ("eval_loss", "held_out")):
            if theirs in entry:
                own[name] = entry[theirs]
    return [found[step] for step in sorted(found) if step > 0]
