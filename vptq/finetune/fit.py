"""Training of a few tensors: AdamW, warm-up and cosine, early stop on what is held out, the best values kept, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vptq.finetune.trainable import Trainable, at_rest, load_values, rate_groups

BETAS = (0.9, 0.95)
DIVERGED = 2.0  # times the first held-out loss


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: of the optimizer. learning_rate: of the highest step, relative to the size of a tensor's numbers.
        warmup_steps: over which it rises; after that it falls to nought as a cosine. weight_decay: of AdamW, decoupled.
        eval_every: steps between two looks at what is held out. patience: looks in a row without gain that end the training.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    eval_every: int
    patience: int

    def factor(self, step: int) -> float:
        """What the rate of a step, from 0 on, is multiplied by."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = max(self.steps - self.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / left))


class Fit:
    """One training.

    Args:
        items: what learns. schedule: how.
        train: makes the gradients of a step, from 0 on, and gives its loss.
        held_out: the loss on what is held out.
    Attributes:
        history: a dict for every step: `step` (1 after the first), `loss`, `learning_rate`, `seconds`, now and then `held_out`.
        first, best: held-out loss before, and of the values in `best_values`, as they are stored. best_step: theirs.
        stopped: why it ended before its last step; empty if it did not.
    """

    def __init__(
        self, items: list[Trainable], schedule: Schedule, train: Callable[[int], float], held_out: Callable[[], float]
    ) -> None:
        self.items, self.schedule, self.train, self.held_out = items, schedule, train, held_out
        self.optimizer = torch.optim.AdamW(
            rate_groups(items, schedule.learning_rate), betas=BETAS, weight_decay=schedule.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.first = self.best = math.inf
        self.best_step, self.without_gain = 0, 0
        self.best_values: dict[str, Tensor] = {}
        self.stopped = ""

    def run(self, told: Callable[[Fit], None] | None = None) -> None:
        """Train to the end, and leave the best values in the model. told: called after every step."""
        if not self.history:
            self._look({"step": 0})
            self.first = self.best
        while self.step < self.schedule.steps and not self.stopped:
            self._step()
            if told:
                told(self)
        load_values(self.items, self.best_values)
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self) -> None:
        began = time.perf_counter()
        factor = self.schedule.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * factor * group["unit"]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.train(self.step)
        entry = {"step": self.step + 1, "loss": loss, "learning_rate": self.schedule.learning_rate * factor}
        if not math.isfinite(loss) or not self._finite_gradients():
            self.stopped = f"diverged at step {self.step + 1}: the loss or its gradients are not finite"
            return
        self.optimizer.step()
        self.step += 1
        if self.step % self.schedule.eval_every == 0 or self.step == self.schedule.steps:
            self._look(entry)
        self.seconds += time.perf_counter() - began
        self.history.append(entry | {"seconds": self.seconds})

    def _look(self, entry: dict[str, float]) -> None:
        """Take down the held-out loss of the values as they would be stored, and keep them if they are the best yet."""
        with at_rest(self.items), torch.no_grad():
            loss = self.held_out()
        entry["held_out"] = loss
        if not self.history:
            self.history.append(entry)
        if loss < self.best or not self.best_values:
            self.best, self.best_step, self.without_gain = loss, self.step, 0
            self.best_values = {item.name: item.rounded().clone() for item in self.items}
            return
        self.without_gain += 1
        if not loss <= DIVERGED * self.first:
            self.stopped = f"diverged: the held-out loss is {loss:.4g} at step {self.step}, {self.first:.4g} at first"
        elif self.without_gain >= self.schedule.patience:
            self.stopped = f"no gain in {self.without_gain} looks at what is held out"

    def _finite_gradients(self) -> bool:
        gradients = [item.parameter.grad for item in self.items if item.parameter.grad is not None]
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()) if gradients else True

    # -- to go on later -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that is needed to go on: tensors, and what JSON takes."""
        tensors: dict[str, Tensor] = {}
        for item in self.items:
            tensors[f"now.{item.name}"] = item.parameter.detach()
            tensors[f"best.{item.name}"] = self.best_values[item.name]
            for key, value in self.optimizer.state[item.parameter].items():
                tensors[f"{key}.{item.name}"] = torch.as_tensor(value)
        names = ("step", "seconds", "history", "first", "best", "best_step", "without_gain", "stopped")
        return tensors, {name: getattr(self, name) for name in names}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in numbers.items():
            setattr(self, name, value)
        load_values(self.items, {item.name: tensors[f"now.{item.name}"] for item in self.items})
        for item in self.items:
            device = item.parameter.device
            self.best_values[item.name] = tensors[f"best.{item.name}"].to(device)
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{item.name}" in tensors]  # what had gradients
            moments = {key: tensors[f"{key}.{item.name}"] for key in keys}
            self.optimizer.state[item.parameter] = {
                key: value.clone() if key == "step" else value.to(device) for key, value in moments.items()
            }
