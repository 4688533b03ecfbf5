"""Linears that are given one input, as queries, keys and values are: found out while they run, then multiplied together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

Linear = TypeVar("Linear")


class Companions(Generic[Linear]):
    """The packed linears of one parent module, and which of them were last given the same tensor one after the other.

    The first of them to be called multiplies for the others too, and they take what was kept for them. A product that nobody
    fetched before the first one is called again is not made a second time. Copies and pickles begin empty.
    """

    def __init__(self) -> None:
        self._followers: dict[int, list[Linear]] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by linear: its x, and its product
        self._first: int | None = None
        self._last_x: weakref.ref[Tensor] | None = None

    def product(
        self, linear: Linear, x: Tensor, multiply_all: Callable[[Sequence[Linear], Tensor], list[Tensor] | None]
    ) -> Tensor | None:
        """What `linear` makes of x: kept, or made now together with those that followed it last time.

        Args:
            multiply_all: the products of some linears with x; None where they can't be made together.
        Returns:
            None where this linear has no company this time.
        """
        kept = self._kept.pop(id(linear), None)
        if kept is not None and kept[0] is x:
            return kept[1]
        self._learn(linear, x)
        followers = self._followers.get(id(linear), [])
        followers[:] = [other for other in followers if self._kept.pop(id(other), None) is None]
        if not followers:
            return None
        found = multiply_all([linear, *followers], x)
        if found is None:
            followers.clear()
            return None
        for other, y in zip(followers, found[1:], strict=True):
            self._kept[id(other)] = x, y
        return found[0]

    def _learn(self, linear: Linear, x: Tensor) -> None:
        if self._last_x is not None and self._last_x() is x and self._first not in (None, id(linear)):
            assert self._first is not None
            followers = self._followers.setdefault(self._first, [])
            if not any(other is linear for other in followers):
                followers.append(linear)
        else:
            self._first, self._last_x = id(linear), weakref.ref(x)

    def forget(self) -> None:
        """Drop products that are kept."""
        self._kept.clear()

    def __reduce__(self) -> tuple:
        return Companions, ()
