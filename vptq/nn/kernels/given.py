"""What a row of activations goes through before a product reads it, done by the product itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PLAIN, NORMED, GATED = 0, 1, 2  # GIVEN of numbers.cuh


@dataclass(frozen=True)
class Given:
    """What becomes of x, one row, (1, n), before anything else.

    Attributes:
        kind: PLAIN, nothing; NORMED, x / √(mean x² + epsilon) · beside; GATED, silu(x) · beside.
        beside: (n,) in x's type, 16 bits, neighbours beside each other.
    """

    kind: int = PLAIN
    beside: Tensor | None = None
    epsilon: float = 0.0

    def check(self, x: Tensor) -> None:
        """Whether kernels can do this to x, (n, columns); an error of ours where not."""
        beside = self.beside
        assert beside is None or (len(x) == 1 and x.dtype == beside.dtype and beside.is_contiguous())


AS_IT_IS = Given()


def normed(weight: Tensor, epsilon: float) -> Given:
    """Normed by the root mean square of the row, weight (n,)."""
    return Given(NORMED, weight, epsilon)


def gated(other: Tensor) -> Given:
    """x is a gate: silu(x) times the numbers of `other`, n of them."""
    return Given(GATED, other)
