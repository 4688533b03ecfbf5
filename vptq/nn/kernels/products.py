"""Products with packed matrices, and matrices in full, by the kernels of product.cu and weight.cu."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.nn.kernels.nvrtc import Kernel, get_kernel
from vptq.nn.kernels.packed import KernelMatrix, MatrixStruct, lane_words

MOST_ROWS = 16  # of x that one launch takes
MOST_SUMS = 64  # that a thread keeps
THREADS = 512
STAGES_BYTES = 24 << 10  # of shared memory, for words on their way
PART_FLOATS = 4096  # sums of warps that wait to be added
MOST_TURNS = 8


class _ProductStruct(ctypes.Structure):
    _fields_ = [
        ("m", MatrixStruct), ("x", ctypes.c_void_p), ("perm", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p), ("offsets", ctypes.c_void_p), ("added", ctypes.c_void_p), ("row_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p), ("y", ctypes.c_void_p), ("unit", ctypes.c_float), ("rows", ctypes.c_int),
        ("x_stride", ctypes.c_int), ("x_first", ctypes.c_int), ("scale_step", ctypes.c_int), ("warp_columns", ctypes.c_int),
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
        scale, offset: (columns,) float32 by stored column. unit: what scale has been divided by, so that x stays in range.
    """

    perm: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    unit: float = 1.0
    first: int = 0


@dataclass(frozen=True)
class Rows:
    """What is done to the sums: (sum + added) · row_scale + bias.

    Attributes:
        added: (n, out_features) float32. row_scale: (1 or out_features,) float32. bias: (out_features,) in y's type.
    """

    added: Tensor | None = None
    row_scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def scale_step(self) -> int:
        return 0 if self.row_scale is None or self.row_scale.numel() == 1 else 1


@dataclass(frozen=True)
class Cut:
    """How a product is shared out: constants of product.cu, and its launch.

    Attributes:
        batch, tiles: rows of x in one product of the tensor cores, and such products side by side. threads: of a block.
        across: warps along the columns. blocks: launched. shared: bytes. columns: of x made ready.
    """

    batch: int
    tiles: int
    threads: int
    across: int
    blocks: int
    shared: int
    columns: int


def product(x: Tensor, matrix: KernelMatrix, columns: Columns, rows: Rows, out: torch.dtype) -> Tensor:
    """(n, in_features) float -> (n, out_features) of type `out`.

    Args:
        x: n from 1 to MOST_ROWS, of the codebooks' type or float32, neighbours in a row beside each other.
        out: the codebooks' type or float32.
    """
    y = torch.empty(len(x), matrix.struct.out_features, dtype=out, device=x.device)
    cut = cut_product(matrix, len(x), _processors(x.device))
    defines = matrix.defines | {
        "BATCH": cut.batch, "TILES": cut.tiles, "THREADS": cut.threads, "STAGES_BYTES": STAGES_BYTES,
        "FLOAT_X": int(x.dtype == torch.float32), "FLOAT_Y": int(out == torch.float32), "PREPARED": int(cut.batch > 1),
    }  # fmt: skip
    struct = _ProductStruct(
        m=matrix.struct, y=y.data_ptr(), unit=columns.unit, rows=len(x), x_first=columns.first, warp_columns=cut.across,
        perm=_pointer(columns.perm), scale=_pointer(columns.scale), offset=_pointer(columns.offset),
        added=_pointer(rows.added), row_scale=_pointer(rows.row_scale), bias=_pointer(rows.bias), scale_step=rows.scale_step,
        x=x.data_ptr(), x_stride=x.stride(0),
    )  # fmt: skip
    if cut.batch > 1:
        ready = torch.empty(len(x), cut.columns, dtype=torch.int16, device=x.device)
        sums = None if columns.offset is None else torch.empty(len(x), dtype=torch.float32, device=x.device)
        given = [struct, ctypes.c_void_p(ready.data_ptr()), ctypes.c_void_p(_pointer(sums))]
        _kernel("prepare", defines, x.device).launch((len(x), 1, 1), cut.threads, 0, given)
        struct.x, struct.x_stride, struct.offsets = ready.data_ptr(), cut.columns, _pointer(sums)
    _kernel("product", defines, x.device).launch((cut.blocks, 1, 1), cut.threads, cut.shared, [struct])
    return y


