"""`finetune --mode e2e`: the whole packed model against the original's predictions, on one GPU or several."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vptq.checkpoint.reader import load_whole
from vptq.finetune.distill import Distillation, Weights
from vptq.finetune.fit import Fit
from vptq.finetune.trainable import trainables
from vptq.finetune_config import FinetuneConfig
from vptq.models.device import resolve_device
from vptq.models.remote import mirror_of
from vptq.pipeline.block_pass import Told, schedule_of, unpacked_in
from vptq.pipeline.states import KeptTeacher, states_folder
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair

STATE = "fit"
LONGEST_WAIT = datetime.timedelta(days=7)  # while the first process measures, or computes what all need
BACKWARD = 3.0  # times a forward pass, that included; once more with gradient checkpointing


class Team(Protocol):
    """The processes that share the work; each has the same tensors and takes the same steps."""

    rank: int
    world: int

    def add_up(self, tensor: Tensor) -> None: ...

    def wait(self) -> None: ...

    def share(self, value: Any) -> Any: ...


class Alone:
    """One process."""

    rank, world = 0, 1

    def add_up(self, tensor: Tensor) -> None:
        pass

    def wait(self) -> None:
        pass

    def share(self, value: Any) -> Any:
        return value


class Launched:
    """Processes that `accelerate launch` has started."""

    def __init__(self, device: str | None) -> None:
        from accelerate import PartialState  # noqa: PLC0415 (slow import)

        on_cpu = resolve_device(device).type == "cpu"
        self.state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
        self.rank, self.world, self.device = self.state.process_index, self.state.num_processes, self.state.device

    def add_up(self, tensor: Tensor) -> None:
        """Over all processes, in place; any shape."""
        torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Until all are here."""
        self.state.wait_for_everyone()

    def share(self, value: Any) -> Any:
        """What the first process has, for all."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


def is_launched() -> bool:
    """Whether this is one of several processes of a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class WholeTuning:
    """The whole model.

    Args: as for `BlockTuning`. team: who shares the work.
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
    ) -> None:
        self.pair, self.config, self.tokens, self.job = pair, config, tokens, job
        self.told, self.note, self.team = told, note, team
        self.schedule = schedule_of(config)
        self.held_out = (math.nan, math.nan)  # the loss, before and after

    def units(self) -> float:
        """What `told` is told in all: tokens that went forward through a block."""
        return self._teacher_units() + self.schedule.steps * self._step_units()

    @property
    def _has_teacher(self) -> bool:
        return self.config.kl_weight > 0

    def _teacher_units(self) -> float:
        cached = self._has_teacher and self.config.teacher == "cached"
        return float(self.tokens.numel()) * len(self.pair.original.blocks) if cached else 0.0

    def _step_units(self) -> float:
        tokens = self.tokens.shape[1]
        times = BACKWARD + self.config.gradient_checkpointing
        trained = times * (self.config.batch_size or 1) * tokens
        looks = (self.config.num_held_out or 1) * tokens / self.schedule.eval_every
        return (trained + looks) * len(self.pair.original.blocks)

    def run(self) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
        """Train; what has changed, by full name as it is stored, and the history."""
        teacher = self._teacher() if self._has_teacher else None
        self.told("training", 0)
        student = self._student()
        assert self.config.train is not None
        items = trainables(
            student,
            self.config.train,
            self.pair.packed.dtype,
            head=student.get_output_embeddings(),
            head_rate=self.config.head_rate,
        )
        fit = self._fit(student, items, teacher)
        kept = self.job.load_tensors(STATE)
        if kept is not None:
            fit.load_state(*kept)
            self.told("training", fit.step * self._step_units())
        fit.run(self._after_step)
        self.held_out = fit.first, fit.best
        self._tell_end(fit)
        return {name: tensor.cpu() for name, tensor in fit.best_values.items()}, {"whole model": fit.history}

    def _fit(self, student: Any, items: list[Any], teacher: Callable[[list[int]], Tensor] | None) -> Fit:
        config = self.config
        distillation = Distillation(
            student,
            self.tokens,
            teacher,
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
            unpacked=unpacked_in(student, self.pair, config),
        )
        return Fit(items, self.schedule, distillation.train, distillation.held_out)

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
            _compute_blocks_twice(student)
        return student

    def _teacher(self) -> Callable[[list[int]], Tensor]:
        """The original's logits of some sequences, by their numbers."""
        if self.config.teacher == "live":
            model = load_whole(
                str(self.pair.original.folder), str(self.pair.device), trust_remote_code=self.pair.trust_remote_code
            )

            @torch.no_grad()
            def live(numbers: list[int]) -> Tensor:
                return model(input_ids=self.tokens[numbers].to(self.pair.device), use_cache=False).logits

            return live
        left = self._teacher_units()

        def heard(tokens: int) -> None:
            nonlocal left
            left -= tokens
            self.told("the original's predictions", tokens)

        if self.team.rank > 0:
            self.team.wait()  # the first process makes them
        teacher = KeptTeacher.make(self.pair.original_runner(), self.tokens, self._states_folder(), heard)
        if self.team.rank == 0:
            self.team.wait()
        self.told("the original's predictions", left)
        return teacher

    def _states_folder(self) -> Path:
        """Where what the original computes is kept: in the run folder, unless that would be copied to its URL."""
        if self.config.cache_dir or mirror_of(self.job.folder) is not None:
            return states_folder(self.config.cache_dir)
        return self.job.work / "states"


def _compute_blocks_twice(model: Any) -> None:
    """Gradient checkpointing, by whatever name transformers knows it; only modules that do it are told that they train."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")  # not its children: dropout stays off
