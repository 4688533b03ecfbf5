"""Which tensors of a packed model train, in which units, and how they come to rest in the type they are stored in.

Indices stay (`finetune.incremental` is where they don't). A tensor's learning rate is the common one times the size of its
numbers, as in Adafactor (arXiv:1804.04235): scales of 0.05 and centroids of 1 then change by the same part of themselves. Sizes
are rounded to powers of two, so that a few groups of the optimizer do for thousands of tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vptq.nn.vquant_linear import VQuantLinear
from vptq.recipe import TrainableKind

SMALLEST_UNIT = 2.0**-14
WEIGHT_SIZES = ("weight_scale", "row_scale", "centroids.weight")  # whose product a weight's size is, about
BIAS_PART = 8  # of an output's size, if inputs are about one: what a bias that is nought begins with
SUFFIXES: dict[str, TrainableKind] = {
    "weight_scale": "scales",
    "row_scale": "scales",
    "weight_bias": "offsets",
    "bias": "offsets",
}


@dataclass(frozen=True)
class Trainable:
    """A tensor that trains.

    Attributes:
        name: the model's own. parameter: float32, of the model. kind: what it is trained as.
        stored: float type of the checkpoint. unit: what the learning rate is multiplied by.
    """

    name: str
    parameter: nn.Parameter
    kind: TrainableKind
    stored: torch.dtype
    unit: float

    def rounded(self) -> Tensor:
        """The tensor as the checkpoint will hold it, of the same shape; detached."""
        return self.parameter.detach().to(self.stored)


def find_trainables(
    model: nn.Module,
    kinds: Collection[TrainableKind],
    *,
    head: nn.Module | None = None,
    prefix: str = "",
    lent: Collection[str] = (),
) -> Iterator[tuple[str, nn.Module, str, TrainableKind]]:
    """What there is to learn in `model`, or in a part of it: full name, module, name in the module, kind.

    Args:
        kinds: of tensors to train. head: the output head; trained only where `kinds` says so.
        prefix: of the part's names in the whole model. lent: linears whose codebooks are left alone, by full name.
    """
    heads, seen = _head_parameters(head), set()
    for path, module in model.named_modules():
        owner = ".".join(part for part in (prefix, path) if part)
        for name, parameter in _own_parameters(module):
            kind: TrainableKind | None = "head" if id(parameter) in heads else _kind_of(module, name)
            if kind is None or kind not in kinds or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            if not (kind == "codebooks" and owner in lent):
                seen.add(id(parameter))
                yield f"{owner}.{name}" if owner else name, module, name, kind


def trainables(
    model: nn.Module,
    kinds: Collection[TrainableKind],
    stored: torch.dtype,
    *,
    head: nn.Module | None = None,
    head_rate: float = 1.0,
    prefix: str = "",
    lent: Collection[str] = (),
) -> list[Trainable]:
    """Mark what shall learn in `model`, or in a part of it, and bring it to float32; all else is left without gradients.

    Args: as for `find_trainables`. stored: float type of the checkpoint. head_rate: the head's rate, as a part of the others'.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = []
    for full, module, name, kind in find_trainables(model, kinds, head=head, prefix=prefix, lent=lent):
        parameter = module.get_parameter(name)
        unit = _unit_of(module, name, parameter) * (head_rate if kind == "head" else 1.0)
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
        found.append(Trainable(full, parameter, kind, stored, unit))
    return found


def float_trainables(
    model: nn.Module, linears: Collection[str], places: Collection[str], stored: torch.dtype
) -> list[Trainable]:
    """Mark what learns in a float32 model while its linears are being quantized; all else stays as it is.

    Args:
        linears: whose weights are float yet, by full name. places: all that are or will be quantized; their biases learn.
        stored: float type of norms and biases in the checkpoint.
    """
    found = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm = _kind_of(module, name) == "norms"
            if norm or (name == "weight" and path in linears) or (name == "bias" and path in places):
                kind: TrainableKind = "norms" if norm else "indices" if name == "weight" else "offsets"
                parameter.requires_grad_()
                own = torch.float32 if kind == "indices" else stored
                found.append(Trainable(f"{path}.{name}", parameter, kind, own, _unit_of(module, name, parameter)))
    return found


def rate_groups(items: list[Trainable], learning_rate: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one a unit; `learning_rate` is relative to the size of a tensor's numbers."""
    units: dict[float, list[nn.Parameter]] = {}
    for item in items:
        units.setdefault(item.unit, []).append(item.parameter)
    return [{"params": parameters, "lr": learning_rate * unit, "unit": unit} for unit, parameters in units.items()]


@contextlib.contextmanager
def at_rest(items: list[Trainable]) -> Iterator[None]:
    """Let the tensors be what a checkpoint would hold of them, and put them back after."""
    rounded = [item for item in items if item.stored != item.parameter.dtype]
    kept = {item.name: item.parameter.detach().clone() for item in rounded}
    with torch.no_grad():
        for item in rounded:
            item.parameter.copy_(item.rounded())
    try:
        yield
    finally:
        load_values(rounded, kept)


@torch.no_grad()
def load_values(items: list[Trainable], values: Mapping[str, Tensor]) -> None:
    """Write the tensors' values, each of its tensor's shape, by name."""
    for item in items:
        item.parameter.copy_(values[item.name])


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters; those of its codebooks count as a packed linear's own."""
    yield from module.named_parameters(recurse=isinstance(module, VQuantLinear))


def _kind_of(module: nn.Module, name: str) -> TrainableKind | None:
    if isinstance(module, VQuantLinear):
        return "codebooks" if "centroids." in name else SUFFIXES.get(name)
    return "norms" if "norm" in type(module).__name__.lower() else None


def _head_parameters(head: nn.Module | None) -> set[int]:
    if head is None:
        return set()
    tensors = [*head.parameters(), *(head._tensors().values() if isinstance(head, VQuantLinear) else ())]
    return {id(tensor) for tensor in tensors}


def _unit_of(module: nn.Module, name: str, parameter: Tensor) -> float:
    """The size of a tensor's numbers, as a power of two; of an offset or bias, which may be nought, by that of the weights."""
    size = _rms(parameter)
    if isinstance(module, VQuantLinear) and name == "weight_bias":
        books = [_rms(tensor) for key, tensor in module.named_parameters() if key == "centroids.weight"]
        size = _rms(module.get_parameter("weight_scale")) * (books[0] if books else 1.0)
    elif isinstance(module, VQuantLinear) and name == "bias":
        weight = math.prod(_rms(own) for key, own in module.named_parameters() if key in WEIGHT_SIZES)
        size = max(size, weight * math.sqrt(module.in_features) / BIAS_PART)
    elif isinstance(module, nn.Linear) and name == "bias":
        size = max(size, _rms(module.weight) * math.sqrt(module.in_features) / BIAS_PART)
    return max(2.0 ** round(math.log2(max(size, 1e-30))), SMALLEST_UNIT)


def _rms(tensor: Tensor) -> float:
    return tensor.detach().float().square().mean().sqrt().item()
