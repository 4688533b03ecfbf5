"""Bits per weight: of a setting on a matrix, of a model's shapes, of a checkpoint. Imports no torch, reads no weights.

Two sums are kept apart. *Ideal* is what the paper counts: index bits n (log2 k + log2 k_res) and codebook bits, the same for
outliers. *Stored* is every bit that the file holds for the linear: whole 32-bit words of packed indices, 16-bit outlier
indices, scales of quantized codebooks, perm, scale and offset. *File* adds all tensors that are not quantized; config and
tokenizer are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vptq.config import LinearConfig
from vptq.errors import UsageError
from vptq.geometry import Geometry, index_bits, plan_geometry
from vptq.layer_config import LayerConfig, read_quantization_config
from vptq.layouts import Shapes, quantization_entry
from vptq.models.headers import read_config, read_headers
from vptq.models.shapes import LinearShape, ModelShapes
from vptq.recipe import FLOAT_BITWIDTH

IDEAL_ITEMS = ("indices", "residual_indices", "outlier_indices", "codebooks", "residual_codebooks", "outlier_codebooks")
EXTRA_ITEMS = ("padding", "codebook_scales", "perm", "scale_and_offset")
ITEMS = IDEAL_ITEMS + EXTRA_ITEMS
ITEM_NAMES = {
    "indices": "indices",
    "residual_indices": "residual indices",
    "outlier_indices": "outlier indices",
    "codebooks": "codebooks",
    "residual_codebooks": "residual codebooks",
    "outlier_codebooks": "outlier codebooks",
    "padding": "padding",
    "codebook_scales": "scales of codebooks",
    "perm": "column order (perm)",
    "scale_and_offset": "scale and offset",
}
SCALES = ("weight_scale", "weight_bias", "row_scale", "bias")
KIND_BITS = {"int32": 32, "int16": 16}


@dataclass(frozen=True)
class LinearBits:
    """Bits of one linear, by item; a bias that the model has of its own is not counted, it is not quantized."""

    name: str
    num_weights: int
    items: Mapping[str, int]

    @property
    def ideal(self) -> int:
        return sum(self.items[item] for item in IDEAL_ITEMS)

    @property
    def stored(self) -> int:
        return sum(self.items[item] for item in ITEMS)


@dataclass(frozen=True)
class ModelBits:
    """Bits of a set of linears and of the rest of the file.

    Attributes:
        other_bits, other_weights: everything that is not quantized; 0 for a bare matrix.
    """

    linears: tuple[LinearBits, ...]
    other_bits: int = 0
    other_weights: int = 0

    @property
    def num_weights(self) -> int:
        return sum(linear.num_weights for linear in self.linears)

    @property
    def ideal_bits_per_weight(self) -> float:
        return _ratio(sum(linear.ideal for linear in self.linears), self.num_weights)

    @property
    def stored_bits_per_weight(self) -> float:
        return _ratio(sum(linear.stored for linear in self.linears), self.num_weights)

    @property
    def file_bits(self) -> int:
        return sum(linear.stored for linear in self.linears) + self.other_bits

    @property
    def file_bits_per_weight(self) -> float:
        return _ratio(self.file_bits, self.num_weights + self.other_weights)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ideal_bits_per_weight": self.ideal_bits_per_weight,
            "stored_bits_per_weight": self.stored_bits_per_weight,
            "file_bits_per_weight": self.file_bits_per_weight,
            "quantized_weights": self.num_weights,
            "other_weights": self.other_weights,
            "total_bits": {
                **{item: sum(linear.items[item] for linear in self.linears) for item in ITEMS},
                "not_quantized": self.other_bits,
                "file": self.file_bits,
            },
        }


def _ratio(bits: int, weights: int) -> float:
    """To 16 significant digits, what a float64 can be trusted for."""
    return float(f"{bits / weights:.16g}")


def linear_bits(name: str, config: LinearConfig, geometry: Geometry, float_bits: int = 16, codebook_of: str = "") -> LinearBits:
    """Bits of one linear under a setting.

    Args:
        float_bits: of the model's float type, 16 or 32. codebook_of: the linear that stores a shared codebook, if another.
    """
    layer = LayerConfig.of(config, geometry, bias=False, codebook_of=codebook_of)
    stored = stored_bits(layer, float_bits)
    books = geometry.group_num if layer.stores_codebook else 0
    outlier_k = layer.num_centroids[0]
    # An ideal number is `bitwidth` bits; a float32 model's floats are stored wider, and counted as they are.
    number = config.bitwidth if config.bitwidth < FLOAT_BITWIDTH else float_bits
    k, k_res, v = config.num_centroids[1], max(config.num_res_centroids[1], 0), config.vector_len
    items = {
        "indices": _num_vectors(geometry) * (layer.trellis_bits or index_bits(k)),
        "residual_indices": geometry.num_vectors * index_bits(k_res),
        "outlier_indices": geometry.num_outlier_vectors * index_bits(outlier_k),
        "codebooks": books * k * v * number,
        "residual_codebooks": books * k_res * v * number,
        "outlier_codebooks": outlier_k * layer.vector_lens[0] * number if geometry.outlier_size else 0,
        "codebook_scales": sum(bits for n, bits in stored.items() if n.endswith(".scales")),
        "perm": stored.get("perm", 0),
        "scale_and_offset": sum(stored.get(key, 0) for key in SCALES),
    }
    return LinearBits(name, geometry.out_features * geometry.in_features, _with_padding(items, stored))


def _num_vectors(geometry: Geometry) -> int:
    """Vectors that hold weights: those that only fill a ring up are padding."""
    if not geometry.ring_len:
        return geometry.num_vectors
    return math.ceil(geometry.out_features / geometry.vector_len) * geometry.in_features


def _with_padding(items: dict[str, int], stored: Mapping[str, int]) -> dict[str, int]:
    """What is stored beyond the items that were counted is padding: of words, of outlier indices, of packed codebooks."""
    return {**items, "padding": sum(stored.values()) - sum(items.values())}


def stored_bits(layer: LayerConfig, float_bits: int) -> dict[str, int]:
    """Bits of every stored tensor of a linear."""
    return {name: math.prod(shape) * KIND_BITS.get(kind, float_bits) for name, (shape, kind) in layer.tensor_shapes().items()}


def matrix_bits(out_features: int, in_features: int, config: LinearConfig) -> ModelBits:
    """Bits of one matrix. Raises UsageError where the settings do not fit it."""
    return model_bits(ModelShapes((LinearShape("matrix", out_features, in_features),), other_weights=0), config)


def model_bits(shapes: ModelShapes, config: LinearConfig) -> ModelBits:
    """Bits of a model's linears and the rest of its file. Raises UsageError with all linears that do not fit."""
    found: list[LinearBits] = []
    faults: list[str] = []
    for linear in shapes.linears:
        geometry, reasons = plan_geometry(linear.out_features, linear.in_features, config)
        faults += [f"{linear.name}: {reason}" for reason in reasons]
        if geometry is not None:
            owner = found[0].name if found and config.is_shared else ""
            found.append(linear_bits(linear.name, config, geometry, shapes.float_bits, owner))
    if faults:
        raise UsageError("the settings do not fit", where=faults, hint="change --group_num, or set --npercent above 0")
    return ModelBits(tuple(found), shapes.other_weights * shapes.float_bits, shapes.other_weights)


