"""Hessians of a model that is in memory as a whole, weighed by its loss: forward and backward once gives those of any linears.

The formula is that of `calibration.fisher`; here gradients need not be kept until their inputs come by again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vptq.calibration.fisher import weights_of
from vptq.calibration.hessian import HessianAccumulator
from vptq.errors import NumericalError


class LossHessians:
    """Watches linears while a loss, summed over tokens, goes forward and backward.

    Args:
        linears: what to watch, by full name. row_groups: runs of output rows of each that have a Hessian of their own.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], row_groups: Mapping[str, int]) -> None:
        self.linears = linears
        self._sums = {
            name: HessianAccumulator(linear.in_features, linear.weight.device, row_groups[name])
            for name, linear in linears.items()
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sum up what goes through the linears."""
        with contextlib.ExitStack() as hooks:
            for name, linear in self.linears.items():
                hooks.enter_context(linear.register_forward_hook(self._hook(self._sums[name])))
            yield

    def collect(self) -> dict[str, Tensor]:
        """Mean over tokens of s x xᵀ by name: (row_groups, in_features, in_features) float32; identities where none came.

        Empties the watcher.

        Raises:
            NumericalError: activations or gradients that are not finite; names the linears.
        """
        found: dict[str, Tensor] = {}
        for name in list(self._sums):
            sums = self._sums.pop(name)  # its float64 sums are as large as all that is made of them
            count, total = sums.num_tokens, sums.take().total
            found[name] = total.div_(count) if count else torch.eye(total.shape[-1], device=total.device).expand_as(total)
        bad = [name for name, own in found.items() if not bool(torch.isfinite(own.diagonal(dim1=-2, dim2=-1)).all())]
        if bad:
            raise NumericalError("activations or gradients are not finite at these linears", where=bad, hint="use other text")
        return found

    @staticmethod
    def _hook(sums: HessianAccumulator) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = inputs[0].detach()

            def add(gradient: Tensor) -> None:
                sums.add(rows, weights_of(gradient, sums.groups))

            output.register_hook(add)

        return hook
