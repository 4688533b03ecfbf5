"""What `config.json` says of one quantized linear. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, cast

from vptq.config import LinearConfig
from vptq.errors import CheckpointError
from vptq.geometry import RING_UNIT, WORD_BITS, Geometry, index_bits
from vptq.layouts import Shapes, spread_settings
from vptq.recipe import FLOAT_BITWIDTH, OFF, RotationKind, RotationSides, VectorQuantDim

PLAIN_VERSION = 1
EXTENDED_VERSION = 2
LARGEST = 1 << 31  # of any size or count
ROUNDING = 1e-9  # a part of columns is rounded up to whole ones: no more than there are
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
    """Shape and stored form of one quantized linear: the 13 keys every VPTQ loader knows, and ours.

    Attributes (ours):
        vector_quant_dim, bitwidth, bsize: see `LinearConfig`.
        rotation, rotation_sides, rotation_seed: how the weight is stored rotated, on the sides that are turned when it runs.
        row_groups: runs of output rows that are rotated each for itself.
        num_scales: what the rotated rows are multiplied by: one number for all, for each group of rows, or for each row; 0
            where the codebooks carry the scale.
        trellis_bits, ring_len: bits stored a vector and vectors a ring of the trellis; 0 without one.
        codebook_of: the linear whose codebook this one shares; empty where it stores its own.
        weight_of: the embedding that is this head as well; empty where the head stores a weight of its own.
        added_bias: the bias was added by fine-tuning; the model's own linear has none.
    """

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
    rotation: str = "none"
    rotation_sides: str = "both"
    rotation_seed: int = 0
    row_groups: int = 1
    num_scales: int = 0
    trellis_bits: int = 0
    ring_len: int = 0
    codebook_of: str = ""
    weight_of: str = ""
    added_bias: bool = False

    @classmethod
    def of(cls, config: LinearConfig, geometry: Geometry, bias: bool, codebook_of: str = "") -> LayerConfig:
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
            enable_norm=config.normalises or config.is_plain,
            enable_perm=config.enable_perm and not config.absorbs_perm,
            bias=bias,
            vector_quant_dim=config.vector_quant_dim,
            bitwidth=config.bitwidth,
            bsize=config.bsize if config.bitwidth < FLOAT_BITWIDTH else 1,
            rotation=config.rotation,
            rotation_sides=config.rotation_sides if config.rotation != "none" else "both",
            rotation_seed=config.rotation_seed if config.rotation != "none" else 0,
            row_groups=geometry.row_groups,
            num_scales=_num_scales(config, geometry),
            trellis_bits=max(config.trellis_bits, 0),
            ring_len=geometry.ring_len,
            codebook_of=codebook_of,
        )

    def linear_config(self, shared: bool) -> LinearConfig:
        """Settings under which a weight of this shape is quantized to this form.

        How indices and codebooks are searched for is not stored: of that, the defaults. Scales and biases that fine-tuning
        added are no settings.

        Args:
            shared: whether the codebook is given, as it is where others share it. (Scales don't tell: they may be added.)
        """
        off = (OFF, OFF)
        outliers = self.outlier_size > 0
        absorbs = self.vector_quant_dim == "out" and self.group_num == 1 and not outliers
        return LinearConfig(
            vector_lens=(self.vector_lens[0] if outliers else OFF, self.vector_lens[1]),
            num_centroids=(self.num_centroids[0] if outliers else OFF, self.num_centroids[1]),
            num_res_centroids=(OFF, self.num_res_centroids[1]) if self.num_res_centroids[1] > 0 else off,
            npercent=100 * self.outlier_size / self.in_features * (1 - ROUNDING),
            group_num=self.group_num,
            group_size=self.group_size if self.group_num > 1 or outliers else OFF,
            vector_quant_dim=cast(VectorQuantDim, self.vector_quant_dim),
            bitwidth=self.bitwidth,
            bsize=self.bsize,
            enable_norm=self.enable_norm and not shared,
            enable_perm=self.enable_perm or absorbs,
            absorb_perm=not self.enable_perm and absorbs and not shared,
            rotation=cast(RotationKind, self.rotation),
            rotation_sides=cast(RotationSides, self.rotation_sides),
            rotation_seed=self.rotation_seed,
            codebook_scope="shared" if shared else "group",
            trellis_bits=self.trellis_bits or OFF,
            scale_scope="row" if shared and self.num_scales == self.out_features else "linear",
            row_groups=self.row_groups,
        )

    @property
    def is_plain(self) -> bool:
        return not self._extensions()

    def _extensions(self) -> dict[str, Any]:
        """Our keys that say more than their default; `bsize` goes with `bitwidth`."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PLAIN_KEYS and f.default is not MISSING}
        defaults = {f.name: f.default for f in fields(self) if f.name in found}
        return found if any(found[name] != defaults[name] for name in found) else {}

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
            row_groups=self.row_groups,
            ring_len=self.ring_len,
        )

    @property
    def stores_codebook(self) -> bool:
        return not (self.codebook_of or self.weight_of)

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
        entry |= self._extensions()
        return entry

    @classmethod
    def from_dict(cls, name: str, entry: dict[str, Any]) -> LayerConfig:
        """Read one entry. Raises CheckpointError with the linear's name where it can't be what it says."""
        missing = [key for key in PLAIN_KEYS if key not in entry and key != "indices_as_float"]
        if missing:
            raise CheckpointError(f"`{name}` in quantization_config lacks settings", where=missing)
        if entry.get("norm_dim"):
            raise CheckpointError(f"`{name}` is normalised by rows (norm_dim), a form that is not read")
        if not entry["is_indice_packed"] or entry.get("indices_as_float"):
            raise CheckpointError(
                f"`{name}` has unpacked indices, a form that is not read", hint="pack the checkpoint with the tool that made it"
            )
        known = {f for f in cls.__dataclass_fields__ if f in entry}
        values: dict[str, Any] = {key: tuple(entry[key]) if isinstance(entry[key], list) else entry[key] for key in known}
        strange = [
            f"{f.name} is {entry[f.name]!r}" for f in fields(cls) if f.name in known and not _fits(values[f.name], f.type)
        ]
        if strange:
            raise CheckpointError(f"`{name}` in quantization_config has settings that can't be", where=strange)
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
        self._check_extensions(name)
        if self.main_bits + self.residual_bits > WORD_BITS:
            raise CheckpointError(f"`{name}`: an index of {self.main_bits + self.residual_bits} bits does not fit 32")

    def _check_extensions(self, name: str) -> None:
        rows = self.out_features // max(self.row_groups, 1)
        faults = []
        if self.rotation not in ("none", "hadamard"):
            faults.append(f"rotation is {self.rotation!r}, which this version does not know")
        if self.rotation_sides not in ("both", "in", "out"):
            faults.append(f"rotation_sides is {self.rotation_sides!r}, which this version does not know")
        if self.row_groups < 1 or rows * self.row_groups != self.out_features:
            faults.append(f"row_groups={self.row_groups} does not divide out_features={self.out_features}")
        if self.num_scales not in (0, 1, self.row_groups, self.out_features):
            faults.append(f"num_scales={self.num_scales} fits neither rows nor groups of rows")
        if bool(self.trellis_bits) != bool(self.ring_len) or not 0 <= self.trellis_bits <= self.main_bits:
            faults.append(f"trellis_bits={self.trellis_bits} and ring_len={self.ring_len} do not fit {self.main_bits} bits")
        if self.added_bias and not self.bias:
            faults.append("added_bias is set, bias is not")
        if self.ring_len < 0 or self.ring_len % RING_UNIT:
            faults.append(f"ring_len={self.ring_len} is no multiple of {RING_UNIT}")
        if faults:
            raise CheckpointError(f"`{name}` in quantization_config does not fit together", where=faults)

    def tensor_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Every stored tensor of the linear but its bias: name -> (shape, kind), kind one of float, int32, int16."""
        geometry = self.geometry
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        if self.weight_of:
            return shapes
        if self.stores_codebook:
            shapes |= self.codebook_shapes()
        if self.trellis_bits:
            words = self.ring_len * self.trellis_bits // WORD_BITS
            shapes["indices"] = ((geometry.num_rings, words, self.in_features), "int32")
        else:
            words = geometry.packed_words(self.main_bits + self.residual_bits)
            shapes["indices"] = ((self.group_num, geometry.group_grid[0], words), "int32")
        if self.outlier_size:
            self._add_codebook(shapes, "outlier_centroids", 1, self.num_centroids[0], self.vector_lens[0])
            shapes["outlier_indices"] = ((1, *geometry.outlier_grid), "int16")
        if self.enable_perm:
            shapes["perm"] = ((self.in_features,), "int16")
        if self.enable_norm:
            shapes["weight_scale"] = ((self.in_features,), "float")
            shapes["weight_bias"] = ((self.in_features,), "float")
        if self.num_scales:
            shapes["row_scale"] = ((self.num_scales,), "float")
        return shapes

    def codebook_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The tensors of main and residual codebooks, this linear's own or those of `codebook_of`."""
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        self._add_codebook(shapes, "centroids", self.group_num, self.num_centroids[1], self.vector_lens[1])
        if self.num_res_centroids[1] > 0:
            self._add_codebook(shapes, "res_centroids", self.group_num, self.num_res_centroids[1], self.vector_lens[1])
        return shapes

    def _add_codebook(self, shapes: dict, name: str, codebooks: int, k: int, vector_len: int) -> None:
        if self.bitwidth == FLOAT_BITWIDTH:
            shapes[f"{name}.weight"] = ((codebooks, k * vector_len), "float")
        else:
            words = -(-k * vector_len * self.bitwidth // WORD_BITS)
            shapes[f"{name}.packed"] = ((codebooks, words), "int32")
            shapes[f"{name}.scales"] = ((codebooks, -(-k // self.bsize)), "float")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the kind that a field is annotated with."""
    if kind == "tuple[int, int]":
        return isinstance(value, tuple) and len(value) == 2 and all(_fits(part, "int") for part in value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, bool if kind == "bool" else str)


def _num_scales(config: LinearConfig, geometry: Geometry) -> int:
    if not config.is_shared:
        return 0
    return geometry.out_features if config.scale_scope == "row" else geometry.row_groups


def quantization_config(layers: dict[str, LayerConfig]) -> dict[str, Any]:
    """The `quantization_config` of config.json. The plain case carries no key of ours; an extension is marked."""
    config: dict[str, Any] = {"quant_method": "vptq", "config_for_layers": {n: c.to_dict() for n, c in layers.items()}}
    if not all(c.is_plain for c in layers.values()):
        config["format_version"] = EXTENDED_VERSION
    return config


def read_quantization_config(entry: dict[str, Any], where: str, shapes: Callable[[], Shapes] = dict) -> dict[str, LayerConfig]:
    """The inverse of `quantization_config`. Raises CheckpointError for another method or a later version.

    Args:
        entry: of `layouts.quantization_entry`. where: for messages. shapes: of the quantized linears; asked only where linears
            share settings.
    """
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
    layers = spread_settings(entry, where, shapes)
    if not layers:
        raise CheckpointError(f"`{where}` names no quantized linears (config_for_layers is empty)")
    found = {name: LayerConfig.from_dict(name, value) for name, value in layers.items()}
    _check_shared(found)
    return found


def _check_shared(layers: dict[str, LayerConfig]) -> None:
    """Every linear that shares a codebook must name one that stores a codebook of the same form."""
    faults = []
    for name, layer in layers.items():
        owner = layers.get(layer.codebook_of)
        if layer.weight_of:
            twin = layers.get(layer.weight_of)
            if twin is None or replace(layer, weight_of="", codebook_of=twin.codebook_of, bias=twin.bias) != twin:
                faults.append(f"{name}: is said to be `{layer.weight_of}`, which is not there or of another form")
        elif not layer.stores_codebook and (
            owner is None or not owner.stores_codebook or owner.codebook_shapes() != layer.codebook_shapes()
        ):
            faults.append(f"{name}: shares the codebook of `{layer.codebook_of}`, which stores none that fits")
    if faults:
        raise CheckpointError("shared codebooks in quantization_config are missing", where=faults)
