"""`finetune --mode block`: one block after the other, each against what the original's makes of the original's inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vptq.errors import UsageError
from vptq.finetune.blockwise import BlockMatching
from vptq.finetune.fit import Fit, Schedule
from vptq.finetune.trainable import Trainable, load_values, trainables
from vptq.finetune.unpacked import Unpacked, fits
from vptq.finetune_config import FinetuneConfig
from vptq.models.runner import BlockRunner, HiddenStates
from vptq.pipeline.tune_check import PARTS, best_part
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair

Told = Callable[[str, float], None]  # what is under way, and units that are new: tokens that went forward through a block


class BlockTuning:
    """All blocks of a model.

    Args:
        pair: original and packed model. config: resolved. tokens: (num_sequences, seq_len) int64, the held-out ones last.
        told: hears what is under way, and how much is done. note: of what people should know.
    """

    def __init__(
        self, pair: Pair, config: FinetuneConfig, tokens: Tensor, job: TuneJob, told: Told, note: Callable[[str], None]
    ) -> None:
        self.pair, self.config, self.job, self.told, self.note = pair, config, job, told, note
        size, held_out = config.micro_batch_size, config.num_held_out or 0
        train, rest = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
        self.batches = [*train.split(size), *rest.split(size)]
        self.num_held_out = len(rest.split(size))
        self.schedule = schedule_of(config)
        self.held_out = (math.nan, math.nan)  # KL of the whole model, before and after

    def units(self) -> float:
        """What `told` is told in all."""
        tokens = sum(batch.numel() for batch in self.batches)
        return len(self.pair.original.blocks) * (2.0 * tokens + self._training_units()) + len(PARTS) * self._check_units()

    def _training_units(self) -> float:
        tokens = self.batches[0].shape[1]
        steps = 3.0 * self.schedule.steps * min(self.config.batch_size or 1, len(self.batches)) * tokens
        looks = (1 + self.schedule.steps // self.schedule.eval_every) * (self.config.num_held_out or 1) * tokens
        return steps + looks

    def run(self) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
        """Train every block; what has changed, by full name as it is stored, and the history of each block."""
        theirs, ours = self.pair.original_runner(like_packed=True), self.pair.packed_runner()
        wanted, found = theirs.embed(self.batches), ours.embed(self.batches)
        changed: dict[str, Tensor] = {}
        histories = {}
        for block in range(len(self.pair.original.blocks)):
            self.told(f"block {block}", 0)
            theirs.load_block(block)
            for _ in theirs.batches_of_block_(block, wanted):
                self.told(f"block {block}", self.batches[0].numel())
            theirs.unload_block(block)
            values, history = self._block(block, ours, found, wanted.batches)
            changed |= values
            if history:
                histories[str(block)] = history
        theirs.unload()
        ours.unload()
        return self._checked(changed), histories

    def _checked(self, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values, or those on the way to them that make the better model as a whole."""
        rest = torch.cat(self.batches[len(self.batches) - self.num_held_out :])
        values, found = best_part(self.pair, changed, rest, lambda: self.told("the model as a whole", self._check_units()))
        part = min(found, key=lambda key: found[key])
        self.held_out = found[0.0], found[part]
        self.note(f"KL from the original on the held-out text: {found[0.0]:.4f} before, {found[part]:.4f} after")
        if part < 1:
            less = "half of what was learned is kept" if part else "all is left as it was; --mode e2e may gain what this can't"
            self.note(f"warning: with all that blocks learned the model is worse (KL {found[1.0]:.4f}): {less}")
        return values

    def _check_units(self) -> float:
        return float(len(self.pair.original.blocks) * (self.config.num_held_out or 1) * self.batches[0].shape[1])

    def _block(
        self, block: int, runner: BlockRunner, inputs: HiddenStates, targets: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Train one block, or take it as it was trained before, and carry the inputs past it, in place."""
        module = self.pair.load_packed_block(block)
        items = self._items(block, module)
        unpacked = unpacked_in(module, self.pair, self.config)
        name = f"block-{block:05d}"
        kept = self.job.load_tensors(name)
        if not items:  # what is left of a block may be of other kinds
            values, history = {}, []
        elif kept is None:
            fit = self._fit(block, runner, inputs, targets, items, unpacked)
            values, history = fit.best_values, fit.history
            self.job.save_tensors(name, values, history)
        else:
            values, history = kept
            load_values(items, values)
            self.told(f"block {block}", self._training_units())
        with unpacked.looking() if unpacked else contextlib.nullcontext():
            self._carry(block, runner, inputs)
        runner.unload_block(block)
        return {key: tensor.cpu() for key, tensor in values.items()}, history

    def _items(self, block: int, module: nn.Module) -> list[Trainable]:
        assert self.config.train is not None
        name = self.pair.packed.block_name(block)
        return trainables(module, self.config.train, self.pair.packed.dtype, prefix=name, lent=self.pair.lent)

    def _fit(
        self,
        block: int,
        runner: BlockRunner,
        inputs: HiddenStates,
        targets: list[Tensor],
        items: list[Trainable],
        unpacked: Unpacked | None,
    ) -> Fit:
        batch = self.config.batch_size or 1
        matching = BlockMatching(
            runner,
            block,
            inputs,
            targets,
            batches_a_step=max(1, batch // self.config.micro_batch_size),
            num_held_out=self.num_held_out,
            seed=self.config.seed,
            compute=self.pair.compute,
            unpacked=unpacked,
        )
        fit = Fit(items, self.schedule, matching.train, matching.held_out)
        each = self._training_units() / self.schedule.steps
        fit.run(lambda _: self.told(f"block {block}", each))
        self.told(f"block {block}", (self.schedule.steps - fit.step) * each)
        line = f"block {block}: {fit.first:.4g} -> {fit.best:.4g} at step {fit.best_step} of {fit.step}"
        self.job.log(line + (f"; {fit.stopped}" if fit.stopped else ""))
        if "diverged" in fit.stopped:
            self.note(f"warning: block {block} {fit.stopped}; its best values are kept. A lower --learning_rate may help")
        return fit

    @torch.no_grad()
    def _carry(self, block: int, runner: BlockRunner, inputs: HiddenStates) -> None:
        device, compute = self.pair.device, self.pair.compute
        for number, (tokens, hidden) in enumerate(zip(inputs.tokens, inputs.batches, strict=True)):
            with torch.autocast(device.type, compute, enabled=compute != torch.float32):
                output = runner.forward_block(block, hidden.to(device), tokens)
            inputs.batches[number] = output.to(hidden.device, hidden.dtype)
            self.told(f"block {block}", tokens.numel())


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
        warmup_steps=round(config.warmup_frac * config.steps),
        weight_decay=config.weight_decay,
        eval_every=config.eval_every,
        patience=config.patience,
    )
