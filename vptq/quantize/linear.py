"""Quantize one linear: reads like the paper."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.errors import NumericalError, UsageError, VptqError
from vptq.geometry import Geometry, plan_geometry
from vptq.quantize.codebook import store_codebook
from vptq.quantize.kmeans import batched_kmeans
from vptq.quantize.layout import Normalisation, VectorWeights, importance_order, normalise, split_vectors, vector_weights
from vptq.quantize.metric import InverseFactor, factor_inverse, proxy_error, scale_metric
from vptq.quantize.result import Codebook, QuantizedWeight
from vptq.quantize.segments import Segment, SweepResult
from vptq.quantize.sweep import quantize_nearest, sweep


@dataclass(frozen=True)
class LinearReport:
    """The figures of one quantized linear. Errors are `proxy_error`, in original column order and scale.

    Attributes:
        error_kmeans: nearest centroid, no feedback. error_sweep: main codebook with feedback.
        error_residual: with the residual stage too; None if off. error: what the stored weight has in the end.
        damping_frac, damping_retries: the damping used, and how often it had to be raised tenfold.
        kmeans_iterations: updates of each k-means, outliers first, then groups, then residual groups.
        seconds: wall time.
    """

    error_kmeans: float
    error_sweep: float
    error_residual: float | None
    error: float
    damping_frac: float
    damping_retries: int
    kmeans_iterations: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Problem:
    """One linear, normalised and permuted, ready for codebooks and sweep."""

    weight: Tensor  # (out, in) float32, permuted, normalised
    metric_diagonal: Tensor  # (in,) float32, diag(H') permuted
    factor: InverseFactor
    perm: Tensor  # (in,) int64
    normalisation: Normalisation | None

    def restore(self, quantized: Tensor) -> Tensor:
        """Back to original column order and scale."""
        unpermuted = quantized[:, torch.argsort(self.perm)]
        return self.normalisation.undo(unpermuted) if self.normalisation else unpermuted


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
    started = time.perf_counter()
    _check_inputs(weight, hessian, name)
    geometry, faults = plan_geometry(weight.shape[0], weight.shape[1], config)
    if geometry is None:
        raise UsageError(f"`{name}` can't be cut as the settings ask", where=faults)
    try:
        return _quantize(weight.float(), hessian.float(), config, geometry, name, storage_dtype, started)
    except NumericalError as error:
        raise NumericalError(error.what, where=[name], hint=error.hint) from error


def _quantize(
    original: Tensor,
    hessian: Tensor,
    config: LinearConfig,
    geometry: Geometry,
    name: str,
    storage_dtype: torch.dtype,
    started: float,
) -> tuple[QuantizedWeight, LinearReport]:
    problem = _prepare(original, hessian, config, storage_dtype)
    generator = torch.Generator().manual_seed(_seed_of(name, config.kseed))
    codebooks = _Codebooks(config, geometry, storage_dtype, generator)
    outlier_book, main_book = codebooks.fit_outliers(problem), codebooks.fit_groups(problem, problem.weight)
    segments = _segments(geometry, outlier_book, (main_book,))
    nearest = quantize_nearest(problem.weight, segments, geometry, problem.metric_diagonal)
    error_kmeans = proxy_error(original, problem.restore(nearest), hessian)

    swept = sweep(problem.weight, problem.factor.inv_chol, segments, geometry, config.blocksize)
    error = error_sweep = proxy_error(original, problem.restore(swept.quantized), hessian)
    residual_book, error_residual = None, None
    if config.has_residual:
        residual_book = codebooks.fit_residual(problem, swept.leftover)
        segments = _segments(geometry, outlier_book, (main_book, residual_book))
        swept = sweep(problem.weight, problem.factor.inv_chol, segments, geometry, config.blocksize)
        error = error_residual = proxy_error(original, problem.restore(swept.quantized), hessian)

    quantized = _collect(problem, config, geometry, swept, outlier_book, main_book, residual_book)
    report = LinearReport(
        error_kmeans=error_kmeans,
        error_sweep=error_sweep,
        error_residual=error_residual,
        error=error,
        damping_frac=problem.factor.damping_frac,
        damping_retries=problem.factor.retries,
        kmeans_iterations=tuple(codebooks.iterations),
        seconds=time.perf_counter() - started,
    )
    return quantized, report


def _check_inputs(weight: Tensor, hessian: Tensor, name: str) -> None:
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


def _prepare(weight: Tensor, hessian: Tensor, config: LinearConfig, storage_dtype: torch.dtype) -> Problem:
    normalisation = normalise(weight, storage_dtype) if config.enable_norm else None
    metric = scale_metric(hessian, normalisation.scale) if normalisation else hessian
    scaled = normalisation.apply(weight) if normalisation else weight
    diagonal = metric.diagonal().clamp_min(0)
    perm = importance_order(diagonal) if config.enable_perm else torch.arange(len(diagonal), device=weight.device)
    # The permuted matrix is factored: a triangular factor can't be un-permuted afterwards.
    factor = factor_inverse(metric[perm][:, perm], config.percdamp)
    return Problem(scaled[:, perm].contiguous(), diagonal[perm].contiguous(), factor, perm, normalisation)


class _Codebooks:
    """Fits the codebooks of one linear; keeps count of the iterations."""

    def __init__(
        self, config: LinearConfig, geometry: Geometry, storage_dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        self.config = config
        self.geometry = geometry
        self.storage_dtype = storage_dtype
        self.generator = generator
        self.iterations: list[int] = []

    def fit_outliers(self, problem: Problem) -> Codebook | None:
        if not self.geometry.outlier_size:
            return None
        columns = [slice(0, self.geometry.outlier_size)]
        return self._fit(problem, problem.weight, columns, self.config.vector_lens[0], self.config.num_centroids[0])

    def fit_groups(self, problem: Problem, data: Tensor) -> Codebook:
        return self._fit(problem, data, self._groups(), self.config.vector_len, self.config.num_centroids[1])

    def fit_residual(self, problem: Problem, leftover: Tensor) -> Codebook:
        """k-means on what the sweep left, with one weight a vector."""
        k = self.config.num_res_centroids[1]
        return self._fit(problem, leftover, self._groups(), self.config.vector_len, k, per_vector=True)

    def _groups(self) -> list[slice]:
        return [slice(*self.geometry.group_columns(g)) for g in range(self.geometry.group_num)]

    def _fit(
        self, problem: Problem, data: Tensor, runs: list[slice], vector_len: int, num_centroids: int, per_vector: bool = False
    ) -> Codebook:
        """One codebook for each run of columns, all runs in one batch."""
        vectors, weights = [], []
        for columns in runs:
            vectors.append(split_vectors(data[:, columns], self.geometry, vector_len).view(-1, vector_len))
            diagonal = problem.metric_diagonal[columns]
            if self.config.kmeans_mode == "uniform":
                diagonal = torch.ones_like(diagonal)
            weights.append(vector_weights(diagonal, self.geometry, vector_len))
        batch = VectorWeights.stack(weights)
        found = batched_kmeans(
            torch.stack(vectors),
            batch.one_a_vector() if per_vector else batch,
            num_centroids,
            iterations=self.config.kiter,
            tol=self.config.ktol,
            generators=[self.generator] * len(runs),
        )
        self.iterations += [result.iterations for result in found]
        return self._store([result.centroids for result in found])

    def _store(self, centroids: list[Tensor]) -> Codebook:
        return store_codebook(torch.stack(centroids), self.config.bitwidth, self.config.bsize, self.storage_dtype)


def _segments(geometry: Geometry, outlier_book: Codebook | None, books: tuple[Codebook, ...]) -> list[Segment]:
    segments = []
    if outlier_book is not None:
        segments.append(Segment(0, geometry.outlier_size, (outlier_book.centroids[0],)))
    for group in range(geometry.group_num):
        segments.append(Segment(*geometry.group_columns(group), tuple(book.centroids[group] for book in books)))
    return segments


def _collect(
    problem: Problem,
    config: LinearConfig,
    geometry: Geometry,
    swept: SweepResult,
    outlier_book: Codebook | None,
    main_book: Codebook,
    residual_book: Codebook | None,
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