def weight(matrix: KernelMatrix, columns: Columns, rows: Rows, out: Tensor) -> None:
    """The matrix in full, scaled, into `out` (out_features, columns), of the codebooks' type: stored order of columns."""
    scaled = columns.scale is not None or columns.offset is not None or rows.row_scale is not None
    threads = THREADS
    defines = matrix.defines | {"THREADS": threads, "STAGES_BYTES": STAGES_BYTES, "SCALED": int(scaled)}
    struct = _WeightStruct(
        m=matrix.struct, out=out.data_ptr(), scale=_pointer(columns.scale), offset=_pointer(columns.offset),
        row_scale=_pointer(rows.row_scale), stride=out.stride(0), scale_step=rows.scale_step,
    )  # fmt: skip
    shared = matrix.table_bytes * matrix.defines["COPIES"]
    blocks = _processors(out.device) * (1 if shared > 100 << 10 else 2)
    _kernel("weight", defines, out.device, "weight.cu").launch((blocks, 1, 1), threads, shared, [struct])


def cut_product(matrix: KernelMatrix, count: int, processors: int) -> Cut:
    """How a product with `count` rows of x is shared out over a GPU."""
    d, m = matrix.defines, matrix.struct
    threads = THREADS
    warps = threads // 32
    pairs = -(-matrix.unit_rows // 2)
    batch, tiles = _cut_rows(pairs, m.units, count, processors)
    slice_columns = 32 * (4 if d["STEP_BITS"] else 8) // batch
    slices = -(-m.group_size // slice_columns) * m.groups
    across = _warps_across(slices, -(-m.units // batch), warps, processors, 8 if d["STEP_BITS"] or batch > 1 else 4)
    part_pairs, turns = _parts(pairs, warps, batch, tiles)
    parts = turns * part_pairs * 2 * (warps // across) * batch * batch * tiles * (across + 1)
    columns = -(-slices // across) * across * slice_columns
    stage = lane_words(d) * 4 * threads
    words = max(2, min(8, STAGES_BYTES // stage)) * stage
    shared = matrix.table_bytes * d["COPIES"] + words + (0 if batch > 1 else 2 * columns) + 4 * max(parts, warps)
    return Cut(batch, tiles, threads, across, min(-(-m.units // batch), processors), shared, columns)


def _cut_rows(pairs: int, units: int, count: int, processors: int) -> tuple[int, int]:
    """`batch` and `tiles`: few rows a product, so that there are units enough for all processors, as long as sums fit."""
    if FORCE_CUT: return FORCE_CUT
    whole = 1 << max(count - 1, 0).bit_length()
    batch = min(8, whole)
    while batch > 2 and units < processors * batch and 2 * (whole // batch) * pairs * 4 <= MOST_SUMS:
        batch //= 2
    return batch, whole // batch


FORCE_CUT = None
FORCE_ACROSS = 0


def _warps_across(slices: int, units: int, warps: int, processors: int, least: int) -> int:
    """Warps that share a unit's columns: few, for each to have a long way between sums, as long as all have work."""
    if FORCE_ACROSS: return min(FORCE_ACROSS, warps)
    across = 1
    while across < warps and 2 * across <= slices and (across < least or units < processors * (warps // across)):
        across *= 2
    return across


def _parts(pairs: int, warps: int, batch: int, tiles: int) -> tuple[int, int]:
    """PART_PAIRS and PART_TURNS of product.cu."""
    all_pairs = -(-pairs // 4) * 4 if batch == 1 else pairs
    pair_floats = warps * 2 * batch * batch * tiles
    part_pairs = max(1, min(all_pairs, PART_FLOATS // pair_floats))
    return part_pairs, 1 if part_pairs < all_pairs else max(1, min(MOST_TURNS, PART_FLOATS // (pair_floats * all_pairs)))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _kernel(name: str, defines: dict[str, int], device: torch.device, source: str = "product.cu") -> Kernel:
    return get_kernel(("common.cuh", "decode.cuh", source), name, tuple(sorted(defines.items())), device)
