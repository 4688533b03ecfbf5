"""Experts that transformers 5 keeps fused, taken apart into linears, so that each is calibrated and quantized by itself.

Its expert modules hold `gate_up_proj` (experts, 2 x intermediate, hidden) and `down_proj` (experts, hidden, intermediate), some
of them transposed, interleaved, with biases or without a gate; each says which by attributes of one decorator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vptq.errors import UsageError
from vptq.models.origins import Origin, of_expert

MARKS = ("has_gate", "is_transposed", "is_concatenated")  # what the decorator leaves on an expert module


@dataclass(frozen=True)
class Piece:
    """What one parameter of an expert is in the fused parameters of its module.

    Attributes:
        name: full name of the parameter. whole: full name of the fused one. expert: its number.
        part: 0, or 1 for the lower half. rows: of the half that it is; None for all. transposed: of a matrix.
    """

    name: str
    whole: str
    expert: int
    part: int
    rows: tuple[int, int] | None
    transposed: bool

    def origin(self, wholes: dict[str, Origin]) -> Origin:
        """Where it lies in files; wholes: where fused parameters lie, if not under their names."""
        whole = wholes.get(self.whole, Origin((self.whole,)))
        return of_expert(whole, self.part, self.expert, transposed=self.transposed, rows=self.rows)


@dataclass
class Fusing:
    """Puts experts' weights back into the fused parameters, each as soon as all of its pieces are there.

    Args:
        pieces: of the experts that were taken apart.
    """

    pieces: Collection[Piece]
    _by_name: dict[str, Piece] = field(init=False)
    _waiting: dict[str, dict[tuple[int, int], Tensor]] = field(init=False, default_factory=dict)
    _sizes: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name = {piece.name: piece for piece in self.pieces}
        for piece in self.pieces:
            self._sizes[piece.whole] = self._sizes.get(piece.whole, 0) + 1

    def takes(self, name: str) -> bool:
        """Whether a parameter is one of its pieces."""
        return name in self._by_name

    def add(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take a piece; gives the fused parameter, by its name, that it completes."""
        piece = self._by_name[name]
        waiting = self._waiting.setdefault(piece.whole, {})
        waiting[piece.expert, piece.part] = tensor.T if piece.transposed else tensor
        if len(waiting) == self._sizes[piece.whole]:
            experts = sorted({expert for expert, _ in waiting})
            parts = sorted({part for _, part in waiting})
            rows = [torch.cat([waiting[e, p] for p in parts], dim=-1 if piece.transposed else 0) for e in experts]
            yield piece.whole, torch.stack(rows).contiguous()
            del self._waiting[piece.whole]


class Expert(nn.Module):
    """The linears of one expert."""


class SplitExperts(nn.Module):
    """Experts as modules of linears, `0`, `1`, ..., in place of a fused module of transformers.

    Args:
        fused: the module; its parameters go, its way of gating stays.
    Attributes:
        all_tokens: let every expert see every token, for calibration; what comes out is the same.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.all_tokens = False
        self.num_experts = len(fused.down_proj)
        self.has_gate, self.is_concatenated = bool(fused.has_gate), bool(fused.is_concatenated)
        for number in range(self.num_experts):
            self.add_module(str(number), _expert_of(fused))
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            delattr(fused, name)
        fused._is_hf_initialized = True  # else transformers begins parameters that are gone
        self.gating: Any = fused

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """hidden_states: (tokens, hidden); numbers of the experts of each token and their weights: (tokens, k) both."""
        chosen, weights = [*routing, *named.values()][:2]
        total = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            tokens, place = torch.where(chosen == number)
            if self.all_tokens:
                found = self._run(number, hidden_states)[tokens]
            elif len(tokens):
                found = self._run(number, hidden_states[tokens])
            else:
                continue
            found = found * weights[tokens, place, None]
            total.index_add_(0, tokens, found.to(total.dtype))
        return total

    def _run(self, number: int, inputs: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        if not self.has_gate:
            return expert.down_proj(self.gating.act_fn(expert.up_proj(inputs)))
        if self.is_concatenated:
            both = torch.cat([expert.gate_proj(inputs), expert.up_proj(inputs)], dim=-1)
        else:
            both = expert.gate_up_proj(inputs)
        return expert.down_proj(self.gating._apply_gate(both))


@contextlib.contextmanager
def all_tokens(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let the experts of a model that was taken apart see all tokens, if that is `wanted`."""
    experts = [module for module in model.modules() if isinstance(module, SplitExperts)] if wanted else []
    for module in experts:
        module.all_tokens = True
    try:
        yield
    finally:
        for module in experts:
            module.all_tokens = False


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts in the way that transformers' decorator marks."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3 and all(hasattr(module, mark) for mark in MARKS)


def split_experts(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> list[Piece]:
    """Take fused experts apart, in place; what each new parameter is in the old ones.

    Args:
        wanted: which modules, by full name.
    Raises:
        UsageError: experts of a form that is not known.
    """
    pieces: list[Piece] = []
    for name, module in list(model.named_modules()):
        if not is_fused(module) or not wanted(name):
            continue
        if getattr(module, "has_post_expert_norm", False):
            raise UsageError(
                f"the experts in `{name}` are not handled", where=["each is followed by a norm of its own"],
                hint="quantize another model, or open an issue with its name",
            )  # fmt: skip
        pieces += _pieces(name, module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, SplitExperts(module))
    return pieces


def _linears(fused: Any) -> dict[str, tuple[str, int, tuple[int, int] | None]]:
    """The linears of an expert: name -> fused parameter, part, rows of that."""
    if not fused.has_gate:
        return {"up_proj": ("up_proj", 0, None), "down_proj": ("down_proj", 0, None)}
    if not fused.is_concatenated:
        return {"gate_up_proj": ("gate_up_proj", 0, None), "down_proj": ("down_proj", 0, None)}
    half = _matrix(fused, "gate_up_proj")[0] // 2
    return {
        "gate_proj": ("gate_up_proj", 0, (0, half)),
        "up_proj": ("gate_up_proj", 1, (half, 2 * half)),
        "down_proj": ("down_proj", 0, None),
    }


def _matrix(fused: Any, name: str) -> tuple[int, int]:
    """(out_features, in_features) of a fused parameter's matrices."""
    _, rows, columns = getattr(fused, name).shape
    return (columns, rows) if fused.is_transposed else (rows, columns)


def _expert_of(fused: Any) -> Expert:
    expert = Expert()
    for name, (whole, _, rows) in _linears(fused).items():
        out_features, in_features = _matrix(fused, whole)
        size = out_features if rows is None else rows[1] - rows[0]
        has_bias = getattr(fused, f"{whole}_bias", None) is not None
        linear = nn.Linear(in_features, size, bias=has_bias, device="meta", dtype=getattr(fused, whole).dtype)
        setattr(expert, name, linear.requires_grad_(False))
    return expert


def _pieces(prefix: str, fused: Any) -> Iterator[Piece]:
    for number in range(len(fused.down_proj)):
        for name, (whole, part, rows) in _linears(fused).items():
            full = f"{prefix}.{number}.{name}"
            yield Piece(f"{full}.weight", f"{prefix}.{whole}", number, part, rows, bool(fused.is_transposed))
            if getattr(fused, f"{whole}_bias", None) is not None:
                yield Piece(f"{full}.bias", f"{prefix}.{whole}_bias", number, part, rows, False)
