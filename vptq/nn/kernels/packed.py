"""Packed matrices as the CUDA kernels take them: codebooks in 16 bits, padded, and what the sources are compiled with."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vptq.nn.rings import RingMatrix, make_run_table
from vptq.nn.vectors import VectorMatrix

LEAST_CENTROIDS = 8
LONGEST_ENTRY = 16  # numbers that one look-up brings
MOST_STATE_BITS = 20  # of a trellis
SHARED_TABLES = 128 << 10  # bytes of codebooks that still fit in shared memory beside the rest
COPIED_TABLES = 64 << 10  # bytes up to which copies of a codebook pay
BANK_BYTES = 128  # that shared memory serves at once
FLOATS = (torch.float16, torch.bfloat16)


class MatrixStruct(ctypes.Structure):
    """`Matrix` of decode.cuh."""

    _fields_ = [
        ("words", ctypes.c_void_p), ("main", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("row_words", ctypes.c_int),
        ("units", ctypes.c_int), ("out_features", ctypes.c_int), ("groups", ctypes.c_int), ("group_size", ctypes.c_int),
        ("ring_words", ctypes.c_int), ("last_words", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class KernelMatrix:
    """A packed matrix on a GPU, in the form of the kernels.

    Attributes:
        words: as in `VectorMatrix` or `RingMatrix`. main, residual: (groups, entries, entry) of 16 bits a number.
        defines: what decode.cuh is compiled with. struct: what it is given.
        table_bytes: of its codebooks, once.
    """

    words: Tensor
    main: Tensor
    residual: Tensor | None
    defines: dict[str, int]
    struct: MatrixStruct
    table_bytes: int

    @property
    def unit_rows(self) -> int:
        """Rows of the matrix that a lane has at once."""
        return unit_vectors(self.defines["STEP_BITS"]) * self.defines["V"]


def takes(matrix: VectorMatrix | RingMatrix, dtype: torch.dtype) -> bool:
    """Whether the kernels have a form for this matrix, with codebooks in `dtype`."""
    if dtype not in FLOATS or matrix.words.numel() >= 1 << 31:
        return False
    if isinstance(matrix, RingMatrix):
        length = matrix.table.shape[1]
        return length <= LONGEST_ENTRY and length & (length - 1) == 0 and matrix.trellis.state_bits <= MOST_STATE_BITS
    least = min(book.shape[1] for book in matrix.books)  # smaller ones don't fill what is copied at once
    return matrix.along_out and matrix.vector_len <= LONGEST_ENTRY and least >= LEAST_CENTROIDS


def make_tables(matrix: VectorMatrix | RingMatrix, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`main` and `residual` of a KernelMatrix: codebooks rounded to `dtype`, entries padded. Shared as codebooks are."""
    if isinstance(matrix, RingMatrix):
        return make_run_table(matrix.table, matrix.trellis, _run(matrix)).to(dtype)[None].contiguous(), None
    entry = max(2, 1 << (matrix.vector_len - 1).bit_length())
    return _padded(matrix.main, entry, dtype), None if matrix.residual is None else _padded(matrix.residual, entry, dtype)


def kernel_matrix(matrix: VectorMatrix | RingMatrix, tables: tuple[Tensor, Tensor | None]) -> KernelMatrix:
    """From packed tensors on a GPU and what `make_tables` made: (groups, entries, entry). `takes` says for which."""
    main, residual = tables
    if isinstance(matrix, RingMatrix):
        return _of_rings(matrix, main)
    entry = main.shape[2]
    groups, rows, row_words = matrix.words.shape
    bits = matrix.main_bits + matrix.residual_bits
    even = matrix.group_size % 8 == 0 and bits % 4 == 0
    defines = {
        "V": matrix.vector_len, "ENTRY": entry, "INDEX_BITS": bits, "MAIN_BITS": _entry_bits(main),
        "RES_BITS": 0 if residual is None else _entry_bits(residual), "STEP_BITS": 0,
        "WIDE": int(even and bits % 16 == 0 and row_words % 4 == 0), "EVEN": int(even),
    }  # fmt: skip
    return _assembled(
        matrix.words, main, residual, defines, matrix.out_features, matrix.group_size,
        groups=groups, row_words=row_words, units=rows, ring_words=0,
    )  # fmt: skip


