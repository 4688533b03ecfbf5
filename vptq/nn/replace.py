"""Put VQuantLinear where a model has linears that its checkpoint holds packed."""

from __future__ import annotations

import torch
from torch import nn

from vptq.errors import CheckpointError
from vptq.layer_config import LayerConfig
from vptq.nn.vquant_embedding import VQuantEmbedding
from vptq.nn.vquant_linear import VQuantLinear


def replace_linears(model: nn.Module, layers: dict[str, LayerConfig], device: str | torch.device = "meta") -> None:
    """Swap the named linears of `model`, in place, for empty VQuantLinears on `device`.

    Raises:
        CheckpointError: a name the model lacks, or sizes that differ.
    """
    faults = []
    for name, config in layers.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            faults.append(f"{name}: the model has no such module")
            continue
        weight = old.weight if isinstance(old, nn.Linear | nn.Embedding) else None
        shape = () if weight is None else tuple(weight.shape)
        if weight is not None and shape != (config.out_features, config.in_features):
            sizes = f"{shape[0]}x{shape[1]}, the checkpoint {config.out_features}x{config.in_features}"
            faults.append(f"{name}: the model has {sizes}")
            continue
        dtype = None if weight is None else weight.dtype
        parent, _, child = name.rpartition(".")
        kind = VQuantEmbedding if isinstance(old, nn.Embedding) else VQuantLinear
        if kind is VQuantEmbedding and not _has_rows(config):
            faults.append(f"{name}: an embedding must be stored row by row")
            continue
        new = kind(**config.to_dict(), device=device, dtype=dtype)
        setattr(model.get_submodule(parent) if parent else model, child, new)
    for name, config in layers.items():
        if not faults and not config.stores_codebook:
            sharer, owner = model.get_submodule(name), model.get_submodule(config.weight_of or config.codebook_of)
            assert isinstance(sharer, VQuantLinear) and isinstance(owner, VQuantLinear)
            sharer.share_codebook(owner)
    if faults:
        raise CheckpointError("the checkpoint's quantized linears do not fit the model", where=faults)


def _has_rows(config: LayerConfig) -> bool:
    """Whether single rows of a linear can be unpacked."""
    plain = not (config.outlier_size or config.enable_perm or config.enable_norm or config.residual_bits)
    by_rows = config.vector_quant_dim == "in" and config.num_scales == config.out_features and config.group_num == 1
    return plain and by_rows and config.rotation_sides == "in"
