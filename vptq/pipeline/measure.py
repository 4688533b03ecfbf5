"""Measurements that a run makes before it quantizes: token weights of the loss, and how sensitive each linear is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vptq.models.files import save_tensors
from vptq.models.stream import TensorSource
from vptq.pipeline.calibrate import Calibrator, relative_weights
from vptq.pipeline.plan import RunPlan
from vptq.quantize.metric import trace_products
from vptq.quantize.problem import LinearInput, rotated
from vptq.quantize.sensitivity import unit_error


class LossWeights:
    """Token weights of every linear, relative (of mean one) for its groups of rows, and the means they had.

    Attributes:
        relative: by full name, (row_groups, num_tokens) float32. means: by full name.
    """

    def __init__(self, absolute: Mapping[str, Tensor], plan: RunPlan) -> None:
        self.relative: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}
        for linear in plan.linears:
            found = relative_weights(absolute[linear.name], linear.layer.row_groups)
            self.relative[linear.name], self.means[linear.name] = found


def kept_weights(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Token weights from a file, or made now and kept there."""
    if path.exists():
        try:
            return load_file(path)
        except Exception:  # half of it is worth nothing
            path.unlink()
    made = make()
    save_tensors(path, made)
    return made


def measure_sensitivity(
    calibrator: Calibrator,
    plan: RunPlan,
    means: Mapping[str, float] | None,
    source: TensorSource,
    device: torch.device,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """By linear name: the predicted rise of the loss, in nats a token, for a quantizer of mean squared error one.

    Args:
        means: of the token weights; None without: then each linear counts by its error relative to its output.
        progress: called with the block that is being measured, after each batch.
    """
    found: dict[str, float] = {}
    blocks = sorted({linear.info.block for linear in plan.linears})
    for block in blocks:
        hessians = calibrator.block(block, True, block == blocks[-1], functools.partial(progress, block))
        moments = {suffix: hessian for hessian in hessians for suffix in hessian.linears}
        for linear in plan.of_block(block):
            if linear.info.suffix not in moments:
                found[linear.name] = 0.0  # no token reaches it: the run will say so
                continue
            weight = source.get(f"{linear.name}.weight").to(device)
            given = LinearInput(linear.name, weight, moments[linear.info.suffix].matrix)
            turned, hessian = rotated(given, linear.config, linear.layer.row_groups)
            error = unit_error(turned, hessian, linear.config.percdamp)
            # half of the squared gradient is the loss to second order
            found[linear.name] = error * means[linear.name] / 2 if means is not None else error / _size(turned, hessian)
    return found


def _size(weight: Tensor, hessian: Tensor) -> float:
    groups = hessian if hessian.ndim == 3 else hessian[None]
    parts = zip(weight.chunk(len(groups)), groups, strict=True)
    return max(sum(trace_products(rows, own) for rows, own in parts), 1e-300)
