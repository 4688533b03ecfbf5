"""Give every output row of the packed linears a scale of its own: the weight stays, more of it can learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.models.stream import FolderSource
from vptq.quantize.result import spread_rows


def with_row_scales(
    source: FolderSource, layers: Mapping[str, LayerConfig], dtype: torch.dtype
) -> tuple[dict[str, LayerConfig], dict[str, Tensor]]:
    """The quantized linears with a scale a row, and these scales, (out_features,) of type `dtype`, by their names.

    Args:
        source: the packed checkpoint. layers: its quantized linears.
    """
    found, scales = dict(layers), {}
    for name, layer in layers.items():
        if layer.num_scales == layer.out_features or layer.weight_of:
            continue
        if layer.num_scales:
            own = spread_rows(source.get(f"{name}.row_scale"), layer.out_features)[:, 0]
        else:
            own = torch.ones(layer.out_features)
        found[name] = replace(layer, num_scales=layer.out_features)
        scales[f"{name}.row_scale"] = own.to(dtype).contiguous()
    return found, scales
