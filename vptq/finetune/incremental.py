"""Indices chosen anew, some linears at a time, while what is still float learns to make up for those that are quantized.

Quantized all at once, every linear keeps its error. Here a run of linears is quantized, with Hessians of the model as it is by
then, and stays; then the weights of all later linears, and the norms, train for some steps towards the original's predictions;
then the next run follows (incremental network quantization, arXiv:1702.03044, there for single weights). What is float
can train under noise (`finetune.noise`), so that it learns to bear what will become of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vptq.calibration.whole import LossHessians
from vptq.checkpoint.names import to_tensors
from vptq.config import LinearConfig
from vptq.finetune.distill import Distillation
from vptq.finetune.fit import Fit, Schedule
from vptq.finetune.noise import ErrorNoise
from vptq.finetune.trainable import Trainable, float_trainables
from vptq.geometry import Geometry
from vptq.layer_config import LayerConfig
from vptq.nn.reference import dequantize_packed
from vptq.quantize.linear import LinearInput, in_batches, quantize_linears
from vptq.quantize.result import Codebook, QuantizedWeight

HESSIAN_TOKENS = 1 << 17  # that Hessians are summed over
HELD_OUT_DRAW = 1 << 40  # number of the noise that what is held out sees, always the same


def parts_of(linears: Sequence[tuple[str, int]], count: int) -> list[tuple[str, ...]]:
    """Runs of linears, in their order, of about equally many weights; `count` of them, or fewer where there are not so many.

    linears: (name, number of weights).
    """
    total, seen = sum(size for _, size in linears), 0
    parts: dict[int, list[str]] = {}
    for name, size in linears:
        parts.setdefault(int((seen + size / 2) * count / total), []).append(name)
        seen += size
    return [tuple(names) for names in parts.values()]


@dataclass(frozen=True)
class Form:
    """What a linear is quantized to.

    Attributes:
        layer: how it is stored. config: settings that give that. shared: name of the linear whose codebook it is quantized
            with; empty where it finds its own.
    """

    layer: LayerConfig
    config: LinearConfig
    shared: str


@dataclass(frozen=True)
class Codebooks:
    """Codebooks that are given: main and perhaps residual, as they are used, and as they are stored."""

    books: tuple[Codebook, ...]
    stored: Mapping[str, Tensor]


class Incremental:
    """The quantizing of a float model, part by part.

    Args:
        model: float32, as it trains. parts: names of its linears, in the order in which they are quantized.
        forms: of each linear. codebooks: given ones, by the linear that stores them. dtype: float type of the checkpoint.
        distillation: gives the loss of the model. schedule: of the training after each part.
        batches: of tokens, (sequences, seq_len) int64 each, that Hessians are summed over.
        noise: on weights that are float yet, in training and on what is held out; None for none.
    Attributes:
        tensors: of the quantized linears, as they are stored, by full name. history: of the training, steps counted on.
        done: parts that are quantized and trained after. loss, quantized_loss: what is held out has after the last part, and
            had before the training that followed it. stopped: why that ended early; empty if it did not.
    """

    def __init__(
        self,
        model: Any,
        parts: Sequence[tuple[str, ...]],
        forms: Mapping[str, Form],
        codebooks: Mapping[str, Codebooks],
        dtype: torch.dtype,
        distillation: Distillation,
        schedule: Schedule,
        batches: Sequence[Tensor],
        noise: ErrorNoise | None = None,
    ) -> None:
        self.model, self.parts, self.forms, self.codebooks, self.dtype = model, parts, forms, codebooks, dtype
        self.distillation, self.schedule, self.batches, self.noise = distillation, schedule, batches, noise
        self.tensors: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.done, self.stopped = 0, ""
        self.loss = self.quantized_loss = float("nan")
        self._seconds = 0.0

    def run(self, told: Callable[[str], None], after: Callable[[Incremental], None]) -> None:
        """Quantize all that is left. told: called before Hessians and after every step. after: called after every part."""
        while self.done < len(self.parts):
            began = time.perf_counter()
            told("quantizing")
            self._quantize(self.parts[self.done])
            self.done += 1
            self._train(told, time.perf_counter() - began)
            after(self)

    def items(self) -> list[Trainable]:
        """What learns: weights of linears that are float yet, norms, biases."""
        return float_trainables(self.model, set(self._left()), {name for part in self.parts for name in part}, self.dtype)

    def _left(self) -> list[str]:
        """The linears that are float yet."""
        return [name for part in self.parts[self.done :] for name in part]

    def _quantize(self, part: tuple[str, ...]) -> None:
        linears = {name: self.model.get_submodule(name) for name in part}
        hessians = self._hessians(linears)
        for names in in_batches(part, self._alike):
            form = self.forms[names[0]]
            shared = self.codebooks[form.shared].books if form.shared else None
            inputs = [LinearInput(name, linears[name].weight.detach(), _squeezed(hessians.pop(name))) for name in names]
            found = quantize_linears(inputs, form.config, storage_dtype=self.dtype, shared=shared)
            for name, (quantized, _) in zip(names, found, strict=True):
                stored = self._stored(self.forms[name].layer, quantized)
                self.tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
                self._put(name, stored)

    def _stored(self, layer: LayerConfig, quantized: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of a checkpoint; what fine-tuning had added changes nothing."""
        stored = to_tensors(quantized, layer, self.dtype)
        if layer.num_scales and "row_scale" not in stored:
            stored["row_scale"] = torch.ones(layer.num_scales, dtype=self.dtype)
        if layer.added_bias:
            stored["bias"] = torch.zeros(layer.out_features, dtype=self.dtype)
        return stored

    @torch.no_grad()
    def _put(self, name: str, stored: Mapping[str, Tensor]) -> None:
        """A weight into the model, as it is read from its stored tensors."""
        form, weight = self.forms[name], self.model.get_submodule(name).weight
        given = self.codebooks[form.shared].stored if form.shared else {}
        tensors = {key: tensor.to(weight.device) for key, tensor in {**given, **stored}.items()}
        weight.copy_(dequantize_packed(tensors, form.layer, torch.float32))

    def _alike(self, name: str) -> tuple[Geometry, LinearConfig, str]:
        """What linears that are quantized together have in common."""
        form = self.forms[name]
        return form.layer.geometry, form.config, form.shared

    def _hessians(self, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        own = {f"{name}.weight" for name in linears}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in own)
            parameter.grad = None
        watcher = LossHessians(linears, {name: self.forms[name].layer.row_groups for name in linears})
        with watcher.watching(), _without_weight_gradients(linears):
            for tokens in self.batches:
                self.distillation.text_loss(tokens).backward()
        return watcher.collect()

    def _train(self, told: Callable[[str], None], seconds: float) -> None:
        """seconds: what quantizing took."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        first = (self.done - 1) * self.schedule.steps
        train, held_out = self._noisy(self.distillation.train), self._noisy(lambda _: self.distillation.held_out())
        fit = Fit(self.items(), self.schedule, lambda step: train(first + step), lambda: held_out(HELD_OUT_DRAW))
        fit.run(lambda _: told("training what is float"))
        for _ in range(self.schedule.steps - fit.step):
            told("training what is float")
        self.loss, self.quantized_loss, self.stopped = fit.best, fit.first, fit.stopped
        self._seconds += seconds
        for entry in fit.history:
            self.history.append(entry | {"step": entry["step"] + first, "seconds": self._seconds + entry.get("seconds", 0.0)})
        self._seconds = self.history[-1]["seconds"]

    def _noisy(self, loss: Callable[[int], float]) -> Callable[[int], float]:
        """A loss with noise on what is float yet; the number that it is given is the draw's too."""
        noise = self.noise
        if noise is None:
            return loss
        left = {name: self.model.get_submodule(name) for name in self._left()}

        def noisy(number: int) -> float:
            with noise.added(left, number):
                return loss(number)

        return noisy

    # -- to go on later -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that is needed to go on: what learns yet, what is stored, and what JSON takes."""
        values = {f"float.{item.name}": item.parameter.detach() for item in self.items()}
        stored = {f"stored.{name}": tensor for name, tensor in self.tensors.items()}
        names = ("done", "history", "loss", "quantized_loss", "_seconds")
        return values | stored, {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in numbers.items():
            setattr(self, name, value)
        for name, tensor in tensors.items():
            if name.startswith("float."):
                self.model.get_parameter(name.removeprefix("float.")).copy_(tensor)
        self.tensors = {key.removeprefix("stored."): own for key, own in tensors.items() if key.startswith("stored.")}
        for linear in (name for part in self.parts[: self.done] for name in part):
            own = {key.removeprefix(f"{linear}."): t for key, t in self.tensors.items() if key.startswith(f"{linear}.")}
            self._put(linear, own)


def _squeezed(hessian: Tensor) -> Tensor:
    """One for all rows as a matrix."""
    return hessian[0] if len(hessian) == 1 else hessian


@contextlib.contextmanager
def _without_weight_gradients(linears: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Drop gradients of weights as they come: only those of outputs are of use."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    with contextlib.ExitStack() as hooks:
        for linear in linears.values():
            hook = linear.weight.register_post_accumulate_grad_hook(drop)
            hooks.callback(hook.remove)
        yield
