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
        self._kept: dict[int, tuple[Tensor, int, Tensor]] = {}  # by linear: its x, in which state, and its product
        self._refused: set[tuple[int, int]] = set()  # pairs that don't go together
        self._first: int | None = None
        self._last_x: weakref.ref[Tensor] | None = None

    def product(
        self, linear: Linear, x: Tensor, multiply_all: Callable[[Sequence[Linear], Tensor], list[Tensor] | None]
    ) -> Tensor | None:
        """What `linear` makes of x: kept, or made now together with those that followed it last time.

        Args:
            multiply_all: the products of some linears with x; None where they can't be made together.
        Returns:
            None where this linear has no company this time. Tensors made in inference mode have none: torch does not tell
            whether they were written to.
        """
        if x.is_inference():
            return None
        kept = self._kept.pop(id(linear), None)
        if kept is not None and kept[0] is x and kept[1] == x._version:
            return kept[2]
        self._learn(linear, x)
        known = self._followers.get(id(linear), [])
        followers = [other for other in known if self._kept.pop(id(other), None) is None]
        self._followers[id(linear)] = followers
        if not followers:
            return None
        found = multiply_all([linear, *followers], x)
        if found is None:  # without the last of them the next time
            self._followers[id(linear)] = followers[:-1]
            self._refused.add((id(linear), id(followers[-1])))
            return None
        for other, y in zip(followers, found[1:], strict=True):
            self._kept[id(other)] = x, x._version, y
        return found[0]

    def _learn(self, linear: Linear, x: Tensor) -> None:
        first = self._first
        if self._last_x is not None and self._last_x() is x and first is not None and first != id(linear):
            known = self._followers.get(first, [])
            if (first, id(linear)) not in self._refused and not any(other is linear for other in known):
                self._followers[first] = [*known, linear]
        else:
            self._first, self._last_x = id(linear), weakref.ref(x)

    def forget(self) -> None:
        """Drop products that are kept, and what was found out."""
        self._kept.clear()
        self._followers.clear()
        self._refused.clear()

    def __reduce__(self) -> tuple:
        return Companions, ()
