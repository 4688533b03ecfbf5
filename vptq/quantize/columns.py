"""Quantizers of one column of vectors along the outputs: by nearest centroid, or as rings of a trellis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.quantize.assign import assign_nearest
from vptq.quantize.trellis import Trellis, encode_again, encode_sequences, kernels_serve

BEAM_SCORES = 1 << 24


@dataclass(frozen=True)
class SweptBlock:
    """A block of columns after the sweep.

    Attributes:
        quantized: (B, columns, out_features) float32. codes: (B, columns, rows, stages) int32.
        errors: (B, columns, out_features) float32, what each column left over U's diagonal: what later columns make up for.
    """

    quantized: Tensor
    codes: Tensor
    errors: Tensor


class ColumnQuantizer(ABC):
    """Chooses the vectors of columns (B, out_features) float32.

    Codes are (B, rows, stages) int32, the centroid of every vector in every stage.
    """

    @abstractmethod
    def encode(self, columns: Tensor) -> Tensor:
        """The codes to quantize columns (B, out_features) with."""

    @abstractmethod
    def encode_again(self, columns: Tensor, codes: Tensor) -> Tensor:
        """Codes no worse than `codes` (B, rows, stages) for columns (B, out_features)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, rows, stages) -> columns (B, out_features)."""

    def sweep(self, remaining: Tensor, inv_chols: Tensor) -> SweptBlock:
        """Quantize columns one after the other, each corrected for the errors of those before it.

        Args:
            remaining: (B, columns, out_features) float32, modified in place.
            inv_chols: (B or 1, columns, columns) float32, upper: these columns' part of U.
        """
        quantized, errors = torch.empty_like(remaining), torch.empty_like(remaining)
        codes = []
        for column, target in enumerate(remaining.unbind(1)):
            codes.append(self.encode(target))
            quantized[:, column] = self.decode(codes[-1])
            error = (target - quantized[:, column]) / inv_chols[:, column, column, None]
            errors[:, column] = error
            coming = inv_chols[:, column, column + 1 :]
            remaining[:, column + 1 :].addcmul_(coming[:, :, None], error[:, None], value=-1)
        return SweptBlock(quantized, torch.stack(codes, 1), errors)


class VectorQuantizer(ColumnQuantizer):
    """Every vector by itself.

    Args:
        stages: codebooks, (num_centroids, vector_len) float32 each: main, then residual if there is one.
        out_features: rows of a column. beam: main centroids tried with the residual stage in `encode_again`.
    """

    def __init__(self, stages: tuple[Tensor, ...], out_features: int, beam: int = 1) -> None:
        self.stages, self.out_features, self.beam = stages, out_features, beam
        self.vector_len = stages[0].shape[1]
        self.padding = -out_features % self.vector_len

    def encode(self, columns: Tensor) -> Tensor:
        vectors, mask = self._split(columns)
        chosen, left = [], vectors
        for stage in self.stages:
            chosen.append(assign_nearest(left, stage, mask))
            left = left - stage[chosen[-1]]
        return torch.stack(chosen, 1).int().view(len(columns), -1, len(self.stages))

    def encode_again(self, columns: Tensor, codes: Tensor) -> Tensor:
        vectors, mask = self._split(columns)
        old = codes.reshape(-1, len(self.stages)).long()
        if len(self.stages) == 1:
            new = assign_nearest(vectors, self.stages[0], mask)[:, None]
        else:
            new = self._beam_search(vectors, mask)
        better = self._errors(vectors, mask, new) < self._errors(vectors, mask, old)
        return torch.where(better[:, None], new, old).int().view(codes.shape)

    def decode(self, codes: Tensor) -> Tensor:
        found = self._look_up(codes.reshape(-1, len(self.stages)).long())
        return found.view(len(codes), -1)[:, : self.out_features]

    def _look_up(self, codes: Tensor) -> Tensor:
        found = self.stages[0][codes[:, 0]]
        for number, stage in enumerate(self.stages[1:], start=1):
            found = found + stage[codes[:, number]]
        return found

    def _errors(self, vectors: Tensor, mask: Tensor | None, codes: Tensor) -> Tensor:
        squares = (vectors - self._look_up(codes)).square()
        return (squares if mask is None else squares * mask).sum(1)

    def _beam_search(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """The best pair of a main centroid among the `beam` nearest and the residual centroid nearest to what it leaves."""
        main, residual = self.stages
        beam = min(self.beam, len(main))
        found = []
        step = max(1, BEAM_SCORES // len(main))
        for start in range(0, len(vectors), step):
            part = vectors[start : start + step]
            own = None if mask is None else mask[start : start + step]
            weighted = part if own is None else part * own
            halves = main.square().sum(1) / 2 if own is None else own @ (main.square() / 2).T
            nearest = torch.topk(weighted @ main.T - halves, beam, 1).indices
            tried = []
            for number in range(beam):
                left = part - main[nearest[:, number]]
                second = assign_nearest(left, residual, own)
                tried.append(torch.stack([nearest[:, number], second], 1))
            errors = torch.stack([self._errors(part, own, pair) for pair in tried], 1)
            best = errors.argmin(1)
            found.append(torch.stack(tried, 1)[torch.arange(len(part), device=part.device), best])
        return torch.cat(found)

    def _split(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vectors (n, vector_len) and, where the last of a column is padded, the weight of each element."""
        if not self.padding:
            return columns.reshape(-1, self.vector_len), None
        padded = torch.nn.functional.pad(columns, (0, self.padding))
        mask = torch.ones_like(padded)
        mask[:, self.out_features :] = 0
        return padded.view(-1, self.vector_len), mask.view(-1, self.vector_len)


