"""Matrices whose vectors come from codebooks, and products with them, in plain torch: some rows at a time, never all unpacked.

Indices are packed as in `nn.packing`: the low bits name the main centroid, those above the residual one. Columns come in
groups of equal size with codebooks of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.nn.packing import unpack_bits
from vptq.quantize.result import lay_out, look_up

CHUNK_WEIGHTS = 1 << 20
BAG_INDICES = 1 << 16  # looked up at once: they stay in a core's cache, and torch keeps to one thread that long
MOST_ROWS = 16  # of x that the GPU's kernels take in one launch
MOST_PARTIAL = {"cpu": 1 << 20, "cuda": 1 << 26}  # numbers of a table of partial sums that caches hold: measured
FEW_ROWS = 12  # of x, for which sums of centroids are cheaper than unpacking: measured, docs/performance.md


@dataclass(frozen=True)
class VectorMatrix:
    """A matrix (out_features, groups · group_size) as indices and codebooks.

    Attributes:
        words: (groups, vector rows, words) int32. main: (groups, k, vector_len) float. residual: the same for the second stage.
        along_out: whether a vector runs down a column, else along a row.
        main_bits, residual_bits: of an index.
    """

    words: Tensor
    main: Tensor
    residual: Tensor | None
    out_features: int
    group_size: int
    along_out: bool
    main_bits: int
    residual_bits: int

    @property
    def dtype(self) -> torch.dtype:
        return self.main.dtype

    @property
    def vector_len(self) -> int:
        return self.main.shape[2]

    @property
    def vector_columns(self) -> int:
        """Vectors of one group in a row of vectors."""
        return self.group_size if self.along_out else -(-self.group_size // self.vector_len)

    @property
    def books(self) -> list[Tensor]:
        """The codebooks that there are: main, then residual."""
        return [self.main] if self.residual is None else [self.main, self.residual]

    def indices(self, group: int | slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Main and residual indices of some rows of vectors, (..., rows, vector columns) int64."""
        values = unpack_bits(self.words[group, rows], self.main_bits + self.residual_bits, self.vector_columns)
        if self.residual is None:
            return values, None
        return values & ((1 << self.main_bits) - 1), values >> self.main_bits


def sums_pay(count: int, device: torch.device) -> bool:
    """Whether a product with `count` rows of x is better made of sums of centroids than with the unpacked matrix."""
    return device.type == "cpu" and count <= FEW_ROWS


def assemble(parts: Iterator[tuple[int, Tensor]], out_features: int, columns: int, like: Tensor) -> Tensor:
    """A matrix from (first row, rows) of it: (out_features, columns), in the type and place of `like`."""
    weight = like.new_empty(out_features, columns)
    for first, part in parts:
        weight[first : first + len(part)] = part
    return weight


def multiply(x: Tensor, parts: Iterator[tuple[int, Tensor]], out_features: int) -> Tensor:
    """x Wᵀ with (first row, rows) of W, one after the other: (n, columns) -> (n, out_features)."""
    product = x.new_empty(len(x), out_features)
    for first, part in parts:
        torch.mm(x, part.T, out=product[:, first : first + len(part)])
    return product


def vector_weight(matrix: VectorMatrix) -> Tensor:
    """The matrix, (out_features, groups · group_size), in the type of its codebooks."""
    return assemble(_parts(matrix), matrix.out_features, len(matrix.words) * matrix.group_size, matrix.main)


def vector_product(x: Tensor, matrix: VectorMatrix) -> Tensor:
    """x Wᵀ: (n, groups · group_size) float -> (n, out_features), in x's type; the arithmetic is in that of the codebooks."""
    wide = x.to(matrix.dtype)
    if sums_pay(len(x), x.device) and (matrix.along_out or partial_sums_pay(len(x), matrix)):
        sums = _sums_of_centroids if matrix.along_out else _sums_of_partial_sums
        return sums(wide, matrix).to(x.dtype)
    return multiply(wide, _parts(matrix), matrix.out_features).to(x.dtype)


