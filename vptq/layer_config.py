"""What `config.json` says of one quantized linear. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vptq.config import FLOAT_BITWIDTH, LinearConfig
from vptq.errors import CheckpointError
from vptq.geometry import WORD_BITS, Geometry, index_bits

PLAIN_VERSION = 1
EXTENDED_VERSION = 2
PLAIN_KEYS = (
    "in_features",
    "out_features",
    "vector_lens",
    "num_centroids",
    "num_res_centroids",
    "group_num",
    "group_size",
    "outlier_size",
    "indices_as_float",
    "enable_norm",
    "enable_perm",
    "is_indice_packed",
    "bias",
)


@dataclass(frozen=True)
class LayerConfig:
    """Shape and stored form of one quantized linear: the 13 keys every VPTQ loader knows, and three of ours."""

    in_features: int
    out_features: int
    vector_lens: tuple[int, int]
    num_centroids: tuple[int, int]
    num_res_centroids: tuple[int, int]
    group_num: int
    group_size: int
    outlier_size: int
    enable_norm: bool
    enable_perm: bool
    bias: bool
    vector_quant_dim: str = "out"
    bitwidth: int = FLOAT_BITWIDTH
    bsize: int = 1

    @classmethod
    def of(cls, config: LinearConfig, geometry: Geometry, bias: bool) -> LayerConfig:
        off = (-1, -1)
        has_outliers = geometry.outlier_size > 0
        return cls(
            in_features=geometry.in_features,
            out_features=geometry.out_features,
            vector_lens=(config.vector_lens[0] if has_outliers else -1, config.vector_len),
            num_centroids=(config.num_centroids[0] if has_outliers else -1, config.num_centroids[1]),
            num_res_centroids=(-1, config.num_res_centroids[1]) if config.has_residual else off,
            group_num=geometry.group_num,
            group_size=geometry.group_size,
            outlier_size=geometry.outlier_size,
            # Other loaders want a scale and an offset in the plain case: 1 and 0 are stored where there is none.
            enable_norm=config.enable_norm or config.is_plain,
            enable_perm=config.enable_perm and not config.absorb_perm,
            bias=bias,
            vector_quant_dim=config.vector_quant_dim,
            bitwidth=config.bitwidth,
            bsize=config.bsize if config.bitwidth < FLOAT_BITWIDTH else 1,
        )

    @property
    def is_plain(self) -> bool:
        return self.vector_quant_dim == "out" and self.bitwidth == FLOAT_BITWIDTH

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            out_features=self.out_features,
            in_features=self.in_features,
            vector_quant_dim=self.vector_quant_dim,
            vector_len=self.vector_lens[1],
            outlier_vector_len=max(self.vector_lens[0], 0),
            outlier_size=self.outlier_size,
            group_num=self.group_num,
            group_size=self.group_size,
        )

    @property
    def main_bits(self) -> int:
        return index_bits(self.num_centroids[1])

    @property
    def residual_bits(self) -> int:
        return index_bits(self.num_res_centroids[1])

    def to_dict(self) -> dict[str, Any]:
        """The entry in `config_for_layers`: exactly the 13 keys in the plain case, ours too otherwise."""
        entry: dict[str, Any] = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "vector_lens": list(self.vector_lens),
            "num_centroids": list(self.num_centroids),
            "num_res_centroids": list(self.num_res_centroids),
            "group_num": self.group_num,
            "group_size": self.group_size,
            "outlier_size": self.outlier_size,
            "indices_as_float": False,
            "enable_norm": self.enable_norm,
            "enable_perm": self.enable_perm,
            "is_indice_packed": True,
            "bias": self.bias,
        }
        if not self.is_plain:
            entry |= {"vector_quant_dim": self.vector_quant_dim, "bitwidth": self.bitwidth, "bsize": self.bsize}
        return entry

    @classmethod
    def from_dict(cls, name: str, entry: dict[str, Any]) -> LayerConfig:
        """Read one entry. Raises CheckpointError with the linear's name where it can't be what it says."""
        missing = [key for key in PLAIN_KEYS if key not in entry and key != "indices_as_float"]
        if missing:
            raise CheckpointError(f"`{name}` in quantization_config lacks settings", where=missing)
        if not entry["is_indice_packed"] or entry.get("indices_as_float"):
            raise CheckpointError(
                f"`{name}` has unpacked indices, a form that is not read", hint="pack the checkpoint with the tool that made it"
            )
        known = {f for f in cls.__dataclass_fields__ if f in entry}
        values: dict[str, Any] = {key: tuple(entry[key]) if isinstance(entry[key], list) else entry[key] for key in known}
        config = cls(**values)
        config._check(name)
        return config

    def _check(self, name: str) -> None:
        columns = self.outlier_size + self.group_num * self.group_size
        sizes = (
            self.in_features,
            self.out_features,
            self.group_num,
            self.group_size,
            self.vector_lens[1],
            self.num_centroids[1],
        )
        if columns != self.in_features or min(sizes) < 1 or self.outlier_size < 0:
            raise CheckpointError(f"`{name}`: outliers and groups make {columns} columns, in_features is {self.in_features}")
        if self.main_bits + self.residual_bits > WORD_BITS:
            raise CheckpointError(f"`{name}`: an index of {self.main_bits + self.residual_bits} bits does not fit 32")

    def tensor_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Every stored tensor of the linear but its bias: name -> (shape, kind), kind one of float, int32, int16."""
        geometry = self.geometry
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        self._add_codebook(shapes, "centroids", self.group_num, self.num_centroids[1], self.vector_lens[1])
        words = geometry.packed_words(self.main_bits + self.residual_bits)
        shapes["indices"] = ((self.group_num, geometry.group_grid[0], words), "int32")
        if self.num_res_centroids[1] > 0:
            self._add_codebook(shapes, "res_centroids", self.group_num, self.num_res_centroids[1], self.vector_lens[1])
        if self.outlier_size:
            self._add_codebook(shapes, "outlier_centroids", 1, self.num_centroids[0], self.vector_lens[0])
            shapes["outlier_indices"] = ((1, *geometry.outlier_grid), "int16")
        if self.enable_perm:
            shapes["perm"] = ((self.in_features,), "int16")
        if self.enable_norm:
            shapes["weight_scale"] = ((self.in_features,), "float")
            shapes["weight_bias"] = ((self.in_features,), "float")
        return shapes

    def _add_codebook(self, shapes: dict, name: str, codebooks: int, k: int, vector_len: int) -> None:
        if self.bitwidth == FLOAT_BITWIDTH:
            shapes[f"{name}.weight"] = ((codebooks, k * vector_len), "float")
        else:
            words = -(-k * vector_len * self.bitwidth // WORD_BITS)
            shapes[f"{name}.packed"] = ((codebooks, words), "int32")
            shapes[f"{name}.scales"] = ((codebooks, -(-k // self.bsize)), "float")


def quantization_config(layers: dict[str, LayerConfig]) -> dict[str, Any]:
    """The `quantization_config` of config.json. The plain case carries no key of ours; an extension is marked."""
    config: dict[str, Any] = {"quant_method": "vptq", "config_for_layers": {n: c.to_dict() for n, c in layers.items()}}
    if not all(c.is_plain for c in layers.values()):
        config["format_version"] = EXTENDED_VERSION
    return config


def read_quantization_config(entry: dict[str, Any], where: str) -> dict[str, LayerConfig]:
    """The inverse of `quantization_config`. Raises CheckpointError for another method or a later version."""
    if entry.get("quant_method") != "vptq":
        method = entry.get("quant_method")
        raise CheckpointError(
            f"`{where}` is quantized by {method!r}, not vptq" if method else f"`{where}` is not a packed VPTQ checkpoint",
            hint="give a packed_model folder; any other model loads with transformers alone",
        )
    version = entry.get("format_version", PLAIN_VERSION)
    if not isinstance(version, int) or version > EXTENDED_VERSION:
        raise CheckpointError(
            f"`{where}` has format version {version}; this vptq reads up to {EXTENDED_VERSION}",
            hint="pip install --upgrade vptq",
        )
    layers = entry.get("config_for_layers") or {}
    if not layers:
        raise CheckpointError(f"`{where}` names no quantized linears (config_for_layers is empty)")
    return {name: LayerConfig.from_dict(name, value) for name, value in layers.items()}
