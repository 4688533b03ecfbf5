"""Unpacked weights that stand in for packed ones while a model trains.

A packed linear that trains unpacks its weight on the way forward and again on the way back, for every batch, and makes its
codebook's gradient of each batch's. Here a weight W(θ) is unpacked once a step; batches multiply with it as with any other
and add up dL/dW; once a step dL/dθ = (dW/dθ)ᵀ dL/dW follows. The same gradients, for the memory of the weights and of theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """Let the linears multiply with their weights as they are now, without gradients of their own."""
        return self._standing(learn=False)

    def learning(self) -> contextlib.AbstractContextManager[None]:
        """The same, and at the end gradients of all batches' losses go on to the packed tensors that learn."""
        return self._standing(learn=True)

    @contextlib.contextmanager
    def _standing(self, learn: bool) -> Iterator[None]:
        try:
            for stand in self._stands:
                stand.unpack(learn)
            yield
            for stand in self._stands:
                stand.hand_on()
        finally:
            for stand in self._stands:
                stand.leave()


class _StandIn:
    """The unpacked weight of one linear, and the sum of its gradients."""

    def __init__(self, linear: VQuantLinear, dtype: torch.dtype) -> None:
        self.linear, self.dtype = linear, dtype
        self.learns = linear.learns()
        self._weight: Tensor | None = None
        self._sum: Tensor | None = None
        self._hook: RemovableHandle | None = None  # for a step only: what torch keeps would keep this object for ever

    def unpack(self, learn: bool) -> None:
        """Put the weight as it is now into the linear."""
        if self._weight is None or self.learns:
            with torch.no_grad():
                made = self.linear.unpacked_weight().to(self.dtype)
            if self._weight is None:
                self._weight = made
            else:
                self._weight.data.copy_(made)
        self._weight.requires_grad_(learn and self.learns)
        if self._weight.requires_grad:
            self._hook = self._weight.register_post_accumulate_grad_hook(self._add)
        self.linear.stand_in = self._weight

    def _add(self, weight: Tensor) -> None:
        """Add up in float32, whatever the products are in."""
        assert weight.grad is not None
        if self._sum is None:
            self._sum = weight.grad.float()
        else:
            self._sum.add_(weight.grad)
        weight.grad = None

    def hand_on(self) -> None:
        """From the weight's gradient to those of the packed tensors."""
        if self._sum is None:
            return
        with torch.enable_grad():
            torch.autograd.backward(self.linear.unpacked_weight(), self._sum)
        self._sum = None

    def leave(self) -> None:
        """Let the linear multiply packed again."""
        self.linear.stand_in = None
        self._sum = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


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
