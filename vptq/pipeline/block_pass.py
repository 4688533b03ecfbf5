"""What every pass over the blocks of a packed model does: load a block as it is by now, train it, keep what it learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vptq.errors import UsageError
from vptq.finetune.blockwise import BlockBatches, BlockLoss
from vptq.finetune.fit import Fit, Schedule
from vptq.finetune.trainable import Trainable, load_values, trainables
from vptq.finetune.unpacked import Unpacked, fits
from vptq.finetune_config import FinetuneConfig
from vptq.models.runner import BlockRunner
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair

Told = Callable[[str, float], None]  # what is under way, and units that are new: tokens that went forward through a block
History = list[dict[str, Any]]
SLOWER = (1.0, 0.25, 0.0625)  # learning rates that a block is tried with, one after the other, until it gains


@dataclass(frozen=True)
class PassSettings:
    """What all passes share.

    Attributes:
        pair: original and packed model. config: resolved. batches: of tokens, (sequences, seq_len) int64, the held-out ones
            last. num_held_out: of the batches. told: hears what is under way, and how much is done. note: of what people
            should know.
    """

    pair: Pair
    config: FinetuneConfig
    batches: list[Tensor]
    num_held_out: int
    job: TuneJob
    told: Told
    note: Callable[[str], None]

    @property
    def num_blocks(self) -> int:
        return len(self.pair.original.blocks)

    @property
    def num_tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    @property
    def held_out(self) -> Tensor:
        """(num_sequences, seq_len) int64."""
        return torch.cat(self.batches[len(self.batches) - self.num_held_out :])


class BlockPass:
    """One pass: every block once.

    Args:
        name: of the pass; its blocks are kept in the run folder under it. start: values that earlier passes found, by full
            name. damping: by how much more an output's change is taken to cost than it does alone (`LocalModel`).
    """

    once = 0.0  # passes of all tokens through each block that go with it, beside the training
    share = 1.0  # of the steps that are asked for
    parts: tuple[float, ...] = (0.0, 0.5, 1.0)  # of the way to what was learned, of which the best is kept

    def __init__(self, settings: PassSettings, name: str, start: Mapping[str, Tensor], damping: float) -> None:
        self.settings, self.name, self.start, self.damping = settings, name, start, damping
        self.schedule = self.schedule_of(settings)

    def run(self) -> tuple[dict[str, Tensor], dict[str, History]]:
        """Train every block; what has changed, by full name as it is stored, and the history of each block by its number."""
        raise NotImplementedError

    @classmethod
    def schedule_of(cls, settings: PassSettings) -> Schedule:
        """How long and how fast a block trains in such a pass."""
        whole = schedule_of(settings.config)
        counts = {name: getattr(whole, name) for name in ("steps", "warmup_steps", "eval_every")}
        return replace(whole, **{name: max(min(count, 1), round(cls.share * count)) for name, count in counts.items()})

    @classmethod
    def units(cls, settings: PassSettings) -> float:
        """What `told` is told in all."""
        training = training_units(settings, cls.schedule_of(settings))
        return settings.num_blocks * (cls.once * settings.num_tokens + training)

    def load(self, block: int) -> tuple[nn.Module, list[Trainable], Unpacked | None]:
        """A block as it is by now, and what learns in it."""
        pair, config = self.settings.pair, self.settings.config
        module, name = pair.load_packed_block(block), pair.packed.block_name(block)
        assert config.train is not None
        items = trainables(module, config.train, pair.packed.dtype, prefix=name, lent=pair.lent)
        load_values([item for item in items if item.name in self.start], self.start)
        return module, items, unpacked_in(module, pair, config)

    def batches(self, block: int, runner: BlockRunner, inputs: list[Tensor], unpacked: Unpacked | None) -> BlockBatches:
        """A block's inputs, as its loss takes them."""
        config = self.settings.config
        return BlockBatches(
            runner,
            block,
            inputs,
            self.settings.batches,
            batch=config.batch_size or 1,
            num_held_out=self.settings.num_held_out,
            seed=config.seed,
            compute=self.settings.pair.compute,
            unpacked=unpacked,
        )

    def train(
        self, block: int, items: list[Trainable], make_loss: Callable[[], BlockLoss]
    ) -> tuple[dict[str, Tensor], History]:
        """Train one block, or take it as it was trained before; its tensors have the values that were found."""
        told, job = self.settings.told, self.settings.job
        each = training_units(self.settings, self.schedule) / self.schedule.steps
        kept = job.load_tensors(self._file(block))
        if kept is not None:
            load_values(items, kept[0])
            told(self._phase(block), each * self.schedule.steps)
            return kept
        fit = self._fit(block, items, make_loss(), each)
        line = f"{self._phase(block)}: {fit.first:.4g} -> {fit.best:.4g} at step {fit.best_step} of {fit.step}"
        job.log(line + (f"; {fit.stopped}" if fit.stopped else ""))
        if "diverged" in fit.stopped:
            less = "its best values are kept. A lower --learning_rate may help"
            self.settings.note(f"warning: block {block} {fit.stopped}; {less}")
        values = {name: tensor.cpu() for name, tensor in fit.best_values.items()}
        job.save_tensors(self._file(block), values, fit.history)
        return values, fit.history

    def _fit(self, block: int, items: list[Trainable], loss: BlockLoss, each: float) -> Fit:
        """One training; with smaller steps once more where it gained nothing. each: what `told` is told of a step."""
        told, phase, fits = self.settings.told, self._phase(block), list[Fit]()
        for slower in SLOWER:
            schedule = replace(self.schedule, learning_rate=slower * self.schedule.learning_rate)
            fits.append(Fit(items, schedule, loss.train, loss.held_out))
            fits[-1].run((lambda _: told(phase, 0.0)) if fits[1:] else (lambda _: told(phase, each)))
            if fits[-1].best_step:
                break
            self.settings.job.log(f"{phase}: nothing gained at learning rate {schedule.learning_rate:.3g}")
        told(phase, (self.schedule.steps - fits[0].step) * each)
        return fits[-1]

    def advance(self, block: int, tokens: Tensor) -> None:
        """Tell that a batch went through a block."""
        self.settings.told(self._phase(block), tokens.numel())

    def _phase(self, block: int) -> str:
        return f"{self.name}, block {block}"

    def _file(self, block: int) -> str:
        return f"{self.name.replace(' ', '-')}-{block:05d}"


def training_units(settings: PassSettings, schedule: Schedule) -> float:
    """What `told` is told of one block's training."""
    config, tokens = settings.config, settings.batches[0].shape[1]
    train = sum(map(len, settings.batches)) - len(settings.held_out)
    steps = 3.0 * schedule.steps * min(config.batch_size or 1, train) * tokens
    return steps + (1 + schedule.steps // schedule.eval_every) * (config.num_held_out or 1) * tokens


def unpacked_in(model: nn.Module, pair: Pair, config: FinetuneConfig) -> Unpacked | None:
    """The packed linears of the model, or a part of it, to stand unpacked in memory, if that is asked for or there is room."""
    unpack = fits(model, pair.compute, pair.device) if config.unpack is None else config.unpack
    return Unpacked(model, pair.compute) if unpack else None


def schedule_of(config: FinetuneConfig) -> Schedule:
    """How long and how fast resolved settings train."""
    if config.steps is None or config.learning_rate is None or config.eval_every is None:
        raise UsageError("settings are not resolved")
    return Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        eval_every=config.eval_every,
        patience=config.patience,
    )
