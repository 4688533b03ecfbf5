"""The sweep on the Triton kernels: blocks of columns in one launch each, trailing updates as matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.geometry import Geometry
from vptq.quantize.kernels.launch import register_width
from vptq.quantize.kernels.sweep_block import ROWS, Stage, make_stage, sweep_block_in, sweep_block_out
from vptq.quantize.layout import as_batch
from vptq.quantize.result import join_vectors, look_up
from vptq.quantize.segments import Segment, SweepResult

MOST_ELEMENTS = 1 << 14  # of a program's part of a block, so that it fits in registers


def sweep_by_kernels(
    weights: Tensor, inv_chols: Tensor, segments: list[list[Segment]], geometry: Geometry, blocksize: int
) -> list[SweepResult]:
    """Quantize linears of one shape together; see `sweep.sweep_linears`. weights: (L, out, in); inv_chols: (L, in, in)."""
    remaining = weights.clone(memory_format=torch.contiguous_format)
    inv_chols = inv_chols.contiguous()
    errors = torch.empty_like(remaining)
    sweeper = _AlongOut if geometry.vector_quant_dim == "out" else _AlongIn
    parts = []
    for number, segment in enumerate(segments[0]):
        books = [as_batch(stages) for stages in zip(*(own[number].stages for own in segments), strict=True)]
        part = sweeper(segment, books, inv_chols, geometry)
        step = part.block_columns(blocksize)
        for start in range(segment.start, segment.end, step):
            end = min(start + step, segment.end)
            part.sweep_block(remaining, errors, start, end)
            for linear in range(len(weights) if end < geometry.in_features else 0):
                coming = inv_chols[linear, start:end, end:]
                remaining[linear, :, end:].addmm_(errors[linear, :, start:end], coming, alpha=-1)
        parts.append(part)
    leftover = torch.cat([part.leftover(errors) for part in parts], 2)
    quantized = torch.cat([part.quantized() for part in parts], 2)
    return [
        SweepResult(quantized[i], leftover[i], tuple(tuple(kept[i].long() for kept in part.indices) for part in parts))
        for i in range(len(weights))
    ]


class _Part:
    """One segment of all linears: its codebooks and what is chosen from them."""

    def __init__(self, segment: Segment, books: list[Tensor], inv_chols: Tensor, geometry: Geometry) -> None:
        self.segment, self.books, self.inv_chols, self.geometry = segment, books, inv_chols, geometry
        self.vector_len = segment.vector_len
        shape = (len(inv_chols), *geometry.vector_grid(segment.end - segment.start, segment.vector_len))
        self.indices = [torch.empty(shape, dtype=torch.int32, device=inv_chols.device) for _ in books]

    def quantized(self) -> Tensor:
        """(L, out_features, columns of the segment) float32."""
        columns = self.segment.end - self.segment.start
        vectors = look_up(self.books[0], self.indices[0])
        for book, indices in zip(self.books[1:], self.indices[1:], strict=True):
            vectors = vectors + look_up(book, indices)
        return torch.stack([join_vectors(own[None], self.geometry, columns) for own in vectors])


class _AlongOut(_Part):
    """Vectors along outputs: one set of centroids for all columns, and one without the padded elements."""

    def __init__(self, segment: Segment, books: list[Tensor], inv_chols: Tensor, geometry: Geometry) -> None:
        super().__init__(segment, books, inv_chols, geometry)
        self.stages = [self._stage(book) for book in books]

    def _stage(self, book: Tensor) -> Stage:
        there = self.geometry.out_features % self.vector_len
        if not there:
            return make_stage(book, book[:, None])
        without = book.clone()
        without[:, :, there:] = 0
        return make_stage(book, torch.stack([book, without], 1))

    def block_columns(self, blocksize: int) -> int:
        return max(1, min(blocksize, 128, MOST_ELEMENTS // (ROWS * register_width(self.vector_len))))

    def sweep_block(self, remaining: Tensor, errors: Tensor, start: int, end: int) -> None:
        sweep_block_out(remaining, self.inv_chols, errors, self.stages, self.indices, self.segment.start, start, end)

    def leftover(self, errors: Tensor) -> Tensor:
        """E = (target - quantized) / U_qq solved for the difference: (L, out_features, columns)."""
        columns = slice(self.segment.start, self.segment.end)
        return errors[:, :, columns] * self.inv_chols.diagonal(dim1=1, dim2=2)[:, None, columns]


class _AlongIn(_Part):
    """Vectors along inputs: ‖(w - c) U_tt⁻¹‖² is plain distance once centroids are multiplied by U_tt⁻¹, tile by tile."""

    def block_columns(self, blocksize: int) -> int:
        return max(1, min(blocksize, 128) // self.vector_len) * self.vector_len

    def sweep_block(self, remaining: Tensor, errors: Tensor, start: int, end: int) -> None:
        inverse = self._inverse_tiles(start, end)
        stages = []
        for book in self.books:
            cut = inverse[:, :, : self.vector_len, : self.vector_len]
            searched = torch.stack([own @ tiles for own, tiles in zip(book, cut, strict=True)])
            stages.append(make_stage(book, searched))
        sweep_block_in(remaining, self.inv_chols, inverse, errors, stages, self.indices, self.segment.start, start, end)

    def _tiles(self, start: int, end: int, width: int) -> Tensor:
        """U_tt of the tiles of [start, end), (L, tiles, width, width); zero past a last tile that is narrower."""
        v, (linears, size, _) = self.vector_len, self.inv_chols.shape
        tiles, rest = divmod(end - start, v)
        found = self.inv_chols.new_zeros(linears, tiles + bool(rest), width, width)
        offset = self.inv_chols.storage_offset() + start * (size + 1)
        whole = self.inv_chols.as_strided((linears, tiles, v, v), (size * size, v * (size + 1), size, 1), offset)
        found[:, :tiles, :v, :v] = whole
        if rest:
            found[:, tiles, :rest, :rest] = self.inv_chols[:, end - rest : end, end - rest : end]
        return found

    def _inverse_tiles(self, start: int, end: int) -> Tensor:
        """U_tt⁻¹ padded with zeros to a power of two: padding adds nothing to any distance."""
        width = register_width(self.vector_len)
        tiles = self._tiles(start, end, width)
        padding = tiles.diagonal(dim1=2, dim2=3) == 0
        tiles.diagonal(dim1=2, dim2=3)[padding] = 1
        identity = torch.eye(width, device=tiles.device).expand_as(tiles[0])
        inverse = torch.stack([torch.linalg.solve_triangular(own, identity, upper=True) for own in tiles])
        return inverse.masked_fill(padding[:, :, None, :] | padding[:, :, :, None], 0).contiguous()

    def leftover(self, errors: Tensor) -> Tensor:
        """E = (target - quantized) U_tt⁻¹ solved for the difference: (L, out_features, columns)."""
        start, end = self.segment.start, self.segment.end
        tiles = self._tiles(start, end, self.vector_len)
        here = errors[:, :, start:end]
        padded = torch.nn.functional.pad(here, (0, tiles.shape[1] * self.vector_len - here.shape[2]))
        linears, rows, columns = padded.shape
        cut = padded.view(linears, rows, tiles.shape[1], self.vector_len)
        # one linear after the other: how a batch of products is rounded may depend on its size
        found = torch.stack([torch.einsum("rtv,tvw->rtw", own, uppers) for own, uppers in zip(cut, tiles, strict=True)])
        return found.reshape(linears, rows, columns)[:, :, : end - start]
