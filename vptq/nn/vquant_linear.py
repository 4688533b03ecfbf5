"""A linear layer that lives in its packed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vptq.backend import choice, use_kernels
from vptq.errors import VptqError
from vptq.layer_config import LayerConfig
from vptq.nn.column_order import can_fold_order, fold_order
from vptq.nn.companions import Companions
from vptq.nn.kept import Kept
from vptq.nn.kernels.fused import FusedLinear, few_rows, fused_linear, go_together
from vptq.nn.kernels.nvrtc import kernels_run
from vptq.nn.kernels.operator import call as fused_call
from vptq.nn.kernels.operator import taken_apart
from vptq.nn.kernels.packed import FLOATS as KERNEL_TYPES
from vptq.nn.kernels.packed import make_tables
from vptq.nn.kernels.products import MOST_MATRICES
from vptq.nn.operands import Operands, main_matrix
from vptq.nn.ops import rotate
from vptq.nn.reference import dequantize_packed, dequantize_rotated, rotation_of
from vptq.nn.rings import RingMatrix, longest_run, make_run_table
from vptq.nn.vectors import MOST_ROWS, VectorMatrix, sums_pay

DTYPES = {"int32": torch.int32, "int16": torch.int16}


class StoredCodebook(nn.Module):
    """Holds a codebook's tensors under the names of the file: `weight`, or `packed` and `scales`."""

    weight: Tensor
    packed: Tensor
    scales: Tensor


