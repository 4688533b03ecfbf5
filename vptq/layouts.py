"""The layouts in which VPTQ checkpoints of the hub say how they are quantized, brought to one. Imports no torch.

Today's is `quantization_config: {quant_method: vptq, config_for_layers: {name: settings}}`. Others are read too: settings that
linears of one last name share (`shared_layer_config: {q_proj: settings}`), and the first releases' `quant_config: {name:
settings}`, or the same flat under `quantization_config`, at the top of config.json or in its `text_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vptq.errors import CheckpointError

METHOD = "vptq"
Shapes = Mapping[str, tuple[int, int, bool]]  # of the quantized linears: out_features, in_features, whether there is a bias


def quantization_entry(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is quantized, as today's layout has it; empty for one that is not.

    config: what config.json holds. Settings that linears share stay under `shared_layer_config`.
    """
    for holder in (config, config.get("text_config")):
        for key in ("quantization_config", "quant_config"):
            entry = holder.get(key) if isinstance(holder, Mapping) else None
            if isinstance(entry, Mapping) and entry:
                return {"quant_method": METHOD, "config_for_layers": dict(entry)} if _is_flat(entry) else dict(entry)
    return {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model as it was before it was quantized."""
    found = {key: value for key, value in config.items() if key not in ("quantization_config", "quant_config")}
    if isinstance(found.get("text_config"), Mapping):
        found["text_config"] = without_quantization(found["text_config"])
    return found


def spread_settings(entry: Mapping[str, Any], where: str, shapes: Callable[[], Shapes]) -> dict[str, dict[str, Any]]:
    """Settings of every quantized linear, by full name.

    Args:
        entry: of `quantization_entry`. where: for messages. shapes: asked only where linears share settings.
    Raises:
        CheckpointError: linears that no settings are for.
    """
    layers, shared = (_settings(entry, key, where) for key in ("config_for_layers", "shared_layer_config"))
    if not shared:
        return layers
    for name, (out_features, in_features, has_bias) in shapes().items():
        own = layers.get(name) or shared.get(name.rpartition(".")[2])
        if own is None:
            raise CheckpointError(f"`{where}` has no settings for the quantized linear `{name}`", hint="get config.json anew")
        usual = {"out_features": out_features, "in_features": in_features, "bias": has_bias, "is_indice_packed": True}
        stated = {key: value for key, value in own.items() if not (key in ("out_features", "in_features") and value == -1)}
        layers[name] = usual | stated
        outliers, groups = layers[name].get("outlier_size"), layers[name].get("group_num")
        if layers[name].get("group_size") == -1 and isinstance(outliers, int) and isinstance(groups, int) and groups > 0:
            layers[name]["group_size"] = (in_features - outliers) // groups
    return layers


def _settings(entry: Mapping[str, Any], key: str, where: str) -> dict[str, dict[str, Any]]:
    found = entry.get(key) or {}
    if not isinstance(found, Mapping) or not all(isinstance(value, Mapping) for value in found.values()):
        raise CheckpointError(f"`{where}`: {key} in config.json holds no settings of linears", hint="get config.json anew")
    return {str(name): dict(value) for name, value in found.items()}


def _is_flat(entry: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Mapping) and "vector_lens" in value for value in entry.values())
