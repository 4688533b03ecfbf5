"""Measurements that a run makes before it quantizes: token weights of the loss, and how sensitive each linear is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from vptq.pipeline.job import Job
from vptq.pipeline.plan import LinearPlan
from vptq.quantize.metric import trace_products
from vptq.quantize.problem import LinearInput, rotated
from vptq.quantize.sensitivity import unit_error


def mean_weights(job: Job, num_runs: int, linears: Iterable[str]) -> dict[str, float]:
    """By full name, the mean of a linear's token weights over its groups of rows and the whole text."""
    found = {}
    for name in linears:
        parts = [job.token_weights(run, name) for run in range(num_runs)]
        found[name] = sum(part.double().sum().item() for part in parts) / sum(part.numel() for part in parts)
    return found


def measure_linear(linear: LinearPlan, weight: Tensor, hessian: Tensor, mean: float | None) -> float:
    """The predicted rise of the loss, in nats a token, for a quantizer of mean squared error one.

    Args:
        weight: (out_features, in_features). hessian: (in_features, in_features), or with row groups (groups, ...).
        mean: of the token weights; None without: then a linear counts by its error relative to its output.
    """
    given = LinearInput(linear.name, weight, hessian)
    turned, metric = rotated(given, linear.config, linear.layer.row_groups)
    error = unit_error(turned, metric, linear.config.percdamp)
    # half of the squared gradient is the loss to second order
    return error * mean / 2 if mean is not None else error / _size(turned, metric)


def _size(weight: Tensor, hessian: Tensor) -> float:
    groups = hessian if hessian.ndim == 3 else hessian[None]
    parts = zip(weight.chunk(len(groups)), groups, strict=True)
    return max(sum(trace_products(rows, own) for rows, own in parts), 1e-300)
