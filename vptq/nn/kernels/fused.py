"""A packed linear as a few kernels: rotations, column order, scales and bias are done on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.nn.kernels.given import AS_IT_IS, Given
from vptq.nn.kernels.packed import KernelMatrix, kernel_matrix, make_tables, takes, with_fewer_copies
from vptq.nn.kernels.products import Columns, Factor, Rows, fits, product, products, weight
from vptq.nn.kernels.turns import Turn, cut_turn, turn, turn_back, turns
from vptq.nn.operands import main_matrix, outlier_matrix, row_scales
from vptq.nn.reference import rotation_of
from vptq.nn.rings import RingMatrix
from vptq.nn.vectors import MOST_ROWS, VectorMatrix
from vptq.quantize.rotation import Rotation

SMALLEST_SCALE = 2.0**-30


@dataclass(frozen=True)
class FusedLinear:
    """A packed linear on a GPU, ready to be multiplied with.

    Attributes:
        config: of the linear. dtype: of codebooks and activations, float16 or bfloat16.
        main, outliers: the packed columns. main_columns, outlier_columns: what x becomes for them.
        row_scale: (1 or out_features,) float32, for sums of products with `main_columns`, whose scale it makes up for.
        scale, offset: (in_features,) of type `dtype` by stored column, and weight_scale, as row_scale: for the weight in full.
        order: (in_features,) int32, the number of x that each stored column takes.
    """

    config: LayerConfig
    dtype: torch.dtype
    main: KernelMatrix
    outliers: KernelMatrix | None
    main_columns: Columns
    outlier_columns: Columns
    scale: Tensor | None
    offset: Tensor | None
    row_scale: Tensor | None
    weight_scale: Tensor | None
    order: Tensor | None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in_features) of type `dtype` -> (..., out_features)."""
        rows = x.reshape(-1, self.config.in_features)
        rows = rows if rows.stride(-1) == 1 and rows.data_ptr() % 16 == 0 else rows.contiguous()
        if not len(rows):
            found = x.new_empty(0, self.config.out_features)
        else:
            found = few_rows(rows, [self], [bias])[0] if len(rows) <= MOST_ROWS else self._many(rows, bias)
        return found.view(*x.shape[:-1], self.config.out_features)

    def _many(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rotation = rotation_of(self.config)
        if rotation.across is not None:
            x = turn(x.contiguous(), rotation.across, self.dtype)
        if self.order is not None:
            x = x.index_select(1, self.order)
        found = torch.nn.functional.linear(x, self.weight(), bias if rotation.down is None else None)
        return found if rotation.down is None else turn_back(Turn(found, rotation.down, bias), self.dtype)

    def weight(self) -> Tensor:
        """The weight as it is stored, rotated or not, in full: (out_features, in_features) of type `dtype`, stored order."""
        size = self.config.outlier_size
        found = torch.empty(self.config.out_features, self.config.in_features, dtype=self.dtype, device=self.main.words.device)
        parts = [(self.main, slice(size, None))]
        if self.outliers is not None:
            parts.append((self.outliers, slice(0, size)))
        for matrix, columns in parts:
            scale, offset = (None if tensor is None else tensor[columns] for tensor in (self.scale, self.offset))
            weight(matrix, scale, offset, self.weight_scale, found[:, columns])
        return found


def few_rows(
    x: Tensor, linears: Sequence[FusedLinear], biases: Sequence[Tensor | None],
    given: Given = AS_IT_IS, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """One x, (n, in_features), n from 1 to MOST_ROWS, with several linears that `go_together`: (n, out_features) for each.

    Args:
        given: what x goes through first; anything but AS_IT_IS only for one row. residual: added to each product, as those.
    """
    first = linears[0]
    rotation = rotation_of(first.config)
    if rotation.across is not None:
        x, given = turn(x.contiguous(), rotation.across, torch.float32, given), AS_IT_IS
    down = [rotation_of(linear.config).down for linear in linears]
    out = first.dtype if down[0] is None else torch.float32
    factors = []
    for linear, bias, turned in zip(linears, biases, down, strict=True):
        added = None
        if linear.outliers is not None:
            added = product(x, Factor(linear.outliers, linear.outlier_columns), torch.float32, given)
        last = (bias, residual) if turned is None else (None, None)
        factors.append(Factor(linear.main, linear.main_columns, Rows(added, linear.row_scale, *last)))
    found = products(x, factors, out, given)
    return found if down[0] is None else _turned_back(found, down, first.dtype, biases, residual)


def _turned_back(
    found: Sequence[Tensor], rotations: Sequence[Rotation | None], dtype: torch.dtype, biases: Sequence[Tensor | None],
    residual: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Rᵀ y + bias + residual of each, those of one size in one launch."""
    groups: dict[tuple[int, int], list[int]] = {}
    works = [Turn(y, r, bias, residual) for y, r, bias in zip(found, rotations, biases, strict=True) if r is not None]
    for i, work in enumerate(works):
        groups.setdefault((work.rotation.size, work.rotation.blocks), []).append(i)
    turned = list(found)
    for members in groups.values():
        for i, y in zip(members, turns([works[i] for i in members], dtype, True), strict=True):
            turned[i] = y
    return turned


def go_together(a: FusedLinear, b: FusedLinear) -> bool:
    """Whether two linears with one input can be multiplied in one launch."""
    turns = [rotation_of(linear.config) for linear in (a, b)]
    same_turns = turns[0].across == turns[1].across and (turns[0].down is None) == (turns[1].down is None)
    return (
        same_turns and a.dtype == b.dtype and a.main.defines == b.main.defines and a.config.in_features == b.config.in_features
    )


def fused_linear(
    tensors: Mapping[str, Tensor], config: LayerConfig, dtype: torch.dtype, tables: tuple[Tensor, Tensor | None] | None = None
) -> FusedLinear | None:
    """From stored tensors on a GPU; None for a form that the kernels don't have.

    Args:
        tensors: as `LayerConfig.tensor_shapes` names them, and a shared codebook.
        tables: (groups, entries, entry) of `make_tables`, where they are kept.
    """
    main, outliers = main_matrix(tensors, config, dtype), outlier_matrix(tensors, config, dtype)
    if not all(takes(matrix, dtype) for matrix in (main, outliers) if matrix is not None) or not _turns(config):
        return None
    own = _made(main, dtype, tables)
    first = None if outliers is None else _made(outliers, dtype)
    if own is None or (outliers is not None and first is None):
        return None
    order = (tensors["perm"].int() & 0xFFFF) if config.enable_perm else None
    if order is not None and torch.equal(order, torch.arange(len(order), dtype=torch.int32, device=order.device)):
        order = None
    perm = None if order is None else tensors["perm"]
    scale = _in_order(tensors["weight_scale"], order, 1.0) if config.enable_norm else None
    offset = _in_order(tensors["weight_bias"], order, 0.0) if config.enable_norm else None
    weight_scale = row_scale = row_scales(tensors, config)
    columns = Columns(perm=perm, offset=offset)
    if scale is not None:  # at most 1, so that 16 bits still hold x times scale; the rest, a power of two, goes to the rows
        unit = torch.exp2(scale.float().abs().max().clamp_min(SMALLEST_SCALE).log2().ceil())
        columns = replace(columns, scale=scale.float() / unit, offset=None if offset is None else offset.float() / unit)
        row_scale = unit[None] if row_scale is None else row_scale * unit
    size = config.outlier_size
    found = FusedLinear(
        config=config, dtype=dtype, main=own, outliers=first,
        main_columns=_part(columns, slice(size, None), dtype), outlier_columns=_part(columns, slice(0, size), dtype),
        scale=None if scale is None else scale.to(dtype), offset=None if offset is None else offset.to(dtype),
        row_scale=row_scale, weight_scale=weight_scale, order=order,
    )  # fmt: skip
    if main.words.is_cuda:  # kernels read constants before what ran ahead of them has ended
        torch.cuda.current_stream(main.words.device).synchronize()
    return found


def _made(
    matrix: VectorMatrix | RingMatrix, dtype: torch.dtype, tables: tuple[Tensor, Tensor | None] | None = None
) -> KernelMatrix | None:
    """In a form that its GPU has room for; None where it has for none."""
    found = kernel_matrix(matrix, make_tables(matrix, dtype) if tables is None else tables)
    return next((form for form in with_fewer_copies(found) if fits(form, found.words.device)), None)


def _turns(config: LayerConfig) -> bool:
    rotation = rotation_of(config)
    return all(side is None or cut_turn(side) is not None for side in (rotation.across, rotation.down))


def _in_order(values: Tensor, order: Tensor | None, idle: float) -> Tensor | None:
    """By stored column; None where all are what changes nothing."""
    if bool((values == idle).all()):
        return None
    return values.contiguous() if order is None else values[order.long()]


def _part(columns: Columns, part: slice, dtype: torch.dtype) -> Columns:
    """Of some stored columns, in the kernels' type, each tensor where they can read it many numbers at a time."""
    perm, scale, offset = (None if t is None else t[part].clone() for t in (columns.perm, columns.scale, columns.offset))
    scale, offset = (None if t is None else t.to(dtype) for t in (scale, offset))
    return Columns(perm, scale, offset, part.start or 0)
