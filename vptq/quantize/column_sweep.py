"""The sweep and its refinement over any quantizer of columns: several linears, or groups of their rows, side by side.

Matrices are worked on transposed, so that a column lies in one run of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.quantize.columns import ColumnQuantizer


def sweep_columns(weights: Tensor, inv_chols: Tensor, quantizer: ColumnQuantizer, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize every column in order with second-order error feedback, see `quantize.sweep`.

    Args:
        weights: (B, out_features, in_features) float32. Not modified.
        inv_chols: (B, in_features, in_features) float32, U upper with metric⁻¹ = Uᵀ U; B may be 1 for all.
        blocksize: columns between two trailing updates; changes the speed, not the answer.
    Returns:
        quantized, (B, out_features, in_features), and codes, (B, in_features, rows, stages) int32.
    """
    remaining = weights.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    quantized = torch.empty_like(remaining)
    codes: list[Tensor] = []
    columns = remaining.shape[1]
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        block = quantizer.sweep(remaining[:, start:end], inv_chols[:, start:end, start:end])
        quantized[:, start:end] = block.quantized
        codes.append(block.codes)
        if end < columns:
            _subtract_products(remaining[:, end:], inv_chols[:, start:end, end:], block.errors)
    return quantized.transpose(1, 2), torch.cat(codes, 1)


@dataclass(frozen=True)
class ColumnRun:
    """Columns [start, end) that one quantizer serves, and their codes, (B, end - start, rows, stages) int32."""

    start: int
    end: int
    quantizer: ColumnQuantizer
    codes: Tensor


def refine_columns(
    weights: Tensor, quantized: Tensor, metrics: Tensor, runs: Sequence[ColumnRun], blocksize: int
) -> tuple[Tensor, list[Tensor]]:
    """Choose every column anew, in order, given all others: one pass of coordinate descent on tr(E H Eᵀ).

    With all else fixed the error of column i is h_ii ‖q - t‖² and what does not depend on it, t = q_i + ((W - Q) H)_i / h_ii.

    Args:
        weights, quantized: (B, out_features, in_features) float32. None is modified, nor are codes.
        metrics: (B, in_features, in_features) float32, symmetric; B may be 1 for all.
        runs: cover all columns in order.
    Returns:
        quantized, and codes for each run, as given, with a lower error or the same.
    """
    new = quantized.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    slope = torch.empty_like(new)
    for own, change, metric in zip(slope, weights.transpose(1, 2) - new, metrics.expand(len(new), -1, -1), strict=True):
        torch.mm(metric, change, out=own)
    scale = metrics.diagonal(dim1=1, dim2=2)
    inverse = torch.where(scale > 0, 1 / scale, 0)  # a column without weight stays near what it is
    found = []
    for run in runs:
        codes = run.codes.clone()
        for start in range(run.start, run.end, blocksize):
            end = min(start + blocksize, run.end)
            changes = torch.empty_like(new[:, start:end])
            for column in range(start, end):
                target = new[:, column] + slope[:, column] * inverse[:, column, None]
                chosen = run.quantizer.encode_again(target, codes[:, column - run.start])
                codes[:, column - run.start] = chosen
                values = run.quantizer.decode(chosen)
                change = values - new[:, column]
                changes[:, column - start] = change
                new[:, column] = values
                coming = metrics[:, column, column + 1 : end]
                slope[:, column + 1 : end].addcmul_(coming[:, :, None], change[:, None], value=-1)
            if end < new.shape[1]:
                _subtract_products(slope[:, end:], metrics[:, start:end, end:], changes)
        found.append(codes)
    return new.transpose(1, 2), found


def _subtract_products(matrices: Tensor, left: Tensor, right: Tensor) -> None:
    """matrices[b] -= left[b]ᵀ right[b], in place: one product after the other, so that a batch gives the bits of each alone."""
    for own, coming, change in zip(matrices, left.expand(len(matrices), -1, -1), right, strict=True):
        own.addmm_(coming.T, change, alpha=-1)
