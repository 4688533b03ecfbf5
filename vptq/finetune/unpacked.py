"""Unpacked weights that stand in for packed ones while a model trains.

A packed linear that trains unpacks its weight on the way forward and again on the way back, for every batch, and makes its
codebook's gradient of each batch's. Here a weight W(θ) is unpacked once a step; batches multiply with it as with any other
and add up dL/dW; once a step dL/dθ = (dW/dθ)ᵀ dL/dW follows. The same gradients, for the memory of the weights and of theirs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vptq.finetune.recorded import Recorded
from vptq.models.device import free_memory
from vptq.nn.vquant_linear import VQuantLinear

FREE_FRACTION = 0.4  # of the free memory, that weights and their gradients may take
SUM_BYTES = 4  # of a gradient's number


class Unpacked:
    """The packed linears of a model, or of a part of it, for the length of a training.

    Args:
        model: what learns in it has to be marked already. dtype: float type of the products.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._stands = [_StandIn(linear, dtype) for linear in unpackable(model)]
        self._learning = [stand for stand in self._stands if stand.learns]
        found = {id(own): own for stand in self._learning for own in stand.linear.learners()}
        self._learners = list(found.values())
        self._made = False  # all weights: from then on they lie where they lie
        on_gpu = any(own.is_cuda for own in self._learners)
        make, give = functools.partial(_make_anew, self._learning), functools.partial(_hand_on, self._learning)
        self._refresh: Callable[[], None] = Recorded(make) if on_gpu else make
        self._give: Callable[[], None] = Recorded(give, self._learners) if on_gpu else give

    @property
    def fault(self) -> str | None:
        """Why a GPU's work for a step can't be recorded, which makes steps slower; None where it can, or has not been tried."""
        return next((own.fault for own in (self._refresh, self._give) if isinstance(own, Recorded) and own.fault), None)

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """Let the linears multiply with their weights as they are now, without gradients of their own."""
        return self._standing(learn=False)

    def learning(self) -> contextlib.AbstractContextManager[None]:
        """The same, and at the end gradients of all batches' losses go on to the packed tensors that learn."""
        return self._standing(learn=True)

    def _is_usual(self) -> bool:
        """Whether a step's gradients come from all linears, and from them alone: else there is other work than was recorded."""
        everywhere = all(stand.has_gradient for stand in self._learning)
        return everywhere and all(learner.grad is None for learner in self._learners)

    @contextlib.contextmanager
    def _standing(self, learn: bool) -> Iterator[None]:
        try:
            if self._made:
                self._refresh()
            else:
                _make_anew(self._stands)
                self._made = True
            for stand in self._stands:
                stand.enter(learn)
            yield
            if learn:
                if self._is_usual():
                    self._give()
                else:
                    _hand_on(self._learning)
        finally:
            for stand in self._stands:
                stand.leave()


class _StandIn:
    """The unpacked weight of one linear, and the sum of its gradients."""

    def __init__(self, linear: VQuantLinear, dtype: torch.dtype) -> None:
        self.linear, self.dtype = linear, dtype
        self.learns = bool(linear.learners())
        self._weight: Tensor | None = None
        self._sum: Tensor | None = None  # from the first gradient on
        self.has_gradient = False  # of this step
        self._hook: RemovableHandle | None = None  # for a step only: what torch keeps would keep this object for ever

    @torch.no_grad()
    def unpack(self) -> None:
        """Make the weight, or bring it to what it is now."""
        made = self.linear.unpacked_weight()
        if self._weight is None:
            self._weight = made.to(self.dtype)
        else:
            self._weight.data.copy_(made)

    def enter(self, learn: bool) -> None:
        """Put the weight into the linear."""
        assert self._weight is not None
        self._weight.requires_grad_(learn and self.learns)
        if self._weight.requires_grad:
            self._hook = self._weight.register_post_accumulate_grad_hook(self._add)
        self.linear.stand_in = self._weight

    def _add(self, weight: Tensor) -> None:
        """Add up in float32, whatever the products are in."""
        assert weight.grad is not None
        if self._sum is None:
            self._sum = torch.empty_like(weight, dtype=torch.float32, requires_grad=False)
        if self.has_gradient:
            self._sum.add_(weight.grad)
        else:
            self._sum.copy_(weight.grad)
        self.has_gradient, weight.grad = True, None

    def hand_on(self) -> None:
        """From the weight's gradient to those of the packed tensors."""
        if self.has_gradient:
            with torch.enable_grad():
                torch.autograd.backward(self.linear.unpacked_weight(), self._sum)

    def leave(self) -> None:
        """Let the linear multiply packed again."""
        self.linear.stand_in = None
        self.has_gradient = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _make_anew(stands: list[_StandIn]) -> None:
    for stand in stands:
        stand.unpack()


def _hand_on(stands: list[_StandIn]) -> None:
    for stand in stands:
        stand.hand_on()


def unpackable(model: nn.Module) -> list[VQuantLinear]:
    """The packed linears whose products are with the weight as a whole."""
    return [module for module in model.modules() if isinstance(module, VQuantLinear) and module.unpacks_whole]


def bytes_unpacked(model: nn.Module, dtype: torch.dtype) -> int:
    """What the weights of its packed linears and their gradients take. The model may be empty."""
    each = dtype.itemsize + SUM_BYTES
    return sum(linear.out_features * linear.in_features * each for linear in unpackable(model))


def fits(model: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether unpacked weights leave enough of the free memory to the rest."""
    return bytes_unpacked(model, dtype) <= FREE_FRACTION * free_memory(device)
