"""Keep what was made of a linear's tensors until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """One value, and which tensors it was made of, in which state.

    Writes are seen by the count that torch keeps of them; those through `.data` are not counted. Of tensors made in inference
    mode nothing is known, so nothing is kept. Copies and pickles begin empty.
    """

    def __init__(self) -> None:
        self._value: tuple[T] | None = None
        self._tensors: tuple[Tensor, ...] = ()
        self._state: Any = None

    def __bool__(self) -> bool:
        return self._value is not None

    def get(self, tensors: Mapping[str, Tensor], make: Callable[[], T], *, also: Any = None) -> T:
        """The value kept for these tensors (of any shape) as they are, or a new one. also: what else it depends on.

        It is made outside of inference mode and without gradients, so that it serves later calls of either kind.
        """
        given = tuple(tensors.values())
        state = also, tuple(None if tensor.is_inference() else tensor._version for tensor in given)
        if self._value is not None and state == self._state and self._are(given):
            return self._value[0]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        if None not in state[1]:
            self._value, self._tensors, self._state = (made,), given, state
        return made

    def peek(self) -> T | None:
        """The value as it was kept, whether it still holds or not."""
        return None if self._value is None else self._value[0]

    def drop(self) -> None:
        """Forget the value."""
        self._value, self._tensors, self._state = None, (), None

    def _are(self, tensors: tuple[Tensor, ...]) -> bool:
        return len(tensors) == len(self._tensors) and all(a is b for a, b in zip(tensors, self._tensors, strict=True))

    def __reduce__(self) -> tuple:
        return Kept, ()
