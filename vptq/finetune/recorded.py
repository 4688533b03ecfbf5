"""Work of a GPU that is the same at every step, recorded once and played again (a CUDA graph): Python starts it as one.

Kernels read and write the same memory each time: what goes in is changed in place, what comes out lies where it lay before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

WARM_UPS = 2  # calls before it is recorded: kernels compile, tables are made


class Recorded:
    """A function without arguments or answer, for calls whose tensors, shapes and order of work never change.

    Args:
        work: the function. learners: parameters whose gradients it makes; none of them may have one when it is called.
    Attributes:
        fault: why it can't be recorded; None while that is not known. Calls then run it as it is.
    """

    def __init__(self, work: Callable[[], None], learners: Iterable[nn.Parameter] = ()) -> None:
        self.work, self.learners = work, list(learners)
        self.fault: str | None = None
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self) -> None:
        self._calls += 1
        if self._graph is None and self.fault is None and self._calls > WARM_UPS and torch.cuda.is_available():
            self._record()
        if self._graph is None:
            self.work()
            return
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.work()
        except RuntimeError as error:  # some kernel that may not be recorded, or too little memory to keep what lies between
            self.fault = str(error).strip().split("\n")[0]
            for parameter in self.learners:
                parameter.grad = None
            torch.cuda.synchronize()
            return
        self._graph = graph
        self._gradients = [(parameter, parameter.grad) for parameter in self.learners if parameter.grad is not None]
