"""Noise like a quantized model's error, on weights that are float yet: they learn to bear being quantized.

An original's weights stand where the loss is least, with no care for how steep it is about that place. Weights that train while
every step gives them another error move to where such errors cost less (for single weights' rounding: arXiv:2004.07320).

The error of a given checkpoint is taken apart. A quantized weight is smaller than its original, W (1 - s) + R, since the least
squared error shrinks what it can't tell; s is what a linear's outputs lack, so that R's are uncorrelated with W's. A draw keeps
s, and lets the rows of R change places and signs: columns keep what they have in common. Both grow with the weight, as
quantizing's own error does; else larger weights would be a way out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOT_ELEMENTS = 1 << 26  # weights whose errors are drawn at once


@dataclass(frozen=True)
class _Lot:
    """Weights of one shape.

    Attributes:
        rest: R of each, (number, out_features, in_features) bfloat16. kept: 1 - s. norms: of the weights; (number,) both.
        row_groups: runs of rows that change places among themselves only.
    """

    names: list[str]
    rest: Tensor
    kept: Tensor
    norms: Tensor
    row_groups: int


class ErrorNoise:
    """Errors to draw from.

    Args:
        weights: float ones, by full name: (out_features, in_features). errors: what is to be added for what they were
            quantized to, of the same shapes. shrinkage: s of each. row_groups: runs of rows of each that change places among
            themselves only. seed: of all draws.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        errors: Mapping[str, Tensor],
        shrinkage: Mapping[str, float],
        row_groups: Mapping[str, int],
        seed: int,
    ) -> None:
        self.seed = seed
        alike: dict[tuple[torch.Size, int], list[str]] = {}
        for name, weight in weights.items():
            alike.setdefault((weight.shape, row_groups[name]), []).append(name)
        self.lots = []
        for (shape, groups), names in alike.items():
            most = max(1, LOT_ELEMENTS // shape.numel())
            for start in range(0, len(names), most):
                lot = names[start : start + most]
                rest = [(errors[name].float() + shrinkage[name] * weights[name]).to(torch.bfloat16) for name in lot]
                norms = torch.stack([weights[name].float().norm() for name in lot])
                kept = torch.tensor([1 - shrinkage[name] for name in lot], device=norms.device)
                self.lots.append(_Lot(lot, torch.stack(rest), kept, norms, groups))

    def _seed_of(self, number: int, lot: int) -> int:
        return ((self.seed * 1_000_003 + number) * len(self.lots) + lot) % (1 << 63)

    @contextlib.contextmanager
    def added(self, linears: Mapping[str, nn.Linear], number: int) -> Iterator[None]:
        """Give some linears' weights a draw's errors; gradients that come are of the weights without them.

        Args:
            linears: that get it, by full name. number: of the draw, 0 to 2^50; the same one gives the same.
        """
        with contextlib.ExitStack() as lots:
            for place, lot in enumerate(self.lots):
                chosen = [i for i, name in enumerate(lot.names) if name in linears]
                if chosen:
                    weights = [linears[lot.names[i]].weight for i in chosen]
                    rest = _drawn(lot, chosen, self._seed_of(number, place))
                    lots.enter_context(_added(weights, rest, lot.kept[chosen], lot.norms[chosen]))
            yield


def _drawn(lot: _Lot, chosen: list[int], seed: int) -> Tensor:
    """R of some of a lot's weights, which do not depend on what else is chosen: (chosen, out_features, in_features)."""
    rest, groups = lot.rest, lot.row_groups
    number, rows = rest.shape[:2]
    generator = torch.Generator(rest.device).manual_seed(seed)
    keys = torch.rand(number, groups, rows // groups, generator=generator, device=rest.device)
    firsts = torch.arange(0, rows, rows // groups, device=rest.device)
    places = (keys.argsort(2) + firsts[:, None]).flatten(1)[chosen]
    signs = torch.randint(2, (number, rows), generator=generator, device=rest.device)[chosen] * 2 - 1
    own = rest if len(chosen) == number else rest[chosen]
    sizes = torch.linalg.vector_norm(own, dim=2, dtype=torch.float32)
    factors = signs * sizes / sizes.gather(1, places).clamp_min(1e-20)
    moved = own.gather(1, places[..., None].expand_as(own))
    return moved.mul_(factors[..., None].to(moved.dtype))


@contextlib.contextmanager
def _added(weights: Sequence[Tensor], rest: Tensor, kept: Tensor, norms: Tensor) -> Iterator[None]:
    """kept w + |w| r / norm in place of each w."""
    clean = [weight.data for weight in weights]
    stacked = torch.stack(clean)
    now = torch.linalg.vector_norm(stacked, dim=(1, 2))
    noisy = stacked.mul_(kept[:, None, None]).addcmul_(rest, (now / norms)[:, None, None])
    for weight, own in zip(weights, noisy, strict=True):
        weight.data = own
    try:
        yield
    finally:
        for weight, own in zip(weights, clean, strict=True):
            weight.data = own
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if gradients:  # through |w| too
        learned = [i for i, weight in enumerate(weights) if weight.grad is not None]
        found = torch.stack(gradients)
        along = (found * rest[learned]).sum((1, 2)) / (norms * now)[learned].clamp_min(1e-20)
        found.mul_(kept[learned, None, None]).addcmul_(torch.stack([clean[i] for i in learned]), along[:, None, None])
        torch._foreach_copy_(gradients, list(found.unbind()))


@torch.no_grad()
def measure_shrinkage(
    model: Any, linears: Mapping[str, nn.Linear], errors: Mapping[str, Tensor], batches: Sequence[Tensor]
) -> dict[str, float]:
    """What outputs lack with these errors, -⟨E x, W x⟩ / ⟨W x, W x⟩ over all tokens: s of each linear, 0 where no token came.

    Args:
        model: takes tokens; the linears are in it. errors: (out_features, in_features) by name. batches: of tokens,
            (sequences, seq_len) int64 each.
    """
    sums = {name: torch.zeros(2, device=linear.weight.device) for name, linear in linears.items()}

    def watch(name: str, linear: nn.Linear, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        ours = nn.functional.linear(inputs[0], linear.weight).float()
        error = nn.functional.linear(inputs[0], errors[name].to(inputs[0].dtype)).float()
        sums[name] += torch.stack([-(ours * error).sum(), ours.square().sum()])

    with contextlib.ExitStack() as hooks:
        for name, linear in linears.items():
            hook: Callable = functools.partial(watch, name)
            hooks.enter_context(linear.register_forward_hook(hook))
        for tokens in batches:
            model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    return {name: (own[0] / own[1]).item() if own[1] > 0 else 0.0 for name, own in sums.items()}
