"""What the user wishes: frozen dataclasses, one default each, every range check. Imports no torch.

Field names are the flag names and the names in a YAML file. Pairs `(outlier, main)` keep the order of the reference's
flags, with -1 for "off". `metadata` feeds the command line: `help`, and `group` as the heading it stands under.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args

from vptq.checks import Checker, check_rotated
from vptq.errors import UsageError
from vptq.fields import file_option, option, typed
from vptq.recipe import (
    DEFAULT_SEQ_LEN,
    DRIFT_FRAC,
    FLOAT_BITWIDTH,
    MAX_CENTROIDS,
    MAX_VECTOR_LEN,
    OFF,
    RECIPE,
    ROWS,
    AfterKind,
    CodebookScope,
    CodebookSource,
    ExecutorKind,
    HessianKind,
    KMeansMode,
    RotationKind,
    RotationSides,
    ScaleScope,
    VectorQuantDim,
)


@dataclass(frozen=True)
class LinearConfig:
    """How one linear is quantized. All that `quantize.linear.quantize_linear` needs to know."""

    vector_lens: tuple[int, int] = option((OFF, 8), "vectors", "weights a vector: outlier, main (-1 = off)", "O M")
    num_centroids: tuple[int, int] = option((OFF, 65536), "vectors", "centroids: outlier, main (-1 = off)", "O M")
    num_res_centroids: tuple[int, int] = option(
        (OFF, OFF), "vectors", "centroids of the residual stage: outlier (only -1), main (-1 = off)", "O M"
    )
    npercent: float = option(0.0, "vectors", "percent of the input columns kept as outliers")
    group_num: int = option(1, "vectors", "groups of columns, each with its own codebook")
    group_size: int = option(OFF, "vectors", "columns a group, in place of --group_num (-1 = from --group_num)")
    vector_quant_dim: VectorQuantDim = option("out", "vectors", "direction a vector runs in: out (rows) or in (columns)")
    bitwidth: int = option(FLOAT_BITWIDTH, "vectors", "bits of each stored codebook number, 2 to 16 (16 = model's float)")
    bsize: int = option(16, "vectors", "centroids that share one scale where --bitwidth is under 16")
    enable_norm: bool | None = option(
        None,
        "vectors",
        "normalise every input column by its mean and standard deviation (default: on; off with a shared codebook)",
    )
    enable_perm: bool = option(True, "vectors", "order the columns by falling Hessian diagonal")
    absorb_perm: bool = option(
        False, "vectors", "store the indices in the original column order and no perm (one group, no outliers)"
    )
    rotation: RotationKind = option("none", "rotation", "hadamard: rotate inputs and outputs, so that weights become Gaussian")
    rotation_sides: RotationSides = option("both", "rotation", "rotate inputs and outputs, or inputs or outputs alone")
    rotation_seed: int = option(0, "rotation", "seed of the rotation's signs")
    codebook_scope: CodebookScope = option(
        "group", "rotation", "codebooks of its own for every group or linear, or one shared by the whole model"
    )
    codebook_source: CodebookSource = option(
        "gaussian", "rotation", "a shared codebook is that of a Gaussian, or trained on the model's own weights"
    )
    trellis_bits: int = option(
        OFF, "rotation", "bits stored a vector on a bitshift trellis over the shared codebook (-1 = off: all bits of an index)"
    )
    scale_scope: ScaleScope = option("linear", "rotation", "with a shared codebook: one scale a linear, or one a row")
    row_groups: int = option(
        1, "rotation", "groups of output rows with a rotation, a scale and, with --hessian fisher, a metric of their own"
    )
    blocksize: int = option(128, "algorithm", "columns between two trailing updates of the sweep")
    percdamp: float = option(0.01, "algorithm", "damping: this fraction of the mean Hessian diagonal")
    kmeans_mode: KMeansMode = option("hessian", "algorithm", "weights of k-means: hessian diagonal, or uniform")
    kiter: int = option(100, "algorithm", "most k-means iterations")
    ktol: float = option(1e-5, "algorithm", "k-means stops when an iteration gains less than this part of the objective")
    kseed: int = option(0, "algorithm", "seed of the k-means starting points")
    refine_iters: int = option(
        0, "algorithm", "rounds of refinement after the sweep: centroids (or scales) refitted, then every vector chosen anew"
    )
    beam: int = option(1, "algorithm", "main centroids that refinement tries for each vector that has a residual stage")

    @property
    def vector_len(self) -> int:
        return self.vector_lens[1]

    @property
    def has_residual(self) -> bool:
        return self.num_res_centroids[1] > 0

    @property
    def has_outliers(self) -> bool:
        return self.npercent > 0

    @property
    def is_shared(self) -> bool:
        """Whether one codebook serves the whole model."""
        return self.codebook_scope == "shared"

    @property
    def has_trellis(self) -> bool:
        return self.trellis_bits > 0

    @property
    def normalises(self) -> bool:
        """Whether every input column is normalised; not with a shared codebook, which has scales of its own."""
        return not self.is_shared if self.enable_norm is None else self.enable_norm

    @property
    def absorbs_perm(self) -> bool:
        """Whether indices are stored in the original column order: with a shared codebook they always are."""
        return self.enable_perm and (self.absorb_perm or self.is_shared)

    @property
    def is_plain(self) -> bool:
        """Whether the stored form is the one that every VPTQ loader reads (no extension needed)."""
        return (
            self.vector_quant_dim == "out"
            and self.bitwidth == FLOAT_BITWIDTH
            and self.rotation == "none"
            and not self.is_shared
        )

    def faults(self) -> list[str]:
        """Every fault of these settings that shows without a shape."""
        found: list[str] = []
        check = Checker(found)
        outlier_len, main_len = self.vector_lens
        outlier_k, main_k = self.num_centroids
        outlier_res, main_res = self.num_res_centroids
        check(1 <= main_len <= MAX_VECTOR_LEN, f"vector_lens: main is {main_len}, must be 1 to {MAX_VECTOR_LEN}")
        check(2 <= main_k <= MAX_CENTROIDS, f"num_centroids: main is {main_k}, must be 2 to {MAX_CENTROIDS}")
        check(
            main_res == OFF or 2 <= main_res <= MAX_CENTROIDS,
            f"num_res_centroids: main is {main_res}, must be 2 to {MAX_CENTROIDS}, or -1 for off",
        )
        check(outlier_res == OFF, f"num_res_centroids: outlier is {outlier_res}; outliers have no residual stage, use -1")
        check(0 <= self.npercent < 100, f"npercent is {self.npercent:g}, must be 0 or more and under 100")
        if self.has_outliers:
            check(
                1 <= outlier_len <= MAX_VECTOR_LEN,
                f"npercent is {self.npercent:g} but vector_lens gives outliers {outlier_len}",
            )
            check(
                2 <= outlier_k <= MAX_CENTROIDS, f"npercent is {self.npercent:g} but num_centroids gives outliers {outlier_k}"
            )
        else:
            check(
                outlier_len == OFF and outlier_k == OFF,
                f"vector_lens and num_centroids give outliers {outlier_len} and {outlier_k} but npercent is 0",
            )
        check(self.group_num >= 1, f"group_num is {self.group_num}, must be 1 or more")
        check(self.group_size == OFF or self.group_size >= 1, f"group_size is {self.group_size}, must be 1 or more, or -1")
        check(2 <= self.bitwidth <= FLOAT_BITWIDTH, f"bitwidth is {self.bitwidth}, must be 2 to 16")
        check(self.bsize >= 1, f"bsize is {self.bsize}, must be 1 or more")
        check(self.blocksize >= 1, f"blocksize is {self.blocksize}, must be 1 or more")
        check(0 <= self.percdamp <= 10, f"percdamp is {self.percdamp:g}, must be 0 to 10")
        check(self.kiter >= 1, f"kiter is {self.kiter}, must be 1 or more")
        check(0 <= self.ktol < 1, f"ktol is {self.ktol:g}, must be 0 or more and under 1")
        check(
            self.vector_quant_dim in get_args(VectorQuantDim),
            f"vector_quant_dim is {self.vector_quant_dim!r}, must be one of out, in",
        )
        check(self.kmeans_mode in get_args(KMeansMode), f"kmeans_mode is {self.kmeans_mode!r}, must be hessian or uniform")
        check_rotated(self, check)
        if self.absorb_perm:
            check(self.enable_perm, "absorb_perm needs enable_perm")
            check(
                self.vector_quant_dim == "out" and self.group_num == 1 and not self.has_outliers,
                "absorb_perm needs vector_quant_dim out, one group and no outliers: only then does column order not matter",
            )
        if self.is_plain:
            for flag, k in (("num_centroids", main_k), ("num_res_centroids", main_res)):
                check(
                    not 2 <= k <= MAX_CENTROIDS or k & (k - 1) == 0,
                    f"{flag}: {k} is not a power of two, as the plain VPTQ format needs",
                )
        return found

    def loader_warnings(self) -> list[str]:
        """Why other VPTQ loaders will not read what these settings give, though ours does."""
        warnings = []
        if self.rotation != "none" or self.is_shared:
            warnings.append("rotation and shared codebooks are extensions of the VPTQ format: only this package loads them")
        if self.vector_quant_dim == "in":
            warnings.append("vector_quant_dim in is an extension of the VPTQ format: only this package loads it")
        if self.bitwidth < FLOAT_BITWIDTH:
            warnings.append(f"bitwidth {self.bitwidth} is an extension of the VPTQ format: only this package loads it")
        if self.is_plain and self.num_res_centroids[1] > self.num_centroids[1]:
            warnings.append("more residual than main centroids: other VPTQ loaders misread the indices")
        if self.is_plain and self.has_outliers and (self.vector_lens[0] != 4 or self.vector_len % 4):
            warnings.append(
                "outliers with vectors other than 4 long, or main vectors whose length is no multiple of 4: "
                "other VPTQ loaders give wrong results"
            )
        return warnings


@dataclass(frozen=True)
class CalibrationConfig:
    """Which tokens the Hessians are taken over."""

    dataset: str | None = option(
        None,
        "calibration",
        "wikitext2, c4, c4-new, or a text or jsonl file or a folder of them (default: c4; demo model: its own)",
    )
    nsamples: int = option(128, "calibration", "sequences of calibration text")
    seq_len: int | None = option(
        None,
        "calibration",
        f"tokens a sequence, calibration and evaluation (default: {DEFAULT_SEQ_LEN}, or the model's if shorter)",
    )
    seed: int = option(0, "calibration", "seed of the choice of sequences")
    hessian_path: str | None = option(None, "calibration", "folder that keeps Hessians and gives them back; published ones too")
    hessian: HessianKind = option(
        "input",
        "calibration",
        "what errors are weighed by: second moments of the inputs, or those weighted by the loss (fisher)",
    )
    sequential: bool = option(
        False, "calibration", "calibrate each block on what the quantized blocks before it put out, aiming at the original's"
    )

    moe_all_experts: bool = option(
        False, "calibration", "let every expert see every token while calibrating, not only those it is chosen for"
    )
    drift_frac: float = option(DRIFT_FRAC, "calibration", "with --sequential: share of the inputs' drift that is made up for")

    @property
    def plain_hessians(self) -> bool:
        """Whether Hessians depend on model and text alone, so that a folder can keep them."""
        return self.hessian == "input" and not self.sequential and not self.moe_all_experts

    def faults(self) -> list[str]:
        found: list[str] = []
        check = Checker(found)
        check(self.nsamples >= 1, f"nsamples is {self.nsamples}, must be 1 or more")
        check(self.seq_len is None or self.seq_len >= 2, f"seq_len is {self.seq_len}, must be 2 or more")
        check(0 <= self.drift_frac <= 1, f"drift_frac is {self.drift_frac:g}, must be 0 to 1")
        check(self.sequential or self.drift_frac == DRIFT_FRAC, "drift_frac goes with sequential")
        check(self.hessian in get_args(HessianKind), f"hessian is {self.hessian!r}, must be input or fisher")
        check(
            self.hessian_path is None or self.plain_hessians,
            "hessian_path keeps Hessians of the inputs alone: leave out hessian fisher, sequential, moe_all_experts, "
            "or hessian_path",
        )
        return found


@dataclass(frozen=True)
class QuantConfig:
    """A whole `vptq quantize` run."""

    model_name: str | None = option(None, "model", "model folder or hub name (default: the demo model in the package)")
    output_dir: str = option("outputs", "model", "where run folders go")
    bits: float | None = option(
        None, "model", "stored bits a weight, any number from 1 to 8: settings are chosen for every linear (see docs/bits.md)"
    )
    sensitivity_path: str | None = option(
        None, "model", "JSON file that keeps what --bits measures of each linear, and gives it back to later runs"
    )
    fold: bool | None = option(
        None, "rotation", "fold rotations into embeddings, norms and head (default: where the model allows it)"
    )
    head_bits: int | None = option(
        None, "model", "bits a weight of the output head too: 2, 3, 4, 5, 6 or 8 (default: as it is)"
    )
    embed_bits: int | None = option(
        None, "model", "bits a weight of the input embeddings too; where these are the head, of both"
    )
    include: tuple[str, ...] | None = option(
        None, "model", "quantize only linears whose full names match one of these globs, such as *mlp*", "GLOB"
    )
    skip: tuple[str, ...] | None = option(
        None, "model", "leave linears as they are whose full names match one of these globs, such as model.layers.0.*", "GLOB"
    )
    per_linear: dict[str, dict[str, Any]] | None = file_option(
        "settings of single linears: a glob over their full names, and under it names and values of settings of vectors"
    )
    linear: LinearConfig = field(default_factory=LinearConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    save_model: bool = option(False, "results", "write model/: the dequantized weights, for any loader")
    save_packed_model: bool = option(True, "results", "write packed_model/: the small checkpoint")
    eval: bool = option(False, "results", "perplexity on wikitext2 and c4 when done")
    new_eval: bool = option(False, "results", "perplexity on wikitext2 and c4-new when done")
    eval_dataset: str | None = option(None, "results", "perplexity on this text (a name or a path) when done")
    eval_nsamples: int = option(OFF, "results", "most windows of each evaluation text (-1 = all)")
    finetune: AfterKind | None = option(
        None, "results", "fine-tune what came out as `vptq finetune` does, on the calibration text: block or e2e"
    )
    num_gpus: int = option(1, "devices", "workers that share the work, one a GPU (on CPU if there is none)")
    executor: ExecutorKind = option(
        "local", "devices", "local: workers on this machine; ray: on a Ray cluster (pip install 'vptq[ray]')"
    )
    ray_address: str | None = option(
        None, "devices", "Ray cluster: auto, host:port or ray://host:port (default: RAY_ADDRESS, or one made here)"
    )
    device: str | None = option(None, "devices", "cuda, cuda:N or cpu (default: cuda where there is one)")
    trust_remote_code: bool = option(False, "model", "let the model folder's own Python code run")

    def faults(self) -> list[str]:
        found = [*self.linear.faults(), *self.calibration.faults()]
        check = Checker(found)
        if self.bits is not None:
            check(1 <= self.bits <= 8, f"bits is {self.bits:g}, must be 1 to 8")
            check(
                self.linear.has_trellis and self.linear.num_centroids[1] == RECIPE["num_centroids"][1],
                "bits chooses the settings of vectors: leave out vector_lens, num_centroids, trellis_bits and codebook_scope",
            )
        found += self._faults_per_linear()
        check(self.bits is None or not self.per_linear, "bits chooses the settings of every linear: leave out per_linear")
        check(not self.fold or self.linear.rotation != "none", "fold goes with rotation hadamard")
        check(
            not self.fold or self.calibration.hessian_path is None,
            "hessian_path keeps Hessians of the model as it is: leave out fold, or hessian_path",
        )
        check(self.bits is None or self.calibration.hessian_path is None, "bits calibrates anew: leave out hessian_path")
        for name, value in (("head_bits", self.head_bits), ("embed_bits", self.embed_bits)):
            check(value is None or value in ROWS, f"{name} is {value}, must be one of {', '.join(map(str, ROWS))}")
        check(self.sensitivity_path is None or self.bits is not None, "sensitivity_path goes with bits")
        check(self.finetune in (None, *get_args(AfterKind)), f"finetune is {self.finetune!r}, must be block or e2e")
        check(self.finetune is None or self.save_packed_model, "finetune needs save_packed_model")
        check(self.executor in get_args(ExecutorKind), f"executor is {self.executor!r}, must be local or ray")
        check(self.ray_address is None or self.executor == "ray", "ray_address goes with executor ray")
        check(self.num_gpus >= 1, f"num_gpus is {self.num_gpus}, must be 1 or more")
        check(
            self.eval_nsamples == OFF or self.eval_nsamples >= 1,
            f"eval_nsamples is {self.eval_nsamples}, must be 1 or more, or -1",
        )
        return found

    def _faults_per_linear(self) -> list[str]:
        known = {f.name for f in dataclasses.fields(LinearConfig)}
        found = []
        for glob, values in (self.per_linear or {}).items():
            unknown = sorted(set(values) - known)
            own = [] if unknown else dataclasses.replace(self.linear, **typed(values)).faults()
            found += [f"per_linear {glob}: {name} is no setting of vectors" for name in unknown]
            found += [f"per_linear {glob}: {fault}" for fault in own]
        return found

    def validate(self) -> None:
        """Raise one UsageError with every fault there is."""
        found = self.faults()
        if found:
            raise UsageError(
                found[0] if len(found) == 1 else f"{len(found)} settings do not fit together",
                where=found if len(found) > 1 else (),
                hint="see `vptq quantize --help` for what each flag means",
            )

    def to_flat(self) -> dict[str, Any]:
        """One name, one value, as in a YAML file: the nested parts are spread out."""
        flat: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                flat |= {g.name: getattr(value, g.name) for g in dataclasses.fields(value)}
            else:
                flat[f.name] = value
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> QuantConfig:
        """The inverse of `to_flat`; names left out take their default. Unknown names are refused."""
        known = set(cls().to_flat())
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError("unknown settings", where=unknown, hint=f"known: {', '.join(sorted(known))}")
        values = typed(values)

        def pick(kind: type) -> dict[str, Any]:
            return {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}

        return cls(
            **pick(cls),
            linear=LinearConfig(**pick(LinearConfig)),
            calibration=CalibrationConfig(**pick(CalibrationConfig)),
        )