class VQuantLinear(nn.Module):
    """`nn.Linear` on packed indices and codebooks.

    A few rows are multiplied with the packed weight; otherwise the weight is unpacked for the call, or once with `cache_weight`
    (as large as the original; faster for many rows and on a CPU). What is kept between calls is made anew when a tensor is
    replaced or written to, but for writes through `.data`, which torch does not count: call `set_cache` after those.

    Attributes:
        stand_in: (out_features, in_features) float, or None; multiplied with in place of the packed weight, while it trains.

    Attributes (tensor data, named, shaped and typed as in the file, see `LayerConfig.tensor_shapes`):
        centroids, res_centroids, outlier_centroids: `StoredCodebook`.
        indices: (group_num, rows, words) int32. outlier_indices, perm: int16 with the bits of a uint16.
        weight_scale, weight_bias: (in_features,) float. bias: (out_features,) float or None.
    """

    bias: Tensor | None
    stand_in: Tensor | None = None
    unpacks_whole = True  # for products of many rows; what never does has no use for a cache

    def __init__(
        self,
        in_features: int,
        out_features: int,
        vector_lens: tuple[int, int],
        num_centroids: tuple[int, int],
        num_res_centroids: tuple[int, int],
        group_num: int,
        group_size: int,
        outlier_size: int,
        indices_as_float: bool = False,
        enable_norm: bool = True,
        enable_perm: bool = True,
        is_indice_packed: bool = True,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **extensions: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        entry = {
            "in_features": in_features,
            "out_features": out_features,
            "vector_lens": list(vector_lens),
            "num_centroids": list(num_centroids),
            "num_res_centroids": list(num_res_centroids),
            "group_num": group_num,
            "group_size": group_size,
            "outlier_size": outlier_size,
            "indices_as_float": indices_as_float,
            "enable_norm": enable_norm,
            "enable_perm": enable_perm,
            "is_indice_packed": is_indice_packed,
            "bias": bias,
            **extensions,
        }
        self.layer_config = LayerConfig.from_dict(type(self).__name__, entry)
        self.cache_weight = False
        self._cached: Kept[Tensor] = Kept()
        self._prepared: Kept[Operands] = Kept()
        self._books: Kept[dict[str, Any]] = Kept()
        self._fused: Kept[tuple[FusedLinear | None, Any]] = Kept()
        self._tables: Kept[tuple[Tensor, Tensor | None]] = Kept()
        self._moved: Kept[dict[str, Tensor]] = Kept()  # a shared codebook that lies on another device
        self._companions: Companions[VQuantLinear] | None = None  # of linears that `prepare_kernels` found beside this one
        self._owner: tuple[VQuantLinear, ...] = ()  # in a tuple, so that it is no child of this module
        dtype = dtype or torch.get_default_dtype()
        for name, (shape, kind) in self.layer_config.tensor_shapes().items():
            tensor = torch.zeros(shape, dtype=DTYPES.get(kind, dtype), device=device)
            self._register(name, tensor)
        self.register_load_state_dict_post_hook(_forget_after_loading)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)

    def _register(self, name: str, tensor: Tensor) -> None:
        owner: nn.Module = self
        if "." in name:
            child, name = name.split(".")
            if not hasattr(self, child):
                setattr(self, child, StoredCodebook())
            owner = getattr(self, child)
        owner.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def share_codebook(self, owner: VQuantLinear) -> None:
        """Take the codebook of `owner`, the linear that `layer_config.codebook_of` names, or all that it has (`weight_of`)."""
        self._owner = (owner,)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The packed tensors by their names in the file, without the bias; a shared codebook is among them."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """The parameters behind `stored_tensors`."""
        own: dict[str, Tensor] = {name: p for name, p in self.named_parameters() if name != "bias"}
        if self.layer_config.stores_codebook:
            return own
        shared = self._codebook_owner()._tensors()
        if self.layer_config.weight_of:
            return shared
        names = self.layer_config.codebook_shapes()
        books, device = {name: shared[name] for name in names}, own["indices"].device
        if all(book.device == device for book in books.values()):
            return own | books
        return own | self._moved.get(books, lambda: {name: book.to(device) for name, book in books.items()}, also=device)

    def _codebook_owner(self) -> VQuantLinear:
        if self.layer_config.stores_codebook:
            return self
        if not self._owner:
            raise VptqError("this linear shares the codebook of another, which it was not given", hint="use share_codebook")
        return self._owner[0]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out_features, in_features), rounded to the type the codebooks are kept in, as `model/` is."""
        stored = self.stored_tensors()
        weight = dequantize_packed(stored, self.layer_config, _float_type(stored))
        return weight if dtype is None else weight.to(dtype)

    def unpacked_weight(self) -> Tensor:
        """The weight, (out_features, in_features) float32, not rounded; gradients reach packed tensors that ask for them."""
        rotation = rotation_of(self.layer_config)
        weight = rotate(dequantize_rotated(self._tensors(), self.layer_config), rotation.across, back=True)
        return weight if rotation.down is None else rotate(weight.T.contiguous(), rotation.down, back=True).T.contiguous()

    def learners(self) -> list[nn.Parameter]:
        """Its packed tensors that gradients are asked for of, a codebook that another linear stores among them."""
        return [own for own in self._tensors().values() if isinstance(own, nn.Parameter) and own.requires_grad]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's type. A rotated weight stays rotated: inputs and outputs turn."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.stand_in is not None:
            return nn.functional.linear(x, self.stand_in.to(x.dtype), bias)
        tensors = self._tensors()
        self._check_present(tensors, x)
        found = self._fused_product(tensors, x, bias)
        return self._product(tensors, x, bias) if found is None else found

    def _product(self, tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """By torch's own operations and operators of ours, which know their gradients."""
        rotation = rotation_of(self.layer_config)
        inputs = rotate(x, rotation.across)
        if self._trains(tensors, x):
            rows = inputs.reshape(-1, self.in_features)
            matrix = main_matrix(tensors, self.layer_config, x.dtype)
            found = Operands.of(tensors, self.layer_config, matrix).product(rows).view(*x.shape[:-1], self.out_features)
        elif self._multiplies_packed(tensors, x):
            rows = inputs.reshape(-1, self.in_features)
            found = self._operands(tensors).product(rows).view(*x.shape[:-1], self.out_features)
        else:
            found = nn.functional.linear(inputs, self._weight(tensors, x))
        found = rotate(found, rotation.down, back=True)
        return found if bias is None else found + bias

    def _check_present(self, tensors: dict[str, Tensor], x: Tensor) -> None:
        if not x.is_meta and any(tensor.is_meta for tensor in tensors.values()):
            raise VptqError("a packed linear's tensors are offloaded", hint="leave `cpu` and `disk` out of device_map")

    def _trains(self, tensors: dict[str, Tensor], x: Tensor) -> bool:
        """Whether gradients are asked for: then packed tensors alone are kept for the way back, not the weight made of them."""
        if not torch.is_grad_enabled() or any(tensor.device != x.device for tensor in tensors.values()):
            return False
        return _learns(tensors) or (x.requires_grad and not self.cache_weight)

    def _multiplies_packed(self, tensors: dict[str, Tensor], x: Tensor) -> bool:
        if self.cache_weight or any(tensor.device != x.device for tensor in tensors.values()):
            return False
        if torch.compiler.is_compiling():  # the operator chooses by the number of rows, which may not be known yet
            return x.device.type == "cpu"
        count = x.numel() // self.in_features
        return sums_pay(count, x.device) or (count <= MOST_ROWS and x.is_cuda and use_kernels(x.device))

    def _fused_product(self, tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor | None:
        """By the kernels for packed linears on a GPU, where they have a form for this one and no gradients are asked for."""
        if not x.is_cuda or self.cache_weight or x.dtype not in KERNEL_TYPES:
            return None
        if x.shape[-1] != self.in_features:
            return None
        if _learns(tensors) or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
            return None
        if torch.compiler.is_compiling():  # what is there by then: a call, or `prepare_kernels`, before compiling makes it
            fused, parts = self._fused.peek() or (None, None)
            return None if fused is None or parts is None or fused.dtype != x.dtype else fused_call(x, fused, parts, bias)
        if choice() == "torch" or any(tensor.device != x.device for tensor in tensors.values()):
            return None
        fused, parts = self._fused_form(tensors, x.dtype)
        if fused is None:
            return None
        if torch.jit.is_tracing():
            return fused_call(x, fused, parts, bias)
        with torch.cuda.device(x.device):
            if self._companions is not None and 0 < x.numel() <= MOST_ROWS * self.in_features:
                found = self._companions.product(self, x, _multiply_all)
                if found is not None:
                    return found
            return fused(x, bias)

    def prepare_kernels(self, dtype: torch.dtype) -> bool:
        """Make what the GPU's kernels multiply with, for inputs of type `dtype`; whether they have a form for this linear.

        The first call of the module does it as well. Before torch.compile or torch.export it has to have been done. The order
        of the columns is folded into the indices on the way, where it can be: `perm` then changes nothing any more.
        """
        return self.fused_form(dtype) is not None

    def fused_form(self, dtype: torch.dtype) -> FusedLinear | None:
        """What the GPU's kernels multiply with, kept until a tensor changes; None where they have no form for this linear."""
        tensors = self._tensors()
        usable = dtype in KERNEL_TYPES and not self.cache_weight and not _learns(tensors)
        if not usable or not all(tensor.is_cuda for tensor in tensors.values()):
            return None
        return self._fused_form(tensors, dtype)[0]

    def _fused_form(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[FusedLinear | None, Any]:
        def make() -> tuple[FusedLinear | None, Any]:
            device = next(iter(tensors.values())).device
            with torch.cuda.device(device):
                if not kernels_run(device):
                    return None, None
                if can_fold_order(self.layer_config) and not any(tensor.is_inference() for tensor in tensors.values()):
                    fold_order(tensors, self.layer_config)
                fused = fused_linear(tensors, self.layer_config, dtype, self._kernel_tables(tensors, dtype))
            return fused, None if fused is None else taken_apart(fused)

        return self._fused.get(tensors, make, also=dtype)

    def _kernel_tables(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Kept by the linear that the codebook belongs to, for all that share it."""
        codebooks = {name: tensor for name, tensor in tensors.items() if name.startswith(("centroids.", "res_centroids."))}

        def make() -> tuple[Tensor, Tensor | None]:
            return make_tables(main_matrix(tensors, self.layer_config, dtype), dtype)

        return self._codebook_owner()._tables.get(codebooks, make, also=dtype)

    def _weight(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """The weight as it is stored, in x's type: rotated where it is."""

        def make() -> Tensor:
            stored = {name: tensor.to(x.device) for name, tensor in tensors.items()}
            return dequantize_rotated(stored, self.layer_config).to(_float_type(stored)).to(x.dtype)

        if self.cache_weight and not _learns(tensors):
            return self._cached.get(tensors, make, also=(x.device, x.dtype))
        return make()

    def _operands(self, tensors: dict[str, Tensor]) -> Operands:
        """What products take, in float32."""
        if torch.compiler.is_compiling():
            return Operands.of(tensors, self.layer_config, main_matrix(tensors, self.layer_config, torch.float32))
        return self._prepared.get(tensors, lambda: self._make_operands(tensors))

    def _make_operands(self, tensors: dict[str, Tensor]) -> Operands:
        """With the float32 codebooks that are kept by the linear they belong to, for all that share them."""
        matrix = main_matrix(tensors, self.layer_config, torch.float32)
        codebooks = {name: tensor for name, tensor in tensors.items() if "centroids." in name}
        books = self._codebook_owner()._books.get(codebooks, lambda: _books_of(matrix))
        return Operands.of(tensors, self.layer_config, replace(matrix, **books))

    def _forget(self) -> None:
        if self._companions is not None:
            self._companions.forget()
        for kept in (self._cached, self._prepared, self._books, self._fused, self._tables, self._moved):
            kept.drop()

    def _apply(self, *args: Any, **kwargs: Any) -> VQuantLinear:
        self._forget()  # else the packed tensors of the device it leaves would stay
        return super()._apply(*args, **kwargs)

    def set_cache(self, on: bool) -> None:
        """Keep the dequantized weight from the next call on, or drop it; what was kept before is made anew."""
        self.cache_weight = on
        self._forget()

    def extra_repr(self) -> str:
        c = self.layer_config
        return (
            f"in_features={c.in_features}, out_features={c.out_features}, vector_lens={c.vector_lens}, "
            f"num_centroids={c.num_centroids}, num_res_centroids={c.num_res_centroids}, group_num={c.group_num}, "
            f"vector_quant_dim={c.vector_quant_dim}, bias={c.bias}"
            + (f", rotation={c.rotation}, trellis_bits={c.trellis_bits}" if c.rotation != "none" or c.trellis_bits else "")
        )


def _forget_after_loading(module: nn.Module, _keys: Any) -> None:
    assert isinstance(module, VQuantLinear)
    module._forget()


def _multiply_all(linears: Sequence[VQuantLinear], x: Tensor) -> list[Tensor] | None:
    """Products of a few rows with linears that the kernels take in one launch; None where they don't."""
    forms: list[FusedLinear] = []
    for linear in linears[:MOST_MATRICES]:
        form = linear.fused_form(x.dtype)
        if form is None or form.main.words.device != x.device or not go_together(form, forms[0] if forms else form):
            return None
        forms.append(form)
    if len(forms) < len(linears):
        return None
    biases = [None if linear.bias is None else linear.bias.to(x.dtype) for linear in linears]
    found = few_rows(x.reshape(-1, x.shape[-1]).contiguous(), forms, biases)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in found]


def _books_of(matrix: VectorMatrix | RingMatrix) -> dict[str, Any]:
    """The fields of a matrix that are its codebooks."""
    if isinstance(matrix, VectorMatrix):
        return {"main": matrix.main, "residual": matrix.residual}
    run = longest_run(matrix.trellis, matrix.table.shape[1])
    return {"table": matrix.table, "run_table": make_run_table(matrix.table, matrix.trellis, run)}


def _learns(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors.values())


def _float_type(stored: dict[str, Tensor]) -> torch.dtype:
    """The float type that a linear's codebooks or scales are kept in."""
    return next(tensor.dtype for tensor in stored.values() if tensor.is_floating_point())


def cache_weights(model: nn.Module, on: bool = True, limit: float | None = None) -> int:
    """Let the VQuantLinears of a model keep their dequantized weights, or stop that: faster on a CPU, and for many rows.

    Args:
        limit: most bytes of weights kept, in the order of the modules; None for all.
    Returns:
        The bytes that the kept weights will take, in the model's own float type.
    """
    size = getattr(model, "dtype", torch.get_default_dtype()).itemsize
    used = 0
    for module in model.modules():
        if isinstance(module, VQuantLinear) and module.unpacks_whole:
            needed = module.out_features * module.in_features * size
            fits = on and (limit is None or used + needed <= limit)
            module.set_cache(fits)
            used += needed if fits else 0
    return used


def prepare_kernels(model: nn.Module) -> int:
    """Make ready the VQuantLinears of a model that lie on a GPU, for inputs of the model's own type; how many there are.

    Those of one parent module that are given one input will be multiplied together.
    """
    for parent in model.modules():
        beside = [child for child in parent.children() if isinstance(child, VQuantLinear) and child.unpacks_whole]
        company: Companions[VQuantLinear] | None = Companions() if len(beside) > 1 else None
        for child in beside:
            child._companions = company
    dtype = getattr(model, "dtype", torch.get_default_dtype())
    ours = [module for module in model.modules() if isinstance(module, VQuantLinear)]
    return sum(module.prepare_kernels(dtype) for module in ours if module.unpacks_whole and not module.cache_weight)
