"""Shapes of a model's linears from its config alone, and a table of known models. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vptq.errors import UsageError
from vptq.models.headers import is_hub_name

FLOAT_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True)
class LinearShape:
    """Name and size of one linear."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class ModelShapes:
    """All linears of a model's blocks, and how many weights the file holds beside them."""

    linears: tuple[LinearShape, ...]
    other_weights: int
    float_bits: int = 16


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **more,
    }


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **more,
    }


# What the published config.json of each says.
KNOWN_MODELS: Mapping[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral"),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, model_type="qwen2"),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
}


def known_shapes(name: str) -> ModelShapes:
    """Shapes of a model in the table. Raises UsageError with the names there are."""
    if name.lower() not in KNOWN_MODELS:
        raise UsageError(f"no model `{name}` in the table of shapes", hint=f"known: {', '.join(KNOWN_MODELS)}")
    return shapes_from_config(KNOWN_MODELS[name.lower()])


def config_folder(model_name: str | None) -> Path:
    """Where config.json is: the demo, a folder, or a hub name, of which only config.json is fetched."""
    if model_name is None:
        return Path(__file__).parent / "demo"
    path = Path(model_name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or "/" not in model_name or not is_hub_name(model_name):
        raise UsageError(
            f"`{model_name}` is no model folder, no hub name and not in the table of shapes",
            hint=f"known: {', '.join(KNOWN_MODELS)}",
        )
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    try:
        return Path(hf_hub_download(model_name, "config.json")).parent
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"the hub gives no config.json of `{model_name}`", where=[reason], hint="check name and network"
        ) from error


def can_derive(config: Mapping[str, Any]) -> bool:
    """Whether `shapes_from_config` knows this model type."""
    return config.get("model_type") in ("llama", "mistral", "qwen2", "qwen3", "opt")


def shapes_from_config(config: Mapping[str, Any]) -> ModelShapes:
    """Shapes of a model from its config.json, for the types that `can_derive` knows."""
    stated = config.get("dtype") or config.get("torch_dtype") or "float16"
    float_bits = FLOAT_BITS.get(str(stated).removeprefix("torch."), 16)
    try:
        if config["model_type"] == "opt":
            return _opt_shapes(config, float_bits)
        return _llama_shapes(config, float_bits)
    except KeyError as error:
        raise UsageError(f"config.json lacks {error}", hint="get the model folder anew") from error


def _llama_shapes(config: Mapping[str, Any], float_bits: int) -> ModelShapes:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, vocab = config["num_attention_heads"], config["vocab_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    block = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    kind = config["model_type"]
    others = 2 * hidden
    if kind == "qwen2" or config.get("attention_bias"):
        others += q + 2 * kv + (hidden if kind != "qwen2" else 0)
    if kind == "qwen3":
        others += 2 * head_dim
    if config.get("mlp_bias"):
        others += 2 * intermediate + hidden
    layers = config["num_hidden_layers"]
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return ModelShapes(_repeat("model.layers", layers, block), layers * others + hidden + embeddings, float_bits)


def _opt_shapes(config: Mapping[str, Any], float_bits: int) -> ModelShapes:
    hidden, ffn, layers = config["hidden_size"], config["ffn_dim"], config["num_hidden_layers"]
    embed = config.get("word_embed_proj_dim") or hidden
    block = {f"self_attn.{n}": (hidden, hidden) for n in ("k_proj", "v_proj", "q_proj", "out_proj")}
    block |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    others = layers * (5 * hidden + ffn + 4 * hidden)  # biases, two layer norms
    others += config["vocab_size"] * embed + (config["max_position_embeddings"] + 2) * hidden
    others += 0 if embed == hidden else 2 * embed * hidden
    others += 2 * hidden if config.get("do_layer_norm_before", True) else 0
    others += 0 if config.get("tie_word_embeddings", True) else config["vocab_size"] * embed
    return ModelShapes(_repeat("model.decoder.layers", layers, block), others, float_bits)


def _repeat(prefix: str, layers: int, block: Mapping[str, tuple[int, int]]) -> tuple[LinearShape, ...]:
    return tuple(LinearShape(f"{prefix}.{layer}.{name}", *shape) for layer in range(layers) for name, shape in block.items())
