"""How much a linear's weight matters: what a quantizer's error costs under its metric, before anything is quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.quantize.metric import factor_inverse


def unit_error(weight: Tensor, hessian: Tensor, damping_frac: float) -> float:
    """tr(E H Eᵀ) that the sweep leaves of a rotated weight with a quantizer of mean squared error one on a unit Gaussian.

    With H = L D Lᵀ the sweep's error is Σ_i d_i ‖e_i‖² over columns i, e_i what the quantizer leaves: for numbers of one
    variance σ² it is rows · σ² · Σ_i d_i, d_i = 1 / U_ii².

    Args:
        weight: (out_features, in_features) float. hessian: (in, in) float, or (groups, in, in) for runs of output rows.
    """
    groups = hessian if hessian.ndim == 3 else hessian[None]
    total = 0.0
    for rows, own in zip(weight.chunk(len(groups)), groups, strict=True):
        pivots = factor_inverse(own.float(), damping_frac).inv_chol.diagonal().double().reciprocal().square()
        total += (torch.mean(rows.double().square()) * len(rows) * pivots.sum()).item()
    return total