def checkpoint_bits(folder: Path, layers: Mapping[str, LayerConfig] | None = None) -> ModelBits:
    """What is really in a saved packed checkpoint: the bytes of its tensors.

    Args:
        layers: its quantized linears, where they have been read already.

    Raises:
        CheckpointError: no packed checkpoint, or a damaged one.
    """
    config = read_config(folder)
    entries = read_headers(folder)
    if layers is None:
        layers = read_quantization_config(quantization_entry(config), str(folder), lambda: _packed_shapes(folder))
    linears, counted = [], set()
    for name, layer in layers.items():
        names = [*layer.tensor_shapes(), *(["bias"] if layer.added_bias else [])]
        tensors = {key: entries[f"{name}.{key}"] for key in names if f"{name}.{key}" in entries}
        counted |= {f"{name}.{key}" for key in tensors}
        linears.append(_checkpoint_linear(name, layer, {key: entry.num_bytes * 8 for key, entry in tensors.items()}))
    others = [entry for name, entry in entries.items() if name not in counted]
    other_weights = sum(math.prod(entry.shape) for entry in others)
    return ModelBits(tuple(linears), sum(e.num_bytes for e in others) * 8, other_weights)


def _packed_shapes(folder: Path) -> Shapes:
    from vptq.models.architecture import shapes_in  # noqa: PLC0415 (torch, only where config.json lacks them)

    return shapes_in(folder)


def _checkpoint_linear(name: str, layer: LayerConfig, stored: dict[str, int]) -> LinearBits:
    if layer.weight_of:
        return LinearBits(name, 0, dict.fromkeys(ITEMS, 0))  # stored once, counted once
    geometry = layer.geometry
    vectors = _num_vectors(geometry)

    def codebook(part: str) -> int:
        return stored.get(f"{part}.weight", 0) + stored.get(f"{part}.packed", 0)

    items = {
        "indices": vectors * (layer.trellis_bits or layer.main_bits),
        "residual_indices": vectors * layer.residual_bits,
        "outlier_indices": geometry.num_outlier_vectors * index_bits(layer.num_centroids[0]),
        "codebooks": codebook("centroids"),
        "residual_codebooks": codebook("res_centroids"),
        "outlier_codebooks": codebook("outlier_centroids"),
        "codebook_scales": sum(bits for key, bits in stored.items() if key.endswith(".scales")),
        "perm": stored.get("perm", 0),
        "scale_and_offset": sum(stored.get(key, 0) for key in SCALES),
    }
    return LinearBits(name, layer.in_features * layer.out_features, _with_padding(items, stored))