def _parts(matrix: VectorMatrix) -> Iterator[tuple[int, Tensor]]:
    """The matrix some rows at a time: the first row's number, and (rows, columns)."""
    groups, rows, _ = matrix.words.shape
    high = matrix.vector_len if matrix.along_out else 1
    step = max(1, CHUNK_WEIGHTS // (groups * matrix.group_size * high))
    for start in range(0, rows, step):
        main, second = matrix.indices(slice(None), slice(start, start + step))
        vectors = look_up(matrix.main, main)
        if matrix.residual is not None and second is not None:
            vectors = vectors + look_up(matrix.residual, second)
        yield start * high, lay_out(vectors, matrix.along_out, matrix.group_size)[: matrix.out_features - start * high]


def split_vectors_of(weight: Tensor, matrix: VectorMatrix) -> Tensor:
    """The vectors of a matrix cut as this one is, padded with zeros: (out_features, columns) -> (groups, rows, columns, v)."""
    groups, rows, _ = matrix.words.shape
    length, size = matrix.vector_len, matrix.group_size
    if matrix.along_out:
        padded = torch.nn.functional.pad(weight, (0, 0, 0, rows * length - len(weight)))
        return padded.reshape(rows, length, groups, size).permute(2, 0, 3, 1)
    padded = torch.nn.functional.pad(weight.reshape(len(weight), groups, size), (0, matrix.vector_columns * length - size))
    return padded.reshape(rows, groups, -1, length).transpose(0, 1)


def _sums_of_centroids(x: Tensor, matrix: VectorMatrix) -> Tensor:
    """A run of outputs is the sum of its row's centroids, each times its column's x: no matrix is made, only indices are."""
    groups, rows, _ = matrix.words.shape
    step = max(1, BAG_INDICES // matrix.group_size)
    sums = x.new_zeros(len(x), rows, matrix.vector_len)
    for group in range(groups):
        inputs = x[:, group * matrix.group_size : (group + 1) * matrix.group_size]
        repeated = inputs[:, None].repeat(1, min(step, rows), 1)
        for start in range(0, rows, step):
            main, second = matrix.indices(group, slice(start, start + step))
            for number, factors in enumerate(repeated):
                own = sums[number, start : start + step]
                own += bags(main, matrix.main[group], factors)
                if matrix.residual is not None and second is not None:
                    own += bags(second, matrix.residual[group], factors)
    return sums.flatten(1)[:, : matrix.out_features].contiguous()


def partial_sums_pay(count: int, matrix: VectorMatrix) -> bool:
    """Whether a product with `count` rows of x, for vectors along inputs, is better made of `partial_sums`.

    They are as many as products with so many outputs as there are centroids.
    """
    sizes = [book.shape[1] for book in matrix.books]
    table = count * matrix.vector_columns * max(sizes)
    few = sum(sizes) <= matrix.out_features
    return few and 0 < table <= MOST_PARTIAL.get(matrix.words.device.type, 0)


def partial_sums(x: Tensor, book: Tensor, matrix: VectorMatrix) -> Tensor:
    """What every centroid makes of every run of inputs, for a matrix whose vectors lie along them.

    Args:
        x: (n, groups · group_size) and book: (groups, k, v), of one float type.
    Returns:
        (groups, k, vector columns, n).
    """
    count, groups = len(x), len(book)
    runs = torch.nn.functional.pad(
        x.reshape(count, groups, -1), (0, matrix.vector_columns * matrix.vector_len - matrix.group_size)
    )
    runs = runs.view(count, groups, matrix.vector_columns, matrix.vector_len).permute(1, 3, 2, 0)
    return (book @ runs.reshape(groups, matrix.vector_len, -1)).view(groups, -1, matrix.vector_columns, count)


def _sums_of_partial_sums(x: Tensor, matrix: VectorMatrix) -> Tensor:
    """An output is the sum of what its centroids make of the inputs, each made once: indices are only looked up."""
    groups, rows, _ = matrix.words.shape
    step = max(1, BAG_INDICES // matrix.vector_columns)
    tables = [partial_sums(x, book, matrix) for book in matrix.books]
    columns = torch.arange(matrix.vector_columns, device=x.device)
    sums = x.new_zeros(rows, len(x))
    for group in range(groups):
        for start in range(0, rows, step):
            for indices, table in zip(matrix.indices(group, slice(start, start + step)), tables, strict=False):
                assert indices is not None
                places = indices * matrix.vector_columns + columns
                sums[start : start + step] += torch.nn.functional.embedding_bag(places, table[group].flatten(0, 1), mode="sum")
    return sums.T.contiguous()


def bags(indices: Tensor, table: Tensor, factors: Tensor) -> Tensor:
    """Σ_c factors[r, c] table[indices[r, c]]: (rows, columns) and (k, v) -> (rows, v)."""
    return torch.nn.functional.embedding_bag(indices, table, mode="sum", per_sample_weights=factors[: len(indices)])
