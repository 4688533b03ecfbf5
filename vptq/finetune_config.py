"""What the user wishes of `vptq finetune`: one frozen dataclass, every range check. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from vptq.checks import Checker
from vptq.errors import UsageError
from vptq.fields import option
from vptq.recipe import DEFAULT_SEQ_LEN, OFF, AddedKind, BlockPassKind, FinetuneMode, TeacherKind, TrainableKind

SELF = "self"  # a dataset: text that the original writes
STEPS = {"block": 100, "e2e": 300, "lora": 300}
SAMPLES = {"block": 128, "e2e": 512, "lora": 512}
BATCH = {"block": 16, "e2e": 16, "lora": 16}
TRAINED: dict[str, tuple[TrainableKind, ...]] = {
    "block": ("codebooks", "scales", "offsets", "norms"),
    "e2e": ("codebooks", "scales", "offsets", "norms"),
}
RATES = ((1e9, 2e-3), (7e9, 5e-4), (2e10, 1e-4), (float("inf"), 5e-5))  # up to so many parameters, the rate
E2E_RATE = 2.0  # times that: each step knows the whole loss
LORA_RATE = 2e-4
AT_ONCE = 8192  # tokens that go through a block together
LEARNS_AS: dict[str, tuple[TrainableKind, ...]] = {
    "row_scales": ("scales",),
    "column_scales": ("scales", "offsets"),
    "biases": ("offsets",),
    "codebooks": ("codebooks",),
}
ROUND_STEPS, ROUND_RATE = 30, 5e-4
ONLY_IN: dict[str, tuple[str, ...]] = {  # modes that a setting is for, where it is not for all
    "passes": ("block",),
    "add": ("block", "e2e"),
    "head_rate": ("e2e",),
    "kl_weight": ("e2e",),
    "ce_weight": ("e2e",),
    "teacher": ("e2e",),
    "gradient_checkpointing": ("e2e", "lora"),
    "unpack": ("block", "e2e"),
    "lora_rank": ("lora",),
    "lora_alpha": ("lora",),
    "lora_dropout": ("lora",),
    "target_modules": ("lora",),
}


@dataclass(frozen=True)
class FinetuneConfig:
    """A whole `vptq finetune` run. None stands for what `resolved` chooses."""

    mode: FinetuneMode = option("block", "model", "block: one block after the other; e2e: the whole model; lora: adapters")
    model_name: str | None = option(None, "model", "packed checkpoint: folder or hub name")
    original: str | None = option(None, "model", "what it was quantized from (default: the demo model)")
    output_dir: str = option("outputs", "model", "where run folders go")
    trust_remote_code: bool = option(False, "model", "let the model folders' own Python code run")
    train: tuple[TrainableKind, ...] | None = option(
        None,
        "tuning",
        "what learns: codebooks, scales, offsets, norms, head, indices (default: all but the last two; codebooks that linears "
        "share, head and indices only e2e)",
        "KIND",
    )
    passes: tuple[BlockPassKind, ...] = option(
        ("outputs", "predictions", "predictions"),
        "tuning",
        "mode block: what blocks learn in each pass over them: the original block's outputs, or what the model's predictions "
        "lack",
        "PASS",
    )
    add: tuple[AddedKind, ...] | None = option(
        None,
        "tuning",
        "what linears get first that changes nothing, but can learn: row_scales (16 bits a row), column_scales (32 a column), "
        "biases (16 a row), codebooks (of its own for each linear that shares one)",
        "KIND",
    )
    dataset: tuple[str, ...] | None = option(
        None,
        "text",
        "wikitext2, c4, c4-new, text or jsonl files or folders, or self: text that the original writes; several share "
        "the sequences (default: c4; demo model: its own)",
    )
    nsamples: int | None = option(
        None, "text", "sequences, held-out ones among them (default: 128 for block, 512 else, or all that the text has)"
    )
    seq_len: int | None = option(
        None, "text", f"tokens a sequence, training and evaluation (default: {DEFAULT_SEQ_LEN}, or the model's if shorter)"
    )
    num_held_out: int | None = option(
        None, "text", "sequences that are not trained on, which decide when to stop (default: an eighth, at most 32)"
    )
    seed: int = option(0, "text", "seed of all: choice of text, order, sampling, adapters")
    steps: int | None = option(
        None,
        "training",
        "steps, of each block or of the whole (default: 100 for block, a third of that in passes `predictions`; 300 else)",
    )
    learning_rate: float | None = option(
        None,
        "training",
        "highest rate, as a part of the size of a tensor's numbers (default: by the model's size, 2e-3 under 1B to 1e-4 "
        "for 7B to 13B, e2e twice that; lora: 2e-4, absolute)",
    )
    head_rate: float = option(0.1, "training", "with --train head: its learning rate, as a part of that of all else")
    rounds: int | None = option(
        None,
        "training",
        "with --train indices: parts of the model that are quantized anew one after the other (default: as many as blocks)",
    )
    round_steps: int = option(
        ROUND_STEPS, "training", "with --train indices: steps that weights which are still float train after each part"
    )
    round_rate: float = option(ROUND_RATE, "training", "with --train indices: highest learning rate of these steps")
    noise: float = option(
        0.0,
        "training",
        "with --train indices: noise on weights that are float yet, as a part of the given checkpoint's error, so that they "
        "learn to bear it",
    )
    warmup_frac: float = option(0.05, "training", "part of the steps over which the rate rises; then it falls as a cosine")
    weight_decay: float = option(0.0, "training", "of AdamW")
    batch_size: int | None = option(None, "training", "sequences a step (default: 16)")
    micro_batch_size: int | None = option(
        None,
        "training",
        f"sequences at once, a divisor of --batch_size: more are faster, for memory (default: {AT_ONCE} tokens' worth)",
    )
    eval_every: int | None = option(None, "training", "steps between two looks at the held-out text (default: a tenth)")
    patience: int = option(4, "training", "looks without gain after which training stops")
    unpack: bool | None = option(
        None,
        "training",
        "unpack weights once a step, not for every batch: faster, for 6 bytes a weight (default: where there is room)",
    )
    bf16: bool = option(True, "training", "products in bfloat16 on a GPU; all that learns stays float32")
    kl_weight: float = option(1.0, "distillation", "weight of KL(original, packed) in the loss")
    ce_weight: float = option(0.0, "distillation", "weight of the text's own cross-entropy in the loss")
    teacher: TeacherKind = option(
        "cached",
        "distillation",
        "the original's predictions: cached (computed block by block before, kept on disk) or live (whole model in memory)",
    )
    cache_dir: str | None = option(
        None,
        "distillation",
        "folder that keeps what the original computes or writes, for further runs (default: the run folder)",
    )
    gradient_checkpointing: bool = option(True, "distillation", "compute blocks twice to save memory")
    lora_rank: int = option(16, "lora", "rank of the adapters")
    lora_alpha: float = option(32.0, "lora", "what adapters are multiplied by, times their rank")
    lora_dropout: float = option(0.0, "lora", "dropout of what goes into the adapters")
    target_modules: tuple[str, ...] | None = option(
        None, "lora", "names of linears that get adapters, such as q_proj (default: all that are packed, but the head)"
    )
    save_model: bool = option(
        False, "results", "write model/ too: dequantized weights, adapters merged into them, for any loader"
    )
    eval: bool = option(False, "results", "perplexity on wikitext2 and c4, before and after")
    new_eval: bool = option(False, "results", "perplexity on wikitext2 and c4-new, before and after")
    eval_dataset: tuple[str, ...] | None = option(None, "results", "perplexity on these texts, before and after")
    eval_nsamples: int = option(OFF, "results", "most windows of each evaluation text (-1 = all)")
    device: str | None = option(None, "devices", "cuda, cuda:N or cpu (default: cuda where there is one)")

    @property
    def at_once(self) -> int:
        """Sequences that go through a block together."""
        return self.micro_batch_size or 1

    @property
    def new_indices(self) -> bool:
        """Whether the model is quantized anew before all else trains."""
        return "indices" in (self.train or ())

    @property
    def only_indices(self) -> bool:
        """Whether nothing trains after that."""
        return self.new_indices and not self.kept_kinds

    @property
    def kept_kinds(self) -> tuple[TrainableKind, ...]:
        """What trains of the packed model, with indices as they are."""
        return tuple(kind for kind in self.train or () if kind != "indices")

    @property
    def warmup_steps(self) -> int:
        """Steps over which the rate rises: one at least, if any are asked for."""
        return math.ceil(self.warmup_frac * (self.steps or 0))

    def faults(self) -> list[str]:
        """Every fault of these settings that shows without the model."""
        found: list[str] = []
        check = Checker(found)
        check(self.mode in get_args(FinetuneMode), f"mode is {self.mode!r}, must be block, e2e or lora")
        check(self.teacher in get_args(TeacherKind), f"teacher is {self.teacher!r}, must be cached or live")
        for name, known in (("train", TrainableKind), ("passes", BlockPassKind), ("add", AddedKind)):
            chosen: tuple[str, ...] | None = getattr(self, name)
            check(chosen != (), f"{name} names nothing")
            for value in chosen or ():
                check(value in get_args(known), f"{name} names {value!r}, must be of {', '.join(get_args(known))}")
        check(self.mode != "block" or "head" not in (self.train or ()), "train head goes with mode e2e")
        check(self.mode != "lora" or not self.train, "mode lora trains adapters: leave out train")
        self._check_rounds(check)
        chosen_kinds = self.train or TRAINED.get(self.mode, ())
        for given in self.add or ():
            needed = LEARNS_AS.get(given, ())
            check(set(needed) <= set(chosen_kinds), f"add {given} goes with train {' '.join(needed)}, or it learns nothing")
        unsaved = self.save_model and "biases" in (self.add or ())
        check(not unsaved, "a dequantized model has no place for added biases: leave out save_model, or biases")
        for name, modes in ONLY_IN.items():
            told = getattr(self, name) != _default_of(name)
            check(self.mode in modes or not told, f"{name} goes with mode {' or '.join(modes)}")
        keeps = self.mode == "e2e" or SELF in (self.dataset or ())
        check(keeps or self.cache_dir is None, f"cache_dir goes with mode e2e, or dataset {SELF}")
        check(self.cache_dir is None or "://" not in self.cache_dir, f"cache_dir is {self.cache_dir}: a folder here is needed")
        for name in ("nsamples", "num_held_out", "steps", "batch_size", "micro_batch_size", "eval_every"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} is {value}, must be 1 or more")
        for name in ("patience", "lora_rank"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be 1 or more")
        check(self.nsamples is None or self.nsamples >= 2, f"nsamples is {self.nsamples}: one to train on, one held out")
        check(self.seq_len is None or self.seq_len >= 2, f"seq_len is {self.seq_len}, must be 2 or more")
        if self.nsamples is not None and self.num_held_out is not None:
            check(
                self.num_held_out < self.nsamples,
                f"num_held_out is {self.num_held_out}, nsamples {self.nsamples}: nothing is left to train on",
            )
        check(
            self.learning_rate is None or 0 < self.learning_rate <= 1,
            f"learning_rate is {self.learning_rate}, must be over 0 and at most 1",
        )
        check(0 < self.head_rate <= 10, f"head_rate is {self.head_rate:g}, must be over 0 and at most 10")
        check(0 <= self.warmup_frac < 1, f"warmup_frac is {self.warmup_frac:g}, must be 0 or more and under 1")
        for name in ("weight_decay", "kl_weight", "ce_weight", "lora_alpha"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name):g}, must be 0 or more")
        check(self.kl_weight + self.ce_weight > 0, "kl_weight and ce_weight are both 0: nothing is left of the loss")
        check(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout:g}, must be 0 or more and under 1")
        check(
            self.eval_nsamples == OFF or self.eval_nsamples >= 1,
            f"eval_nsamples is {self.eval_nsamples}, must be 1 or more, or -1",
        )
        return found

    def _check_rounds(self, check: Checker) -> None:
        check(self.mode != "block" or not self.new_indices, "train indices goes with mode e2e")
        for name in ("rounds", "round_steps", "round_rate", "noise"):
            value = getattr(self, name)
            check(self.new_indices or value == _default_of(name), f"{name} goes with train indices")
            check(value is None or value > 0 or name == "noise", f"{name} is {value}, must be over 0")
        check(self.noise >= 0, f"noise is {self.noise}, must be 0 or more")
        check(self.round_rate <= 1, f"round_rate is {self.round_rate}, must be at most 1")
        for name in ("steps", "learning_rate", "eval_every", "patience", "warmup_frac"):
            told = getattr(self, name) != _default_of(name)
            check(not self.only_indices or not told, f"{name} is for what trains after indices: train names nothing else")

    def validate(self) -> None:
        """Raise one UsageError with every fault there is."""
        found = self.faults()
        if self.model_name is None:
            found.insert(0, "model_name is missing: the packed checkpoint to fine-tune")
        if found:
            raise UsageError(
                found[0] if len(found) == 1 else f"{len(found)} settings do not fit together",
                where=found if len(found) > 1 else (),
                hint="see `vptq finetune --help` for what each flag means",
            )

    def resolved(self, num_parameters: int, longest: int | None) -> FinetuneConfig:
        """With a value for everything that was left open.

        Args:
            num_parameters: of the original. longest: context that the model takes.
        """
        nsamples = self.nsamples or SAMPLES[self.mode]
        steps = self.steps or STEPS[self.mode]
        batch = self.batch_size or BATCH[self.mode]
        seq_len = self.seq_len or min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
        most = min(self.micro_batch_size or max(1, AT_ONCE // seq_len), batch)
        by_size = next(rate for size, rate in RATES if num_parameters < size) * (E2E_RATE if self.mode == "e2e" else 1)
        return replace(
            self,
            train=TRAINED.get(self.mode) if self.train is None else self.train,
            nsamples=nsamples,
            seq_len=seq_len,
            num_held_out=self.num_held_out or max(1, min(nsamples // 8, 32)),
            steps=None if self.only_indices else steps,
            learning_rate=None if self.only_indices else self.learning_rate or (LORA_RATE if self.mode == "lora" else by_size),
            batch_size=batch,
            micro_batch_size=next(size for size in range(most, 0, -1) if batch % size == 0),
            eval_every=None if self.only_indices else min(self.eval_every or max(1, steps // 10), steps),
        )

    def to_flat(self) -> dict[str, Any]:
        """One name, one value, as in a YAML file."""
        flat = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> FinetuneConfig:
        """The inverse of `to_flat`; names left out take their default. Unknown names are refused."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError("unknown settings", where=unknown, hint=f"known: {', '.join(sorted(known))}")
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**given)


def _default_of(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(FinetuneConfig) if field.name == name)
