"""Quantize linears with one codebook that the whole model shares: no k-means, the sweep is all there is.

The rotated weight is Gaussian, so after one division by its size it is quantized with the codebook of a unit Gaussian. Runs
of output rows (`row_groups`) are problems of their own: a rotation, a scale and, where there is one, a metric for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.geometry import Geometry
from vptq.quantize.column_sweep import ColumnRun, refine_columns, sweep_columns
from vptq.quantize.columns import make_quantizer
from vptq.quantize.layout import as_batch
from vptq.quantize.metric import InverseFactor, trace_products
from vptq.quantize.problem import LinearInput, LinearReport, column_order, factor_named, rotated, rotation_of
from vptq.quantize.result import Codebook, QuantizedWeight, spread_rows
from vptq.quantize.segments import Segment
from vptq.quantize.sweep import sweep_linears


@dataclass
class _Rows:
    """One run of output rows of one linear: what is to be quantized, and what it is quantized to so far."""

    weight: Tensor  # (rows, in) float32, rotated, permuted
    metric: Tensor  # (in, in) float32, rotated, permuted, not damped
    factor: InverseFactor
    perm: Tensor  # (in,) int64
    size: float  # tr(W H Wᵀ)
    scale: Tensor  # (1,) or (rows,) float32, as it will be stored
    quantized: Tensor  # (rows, in) float32, in units of the scale
    codes: Tensor  # (in, vectors, stages) int32

    def error(self) -> float:
        """tr(E H Eᵀ)."""
        return trace_products(self.weight - self.quantized * spread_rows(self.scale, len(self.weight)), self.metric)

    def scaled(self) -> Tensor:
        """The weight in units of the scale."""
        return self.weight / spread_rows(self.scale, len(self.weight))


def quantize_with_shared(
    linears: Sequence[LinearInput],
    config: LinearConfig,
    geometry: Geometry,
    shared: Sequence[Codebook],
    storage_dtype: torch.dtype,
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """See `linear.quantize_linears`; all linears are of the shape that `geometry` cuts.

    Args:
        shared: main and perhaps residual codebook, for weights of unit variance.
    """
    groups = [rows for linear in linears for rows in _prepare(linear, config, geometry, storage_dtype)]
    stages = tuple(book.centroids[0].to(groups[0].weight.device) for book in shared)
    own = geometry.of_row_group()
    _sweep(groups, stages, config, own)
    count = geometry.row_groups
    cut = [groups[i : i + count] for i in range(0, len(groups), count)]
    swept = [_relative_error(rows) for rows in cut]
    refined: list[float | None] = [None] * len(cut)
    if config.refine_iters:
        _refine(groups, stages, config, own, storage_dtype)
        refined = [_relative_error(rows) for rows in cut]
    return [
        (_collect(rows, config, geometry, shared), _report(rows, error_swept, error_refined))
        for rows, error_swept, error_refined in zip(cut, swept, refined, strict=True)
    ]


def _prepare(linear: LinearInput, config: LinearConfig, geometry: Geometry, storage_dtype: torch.dtype) -> list[_Rows]:
    weight, hessian = rotated(linear, config, geometry.row_groups)
    metrics = list(hessian) if hessian.ndim == 3 else [hessian] * geometry.row_groups
    found: list[_Rows] = []
    for rows, metric in zip(weight.chunk(geometry.row_groups), metrics, strict=True):
        if found and metric is hessian:  # one metric for all rows is factored once
            perm, factor, permuted = found[0].perm, found[0].factor, found[0].metric
        else:
            perm = column_order(metric.diagonal(), config)
            permuted = metric[perm][:, perm].contiguous()
            factor = factor_named(permuted, config, linear.name)
        own = rows[:, perm].contiguous()
        scale = _first_scale(own, config).to(storage_dtype).float()
        size = trace_products(own, permuted)
        nothing = torch.empty(0, device=own.device)
        found.append(_Rows(own, permuted, factor, perm, size, torch.where(scale > 0, scale, 1), nothing, nothing))
    return found


def _first_scale(weight: Tensor, config: LinearConfig) -> Tensor:
    """The root mean square of the rows together, or of each: (1,) or (rows,)."""
    squares = weight.double().square().mean(1)
    return (squares if config.scale_scope == "row" else squares.mean(0, keepdim=True)).sqrt()


def _sweep(groups: list[_Rows], stages: tuple[Tensor, ...], config: LinearConfig, geometry: Geometry) -> None:
    """Fills in `quantized` and `codes`, all groups side by side."""
    weights = as_batch([rows.scaled() for rows in groups])
    inv_chols = _batch_or_one([rows.factor.inv_chol for rows in groups])
    if config.has_trellis:
        quantized, codes = sweep_columns(
            weights, inv_chols, make_quantizer(stages, config, geometry.out_features, geometry.ring_len), config.blocksize
        )
        for rows, own, found in zip(groups, quantized, codes, strict=True):
            rows.quantized, rows.codes = own.contiguous(), found
        return
    segments = [[Segment(0, geometry.in_features, stages)]] * len(groups)
    every = inv_chols.expand(len(groups), -1, -1)
    for rows, result in zip(groups, sweep_linears(weights, every, segments, geometry, config.blocksize), strict=True):
        rows.quantized = result.quantized
        rows.codes = torch.stack([index.T for index in result.indices[0]], 2).int()


def _refine(
    groups: list[_Rows], stages: tuple[Tensor, ...], config: LinearConfig, geometry: Geometry, storage_dtype: torch.dtype
) -> None:
    """`config.refine_iters` rounds of scale, then indices, in place; each group keeps what is better."""
    quantizer = make_quantizer(stages, config, geometry.out_features, geometry.ring_len)
    metrics = _batch_or_one([rows.metric for rows in groups])
    errors = [rows.error() for rows in groups]
    for _ in range(config.refine_iters):
        for number, rows in enumerate(groups):
            old = rows.scale
            rows.scale = _best_scale(rows).to(storage_dtype).float()
            reached = rows.error()
            if reached < errors[number]:
                errors[number] = reached
            else:
                rows.scale = old
        weights, quantized = as_batch([rows.scaled() for rows in groups]), as_batch([rows.quantized for rows in groups])
        run = ColumnRun(0, geometry.in_features, quantizer, as_batch([rows.codes for rows in groups]))
        found, codes = refine_columns(weights, quantized, metrics, [run], config.blocksize)
        for number, rows in enumerate(groups):
            kept = rows.quantized, rows.codes
            rows.quantized, rows.codes = found[number].contiguous(), codes[0][number]
            reached = rows.error()
            if reached < errors[number]:
                errors[number] = reached
            else:
                rows.quantized, rows.codes = kept


def _best_scale(rows: _Rows) -> Tensor:
    """The scale(s) with the least error for the indices as they are: tr(W H Qᵀ) / tr(Q H Qᵀ), of all rows or of each."""
    products = (rows.quantized @ rows.metric).double()
    top, bottom = (products * rows.weight).sum(1), (products * rows.quantized).sum(1)
    if len(rows.scale) == 1:
        top, bottom = top.sum(0, keepdim=True), bottom.sum(0, keepdim=True)
    best = top / bottom
    return torch.where((bottom > 0) & (best > 0), best, rows.scale.double())


def _batch_or_one(matrices: list[Tensor]) -> Tensor:
    """A batch; of one matrix that stands for all, that one: (1, ...)."""
    same = all(matrix is matrices[0] for matrix in matrices)
    return as_batch(matrices[:1] if same else matrices)


def _relative_error(groups: list[_Rows]) -> float:
    size = sum(rows.size for rows in groups)
    error = max(sum(rows.error() for rows in groups), 0.0)
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def _report(groups: list[_Rows], error_sweep: float, error_refined: float | None) -> LinearReport:
    return LinearReport(
        error_kmeans=None,
        error_sweep=error_sweep,
        error_residual=None,
        error_refined=error_refined,
        error=error_sweep if error_refined is None else error_refined,
        damping_frac=max(rows.factor.damping_frac for rows in groups),
        damping_retries=max(rows.factor.retries for rows in groups),
        kmeans_iterations=(),
        kmeans_objectives=(),
        weight=sum(rows.size for rows in groups),
        seconds=0.0,
    )


def _collect(groups: list[_Rows], config: LinearConfig, geometry: Geometry, shared: Sequence[Codebook]) -> QuantizedWeight:
    """Groups below one another, columns in original order."""
    along_out = geometry.vector_quant_dim == "out"  # else columns of codes are not columns of the weight, nor permuted
    codes = torch.cat([rows.codes[torch.argsort(rows.perm)] if along_out else rows.codes for rows in groups], 1)
    residual = shared[1] if len(shared) > 1 else None
    return QuantizedWeight(
        geometry=geometry,
        codebook=shared[0],
        indices=codes[None, :, :, 0].transpose(1, 2).contiguous(),
        residual_codebook=residual,
        residual_indices=None if residual is None else codes[None, :, :, 1].transpose(1, 2).contiguous(),
        row_scale=torch.cat([rows.scale for rows in groups]),
        rotation=rotation_of(config, (geometry.out_features, geometry.in_features), geometry.row_groups),
    )
