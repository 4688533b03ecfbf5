"""Quantize linears with codebooks of their own: reads like the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.geometry import Geometry
from vptq.quantize.codebook import store_codebook
from vptq.quantize.kmeans import batched_kmeans
from vptq.quantize.layout import VectorWeights, as_batch, split_vectors, vector_weights
from vptq.quantize.problem import LinearInput, LinearReport, Problem, prepare, rotation_of
from vptq.quantize.refine import Books, Chosen, refine
from vptq.quantize.result import Codebook, QuantizedWeight
from vptq.quantize.segments import Segment, SweepResult
from vptq.quantize.sweep import quantize_nearest, sweep_linears


def quantize_with_own(
    linears: Sequence[LinearInput], config: LinearConfig, geometry: Geometry, storage_dtype: torch.dtype
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """See `linear.quantize_linears`; all linears are of the shape that `geometry` cuts."""
    problems = [prepare(linear, config, storage_dtype) for linear in linears]
    fit = _Codebooks(config, geometry, storage_dtype, problems)
    outlier_books = fit.outliers()
    main_books = fit.groups([problem.weight for problem in problems])
    segments = [Books(o, m).segments(geometry) for o, m in zip(outlier_books, main_books, strict=True)]
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
        segments = [Books(o, m, r).segments(geometry) for o, m, r in zip(outlier_books, main_books, books, strict=True)]
        swept = _sweep(problems, segments, geometry, config)
        errors_residual = [problem.error(result.quantized) for problem, result in zip(problems, swept, strict=True)]
        residual_books = list(books)
    errors_refined: list[float | None] = [None] * len(problems)
    chosen = [
        Chosen(result, Books(o, m, r)) for result, o, m, r in zip(swept, outlier_books, main_books, residual_books, strict=True)
    ]
    if config.refine_iters:
        chosen = [refine(problem, own, config, geometry, storage_dtype) for problem, own in zip(problems, chosen, strict=True)]
        errors_refined = [problem.error(own.swept.quantized) for problem, own in zip(problems, chosen, strict=True)]
    quantized = [
        _collect(problem, own, config=config, geometry=geometry) for problem, own in zip(problems, chosen, strict=True)
    ]
    errors = zip(problems, errors_kmeans, errors_sweep, errors_residual, errors_refined, strict=True)
    return list(zip(quantized, (_report(*figures) for figures in errors), strict=True))


def _sweep(
    problems: list[Problem], segments: list[list[Segment]], geometry: Geometry, config: LinearConfig
) -> list[SweepResult]:
    weights = as_batch([problem.weight for problem in problems])
    inv_chols = as_batch([problem.factor.inv_chol for problem in problems])
    return sweep_linears(weights, inv_chols, segments, geometry, config.blocksize)


def _report(
    problem: Problem,
    error_kmeans: float,
    error_sweep: float,
    error_residual: float | None,
    error_refined: float | None,
) -> LinearReport:
    last = [error for error in (error_sweep, error_residual, error_refined) if error is not None][-1]
    return LinearReport(
        error_kmeans=error_kmeans,
        error_sweep=error_sweep,
        error_residual=error_residual,
        error_refined=error_refined,
        error=last,
        damping_frac=problem.factor.damping_frac,
        damping_retries=problem.factor.retries,
        kmeans_iterations=tuple(fit.iterations for fit in problem.fits),
        kmeans_objectives=tuple(fit.objective[-1] for fit in problem.fits),
        weight=problem.measure.denominator,
        seconds=0.0,
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


def _collect(problem: Problem, chosen: Chosen, *, config: LinearConfig, geometry: Geometry) -> QuantizedWeight:
    swept, books = chosen.swept, chosen.books
    outlier_indices = swept.indices[0][0][None].int() if books.outlier is not None else None
    groups = swept.indices[1:] if books.outlier is not None else swept.indices
    quantized = QuantizedWeight(
        geometry=geometry,
        codebook=books.main,
        indices=torch.stack([stages[0] for stages in groups]).int(),
        residual_codebook=books.residual,
        residual_indices=torch.stack([stages[1] for stages in groups]).int() if books.residual is not None else None,
        outlier_codebook=books.outlier,
        outlier_indices=outlier_indices,
        perm=problem.perm if config.enable_perm else None,
        scale=problem.normalisation.scale if problem.normalisation else None,
        offset=problem.normalisation.offset if problem.normalisation else None,
        rotation=rotation_of(config, (geometry.out_features, geometry.in_features), 1),
    )
    return quantized.absorb_perm() if config.absorb_perm else quantized