class TrellisQuantizer(ColumnQuantizer):
    """Rings of `ring_len` vectors, each chosen as a whole.

    Args:
        table: (2^L, vector_len) float32. out_features: rows of a column, a multiple of vector_len.
    """

    def __init__(self, table: Tensor, trellis: Trellis, out_features: int, ring_len: int) -> None:
        self.table, self.trellis, self.out_features, self.ring_len = table, trellis, out_features, ring_len
        self.vector_len = table.shape[1]
        self.padding = -out_features % (ring_len * self.vector_len)
        self.weights: Tensor | None = None
        if self.padding:
            there = torch.ones(out_features // self.vector_len, device=table.device)
            self.weights = torch.nn.functional.pad(there, (0, self.padding // self.vector_len)).view(-1, ring_len)

    def encode(self, columns: Tensor) -> Tensor:
        rings, weights = self._rings(columns)
        return encode_sequences(rings, weights, self.table, self.trellis).view(len(columns), -1, 1)

    def encode_again(self, columns: Tensor, codes: Tensor) -> Tensor:
        rings, weights = self._rings(columns)
        old = codes.reshape(-1, self.ring_len)
        return encode_again(rings, weights, self.table, self.trellis, old).view(codes.shape)

    def decode(self, codes: Tensor) -> Tensor:
        found = torch.nn.functional.embedding(codes[:, :, 0], self.table)
        return found.reshape(len(codes), -1)[:, : self.out_features]

    def sweep(self, remaining: Tensor, inv_chols: Tensor) -> SweptBlock:
        if not kernels_serve(self.table, self.trellis):
            return super().sweep(remaining, inv_chols)
        from vptq.quantize.kernels.trellis import sweep_rings_by_kernel

        bits = self.trellis.state_bits, self.trellis.step_bits
        quantized, errors, states = sweep_rings_by_kernel(remaining, inv_chols, self.table, *bits, self.ring_len)
        return SweptBlock(quantized, states[..., None], errors)

    def _rings(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        padded = torch.nn.functional.pad(columns, (0, self.padding)) if self.padding else columns
        weights = None if self.weights is None else self.weights.repeat(len(columns), 1)
        return padded.reshape(-1, self.ring_len, self.vector_len), weights


def make_quantizer(stages: tuple[Tensor, ...], config: LinearConfig, out_features: int, ring_len: int) -> ColumnQuantizer:
    """The quantizer of a setting. stages: (k, vector_len) float32 each; ring_len: vectors of a ring, with a trellis."""
    if config.has_trellis:
        trellis = Trellis.over(len(stages[0]), config.trellis_bits)
        return TrellisQuantizer(stages[0], trellis, out_features, ring_len)
    return VectorQuantizer(stages, out_features, config.beam if len(stages) > 1 else 1)
