"""A linear layer that lives in its packed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vptq.errors import VptqError
from vptq.layer_config import LayerConfig
from vptq.nn.operands import Operands, main_matrix
from vptq.nn.ops import rotate
from vptq.nn.reference import dequantize_packed, dequantize_rotated, rotation_of
from vptq.nn.rings import RingMatrix, longest_run, make_run_table
from vptq.nn.vectors import sums_pay

DTYPES = {"int32": torch.int32, "int16": torch.int16}


class StoredCodebook(nn.Module):
    """Holds a codebook's tensors under the names of the file: `weight`, or `packed` and `scales`."""

    weight: Tensor
    packed: Tensor
    scales: Tensor


class VQuantLinear(nn.Module):
    """`nn.Linear` on packed indices and codebooks.

    The weight is dequantized for every call, or once with `cache_weight` (faster, and as large as the original).

    Attributes (tensor data, named, shaped and typed as in the file, see `LayerConfig.tensor_shapes`):
        centroids, res_centroids, outlier_centroids: `StoredCodebook`.
        indices: (group_num, rows, words) int32. outlier_indices, perm: int16 with the bits of a uint16.
        weight_scale, weight_bias: (in_features,) float. bias: (out_features,) float or None.
    """

    bias: Tensor | None
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
        self._cached: Tensor | None = None
        self._prepared: tuple[tuple, Operands] | None = None
        self._runs: tuple[Tensor, Tensor] | None = None
        self._owner: tuple[VQuantLinear, ...] = ()  # in a tuple, so that it is no child of this module
        dtype = dtype or torch.get_default_dtype()
        for name, (shape, kind) in self.layer_config.tensor_shapes().items():
            tensor = torch.zeros(shape, dtype=DTYPES.get(kind, dtype), device=device)
            self._register(name, tensor)
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
        if any(tensor.is_meta for tensor in shared.values()):
            raise VptqError(
                "the codebook that this linear shares is offloaded", hint="leave `cpu` and `disk` out of device_map"
            )
        if self.layer_config.weight_of:
            return shared
        names = self.layer_config.codebook_shapes()
        return own | {name: shared[name].to(own["indices"].device) for name in names}

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

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's type. A rotated weight stays rotated: inputs and outputs turn.

        A few rows on a CPU are multiplied with the packed weight, more with one that is unpacked for the call.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rotation = rotation_of(self.layer_config)
        inputs = rotate(x, rotation.across)
        rows = inputs.reshape(-1, self.in_features)
        if not self.cache_weight and sums_pay(len(rows), x.device):
            found = self._operands().product(rows).view(*x.shape[:-1], self.out_features)
        else:
            found = nn.functional.linear(inputs, self._weight(x))
        found = rotate(found, rotation.down, back=True)
        return found if bias is None else found + bias

    def _weight(self, x: Tensor) -> Tensor:
        """The weight as it is stored, in x's type: rotated where it is."""
        cached = self._cached
        if cached is not None and cached.device == x.device and cached.dtype == x.dtype:
            return cached
        stored = {name: tensor.to(x.device) for name, tensor in self._tensors().items()}
        weight = dequantize_rotated(stored, self.layer_config).to(_float_type(stored)).to(x.dtype)
        self._cached = weight.detach() if self.cache_weight else None
        return weight

    def _operands(self) -> Operands:
        """What products take, kept until a tensor is changed or moved; made anew where gradients shall reach the codebooks."""
        tensors = self._tensors()
        if torch.compiler.is_compiling() or any(tensor.requires_grad for tensor in tensors.values()):
            return Operands.of(tensors, self.layer_config, main_matrix(tensors, self.layer_config, torch.float32))
        state = tuple((name, tensor.data_ptr(), _version(tensor)) for name, tensor in tensors.items())
        if self._prepared is None or self._prepared[0] != state:
            main = main_matrix(tensors, self.layer_config, torch.float32)
            if isinstance(main, RingMatrix):
                main = self._codebook_owner()._with_run_table(main)
            self._prepared = state, Operands.of(tensors, self.layer_config, main)
        return self._prepared[1]

    def _with_run_table(self, matrix: RingMatrix) -> RingMatrix:
        """With the table of runs of vectors, made once for all linears that share this one's codebook."""
        if self._runs is None or not torch.equal(self._runs[0], matrix.table):
            run = longest_run(matrix.trellis, matrix.table.shape[1])
            self._runs = matrix.table, make_run_table(matrix.table, matrix.trellis, run)
        return replace(matrix, table=self._runs[0], run_table=self._runs[1])

    def set_cache(self, on: bool) -> None:
        """Keep the dequantized weight from the next call on, or drop it."""
        self.cache_weight = on
        self._cached = None

    def extra_repr(self) -> str:
        c = self.layer_config
        return (
            f"in_features={c.in_features}, out_features={c.out_features}, vector_lens={c.vector_lens}, "
            f"num_centroids={c.num_centroids}, num_res_centroids={c.num_res_centroids}, group_num={c.group_num}, "
            f"vector_quant_dim={c.vector_quant_dim}, bias={c.bias}"
            + (f", rotation={c.rotation}, trellis_bits={c.trellis_bits}" if c.rotation != "none" or c.trellis_bits else "")
        )


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; one made in inference mode does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _float_type(stored: dict[str, Tensor]) -> torch.dtype:
    """The float type that a linear's codebooks or scales are kept in."""
    return next(tensor.dtype for tensor in stored.values() if tensor.is_floating_point())


def cache_weights(model: nn.Module, on: bool = True, limit: float | None = None) -> int:
    """Let the VQuantLinears of a model keep their dequantized weights (faster, more memory), or stop that.

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
