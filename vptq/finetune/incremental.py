"""Indices chosen anew, some linears at a time, while what is still float learns to make up for those that are quantized.

Quantized all at once, every linear keeps its error. Here a run of linears is quantized, with Hessians of the model as it is by
then, and stays; then the weights of all later linears, and the norms, train for some steps towards the original's predictions;
then the next run follows (incremental network quantization, arXiv:1702.03044, there for single weights).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vptq.calibration.whole import LossHessians
from vptq.checkpoint.names import to_tensors
from vptq.finetune.distill import Distillation
from vptq.finetune.fit import Fit, Schedule
from vptq.finetune.trainable import Trainable, float_trainables
from vptq.layer_config import LayerConfig
from vptq.quantize.linear import LinearInput, quantize_linears
from vptq.quantize.result import Codebook, QuantizedWeight, spread_rows

HESSIAN_TOKENS = 1 << 17  # that Hessians are summed over


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
class Forms:
    """What linears are quantized to.

    Attributes:
        layers: stored form of each linear, by full name. codebooks: of those that share one, by the linear that stores it.
        dtype: float type of the checkpoint.
    """

    layers: Mapping[str, LayerConfig]
    codebooks: Mapping[str, tuple[Codebook, ...]]
    dtype: torch.dtype

    def shared(self, name: str) -> tuple[Codebook, ...] | None:
        """The codebooks that a linear shares; None for one that finds its own."""
        layer = self.layers[name]
        return self.codebooks[layer.codebook_of or name] if layer.num_scales else None


class Incremental:
    """The quantizing of a float model, part by part.

    Args:
        model: float32, as it trains. parts: names of its linears, in the order in which they are quantized.
        distillation: gives the loss of the model. schedule: of the training after each part.
        batches: of tokens, (sequences, seq_len) int64 each, that Hessians are summed over.
    Attributes:
        tensors: of the quantized linears, as they are stored, by full name. history: of the training, steps counted on.
        done: parts that are quantized and trained after. loss, quantized_loss: what is held out has after the last part, and
            had before the training that followed it.
    """

    def __init__(
        self,
        model: Any,
        parts: Sequence[tuple[str, ...]],
        forms: Forms,
        distillation: Distillation,
        schedule: Schedule,
        batches: Sequence[Tensor],
    ) -> None:
        self.model, self.parts, self.forms = model, parts, forms
        self.distillation, self.schedule, self.batches = distillation, schedule, batches
        self.tensors: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.done = 0
        self.loss = self.quantized_loss = float("nan")
        self._seconds = 0.0

    def run(self, told: Callable[[str], None], after: Callable[[Incremental], None]) -> None:
        """Quantize all that is left. told: called before Hessians and after every step. after: called after every part."""
        while self.done < len(self.parts):
            began = time.perf_counter()
            told("quantizing")
            self._quantize(self.parts[self.done])
            self._train(told, time.perf_counter() - began)
            self.done += 1
            after(self)

    def items(self) -> list[Trainable]:
        """What trains: weights of linears that are still float, norms, biases."""
        left = {name for part in self.parts[self.done + 1 :] for name in part}
        names = {name for part in self.parts for name in part}
        return float_trainables(self.model, left, names, self.forms.dtype)

    def _quantize(self, part: tuple[str, ...]) -> None:
        linears = {name: self.model.get_submodule(name) for name in part}
        hessians = self._hessians(linears)
        for names in self._alike(part):
            layer, shared = self.forms.layers[names[0]], self.forms.shared(names[0])
            inputs = [LinearInput(name, linears[name].weight.detach(), _squeezed(hessians.pop(name))) for name in names]
            found = quantize_linears(inputs, layer.linear_config(), storage_dtype=self.forms.dtype, shared=shared)
            for name, (quantized, _) in zip(names, found, strict=True):
                self._put(name, linears[name], quantized)

    def _put(self, name: str, linear: nn.Linear, quantized: QuantizedWeight) -> None:
        """A quantized weight into the model and among what is stored."""
        linear.weight.data.copy_(quantized.dequantize())
        layer = self.forms.layers[name]
        stored = to_tensors(quantized, layer, self.forms.dtype)
        if layer.num_scales:  # it may have been given more of them
            stored["row_scale"] = spread_rows(stored["row_scale"], layer.num_scales)[:, 0].contiguous()
        if layer.added_bias:
            stored["bias"] = torch.zeros(layer.out_features, dtype=self.forms.dtype)
        self.tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}

    def _alike(self, part: tuple[str, ...]) -> list[list[str]]:
        """Linears that are quantized together."""
        alike: dict[Any, list[str]] = {}
        for name in part:
            layer = self.forms.layers[name]
            shape = layer.out_features, layer.in_features
            alike.setdefault((shape, layer.linear_config(), layer.codebook_of or name), []).append(name)
        return list(alike.values())

    def _hessians(self, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        own = {f"{name}.weight" for name in linears}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in own)
            parameter.grad = None
        watcher = LossHessians(linears, {name: self.forms.layers[name].row_groups for name in linears})
        with watcher.watching(), _without_weight_gradients(linears):
            for tokens in self.batches:
                self.distillation.text_loss(tokens).backward()
        return watcher.collect()

    def _train(self, told: Callable[[str], None], seconds: float) -> None:
        """seconds: what quantizing took."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        first = self.done * self.schedule.steps
        fit = Fit(self.items(), self.schedule, lambda step: self.distillation.train(first + step), self.distillation.held_out)
        fit.run(lambda _fit: told("training what is float"))
        self.loss, self.quantized_loss = fit.best, fit.first
        self._seconds += seconds
        for entry in fit.history:
            self.history.append(entry | {"step": entry["step"] + first, "seconds": self._seconds + entry.get("seconds", 0.0)})
        self._seconds = self.history[-1]["seconds"]

    # -- to go on later -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that is needed to go on: tensors, and what JSON takes."""
        values = {f"float.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        stored = {f"stored.{name}": tensor for name, tensor in self.tensors.items()}
        names = ("done", "history", "loss", "quantized_loss", "_seconds")
        return values | stored, {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in numbers.items():
            setattr(self, name, value)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"float.{name}"])
        self.tensors = {key.removeprefix("stored."): own for key, own in tensors.items() if key.startswith("stored.")}


def _squeezed(hessian: Tensor) -> Tensor:
    """One for all rows as a matrix."""
    return hessian[0] if len(hessian) == 1 else hessian


@contextlib.contextmanager
def _without_weight_gradients(linears: Mapping[str, nn.Linear]):  # type: ignore[no-untyped-def]
    """Drop gradients of weights as they come: only those of outputs are of use."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    with contextlib.ExitStack() as hooks:
        for linear in linears.values():
            hook = linear.weight.register_post_accumulate_grad_hook(drop)
            hooks.callback(hook.remove)
        yield
