"""The sweep: quantize left to right, and let what is still to come make up for each error (VPTQ sec. 3.1, GPTQ).

The unit is one column where vectors run along outputs, and one tile of v columns where they run along inputs. With U the
upper factor of the inverse metric, a unit t costs ‖(W_t - Ŵ_t) U_tt⁻¹‖², and the best answer of the columns to its right
is W_rest -= E U[t, rest] with E = (W_t - Ŵ_t) U_tt⁻¹. For a single column this is e = (w - ŵ) / U_qq. (The reference
keeps only the diagonal of a tile's inverse.) Within a block of columns the answer is given at once, past it in one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vptq.backend import use_kernels
from vptq.geometry import Geometry
from vptq.quantize.assign import assign_nearest
from vptq.quantize.clusters import find_nearest
from vptq.quantize.layout import split_vectors, vector_weights
from vptq.quantize.result import join_vectors
from vptq.quantize.segments import Segment, SweepResult

ALIGNED = 32  # float32 numbers: a library's products may be rounded otherwise where a matrix starts elsewhere

QuantizeUnit = Callable[[Tensor, Tensor, Segment], tuple[Tensor, list[Tensor]]]


def sweep(weight: Tensor, inv_chol: Tensor, segments: list[Segment], geometry: Geometry, blocksize: int) -> SweepResult:
    """Quantize every column in order, with second-order error feedback: `sweep_linears` for one linear.

    Args:
        weight: (out_features, in_features). inv_chol: (in_features, in_features).
    """
    return sweep_linears(weight[None], inv_chol[None], [segments], geometry, blocksize)[0]


def sweep_linears(
    weights: Tensor, inv_chols: Tensor, segments: list[list[Segment]], geometry: Geometry, blocksize: int
) -> list[SweepResult]:
    """Quantize linears of one shape and one setting, each with its own metric and codebooks.

    By the kernels, which serve all in one launch, or plainly one after the other; the same bits as each alone.

    Args:
        weights: (L, out_features, in_features) float32, permuted, normalised. Not modified.
        inv_chols: (L, in_features, in_features) float32, U upper with metric⁻¹ = Uᵀ U.
        segments: of each linear; they cover all columns in order.
        blocksize: columns between two trailing updates; changes the speed, not the answer.
    """
    if use_kernels(weights.device) and max(segment.vector_len for segment in segments[0]) <= 16:
        from vptq.quantize.kernels.sweep import sweep_by_kernels

        if len(weights) > 1 and any(tensor[0].numel() % ALIGNED for tensor in (weights, inv_chols)):
            return [sweep(w, u, own, geometry, blocksize) for w, u, own in zip(weights, inv_chols, segments, strict=True)]
        return sweep_by_kernels(weights, inv_chols, segments, geometry, blocksize)
    found = zip(weights, inv_chols, segments, strict=True)
    return [plain_sweep(weight, inv_chol, own, geometry, blocksize) for weight, inv_chol, own in found]


def plain_sweep(weight: Tensor, inv_chol: Tensor, segments: list[Segment], geometry: Geometry, blocksize: int) -> SweepResult:
    """The sweep of one linear in plain torch, column by column.

    Args:
        weight: (out_features, in_features) float32, permuted, normalised. Not modified.
        inv_chol: (in_features, in_features) float32, U upper with metric⁻¹ = Uᵀ U.
        segments: cover all columns in order.
        blocksize: columns between two trailing updates; changes the speed, not the answer.
    """
    remaining = weight.clone()
    quantized = torch.empty_like(weight)
    leftover = torch.empty_like(weight)
    along_out = geometry.vector_quant_dim == "out"
    quantize_unit = _column_quantizer(geometry) if along_out else _quantize_tile
    indices: list[tuple[Tensor, ...]] = []
    for segment in segments:
        unit = 1 if along_out else segment.vector_len
        chosen: list[list[Tensor]] = [[] for _ in segment.stages]
        step = max(1, blocksize // unit) * unit
        for start in range(segment.start, segment.end, step):
            end = min(start + step, segment.end)
            errors = torch.empty_like(weight[:, start:end])
            for left in range(start, end, unit):
                right = min(left + unit, end)
                target = remaining[:, left:right]
                tile = inv_chol[left:right, left:right]
                found, stage_indices = quantize_unit(target, tile, segment)
                quantized[:, left:right] = found
                leftover[:, left:right] = target - found
                error = _divide_upper(leftover[:, left:right], tile)
                errors[:, left - start : right - start] = error
                remaining[:, right:end] -= error @ inv_chol[left:right, right:end]
                for kept, new in zip(chosen, stage_indices, strict=True):
                    kept.append(new)
            remaining[:, end:] -= errors @ inv_chol[start:end, end:]
        indices.append(tuple(torch.cat(kept, dim=1) for kept in chosen))
    return SweepResult(quantized, leftover, tuple(indices))


def quantize_nearest(weight: Tensor, segments: list[Segment], geometry: Geometry, weights: Tensor) -> Tensor:
    """Every vector by its nearest centroid, no feedback: what k-means alone gives. weights: (in_features,) diag(H')."""
    parts = []
    for segment in segments:
        columns = weight[:, segment.start : segment.end]
        vectors = split_vectors(columns, geometry, segment.vector_len)
        flat = vectors.view(-1, segment.vector_len)
        importance = vector_weights(weights[segment.start : segment.end], geometry, segment.vector_len)
        chosen = segment.stages[0][find_nearest(flat, importance, segment.stages[0])]
        parts.append(join_vectors(chosen.view(1, *vectors.shape), geometry, segment.end - segment.start))
    return torch.cat(parts, dim=1)


def _divide_upper(rows: Tensor, tile: Tensor) -> Tensor:
    """rows U_tt⁻¹ for an upper tile."""
    if tile.shape[0] == 1:
        return rows / tile
    return torch.linalg.solve_triangular(tile, rows, upper=True, left=False)


def _column_quantizer(geometry: Geometry) -> QuantizeUnit:
    """For vectors along outputs: one column's vectors, nearest centroid, padding without a part in the distance."""

    def quantize_column(column: Tensor, tile: Tensor, segment: Segment) -> tuple[Tensor, list[Tensor]]:
        vector_len = segment.vector_len
        padding = -geometry.out_features % vector_len
        flat = torch.nn.functional.pad(column[:, 0], (0, padding)).view(-1, vector_len)
        mask = None
        if padding:
            mask = torch.ones_like(flat)
            mask[-1, vector_len - padding :] = 0
        found = torch.zeros_like(flat)
        indices = []
        for centroids in segment.stages:
            index = assign_nearest(flat - found, centroids, mask)
            found = found + centroids[index]
            indices.append(index[:, None])
        return found.view(-1, 1)[: geometry.out_features], indices

    return quantize_column


def _quantize_tile(target: Tensor, tile: Tensor, segment: Segment) -> tuple[Tensor, list[Tensor]]:
    """For vectors along inputs: ‖(w - c) U_tt⁻¹‖² is plain distance once both are multiplied by U_tt⁻¹."""
    width = tile.shape[0]
    found = torch.zeros_like(target)
    indices = []
    for centroids in segment.stages:
        cut = centroids[:, :width]
        index = assign_nearest(_divide_upper(target - found, tile), _divide_upper(cut, tile))
        found = found + cut[index]
        indices.append(index[:, None])
    return found, indices
