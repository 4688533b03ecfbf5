"""The metric: how much an error in each direction costs. Damp it, factor it, measure with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.errors import NumericalError

MAX_RETRIES = 8
FIRST_RETRY_FRAC = 1e-4


@dataclass(frozen=True)
class InverseFactor:
    """U with H⁻¹ = Uᵀ U for a damped, permuted metric H.

    Attributes:
        inv_chol: (in_features, in_features) float32, upper triangular.
        damping_frac: fraction of the mean diagonal that was added in the end.
        retries: how often the damping had to be raised tenfold.
    """

    inv_chol: Tensor
    damping_frac: float
    retries: int


def scale_metric(hessian: Tensor, scale: Tensor) -> Tensor:
    """H' = S H S, the metric of W' = (W - offset) / scale. (in, in), (in,) -> (in, in). The reference leaves this out."""
    return hessian * scale[:, None] * scale[None, :]


def factor_inverse(metric: Tensor, damping_frac: float) -> InverseFactor:
    """Factor the inverse of `metric + damping_frac * mean(diag) * I` in float64, damping more where that fails.

    With J the reversal of rows, chol(J H J) = L gives H = A Aᵀ with A = J L J upper, so U = A⁻¹: one factorisation and
    one triangular inverse, with no inverse of an inverse.

    Args:
        metric: (in_features, in_features) float, symmetric, already permuted. Not modified.
    Raises:
        NumericalError: no damping up to 10^8 times the first one makes it positive definite.
    """
    mean = metric.diagonal().double().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    frac = damping_frac
    for retry in range(MAX_RETRIES + 1):
        inverse = _inverse_factor(metric, frac * mean)
        if inverse is not None:
            return InverseFactor(inverse, frac, retry)
        frac = frac * 10 if frac > 0 else FIRST_RETRY_FRAC
    raise NumericalError(
        "the Hessian can't be factored, however much it is damped",
        hint="calibrate with more tokens, or look for extreme activations in this model",
    )


def _inverse_factor(metric: Tensor, damping: Tensor) -> Tensor | None:
    """U in float32, or None. A large layer's float64 matrices are gigabytes: at most two live at a time."""
    reversed_metric = metric.flip(0, 1).double()
    reversed_metric.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(reversed_metric)
    del reversed_metric
    if failed.item():
        return None
    upper = lower.mT.flip(0, 1).mT  # columns first, as the solver takes it without a copy
    del lower
    inverse = torch.eye(len(upper), dtype=torch.float64, device=upper.device).mT
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    del upper
    return inverse.to(torch.float32, memory_format=torch.contiguous_format) if torch.isfinite(inverse).all() else None


def trace_products(rows: Tensor, metric: Tensor) -> float:
    """tr(E H Eᵀ): rows (n, in_features) float32, metric (in_features, in_features) float32; summed in float64."""
    return ((rows @ metric).double() * rows.double()).sum().item()


class ProxyError:
    """tr(E H Eᵀ) / tr(W H Wᵀ), E = weight - quantized, all in original column order and scale; undamped H.

    Args:
        weight: (out_features, in_features) float32. hessian: (in_features, in_features) float32.
    """

    def __init__(self, weight: Tensor, hessian: Tensor) -> None:
        self.weight, self.hessian = weight, hessian
        self.denominator = self._trace(weight)

    def _trace(self, rows: Tensor) -> float:
        return trace_products(rows, self.hessian)

    def of(self, quantized: Tensor) -> float:
        """The relative error of (out_features, in_features) float32; 0 if both traces are zero."""
        numerator = self._trace(self.weight - quantized)
        if self.denominator <= 0:
            return 0.0 if numerator <= 0 else float("inf")
        return max(numerator, 0.0) / self.denominator


def proxy_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """`ProxyError` for one quantized weight; all float32, weights (out_features, in_features)."""
    return ProxyError(weight, hessian).of(quantized)