def with_fewer_copies(matrix: KernelMatrix) -> Iterator[KernelMatrix]:
    """The matrix, then the same with codebooks fewer times in shared memory, last not at all: for GPUs that have little."""
    copies = matrix.defines["COPIES"]
    while copies:
        yield replace(matrix, defines=matrix.defines | {"COPIES": copies})
        copies //= 2
    yield replace(matrix, defines=matrix.defines | {"COPIES": 0})


def _of_rings(matrix: RingMatrix, table: Tensor) -> KernelMatrix:
    trellis, length, run = matrix.trellis, matrix.table.shape[1], _run(matrix)
    rings, ring_words, columns = matrix.words.shape
    defines = {
        "V": length, "ENTRY": run * length, "INDEX_BITS": 0, "RES_BITS": 0,
        "MAIN_BITS": trellis.state_bits + (run - 1) * trellis.step_bits,
        "STEP_BITS": trellis.step_bits, "WIDE": int(columns % 4 == 0), "EVEN": 0,
    }  # fmt: skip
    return _assembled(
        matrix.words, table, None, defines, matrix.out_features, columns,
        groups=1, row_words=columns, units=rings * ring_words // unit_words(trellis.step_bits), ring_words=ring_words,
    )  # fmt: skip


def _run(matrix: RingMatrix) -> int:
    """Vectors that one look-up brings."""
    length = matrix.table.shape[1]
    size = 4 * length << (matrix.trellis.state_bits + matrix.trellis.step_bits)
    return 2 if 2 * length <= LONGEST_ENTRY and size <= SHARED_TABLES else 1


def _assembled(
    words: Tensor, main: Tensor, residual: Tensor | None, defines: dict[str, int], out_features: int, group_size: int,
    *, groups: int, row_words: int, units: int, ring_words: int,
) -> KernelMatrix:  # fmt: skip
    size = sum(table[0].numel() * 2 for table in (main, residual) if table is not None)
    defines = defines | {
        "BF16": int(main.dtype == torch.bfloat16), "GROUPED": int(groups > 1),
        "COPIES": _copies(size, 2 * defines["ENTRY"]) if groups == 1 else 0,
    }  # fmt: skip
    at_once = 4 if ring_words and defines["WIDE"] else lane_words(defines) if defines["EVEN"] else 1
    struct = MatrixStruct(
        words=words.data_ptr(), main=main.data_ptr(), residual=None if residual is None else residual.data_ptr(),
        row_words=row_words, units=units, out_features=out_features, groups=groups, group_size=group_size,
        ring_words=ring_words, last_words=words.numel() - at_once,
    )  # fmt: skip
    return KernelMatrix(words, main, residual, defines, struct, size)


def _padded(book: Tensor, entry: int, dtype: torch.dtype) -> Tensor:
    """(groups, k, v) -> (groups, power of two, entry), zeros past k and v; the same memory where it is so already."""
    entries = max(2, 1 << (book.shape[1] - 1).bit_length())
    if book.dtype == dtype and book.shape[1:] == (entries, entry) and book.is_contiguous():
        return book
    return torch.nn.functional.pad(book.to(dtype), (0, entry - book.shape[2], 0, entries - book.shape[1])).contiguous()


def _entry_bits(table: Tensor) -> int:
    return table.shape[1].bit_length() - 1


def _copies(size: int, entry_bytes: int) -> int:
    """How often codebooks lie in shared memory, so that lanes that look up at once meet in fewer banks; 0: not at all."""
    if size > SHARED_TABLES:
        return 0
    copies = 1
    while 2 * copies * size <= COPIED_TABLES and 2 * copies * entry_bytes <= BANK_BYTES:
        copies *= 2
    return copies


def unit_words(step_bits: int) -> int:
    """Words of a ring that end where a vector does."""
    return step_bits // math.gcd(step_bits, 32)


def unit_vectors(step_bits: int) -> int:
    """Vectors in `unit_words`; 1 without a trellis."""
    return 32 // math.gcd(step_bits, 32) if step_bits else 1


def lane_words(defines: dict[str, int]) -> int:
    """Words that a lane reads at once."""
    if defines["STEP_BITS"]:
        return 4 * (unit_words(defines["STEP_BITS"]) + 1)
    bits = 8 * defines["INDEX_BITS"]
    return -(-bits // 32) + (1 if bits % 32 else 0)
