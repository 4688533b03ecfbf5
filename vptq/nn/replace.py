"""Put VQuantLinear where a model has linears that its checkpoint holds packed."""

from __future__ import annotations

import torch
from torch import nn

from vptq.errors import CheckpointError
from vptq.layer_config import LayerConfig
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
        if isinstance(old, nn.Linear) and (old.out_features, old.in_features) != (config.out_features, config.in_features):
            sizes = f"{old.out_features}x{old.in_features}, the checkpoint {config.out_features}x{config.in_features}"
            faults.append(f"{name}: the model has {sizes}")
            continue
        dtype = old.weight.dtype if isinstance(old, nn.Linear) else None
        parent, _, child = name.rpartition(".")
        new = VQuantLinear(**config.to_dict(), device=device, dtype=dtype)
        setattr(model.get_submodule(parent) if parent else model, child, new)
    for name, config in layers.items():
        if not faults and not config.stores_codebook:
            sharer, owner = model.get_submodule(name), model.get_submodule(config.codebook_of)
            assert isinstance(sharer, VQuantLinear) and isinstance(owner, VQuantLinear)
            sharer.share_codebook(owner)
    if faults:
        raise CheckpointError("the checkpoint's quantized linears do not fit the model", where=faults)
