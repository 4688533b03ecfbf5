"""A fused linear as one operator that torch.compile and torch.export take as it is. It has no gradients."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, library

from vptq.layer_config import LayerConfig
from vptq.nn.kernels.fused import FusedLinear
from vptq.nn.kernels.packed import KernelMatrix, MatrixStruct
from vptq.nn.kernels.products import Columns

Parts = dict[str, Tensor]
TENSORS = ("scale", "offset", "row_scale", "weight_scale", "order")
SIZES = ("row_words", "units", "out_features", "groups", "group_size", "ring_words", "last_words")


def call(x: Tensor, fused: FusedLinear, parts: tuple[list[Tensor], str], bias: Tensor | None) -> Tensor:
    """`fused(x, bias)` through the operator; parts: what `taken_apart` made of it."""
    tensors, form = parts
    return _fused_linear(x, tensors, bias, form, fused.config.out_features)


@library.custom_op(
    "vptq::fused_linear", mutates_args=(),
    schema="(Tensor x, Tensor[] tensors, Tensor? bias, str form, SymInt out_features) -> Tensor",
)  # fmt: skip
def _fused_linear(x: Tensor, tensors: list[Tensor], bias: Tensor | None, form: str, out_features: int) -> Tensor:
    with torch.cuda.device(x.device):
        return put_together(tensors, form)(x, bias)


@_fused_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, form: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def taken_apart(fused: FusedLinear) -> tuple[list[Tensor], str]:
    """Tensors, and all else as text."""
    tensors: Parts = {}
    form: dict[str, Any] = {
        "config": replace(fused.config, codebook_of="").to_dict(),
        "dtype": str(fused.dtype).removeprefix("torch."),
    }
    for name in TENSORS:
        _put(tensors, name, getattr(fused, name))
    for side in ("main", "outliers"):
        matrix = getattr(fused, side)
        if matrix is not None:
            form[side] = {
                "defines": matrix.defines, "table_bytes": matrix.table_bytes,
                "sizes": {name: getattr(matrix.struct, name) for name in SIZES},
            }  # fmt: skip
            for name in ("words", "main", "residual"):
                _put(tensors, f"{side}.{name}", getattr(matrix, name))
    for side in ("main_columns", "outlier_columns"):
        columns = getattr(fused, side)
        form[side] = {"first": columns.first}
        for name in ("perm", "scale", "offset"):
            _put(tensors, f"{side}.{name}", getattr(columns, name))
    return list(tensors.values()), json.dumps(form | {"names": list(tensors)})


def put_together(tensors: list[Tensor], form: str) -> FusedLinear:
    """The inverse of `taken_apart`, whose tensors (of any shape) these are."""
    said = _read(form)
    found = dict(zip(said["names"], tensors, strict=True))
    plain = {name: found.get(name) for name in TENSORS}
    return FusedLinear(
        config=said["config"], dtype=said["dtype"], main=_matrix(found, said, "main"),
        outliers=_matrix(found, said, "outliers") if "outliers" in said else None,
        main_columns=_columns(found, said, "main_columns"), outlier_columns=_columns(found, said, "outlier_columns"), **plain,
    )  # fmt: skip


def _put(tensors: Parts, name: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        tensors[name] = tensor


def _matrix(tensors: Parts, said: dict[str, Any], side: str) -> KernelMatrix:
    form = said[side]
    words, main, residual = tensors[f"{side}.words"], tensors[f"{side}.main"], tensors.get(f"{side}.residual")
    struct = MatrixStruct(
        words=words.data_ptr(),
        main=main.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        **form["sizes"],
    )
    return KernelMatrix(words, main, residual, form["defines"], struct, form["table_bytes"])


def _columns(tensors: Parts, said: dict[str, Any], side: str) -> Columns:
    return Columns(first=said[side]["first"], **{name: tensors.get(f"{side}.{name}") for name in ("perm", "scale", "offset")})


@functools.lru_cache(maxsize=4096)
def _read(form: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(form)
    said["config"] = LayerConfig.from_dict("a linear", said["config"])
    said["dtype"] = getattr(torch, said["dtype"])
    return said
