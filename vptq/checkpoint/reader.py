"""Read packed checkpoints: strictly, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.checkpoint.names import check_tensors
from vptq.errors import UsageError
from vptq.layer_config import LayerConfig, quantization_config, read_quantization_config
from vptq.layouts import METHOD, quantization_entry
from vptq.models.architecture import (
    Skeleton,
    check_weights,
    load_skeleton,
    packed_shapes,
    resolve_folder,
    shapes_in,
    tied_names,
)
from vptq.models.device import forced_dtype, resolve_device
from vptq.models.headers import read_config
from vptq.models.stream import FolderSource, TensorSource, load_module
from vptq.nn.ranges import check_indices
from vptq.nn.reference import dequantize_packed
from vptq.nn.replace import replace_linears
from vptq.nn.vquant_linear import cache_weights as keep_weights
from vptq.nn.vquant_linear import prepare_kernels

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I16": torch.int16,
    "I64": torch.int64,
}


def is_packed(folder: Path) -> bool:
    """Whether a model folder is a packed VPTQ checkpoint."""
    return quantization_entry(read_config(folder)).get("quant_method") == METHOD


def refuse_packed(folder: Path) -> None:
    """Raise UsageError for a packed checkpoint."""
    if is_packed(folder):
        raise UsageError(f"`{folder}` is quantized already", hint="give the original model")


def read_layers(folder: Path, trust_remote_code: bool = False) -> dict[str, LayerConfig]:
    """The quantized linears of a packed checkpoint."""
    return read_quantization_config(
        quantization_entry(read_config(folder)),
        str(folder),
        lambda: shapes_in(folder, trust_remote_code),
    )


class DequantizedSource:
    """A model's tensors where some linears are quantized: their weights are dequantized on demand.

    Args:
        base: gives all other tensors.
        layers: the quantized linears. stored: gives the packed tensors of one of them by its name.
        dtype: float type that weights are rounded to, the model's own. device: where they are dequantized.
    """

    def __init__(
        self,
        base: TensorSource,
        layers: Mapping[str, LayerConfig],
        stored: Callable[[str], dict[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.base, self.layers, self.stored, self.dtype, self.device = base, layers, stored, dtype, device

    def has(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.layers or self.base.has(name)

    def get(self, name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        if linear != name and linear in self.layers:
            linear = self.layers[linear].weight_of or linear
            tensors = {key: tensor.to(self.device) for key, tensor in self.stored(linear).items()}
            return dequantize_packed(tensors, self.layers[linear], self.dtype)
        return self.base.get(name)


def packed_tensors(source: TensorSource, linear: str, layer: LayerConfig) -> dict[str, Tensor]:
    """The stored tensors of one linear of a packed checkpoint, with the codebook that it shares.

    Raises:
        CheckpointError: missing or misshapen tensors.
    """
    names = [key for key in layer.tensor_shapes() if source.has(f"{linear}.{key}")]
    found = {key: source.get(f"{linear}.{key}") for key in names}
    check_tensors({key: (tuple(t.shape), t.dtype) for key, t in found.items()}, layer, linear)
    if not layer.stores_codebook:
        found |= {key: source.get(f"{layer.codebook_of}.{key}") for key in layer.codebook_shapes()}
    return found


def check_packed(source: FolderSource, layers: Mapping[str, LayerConfig]) -> None:
    """Raise CheckpointError unless every tensor of every quantized linear is there; reads headers only."""
    for linear, layer in layers.items():
        entries = {key: source.entry(f"{linear}.{key}") for key in layer.tensor_shapes() if source.has(f"{linear}.{key}")}
        found = {key: (entry.shape, TORCH_DTYPES.get(entry.dtype, torch.bool)) for key, entry in entries.items()}
        check_tensors(found, layer, linear)


def open_source(skeleton: Skeleton, device: torch.device) -> TensorSource:
    """The weights of a model folder, dequantized on `device` where it is packed."""
    source = skeleton.source()
    if not is_packed(skeleton.folder):
        check_weights(skeleton, source)
        return source
    entry, shapes = quantization_entry(read_config(skeleton.folder)), packed_shapes(skeleton.model, source.entries)
    layers = read_quantization_config(entry, str(skeleton.folder), lambda: shapes)
    check_weights(skeleton, source, quantized=layers)
    check_packed(source, layers)
    return DequantizedSource(source, layers, lambda name: packed_tensors(source, name, layers[name]), skeleton.dtype, device)


def open_packed(
    folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[Skeleton, FolderSource, dict[str, LayerConfig]]:
    """A packed checkpoint whose tensors are not read yet: its model with `VQuantLinear`s, its tensors, its quantized linears.

    Args:
        dtype: float type that the model will run in; None for the stored one.
    Raises:
        CheckpointError: a folder that is missing, damaged, not packed, or of a later format version.
    """
    layers = read_layers(folder, trust_remote_code)
    skeleton = load_skeleton(folder, trust_remote_code, dtype)
    source = skeleton.source()
    check_weights(skeleton, source, quantized=layers)
    check_packed(source, layers)
    replace_linears(skeleton.model, layers)
    return skeleton, source, layers


@torch.inference_mode(False)  # what is loaded must serve calls of either kind
def load_quantized(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    cache_weights: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a packed checkpoint as a transformers model whose linears are `VQuantLinear`.

    Args:
        path: folder or hub name. device: where the model goes. dtype: its float type (default: as stored).
        cache_weights: keep each dequantized weight after its first use: faster, and as large as the original.
    Raises:
        UsageError: a device that is not there.
        CheckpointError: a folder that is missing, damaged, not packed, or of a later format version.
    """
    target = resolve_device(str(device))
    folder = resolve_folder(str(path))
    skeleton, source, layers = open_packed(folder, dtype, trust_remote_code)
    model = skeleton.model
    fill_model(skeleton, source, target, dtype)
    model.config.quantization_config = quantization_config(layers)  # so that saving it again keeps it
    with contextlib.suppress(OSError):
        model.generation_config = _generation_config(folder)
    check_indices(model)
    keep_weights(model, cache_weights)
    prepare_kernels(model)
    return model.eval()


def load_whole(
    model_name: str | None, device: str | None = None, *, cache_weights: bool = False, trust_remote_code: bool = False
) -> Any:
    """A model with all its weights in memory: an original, a dequantized or a packed one.

    Args:
        model_name: folder or hub name; None for the demo model. device: None for a GPU where there is one.
        cache_weights: see `load_quantized`.
    """
    target = resolve_device(device)
    folder = resolve_folder(model_name)
    dtype = forced_dtype(target)
    if is_packed(folder):
        return load_quantized(folder, target, dtype=dtype, cache_weights=cache_weights, trust_remote_code=trust_remote_code)
    skeleton = load_skeleton(folder, trust_remote_code, dtype)
    source = skeleton.source()
    check_weights(skeleton, source)
    fill_model(skeleton, source, target, dtype)
    with contextlib.suppress(OSError):
        skeleton.model.generation_config = _generation_config(folder)
    return skeleton.model.eval()


def fill_model(skeleton: Skeleton, source: TensorSource, device: torch.device, dtype: torch.dtype | None) -> None:
    """Read all weights of a skeleton's model at once, in place. dtype: its float type; None for the stored one."""
    model = skeleton.model
    skipped = [name for name in tied_names(model) if not source.has(name)]
    load_module(model, "", source, device, dtype or skeleton.dtype, skip=skipped)
    model.tie_weights()
    model.to(device)


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig  # noqa: PLC0415 (slow import)

    return GenerationConfig.from_pretrained(folder)
