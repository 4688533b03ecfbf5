"""Products with packed matrices, and matrices in full, by the kernels of product.cu and weight.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.nn.kernels.given import AS_IT_IS, Given
from vptq.nn.kernels.nvrtc import Kernel, get_kernel, limits_of, pointer
from vptq.nn.kernels.packed import KernelMatrix, MatrixStruct, lane_words
from vptq.nn.vectors import MOST_ROWS

MOST_MATRICES = 4  # that one launch takes
MOST_SUMS = 64  # that a thread keeps
MOST_THREADS = 512
SHARED_OF_TWO = 200 << 10  # bytes, of two blocks on a processor
TURN_COSTS = (0.5, 2.0)  # of adding up a turn's sums, in steps; with one row of x, and with more: measured
STAGES_BYTES = 24 << 10  # of shared memory, for words on their way
SMALLER = ((256, 24 << 10), (256, 12 << 10), (128, 8 << 10))  # threads and stages where shared memory is short
PART_FLOATS = 4096  # sums of warps that wait to be added
MOST_TURNS = 8


class _ProductStruct(ctypes.Structure):
    """`Product` of product.cu."""

    _fields_ = [
        ("m", MatrixStruct), ("x", ctypes.c_void_p), ("beside", ctypes.c_void_p), ("perm", ctypes.c_void_p),
        ("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("added", ctypes.c_void_p), ("row_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("y", ctypes.c_void_p), ("ready", ctypes.c_void_p),
        ("sums", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("rows", ctypes.c_int), ("in_features", ctypes.c_int),
        ("x_stride", ctypes.c_int), ("x_first", ctypes.c_int), ("scale_step", ctypes.c_int), ("warp_columns", ctypes.c_int),
    ]  # fmt: skip


class _ProductsStruct(ctypes.Structure):
    """`Products` of product.cu."""

    _fields_ = [
        ("p", _ProductStruct * MOST_MATRICES), ("first", ctypes.c_int * (MOST_MATRICES + 1)), ("count", ctypes.c_int),
    ]  # fmt: skip


class _WeightStruct(ctypes.Structure):
    _fields_ = [
        ("m", MatrixStruct), ("out", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p), ("stride", ctypes.c_int), ("scale_step", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """How numbers of x become what the packed columns are multiplied with.

    Attributes:
        perm: (columns,) int16 with the bits of a uint16, the number of x that each stored column takes; None: `first` on.
        scale, offset: (columns,) of the codebooks' type, by stored column; all three where they can be read 16 bytes at a time.
    """

    perm: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    first: int = 0


@dataclass(frozen=True)
class Rows:
    """What is done to the sums: (sum + added) · row_scale + bias + residual.

    Attributes:
        added: (n, out_features) float32. row_scale: (1 or out_features,) float32. bias: (out_features,) in y's type.
        residual: as y.
    """

    added: Tensor | None = None
    row_scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """How a product is shared out: constants of product.cu, and its launch.

    Attributes:
        batch, tiles: rows of x in one product of the tensor cores, and such products side by side.
        threads: of a block. stages: bytes of shared memory for words on their way.
        across: warps along the columns. blocks: launched. shared: bytes. columns: of x made ready.
    """

    batch: int
    tiles: int
    threads: int
    stages: int
    across: int
    blocks: int
    shared: int
    columns: int


@dataclass(frozen=True)
class Factor:
    """A matrix to be multiplied with, how x comes to it, and what becomes of the sums."""

    matrix: KernelMatrix
    columns: Columns = Columns()
    rows: Rows = Rows()


def product(x: Tensor, factor: Factor, out: torch.dtype, given: Given = AS_IT_IS) -> Tensor:
    """(n, in_features) float -> (n, out_features) of type `out`, see `products`."""
    return products(x, [factor], out, given)[0]


def products(x: Tensor, factors: Sequence[Factor], out: torch.dtype, given: Given = AS_IT_IS) -> list[Tensor]:
    """x with several matrices of one form, in one launch: (n, in_features) float -> (n, out_features) of type `out` for each.

    Args:
        x: n from 1 to MOST_ROWS, of the codebooks' type or float32, neighbours in a row beside each other.
        factors: up to MOST_MATRICES, with equal `defines`. out: the codebooks' type or float32.
        given: what x goes through before that; anything but AS_IT_IS only for one row of 16-bit numbers.
    """
    given.check(x)
    count, device = len(x), x.device
    limits = limits_of(device)
    shares = share_out([factor.matrix.struct.units for factor in factors], limits.processors)
    cuts = cut_products([factor.matrix for factor in factors], count, shares, limits.shared)
    found = [torch.empty(count, factor.matrix.struct.out_features, dtype=out, device=device) for factor in factors]
    cut = cuts[0]
    defines = factors[0].matrix.defines | {
        "BATCH": cut.batch, "TILES": cut.tiles, "THREADS": cut.threads, "STAGES_BYTES": cut.stages,
        "FLOAT_X": int(x.dtype == torch.float32), "FLOAT_Y": int(out == torch.float32), "PREPARED": int(cut.batch > 1),
        "GIVEN": given.kind,
    }  # fmt: skip
    struct = _ProductsStruct(count=len(factors))
    kept = []  # until launched
    for number, (factor, own, y) in enumerate(zip(factors, cuts, found, strict=True)):
        struct.p[number] = _struct_of(factor, own, x, y, given)
        struct.first[number + 1] = struct.first[number] + own.blocks
        if cut.batch > 1:
            ready = torch.empty(count, own.columns, dtype=torch.int16, device=device)
            sums = None if factor.columns.offset is None else torch.empty(count, dtype=torch.float32, device=device)
            struct.p[number].ready, struct.p[number].sums = ready.data_ptr(), pointer(sums)
            kept += [ready, sums]
    if cut.batch > 1:
        _kernel("prepare", defines, device).launch((count, len(factors), 1), cut.threads, 0, [struct])
    shared = max(_more_than_half(limits.shared), *(own.shared for own in cuts))
    _kernel("product", defines, device).launch((struct.first[len(factors)], 1, 1), cut.threads, shared, [struct])
    return found


def _struct_of(factor: Factor, cut: Cut, x: Tensor, y: Tensor, given: Given) -> _ProductStruct:
    columns, rows = factor.columns, factor.rows
    return _ProductStruct(
        m=factor.matrix.struct, y=y.data_ptr(), rows=len(x), x_first=columns.first, warp_columns=cut.across,
        perm=pointer(columns.perm), scale=pointer(columns.scale), offset=pointer(columns.offset),
        added=pointer(rows.added), row_scale=pointer(rows.row_scale), bias=pointer(rows.bias),
        residual=pointer(rows.residual), scale_step=_scale_step(rows.row_scale), x=x.data_ptr(), x_stride=x.stride(0),
        in_features=x.shape[1], beside=pointer(given.beside), epsilon=given.epsilon,
    )  # fmt: skip


def weight(matrix: KernelMatrix, scale: Tensor | None, offset: Tensor | None, row_scale: Tensor | None, out: Tensor) -> None:
    """The matrix in full, times scale, plus offset, times row_scale, into `out`, columns in stored order.

    Args:
        scale, offset: (columns,) of the codebooks' type, by stored column. row_scale: (1 or out_features,) float32.
        out: (out_features, columns) of the codebooks' type, neighbours in a row beside each other.
    """
    d = matrix.defines
    vector = d["WIDE"] if d["STEP_BITS"] else d["EVEN"]
    vector = vector and out.stride(0) % 8 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in (out, scale, offset))
    scaled = any(tensor is not None for tensor in (scale, offset, row_scale))
    defines = d | {"THREADS": MOST_THREADS, "SCALED": int(scaled), "VECTOR": int(vector)}
    struct = _WeightStruct(
        m=matrix.struct, out=out.data_ptr(), scale=pointer(scale), offset=pointer(offset), row_scale=pointer(row_scale),
        stride=out.stride(0), scale_step=_scale_step(row_scale),
    )  # fmt: skip
    shared = matrix.table_bytes * d["COPIES"]
    blocks = limits_of(out.device).processors * (1 if 2 * shared > SHARED_OF_TWO else 2)
    _kernel("weight", defines, out.device, "weight.cu").launch((blocks, 1, 1), MOST_THREADS, shared, [struct])


def share_out(units: Sequence[int], processors: int) -> list[int]:
    """Processors for each of several matrices, by their units, so that the slowest takes least: at least one for each."""
    shares = [1] * len(units)
    for _ in range(processors - len(units)):
        slowest = max(range(len(units)), key=lambda i: units[i] / shares[i])
        shares[slowest] += 1
    return shares


def cut_products(matrices: Sequence[KernelMatrix], count: int, shares: Sequence[int], most_shared: int) -> list[Cut]:
    """How products with `count` rows of x are shared out over so many processors each, of so much shared memory.

    All have the same batch, tiles and threads, as one launch must.
    """
    units, processors = sum(matrix.struct.units for matrix in matrices), sum(shares)
    batch, tiles = _cut_rows(-(-matrices[0].unit_rows // 2), units, count, processors)

    def cuts(threads: int, stages: int) -> list[Cut]:
        return [_cut(matrix, batch, tiles, share, threads, stages) for matrix, share in zip(matrices, shares, strict=True)]

    found = cuts(MOST_THREADS, STAGES_BYTES)
    for threads, stages in SMALLER:  # GPUs differ in shared memory
        if max(cut.shared for cut in found) > most_shared:
            found = cuts(threads, stages)
    return found


def fits(matrix: KernelMatrix, device: torch.device) -> bool:
    """Whether products with any number of rows find room in shared memory."""
    limits = limits_of(device)
    cuts = (cut_products([matrix], n, [limits.processors], limits.shared)[0] for n in range(1, MOST_ROWS + 1))
    return all(cut.shared <= limits.shared for cut in cuts)


def _more_than_half(most_shared: int) -> int:
    """Shared memory that no two blocks of one processor can have: else blocks that begin early would gather where others end
    first, and other processors stand idle. Small kernels still find room beside one.
    """
    return most_shared // 2 + 1024


def _cut(matrix: KernelMatrix, batch: int, tiles: int, processors: int, threads: int, stages: int) -> Cut:
    d, m = matrix.defines, matrix.struct
    warps = threads // 32
    pairs = -(-matrix.unit_rows // 2)
    slice_columns = 32 * (4 if d["STEP_BITS"] else 8) // batch
    slices, units = -(-m.group_size // slice_columns) * m.groups, -(-m.units // batch)
    across = _warps_across(slices, units, warps, processors, TURN_COSTS[batch > 1])
    part_pairs, turns = _parts(pairs, warps, batch, tiles)
    parts = 2 * warps + turns * part_pairs * 2 * (warps // across) * batch * batch * tiles * (across + 1)
    columns = -(-slices // across) * across * slice_columns
    stage = lane_words(d) * 4 * threads
    words = max(2, min(8, stages // stage)) * stage
    shared = matrix.table_bytes * d["COPIES"] + words + (0 if batch > 1 else 2 * columns) + 4 * parts
    return Cut(batch, tiles, threads, stages, across, min(units, processors), shared, columns)


def _cut_rows(pairs: int, units: int, count: int, processors: int) -> tuple[int, int]:
    """`batch` and `tiles`: few rows a product, so that there are units enough for all processors, as long as sums fit."""
    whole = 1 << max(count - 1, 0).bit_length()
    batch = min(8, whole)
    while batch > 2 and units < 2 * processors * batch and 2 * (whole // batch) * pairs * 4 <= MOST_SUMS:
        batch //= 2
    return batch, whole // batch


def _warps_across(slices: int, units: int, warps: int, processors: int, turn_cost: float) -> int:
    """Warps that share a unit's columns, so that all turns together take least, in steps; few where that is the same."""

    def cost(across: int) -> float:
        turns = -(-units // (processors * (warps // across)))
        return turns * (-(-slices // across) + turn_cost)

    return min((1 << i for i in range(warps.bit_length())), key=cost)


def _parts(pairs: int, warps: int, batch: int, tiles: int) -> tuple[int, int]:
    """PART_PAIRS and PART_TURNS of product.cu."""
    all_pairs = -(-pairs // 4) * 4 if batch == 1 else pairs
    pair_floats = warps * 2 * batch * batch * tiles
    part_pairs = max(1, min(all_pairs, PART_FLOATS // pair_floats))
    return part_pairs, 1 if part_pairs < all_pairs else max(1, min(MOST_TURNS, PART_FLOATS // (pair_floats * all_pairs)))


def _scale_step(row_scale: Tensor | None) -> int:
    return 0 if row_scale is None or row_scale.numel() == 1 else 1


def _kernel(name: str, defines: dict[str, int], device: torch.device, source: str = "product.cu") -> Kernel:
    return get_kernel(("ptx.cuh", "numbers.cuh", "decode.cuh", source), name, tuple(sorted(defines.items())), device)
