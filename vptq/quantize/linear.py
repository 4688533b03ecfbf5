"""Quantize linears: with codebooks of their own, or with one that the whole model shares."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.errors import UsageError
from vptq.geometry import Geometry, plan_geometry
from vptq.quantize.own_codebooks import quantize_with_own
from vptq.quantize.problem import LinearInput, LinearReport, check_input
from vptq.quantize.result import Codebook, QuantizedWeight
from vptq.quantize.shared_codebook import quantize_with_shared

T = TypeVar("T")
BATCH_VECTORS = 1 << 20  # about what fills a large GPU
BATCH_METRIC = 1 << 27  # numbers of all factors of a batch: half a gigabyte


def in_batches(linears: Iterable[T], form: Callable[[T], tuple[Geometry, LinearConfig, Hashable]]) -> list[list[T]]:
    """Linears that are quantized together: of one form, no more of them than fill a large GPU and fit its memory.

    form: of one linear: how it is cut, its settings, and whatever else must be the same.
    """
    batches: dict[Hashable, list[list[T]]] = {}
    for linear in linears:
        geometry, config, _ = key = form(linear)
        alike = batches.setdefault(key, [[]])
        if len(alike[-1]) >= _most_together(geometry, config):
            alike.append([])
        alike[-1].append(linear)
    return [batch for alike in batches.values() for batch in alike]


def _most_together(geometry: Geometry, config: LinearConfig) -> int:
    by_metric = BATCH_METRIC // (geometry.in_features**2 * geometry.row_groups)
    return max(1, by_metric if config.has_trellis else min(by_metric, BATCH_VECTORS // geometry.num_vectors))


def quantize_linear(
    weight: Tensor,
    hessian: Tensor,
    config: LinearConfig,
    *,
    name: str = "linear",
    storage_dtype: torch.dtype = torch.float16,
    shared: Sequence[Codebook] | None = None,
) -> tuple[QuantizedWeight, LinearReport]:
    """Choose codebooks and indices that keep tr(E H Eᵀ) small (VPTQ, arXiv:2409.17066, algorithm 1).

    Args:
        weight: (out_features, in_features) float, finite. Not modified.
        hessian: (in_features, in_features) float, symmetric: mean over tokens of x xᵀ. Not modified. Or one for each run of
            output rows, (row_groups, in_features, in_features), with a shared codebook.
        config: settings; `config.kseed` and `name` seed the k-means.
        storage_dtype: float type of the file, which codebooks and scales are rounded to before they are used.
        shared: main and, if there is one, residual codebook of the model, where `config.codebook_scope` is shared; each
            (1, k, vector_len), for weights of unit variance.
    Returns:
        The quantized weight and its figures.
    Raises:
        UsageError: settings that do not fit the shape.   NumericalError: non-finite weight or Hessian, or one that can't
        be factored; names the linear.
    """
    return quantize_linears([LinearInput(name, weight, hessian)], config, storage_dtype=storage_dtype, shared=shared)[0]


def quantize_linears(
    linears: Sequence[LinearInput],
    config: LinearConfig,
    *,
    storage_dtype: torch.dtype = torch.float16,
    shared: Sequence[Codebook] | None = None,
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """`quantize_linear` for several linears of one shape: together they fill a GPU; each comes out the same bits as alone."""
    started = time.perf_counter()
    shape = linears[0].weight.shape
    geometry, faults = plan_geometry(shape[0], shape[1], config)
    if geometry is None or any(linear.weight.shape != shape for linear in linears):
        names = ", ".join(f"`{linear.name}`" for linear in linears)
        raise UsageError(f"{names} can't be cut as the settings ask", where=faults or ["their shapes differ"])
    if config.is_shared and not shared:
        raise UsageError("codebook_scope shared needs the codebook that is shared")
    for linear in linears:
        check_input(linear, geometry.row_groups)
    device = linears[0].weight.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # where kernels are launched
        if config.is_shared and shared:
            found = quantize_with_shared(linears, config, geometry, shared, storage_dtype)
        else:
            found = quantize_with_own(linears, config, geometry, storage_dtype)
    seconds = (time.perf_counter() - started) / len(linears)
    return [(quantized, replace(report, seconds=seconds)) for quantized, report in found]
