"""Quantize one linear: reads like the paper."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.errors import NumericalError, UsageError, VptqError
from vptq.geometry import Geometry, plan_geometry
from vptq.quantize.codebook import store_codebook
from vptq.quantize.kmeans import KMeansResult, batched_kmeans
from vptq.quantize.layout import (
    Normalisation,
    VectorWeights,
    as_batch,
    importance_order,
    normalise,
    split_vectors,
    vector_weights,
)
from vptq.quantize.metric import InverseFactor, ProxyError, factor_inverse, scale_metric
from vptq.quantize.result import Codebook, QuantizedWeight
from vptq.quantize.segments import Segment, SweepResult
from vptq.quantize.sweep import quantize_nearest, sweep_linears


@dataclass(frozen=True)
class LinearReport:
    """The figures of one quantized linear. Errors are `proxy_error`, in original column order and scale.

    Attributes:
        error_kmeans: nearest centroid, no feedback. error_sweep: main codebook with feedback.
        error_residual: with the residual stage too; None if off. error: what the stored weight has in the end.
        damping_frac, damping_retries: the damping used, and how often it had to be raised tenfold.
        kmeans_iterations: updates of each k-means, outliers first, then groups, then residual groups.
        kmeans_objectives: weighted squared error each ended with, in the same order.
        seconds: wall time; of linears quantized together, an equal share.
    """

    error_kmeans: float
    error_sweep: float
    error_residual: float | None
    error: float
    damping_frac: float
    damping_retries: int
    kmeans_iterations: tuple[int, ...]
    kmeans_objectives: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class LinearInput:
    """One linear to quantize.

    Attributes:
        name: seeds its k-means, with `kseed`; stands in messages.
        weight: (out_features, in_features) float, finite.
        hessian: (in_features, in_features) float, symmetric: mean over tokens of x xᵀ.
    """

    name: str
    weight: Tensor
    hessian: Tensor


@dataclass(frozen=True)
class Problem:
    """One linear, normalised and permuted, ready for codebooks and sweep."""

    weight: Tensor  # (out, in) float32, permuted, normalised
    metric_diagonal: Tensor  # (in,) float32, diag(H') permuted
    factor: InverseFactor
    perm: Tensor  # (in,) int64
    normalisation: Normalisation | None
    measure: ProxyError
    generator: torch.Generator
    fits: list[KMeansResult]  # every k-means so far

    def error(self, quantized: Tensor) -> float:
        """Proxy error of a quantized `weight`, back in original column order and scale."""
        unpermuted = quantized[:, torch.argsort(self.perm)]
        return self.measure.of(self.normalisation.undo(unpermuted) if self.normalisation else unpermuted)


def quantize_linear(
    weight: Tensor, hessian: Tensor, config: LinearConfig, *, name: str = "linear", storage_dtype: torch.dtype = torch.float16
) -> tuple[QuantizedWeight, LinearReport]:
    """Choose codebooks and indices that keep tr(E H Eᵀ) small (VPTQ, arXiv:2409.17066, algorithm 1).

    Args:
        weight: (out_features, in_features) float, finite. Not modified.
        hessian: (in_features, in_features) float, symmetric: mean over tokens of x xᵀ. Not modified.
        config: settings; `config.kseed` and `name` seed the k-means.
        storage_dtype: float type of the file, which codebooks and scales are rounded to before they are used.
    Returns:
        The quantized weight and its figures.
    Raises:
        UsageError: settings that do not fit the shape.   NumericalError: non-finite weight or Hessian, or one that can't
        be factored; names the linear.
    """
    return quantize_linears([LinearInput(name, weight, hessian)], config, storage_dtype=storage_dtype)[0]


def quantize_linears(
    linears: Sequence[LinearInput], config: LinearConfig, *, storage_dtype: torch.dtype = torch.float16
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """`quantize_linear` for several linears of one shape: together they fill a GPU; each comes out the same bits as alone."""
    started = time.perf_counter()
    for linear in linears:
        _check_input(linear)
    shape = linears[0].weight.shape
    geometry, faults = plan_geometry(shape[0], shape[1], config)
    if geometry is None or any(linear.weight.shape != shape for linear in linears):
        names = ", ".join(f"`{linear.name}`" for linear in linears)
        raise UsageError(f"{names} can't be cut as the settings ask", where=faults or ["their shapes differ"])
    device = linears[0].weight.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # where kernels are launched
        problems = [_prepare(linear, config, storage_dtype) for linear in linears]
        found = _quantize(problems, config, geometry, storage_dtype)
    seconds = (time.perf_counter() - started) / len(linears)
    return [(quantized, replace(report, seconds=seconds)) for quantized, report in found]


def _quantize(
    problems: list[Problem], config: LinearConfig, geometry: Geometry, storage_dtype: torch.dtype
) -> list[tuple[QuantizedWeight, LinearReport]]:
    fit = _Codebooks(config, geometry, storage_dtype, problems)
    outlier_books = fit.outliers()
    main_books = fit.groups([problem.weight for problem in problems])
    segments = [_segments(geometry, o, (m,)) for o, m in zip(outlier_books, main_books, strict=True)]
    errors_kmeans = [
        problem.error(quantize_nearest(problem.weight, own, geometry, problem.metric_diagonal))
        for problem, own in zip(problems, segments, strict=True)
    ]
    swept = _sweep(problems, segments, geometry, config)
    errors_sweep = [problem.error(result.quantized) for problem, result in zip(problems, swept, strict=True)]
    residual_books: list[Codebook | None] = [None] * len(problems)
    errors_residual: list[float | None] = [None] * len(problems)
    if config.has_residual:
        books = fit.residuals([result.leftover for result in swept])
        segments = [_segments(geometry, o, (m, r)) for o, m, r in zip(outlier_books, main_books, books, strict=True)]
        swept = _sweep(problems, segments, geometry, config)
        errors_residual = [problem.error(result.quantized) for problem, result in zip(problems, swept, strict=True)]
        residual_books = list(books)
    quantized = [
        _collect(*parts, config=config, geometry=geometry)
        for parts in zip(problems, swept, outlier_books, main_books, residual_books, strict=True)
    ]
    reports = [_report(*figures) for figures in zip(problems, errors_kmeans, errors_sweep, errors_residual, strict=True)]
    return list(zip(quantized, reports, strict=True))


def _sweep(
    problems: list[Problem], segments: list[list[Segment]], geometry: Geometry, config: LinearConfig
) -> list[SweepResult]:
    weights = as_batch([problem.weight for problem in problems])
    inv_chols = as_batch([problem.factor.inv_chol for problem in problems])
    return sweep_linears(weights, inv_chols, segments, geometry, config.blocksize)


def _report(problem: Problem, error_kmeans: float, error_sweep: float, error_residual: float | None) -> LinearReport:
    return LinearReport(
        error_kmeans=error_kmeans,
        error_sweep=error_sweep,
        error_residual=error_residual,
        error=error_sweep if error_residual is None else error_residual,
        damping_frac=problem.factor.damping_frac,
        damping_retries=problem.factor.retries,
        kmeans_iterations=tuple(fit.iterations for fit in problem.fits),
        kmeans_objectives=tuple(fit.objective[-1] for fit in problem.fits),
        seconds=0.0,
    )


def _check_input(linear: LinearInput) -> None:
    name, weight, hessian = linear.name, linear.weight, linear.hessian
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise VptqError(f"`{name}`: Hessian {tuple(hessian.shape)} does not fit weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("non-finite weights", where=[name], hint="the checkpoint is damaged or overflowed; get it anew")
    if not bool(torch.isfinite(hessian).all()):
        raise NumericalError(
            "non-finite Hessian",
            where=[name],
            hint="activations overflowed; calibrate other text, or load the model as bfloat16",
        )


def _seed_of(name: str, kseed: int) -> int:
    """A seed of its own for every linear, whoever quantizes it and in whatever order."""
    return int.from_bytes(hashlib.sha256(f"{kseed}/{name}".encode()).digest()[:7], "little")


def _prepare(linear: LinearInput, config: LinearConfig, storage_dtype: torch.dtype) -> Problem:
    weight, hessian = linear.weight.float(), linear.hessian.float()
    normalisation = normalise(weight, storage_dtype) if config.enable_norm else None
    metric = scale_metric(hessian, normalisation.scale) if normalisation else hessian
    scaled = normalisation.apply(weight) if normalisation else weight
    diagonal = metric.diagonal().clamp_min(0)
    perm = importance_order(diagonal) if config.enable_perm else torch.arange(len(diagonal), device=weight.device)
    # The permuted matrix is factored: a triangular factor can't be un-permuted afterwards.
    try:
        factor = factor_inverse(metric[perm][:, perm], config.percdamp)
    except NumericalError as error:
        raise NumericalError(error.what, where=[linear.name], hint=error.hint) from error
    generator = torch.Generator().manual_seed(_seed_of(linear.name, config.kseed))
    measure = ProxyError(weight, hessian)
    return Problem(
        scaled[:, perm].contiguous(), diagonal[perm].contiguous(), factor, perm, normalisation, measure, generator, []
    )


class _Codebooks:
    """Fits the codebooks of linears of one shape: all their runs of columns in one batch of k-means."""

    def __init__(self, config: LinearConfig, geometry: Geometry, storage_dtype: torch.dtype, problems: list[Problem]) -> None:
        self.config, self.geometry, self.storage_dtype, self.problems = config, geometry, storage_dtype, problems

    def outliers(self) -> list[Codebook | None]:
        if not self.geometry.outlier_size:
            return [None] * len(self.problems)
        data = [problem.weight for problem in self.problems]
        columns = [slice(0, self.geometry.outlier_size)]
        return list(self._fit(data, columns, self.config.vector_lens[0], self.config.num_centroids[0]))

    def groups(self, data: list[Tensor]) -> list[Codebook]:
        return self._fit(data, self._groups(), self.config.vector_len, self.config.num_centroids[1])

    def residuals(self, leftovers: list[Tensor]) -> list[Codebook]:
        """k-means on what the sweep left, with one weight a vector."""
        k = self.config.num_res_centroids[1]
        return self._fit(leftovers, self._groups(), self.config.vector_len, k, per_vector=True)

    def _groups(self) -> list[slice]:
        return [slice(*self.geometry.group_columns(g)) for g in range(self.geometry.group_num)]

    def _fit(
        self, data: list[Tensor], runs: list[slice], vector_len: int, num_centroids: int, per_vector: bool = False
    ) -> list[Codebook]:
        """A codebook for each run of columns of each linear."""
        vectors, weights, generators = [], [], []
        for problem, matrix in zip(self.problems, data, strict=True):
            for columns in runs:
                vectors.append(split_vectors(matrix[:, columns], self.geometry, vector_len).view(-1, vector_len))
                diagonal = problem.metric_diagonal[columns]
                if self.config.kmeans_mode == "uniform":
                    diagonal = torch.ones_like(diagonal)
                weights.append(vector_weights(diagonal, self.geometry, vector_len))
                generators.append(problem.generator)
        batch = VectorWeights.stack(weights)
        size = self.geometry.out_features if self.geometry.vector_quant_dim == "out" else runs[0].stop - runs[0].start
        found = batched_kmeans(
            as_batch(vectors),
            batch.one_a_vector(padded=size % vector_len != 0) if per_vector else batch,
            num_centroids,
            iterations=self.config.kiter,
            tol=self.config.ktol,
            generators=generators,
        )
        books = []
        for number, problem in enumerate(self.problems):
            own = found[number * len(runs) : (number + 1) * len(runs)]
            problem.fits.extend(replace(result, assignments=result.assignments[:0]) for result in own)
            centroids = torch.stack([result.centroids for result in own])
            books.append(store_codebook(centroids, self.config.bitwidth, self.config.bsize, self.storage_dtype))
        return books


def _segments(geometry: Geometry, outlier_book: Codebook | None, books: tuple[Codebook, ...]) -> list[Segment]:
    segments = []
    if outlier_book is not None:
        segments.append(Segment(0, geometry.outlier_size, (outlier_book.centroids[0],)))
    for group in range(geometry.group_num):
        segments.append(Segment(*geometry.group_columns(group), tuple(book.centroids[group] for book in books)))
    return segments


def _collect(
    problem: Problem,
    swept: SweepResult,
    outlier_book: Codebook | None,
    main_book: Codebook,
    residual_book: Codebook | None,
    *,
    config: LinearConfig,
    geometry: Geometry,
) -> QuantizedWeight:
    outlier_indices = swept.indices[0][0][None].int() if outlier_book is not None else None
    groups = swept.indices[1:] if outlier_book is not None else swept.indices
    quantized = QuantizedWeight(
        geometry=geometry,
        codebook=main_book,
        indices=torch.stack([stages[0] for stages in groups]).int(),
        residual_codebook=residual_book,
        residual_indices=torch.stack([stages[1] for stages in groups]).int() if residual_book is not None else None,
        outlier_codebook=outlier_book,
        outlier_indices=outlier_indices,
        perm=problem.perm if config.enable_perm else None,
        scale=problem.normalisation.scale if problem.normalisation else None,
        offset=problem.normalisation.offset if problem.normalisation else None,
    )
    return quantized.absorb_perm() if config.absorb_perm else quantized
