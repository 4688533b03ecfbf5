"""Give packed linears tensors that change nothing yet, so that more of them can learn: scales, biases, codebooks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.models.stream import FolderSource
from vptq.quantize.result import spread_rows
from vptq.recipe import AddedKind


def with_additions(
    source: FolderSource, layers: Mapping[str, LayerConfig], dtype: torch.dtype, kinds: Collection[AddedKind], part: str
) -> tuple[dict[str, LayerConfig], dict[str, Tensor]]:
    """The quantized linears with more tensors, and these tensors, of type `dtype`, by their names.

    Args:
        source: the packed checkpoint. layers: its quantized linears. kinds: what each gets that has none yet: row_scales,
            (out_features,); column_scales, (in_features,) ones, and offsets, (in_features,) noughts, which the format has
            beside them; biases, (out_features,) noughts; codebooks, copies of those that it shares. part: of the model that
            they are in, by its name: the blocks.
    """
    found, tensors = dict(layers), {}
    for name, layer in layers.items():
        if not name.startswith(f"{part}."):
            continue
        rows, columns = layer.out_features, layer.in_features
        if "row_scales" in kinds and layer.num_scales != rows:
            old = source.get(f"{name}.row_scale") if layer.num_scales else torch.ones(1)
            tensors[f"{name}.row_scale"] = spread_rows(old, rows)[:, 0].to(dtype).contiguous()
            layer = replace(layer, num_scales=rows)
        if "column_scales" in kinds and not layer.enable_norm:
            tensors |= {f"{name}.weight_scale": torch.ones(columns, dtype=dtype)}
            tensors |= {f"{name}.weight_bias": torch.zeros(columns, dtype=dtype)}
            layer = replace(layer, enable_norm=True)
        if "biases" in kinds and not layer.bias:
            tensors[f"{name}.bias"] = torch.zeros(rows, dtype=dtype)
            layer = replace(layer, bias=True, added_bias=True)
        if "codebooks" in kinds and layer.codebook_of:
            tensors |= {f"{name}.{key}": source.get(f"{layer.codebook_of}.{key}").clone() for key in layer.codebook_shapes()}
            layer = replace(layer, codebook_of="")
        found[name] = layer
    return found, tensors
