"""`finetune --mode e2e`: the whole packed model against the original's predictions, on one GPU or several."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vptq.finetune.distill import Distillation, Weights
from vptq.finetune.fit import Fit, Schedule
from vptq.finetune.trainable import trainables
from vptq.finetune.unpacked import Unpacked
from vptq.finetune_config import FinetuneConfig
from vptq.pipeline.block_pass import Told, schedule_of, unpacked_in
from vptq.pipeline.teacher import Teacher
from vptq.pipeline.team import Team
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair

STATE = "fit"


class WholeModel:
    """What trainings of the whole model share.

    Args: as for `BlockTuning`. team: who shares the work. teacher: the original's predictions; None where only the text counts.
    """

    def __init__(
        self,
        pair: Pair,
        config: FinetuneConfig,
        tokens: Tensor,
        job: TuneJob,
        told: Told,
        note: Callable[[str], None],
        team: Team,
        teacher: Teacher | None,
    ) -> None:
        self.pair, self.config, self.tokens, self.job = pair, config, tokens, job
        self.told, self.note, self.team, self.teacher = told, note, team, teacher

    def distillation(self, model: Any, unpacked: Unpacked | None = None) -> Distillation:
        """The loss of a model against the original's predictions, as the settings ask for it. unpacked: its packed linears."""
        config = self.config
        return Distillation(
            model,
            self.tokens,
            self.teacher.logits(self.told) if self.teacher else None,
            Weights(config.kl_weight, config.ce_weight),
            batch=config.batch_size or 1,
            micro_batch=config.at_once,
            num_held_out=config.num_held_out or 1,
            seed=config.seed,
            device=self.pair.device,
            compute=self.pair.compute,
            rank=self.team.rank,
            world=self.team.world,
            reduce=None if self.team.world == 1 else self.team.add_up,
            unpacked=unpacked,
        )

    def units_of(self, trained: int, looked: float = 0.0) -> float:
        """What `told` is told of sequences that go forward and backward, and of others that only go forward."""
        backward = 3.0 + self.config.gradient_checkpointing
        return (backward * trained + looked) * self.tokens.shape[1] * len(self.pair.original.blocks)

    @property
    def looked(self) -> int:
        """Sequences of a look at what is held out."""
        return self.config.num_held_out or 1


class WholeTuning(WholeModel):
    """The packed model, its indices as they are.

    Attributes:
        held_out: the loss, before and after.
    """

    held_out = (math.nan, math.nan)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """How long and how fast it trains."""
        return schedule_of(self.config)

    def units(self) -> float:
        """What `told` is told in all: tokens that went forward through a block."""
        return self.schedule.steps * self._step_units()

    def _step_units(self) -> float:
        return self.units_of(self.config.batch_size or 1, self.looked / self.schedule.eval_every)

    def run(self) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
        """Train; what has changed, by full name as it is stored, and the history."""
        if self.teacher:
            self.teacher.logits(self.told)  # before the student takes memory
        self.told("training", 0)
        student = self._student()
        items = trainables(
            student,
            self.config.kept_kinds,
            self.pair.packed.dtype,
            head=student.get_output_embeddings(),
            head_rate=self.config.head_rate,
        )
        unpacked = unpacked_in(student, self.pair, self.config)
        distillation = self.distillation(student, unpacked)
        fit = Fit(items, self.schedule, distillation.train, distillation.held_out)
        kept = self.job.load_tensors(STATE)
        if kept is not None:
            fit.load_state(*kept)
            self.told("training", fit.step * self._step_units())
        fit.run(self._after_step)
        if unpacked and unpacked.fault:
            self.note(f"steps were started kernel by kernel, which is slower: {unpacked.fault}")
        self.held_out = fit.first, fit.best
        self._tell_end(fit)
        return {name: tensor.cpu() for name, tensor in fit.best_values.items()}, {"whole model": fit.history}

    def _after_step(self, fit: Fit) -> None:
        self.told("training", self._step_units())
        last = bool(fit.stopped) or fit.step == self.schedule.steps
        if self.team.rank == 0 and (last or fit.step % self.schedule.eval_every == 0):
            self.job.check_lock()
            self.job.save_tensors(STATE, *fit.state())

    def _tell_end(self, fit: Fit) -> None:
        self.told("training", (self.schedule.steps - fit.step) * self._step_units())
        line = f"held-out loss {fit.first:.4f} -> {fit.best:.4f} at step {fit.best_step} of {fit.step}"
        self.note(line + (f"; stopped: {fit.stopped}" if fit.stopped else ""))
        if "diverged" in fit.stopped:
            self.note("warning: training diverged; the best values are kept. A lower --learning_rate may help")

    def _student(self) -> Any:
        """The packed model, as it trains: no dropout, blocks computed twice if that is asked for."""
        student: Any = self.pair.load_student()
        if self.config.gradient_checkpointing:
            compute_blocks_twice(student)
        return student


def compute_blocks_twice(model: Any) -> None:
    """Gradient checkpointing, by whatever name transformers knows it; only modules that do it are told that they train."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")  # not its children: dropout stays off
