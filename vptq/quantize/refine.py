"""Refinement of a linear with codebooks of its own: centroids, then indices, each exact given the other, never worse.

With indices fixed the weight is linear in its centroids, so tr(E H Eᵀ) is least where a linear system holds: conjugate
gradients, one product with H an iteration, for outliers, groups and both stages together. With centroids fixed, one pass
over the columns gives each vector its best index given all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.geometry import Geometry
from vptq.quantize.codebook import store_codebook
from vptq.quantize.column_sweep import ColumnRun, refine_columns
from vptq.quantize.columns import VectorQuantizer
from vptq.quantize.fixed_point import index_sums
from vptq.quantize.layout import split_vectors
from vptq.quantize.problem import Problem
from vptq.quantize.result import Codebook, join_vectors
from vptq.quantize.segments import Segment, SweepResult

CG_ITERATIONS = 40
CG_ENOUGH = 1e-10  # of the first residual, squared
JITTER = 1e-6  # of a tile's mean diagonal, so that it can be factored


@dataclass(frozen=True)
class Books:
    """The codebooks of one linear, as they will be stored."""

    outlier: Codebook | None
    main: Codebook
    residual: Codebook | None = None

    def segments(self, geometry: Geometry) -> list[Segment]:
        """The runs of columns and the centroids that serve each."""
        found = []
        if self.outlier is not None:
            found.append(Segment(0, geometry.outlier_size, (self.outlier.centroids[0],)))
        stages = [self.main] if self.residual is None else [self.main, self.residual]
        for group in range(geometry.group_num):
            found.append(Segment(*geometry.group_columns(group), tuple(book.centroids[group] for book in stages)))
        return found

    def with_centroids(self, found: list[tuple[Tensor, ...]], config: LinearConfig, dtype: torch.dtype) -> Books:
        """The same with other centroids, (k, vector_len) a segment and stage, rounded to what is stored."""

        def store(centroids: Sequence[Tensor]) -> Codebook:
            return store_codebook(torch.stack(list(centroids)), config.bitwidth, config.bsize, dtype)

        groups = found if self.outlier is None else found[1:]
        return Books(
            None if self.outlier is None else store([found[0][0]]),
            store([stages[0] for stages in groups]),
            None if self.residual is None else store([stages[1] for stages in groups]),
        )


@dataclass(frozen=True)
class Chosen:
    """What a linear is quantized to so far: indices and quantized weight, and the codebooks they are of."""

    swept: SweepResult
    books: Books


def refine(problem: Problem, chosen: Chosen, config: LinearConfig, geometry: Geometry, storage_dtype: torch.dtype) -> Chosen:
    """`config.refine_iters` rounds, ended early by one that gains nothing. What is given is not modified."""
    metric = problem.metric()
    best, error = chosen, problem.error(chosen.swept.quantized)
    for _ in range(config.refine_iters):
        before = error
        for step in (_fit_centroids, _choose_again):
            found = step(problem, metric, best, config, geometry, storage_dtype)
            reached = problem.error(found.swept.quantized)
            if reached < error:  # rounding to what is stored may cost more than the step gains
                best, error = found, reached
        if not error < before:
            break
    return best


def _fit_centroids(
    problem: Problem, metric: Tensor, chosen: Chosen, config: LinearConfig, geometry: Geometry, dtype: torch.dtype
) -> Chosen:
    """The best centroids for the indices as they are, by preconditioned conjugate gradients."""
    segments = chosen.books.segments(geometry)
    decoder = Decoder(segments, chosen.swept.indices, geometry)
    x = decoder.flatten([segment.stages for segment in segments])
    left = decoder.adjoint((problem.weight - decoder.decode(x)) @ metric)
    counts = decoder.adjoint(metric.diagonal().expand_as(problem.weight)).clamp_min(0)
    inverse = torch.where(counts > 0, 1 / counts, 0)
    z = inverse * left
    direction, size = z, _dot(left, z)
    enough = CG_ENOUGH * size
    for _ in range(CG_ITERATIONS):
        if not bool(size > enough):
            break
        applied = decoder.adjoint(decoder.decode(direction) @ metric)
        curvature = _dot(direction, applied)
        if not bool(curvature > 0):
            break
        step = (size / curvature).float()
        x = x + step * direction
        left = left - step * applied
        z = inverse * left
        following = _dot(left, z)
        direction, size = z + (following / size).float() * direction, following
    books = chosen.books.with_centroids(decoder.unflatten(x), config, dtype)
    stored = decoder.flatten([segment.stages for segment in books.segments(geometry)])
    return Chosen(SweepResult(decoder.decode(stored), chosen.swept.leftover, chosen.swept.indices), books)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()


class Decoder:
    """The linear map from all centroids of a linear, as one vector, to its weight, and its adjoint.

    Args:
        indices: for every segment, for every stage, (rows, vector columns) integer.
    """

    def __init__(self, segments: list[Segment], indices: tuple[tuple[Tensor, ...], ...], geometry: Geometry) -> None:
        self.segments, self.geometry = segments, geometry
        self.indices = [[stage.long() for stage in stages] for stages in indices]

    def decode(self, centroids: Tensor) -> Tensor:
        """All centroids (n,) -> (out_features, in_features)."""
        parts = []
        for segment, stages, indices in zip(self.segments, self.unflatten(centroids), self.indices, strict=True):
            vectors = stages[0][indices[0]]
            for stage, index in zip(stages[1:], indices[1:], strict=True):
                vectors = vectors + stage[index]
            parts.append(join_vectors(vectors[None], self.geometry, segment.end - segment.start))
        return torch.cat(parts, 1)

    def adjoint(self, matrix: Tensor) -> Tensor:
        """(out_features, in_features) -> (n,): for every centroid, the sum over the vectors that it stands for."""
        sums = []
        for segment, indices in zip(self.segments, self.indices, strict=True):
            vectors = split_vectors(matrix[:, segment.start : segment.end], self.geometry, segment.vector_len)
            flat = vectors.view(-1, segment.vector_len)
            for stage, index in zip(segment.stages, indices, strict=True):
                sums.append(index_sums(index.reshape(-1), flat, len(stage)).view(-1))
        return torch.cat(sums)

    def flatten(self, centroids: Sequence[Sequence[Tensor]]) -> Tensor:
        """(k, vector_len) for every segment and stage -> (n,)."""
        return torch.cat([stage.reshape(-1) for stages in centroids for stage in stages])

    def unflatten(self, centroids: Tensor) -> list[tuple[Tensor, ...]]:
        """The inverse of `flatten`."""
        shapes = [stage.shape for segment in self.segments for stage in segment.stages]
        pieces = iter(centroids.split([shape.numel() for shape in shapes]))
        return [tuple(next(pieces).view(stage.shape) for stage in segment.stages) for segment in self.segments]


def _choose_again(
    problem: Problem, metric: Tensor, chosen: Chosen, config: LinearConfig, geometry: Geometry, _dtype: torch.dtype
) -> Chosen:
    """One pass that gives each vector its best index given all others."""
    segments = chosen.books.segments(geometry)
    choose = _columns_again if geometry.vector_quant_dim == "out" else _tiles_again
    quantized, indices = choose(problem.weight, chosen.swept, metric, segments, config)
    return Chosen(SweepResult(quantized, chosen.swept.leftover, indices), chosen.books)


Indices = tuple[tuple[Tensor, ...], ...]


def _columns_again(
    weight: Tensor, swept: SweepResult, metric: Tensor, segments: list[Segment], config: LinearConfig
) -> tuple[Tensor, Indices]:
    runs = []
    for segment, indices in zip(segments, swept.indices, strict=True):
        codes = torch.stack([index.T for index in indices], 2)[None].int()
        beam = config.beam if len(segment.stages) > 1 else 1
        runs.append(ColumnRun(segment.start, segment.end, VectorQuantizer(segment.stages, len(weight), beam), codes))
    found, again = refine_columns(weight[None], swept.quantized[None], metric[None], runs, config.blocksize)
    chosen = tuple(tuple(own[0, :, :, stage].T.long() for stage in range(own.shape[3])) for own in again)
    return found[0].contiguous(), chosen


def _tiles_again(
    weight: Tensor, swept: SweepResult, metric: Tensor, segments: list[Segment], config: LinearConfig
) -> tuple[Tensor, Indices]:
    """Vectors along inputs: with t = q + (E H)_t H_tt⁻¹, the error of a tile is (t - c) H_tt (t - c)ᵀ = ‖(t - c) L‖²."""
    new = swept.quantized.clone()
    slope = (weight - new) @ metric
    found = [[index.clone() for index in indices] for indices in swept.indices]
    for segment, indices in zip(segments, found, strict=True):  # indices: of each stage
        for number, start in enumerate(range(segment.start, segment.end, segment.vector_len)):
            end = min(start + segment.vector_len, segment.end)
            tile = metric[start:end, start:end].double()
            tile.diagonal().add_(JITTER * tile.diagonal().mean())
            lower, failed = torch.linalg.cholesky_ex(tile)
            if failed.item():
                continue
            target = new[:, start:end] + torch.cholesky_solve(slope[:, start:end].double().T, lower).T.float()
            cut = tuple(stage[:, : end - start] for stage in segment.stages)
            factor = lower.float()
            beam = config.beam if len(cut) > 1 else 1
            quantizer = VectorQuantizer(tuple(stage @ factor for stage in cut), target.numel(), beam)
            old = torch.stack([index[:, number] for index in indices], 1)[None]
            codes = quantizer.encode_again((target @ factor).reshape(1, -1), old)[0].long()
            change = -new[:, start:end]
            for centroids, kept, own_codes in zip(cut, indices, codes.T, strict=True):
                kept[:, number] = own_codes
                change = change + centroids[own_codes]
            new[:, start:end] += change
            slope -= change @ metric[start:end]
    return new, tuple(tuple(stages) for stages in found)
