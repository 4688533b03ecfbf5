"""Quantize one linear as a task of its own: weight from its file, Hessian, settings in; a finished work file out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vptq.checkpoint.names import to_tensors
from vptq.models.stream import FolderSource
from vptq.pipeline.job import Job
from vptq.pipeline.plan import LinearPlan
from vptq.quantize.linear import quantize_linear


@dataclass(frozen=True)
class LinearTask:
    """All a worker needs, small enough to send: files are named, not carried."""

    plan: LinearPlan
    dtype: torch.dtype


def run_task(
    task: LinearTask, source: FolderSource, hessian: Tensor, job: Job, device: torch.device, worker: int
) -> dict[str, Any]:
    """Quantize, save, log; returns the figures (see `LinearReport`, with shape and stored bits)."""
    plan = task.plan
    weight = source.get(f"{plan.name}.weight").to(device)
    quantized, report = quantize_linear(weight, hessian.to(device), plan.config, name=plan.name, storage_dtype=task.dtype)
    figures = {
        "name": plan.name,
        "shape": [plan.info.out_features, plan.info.in_features],
        "bits": plan.bits.stored / plan.bits.num_weights,
        **asdict(report),
        "kmeans_iterations": list(report.kmeans_iterations),
    }
    job.save_linear(plan.name, to_tensors(quantized, plan.layer, task.dtype), figures)
    job.log(log_line(figures), worker)
    return figures


def log_line(figures: dict[str, Any]) -> str:
    """One line for a linear: shape, bits, errors by stage, seconds, and damping where it had to be raised."""
    out_features, in_features = figures["shape"]
    residual = "" if figures["error_residual"] is None else f"  residual {figures['error_residual']:.5f}"
    retries = figures["damping_retries"]
    damping = f"  damping raised {retries}x to {figures['damping_frac']:g}" if retries else ""
    return (
        f"{figures['name']}  {out_features}x{in_features}  {figures['bits']:.3f} bits  "
        f"proxy error: k-means {figures['error_kmeans']:.5f}  sweep {figures['error_sweep']:.5f}{residual}  "
        f"{figures['seconds']:.1f} s{damping}"
    )
