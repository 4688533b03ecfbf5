"""Seeded random-sign rotations by fast transforms, after which weights are Gaussian (QuIP#, arXiv:2402.04396, sec. 3).

R = K diag(s), s random signs, K symmetric and orthogonal, so R⁻¹ = Rᵀ = diag(s) K. For a size m 2^a with m odd, K is the
Kronecker product of the Hartley matrix of size m (entries cos + sin of 2πij/m, over √m: the "small fixed factor", flat like
a Hadamard matrix and there for every m) and Sylvester's Hadamard matrix of size 2^a. Signs come from a hash of seed, side
and size: they are nowhere stored, and are the same on every machine and in every release.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vptq.backend import use_kernels

Side = Literal["in", "out"]
LARGEST_FACTOR = 128  # rows of a Hadamard matrix that one product applies


@dataclass(frozen=True)
class Rotation:
    """R for vectors of `size` elements, or `blocks` such rotations side by side, each over its own run of elements.

    Attributes:
        size: elements in all. seed, side: choose the signs. blocks: runs of size / blocks that are rotated each for itself.
    """

    size: int
    seed: int
    side: Side
    blocks: int = 1

    def apply(self, rows: Tensor) -> Tensor:
        """R x for every row x: (..., size) float -> (..., size), in the same type."""
        return self._mix(rows * self._signs(rows))

    def undo(self, rows: Tensor) -> Tensor:
        """Rᵀ y for every row y: (..., size) float -> (..., size), in the same type."""
        return self._mix(rows) * self._signs(rows)

    def conjugate(self, matrix: Tensor) -> Tensor:
        """R M Rᵀ: (..., size, size) -> (..., size, size)."""
        return self.apply(self.apply(matrix).transpose(-1, -2)).transpose(-1, -2)

    def _mix(self, rows: Tensor) -> Tensor:
        run = self.size // self.blocks
        return orthogonal_transform(rows.reshape(*rows.shape[:-1], self.blocks, run)).reshape(rows.shape)

    def _signs(self, like: Tensor) -> Tensor:
        return random_signs(self.size, self.seed, self.side, like.device).to(like.dtype)


@dataclass(frozen=True)
class LinearRotation:
    """The rotations of a linear: W' = R_out W R_inᵀ, so W x = R_outᵀ W' (R_in x). None on a side that is not rotated."""

    across: Rotation | None
    down: Rotation | None

    @staticmethod
    def of(kind: str, sides: str, shape: tuple[int, int], seed: int, row_groups: int) -> LinearRotation:
        """From settings (see `LinearConfig`); shape is (out_features, in_features)."""
        rotated = kind == "hadamard"
        across = Rotation(shape[1], seed, "in") if rotated and sides in ("both", "in") else None
        down = Rotation(shape[0], seed, "out", row_groups) if rotated and sides in ("both", "out") else None
        return LinearRotation(across, down)

    def turn(self, weight: Tensor) -> Tensor:
        """R_out W R_inᵀ: (out_features, in_features) -> the same shape."""
        weight = weight if self.across is None else self.across.apply(weight)
        return weight if self.down is None else self.down.apply(weight.T).T

    def turn_back(self, weight: Tensor) -> Tensor:
        """R_outᵀ W' R_in, the inverse of `turn`: (out_features, in_features) -> the same shape."""
        weight = weight if self.across is None else self.across.undo(weight)
        return weight if self.down is None else self.down.undo(weight.T).T

    def turn_metric(self, hessian: Tensor) -> Tensor:
        """R_in H R_inᵀ: (..., in_features, in_features) -> the same shape."""
        return hessian if self.across is None else self.across.conjugate(hessian)


NOT_ROTATED = LinearRotation(None, None)


@functools.lru_cache(maxsize=64)
def random_signs(size: int, seed: int, side: Side, device: torch.device) -> Tensor:
    """(size,) float32 of ±1, from SHAKE-256 of seed, side and size. Not to be modified: it is kept."""
    drawn = hashlib.shake_256(f"vptq rotation {seed} {side} {size}".encode()).digest(size)
    with torch.inference_mode(False):  # what is kept must serve training too
        return (torch.frombuffer(bytearray(drawn), dtype=torch.uint8) & 1).float().mul_(2).sub_(1).to(device)


def orthogonal_transform(rows: Tensor) -> Tensor:
    """K x for every row: (..., n) -> (..., n) in the same type, computed in float32 or wider. By kernel or plainly."""
    size = rows.shape[-1]
    odd, power = odd_part(size)
    learns = torch.is_grad_enabled() and rows.requires_grad  # the plain transform knows its gradient
    if power > 1 and rows.dtype != torch.float64 and not learns and use_kernels(rows.device):
        from vptq.quantize.kernels.hadamard import LARGEST, hadamard_by_kernel

        if power <= LARGEST:
            return _odd_factor(hadamard_by_kernel(rows, power), odd, power)
    return plain_transform(rows)


def plain_transform(rows: Tensor) -> Tensor:
    """`orthogonal_transform` in plain torch. (..., n) -> (..., n)."""
    odd, power = odd_part(rows.shape[-1])
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return _odd_factor(_plain_hadamard(wide, power), odd, power).to(rows.dtype)


def odd_part(size: int) -> tuple[int, int]:
    """(m, 2^a) with size = m 2^a, m odd."""
    power = size & -size
    return size // power, power


def _plain_hadamard(rows: Tensor, power: int) -> Tensor:
    """The Hadamard factor on every run of `power` elements, as products with matrices of at most 128 rows."""
    shape = rows.shape
    inner = 1
    while inner < power:
        factor = min(LARGEST_FACTOR, power // inner)
        matrix = hadamard_matrix(factor, rows.dtype, rows.device)
        rows = torch.matmul(matrix, rows.reshape(-1, factor, inner))
        inner *= factor
    return rows.reshape(shape)


def _odd_factor(rows: Tensor, odd: int, power: int) -> Tensor:
    if odd == 1:
        return rows
    wide = rows if rows.dtype == torch.float64 else rows.float()
    mixed = torch.matmul(hartley_matrix(odd, wide.dtype, rows.device), wide.reshape(-1, odd, power))
    return mixed.reshape(rows.shape).to(rows.dtype)


@functools.lru_cache(maxsize=64)
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's, over √size: (size, size), symmetric, orthogonal. size: a power of two. Not to be modified: it is kept."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / math.sqrt(size)).to(device, dtype)


@functools.lru_cache(maxsize=64)
def hartley_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos + sin of 2πij/size, over √size: (size, size), symmetric, orthogonal. Not to be modified: it is kept."""
    with torch.inference_mode(False):
        steps = torch.arange(size, dtype=torch.int64)
        angle = (steps[:, None] * steps[None, :] % size).double() * (2 * math.pi / size)
        return ((angle.cos() + angle.sin()) / math.sqrt(size)).to(device, dtype)
