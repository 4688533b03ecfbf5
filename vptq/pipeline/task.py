"""Quantize linears as a task of their own: weights from files, Hessians, settings in; finished work files out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.backend import use_kernels
from vptq.checkpoint.names import to_tensors
from vptq.models.stream import TensorSource
from vptq.pipeline.codebooks import load_codebooks
from vptq.pipeline.hessians import Moments
from vptq.pipeline.job import Job
from vptq.pipeline.plan import LinearPlan
from vptq.quantize.linear import LinearInput, in_batches, quantize_linears


@dataclass(frozen=True)
class LinearTask:
    """All a worker needs, small enough to send: files are named, not carried."""

    plan: LinearPlan
    dtype: torch.dtype
    codebook: Path | None = None


@dataclass(frozen=True)
class Finished:
    """A quantized linear on its way to disk: stored tensors, on the CPU, and figures."""

    name: str
    tensors: dict[str, Tensor]
    figures: dict[str, Any]


def make_batches(tasks: list[LinearTask], device: torch.device) -> list[list[LinearTask]]:
    """Tasks that are quantized together: of one shape and setting, where kernels can fill the GPU only so."""
    if not use_kernels(device):
        return [[task] for task in tasks]
    return in_batches(tasks, lambda task: (task.plan.layer.geometry, task.plan.config, task.dtype))


def quantize_batch(
    tasks: Sequence[LinearTask], source: TensorSource, hessians: Mapping[str, Moments], device: torch.device
) -> list[Finished]:
    """Quantize linears of one shape and setting. hessians: by suffix."""
    inputs = []
    for task in tasks:
        moments = hessians[task.plan.info.suffix]
        weight = source.get(f"{task.plan.name}.weight").to(device, non_blocking=True)
        drift = None if moments.drift is None else moments.drift.to(device)
        inputs.append(LinearInput(task.plan.name, weight, moments.hessian.to(device), drift))
    config, dtype = tasks[0].plan.config, tasks[0].dtype
    path = tasks[0].codebook
    shared = None if path is None else load_codebooks(path, config.bitwidth, config.bsize, dtype, device)
    found = quantize_linears(inputs, config, storage_dtype=dtype, shared=shared)
    finished = []
    for task, (quantized, report) in zip(tasks, found, strict=True):
        plan = task.plan
        figures = {
            "name": plan.name,
            "shape": [plan.info.out_features, plan.info.in_features],
            "bits": plan.bits.stored / plan.bits.num_weights,
            "tokens": hessians[plan.info.suffix].num_tokens,
            "codebook_use": codebook_use(quantized.indices, plan.config.num_centroids[1]),
            **asdict(report),
            "kmeans_iterations": list(report.kmeans_iterations),
            "kmeans_objectives": list(report.kmeans_objectives),
        }
        tensors = {key: tensor.cpu() for key, tensor in to_tensors(quantized, plan.layer, task.dtype).items()}
        finished.append(Finished(plan.name, tensors, figures))
    return finished


def codebook_use(indices: Tensor, num_centroids: int) -> float:
    """Entropy of a linear's main indices, as a part of the most it can be; mean over groups.

    indices: (group_num, ...) integer.
    """
    if num_centroids < 2:
        return 1.0
    counts = torch.stack([torch.bincount(own.flatten().long(), minlength=num_centroids) for own in indices]).double()
    shares = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return (entropy.mean() / math.log(num_centroids)).item()


def keep(finished: Finished, job: Job, worker: int) -> dict[str, Any]:
    """Save and log one linear; returns its figures (see `LinearReport`, with shape and stored bits)."""
    job.save_linear(finished.name, finished.tensors, finished.figures)
    job.log(log_line(finished.figures), worker)
    return finished.figures


def log_line(figures: dict[str, Any]) -> str:
    """One line for a linear: shape, bits, errors, k-means iterations, seconds, and damping where it had to be raised."""
    out_features, in_features = figures["shape"]
    names = {"error_kmeans": "k-means", "error_sweep": "sweep", "error_residual": "residual", "error_refined": "refined"}
    errors = "  ".join(f"{name} {figures[key]:.5f}" for key, name in names.items() if figures[key] is not None)
    iterations = " ".join(map(str, figures["kmeans_iterations"]))
    kmeans = f"  k-means iterations {iterations}" if iterations else ""
    retries = figures["damping_retries"]
    damping = f"  damping raised {retries}x to {figures['damping_frac']:g}" if retries else ""
    return (
        f"{figures['name']}  {out_features}x{in_features}  {figures['bits']:.3f} bits  "
        f"proxy error: {errors}{kmeans}  {figures['seconds']:.2f} s{damping}"
    )
