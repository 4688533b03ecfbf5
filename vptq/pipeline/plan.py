"""The plan of a run: every linear's setting and bits, and all faults at once, before any weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vptq.bits import ITEMS, LinearBits, ModelBits, linear_bits
from vptq.config import LinearConfig, QuantConfig
from vptq.data import check_dataset
from vptq.errors import UsageError
from vptq.geometry import geometry_warnings, plan_geometry
from vptq.layer_config import LayerConfig
from vptq.models.architecture import DEMO, LinearInfo, Skeleton, check_weights, tied_names
from vptq.models.files import standing_folder
from vptq.models.headers import DTYPE_BITS
from vptq.models.remote import is_url, local_folder
from vptq.models.stream import FolderSource
from vptq.pipeline.codebooks import codebook_name
from vptq.pipeline.ends import End, choose_ends
from vptq.pipeline.evaluate import resolve_seq_len
from vptq.pipeline.fold import Fold
from vptq.pipeline.selection import select_linears

DISK_SLACK = 1.1
LEFT_FRACTION = 0.02


@dataclass(frozen=True)
class LinearPlan:
    """What will be done to one linear."""

    info: LinearInfo
    config: LinearConfig
    layer: LayerConfig
    bits: LinearBits

    @property
    def name(self) -> str:
        return self.info.name


@dataclass(frozen=True)
class RunPlan:
    """A whole run, worked out from shapes.

    Attributes:
        linears: of the blocks, in module order. ends: embeddings and head, where they are quantized too.
        calibration_dataset, seq_len: resolved. eval_datasets: text to measure on, in order.
        bits: predicted, of linears and file. warnings: what works but the user should know.
    """

    linears: tuple[LinearPlan, ...]
    ends: tuple[LinearPlan, ...]
    calibration_dataset: str
    seq_len: int
    eval_datasets: tuple[str, ...]
    bits: ModelBits
    warnings: tuple[str, ...]

    @property
    def everything(self) -> tuple[LinearPlan, ...]:
        """All that is quantized: the blocks' linears, then embeddings and head."""
        return self.linears + self.ends

    def of_block(self, block: int) -> list[LinearPlan]:
        return [linear for linear in self.linears if linear.info.block == block]


def make_plan(
    config: QuantConfig,
    skeleton: Skeleton,
    source: FolderSource | None,
    settings: Mapping[str, LinearConfig] | None = None,
    fold: Fold | None = None,
) -> RunPlan:
    """Work out the run.

    Args:
        source: None for a model whose weights are not at hand.
        settings: of every linear, by name, where they differ; else `config.linear` is that of all.
        fold: what rotates some sides of the linears already.
    Raises:
        UsageError: with everything that does not fit, listed.
    """
    config.validate()
    if source is not None:
        check_weights(skeleton, source)
    wanted = []
    for info, chosen in select_linears(config, skeleton):
        own = (settings or {}).get(info.name, chosen)
        wanted.append(End(info, fold.remaining(info.name, own) if fold is not None else own))
    planned = _plan_linears([*wanted, *choose_ends(config, skeleton)], skeleton)
    linears, ends = planned[: len(wanted)], planned[len(wanted) :]
    seq_len = resolve_seq_len(config.calibration.seq_len, skeleton.max_seq_len)
    datasets = _eval_datasets(config)
    calibration = config.calibration.dataset or (str(DEMO / "calibration.txt") if config.model_name is None else "c4")
    for dataset in (calibration, *datasets):
        check_dataset(dataset)
    bits = _file_bits(planned, skeleton, source)
    warnings = (*_warnings(config, linears), *_left_warnings(skeleton))
    if config.calibration.moe_all_experts and not skeleton.form.pieces:
        raise UsageError("moe_all_experts is for models whose experts transformers fuses", hint="leave it out")
    return RunPlan(linears, ends, calibration, seq_len, datasets, bits, warnings)


def _plan_linears(wanted: list[End], skeleton: Skeleton) -> tuple[LinearPlan, ...]:
    plans, faults = [], []
    float_bits = skeleton.dtype.itemsize * 8
    owners: dict[str, str] = {}  # the first linear with a shared codebook stores it
    for end in wanted:
        info, config = end.info, end.config
        geometry, reasons = plan_geometry(info.out_features, info.in_features, config)
        faults += [f"{info.name} ({info.out_features}x{info.in_features}): {reason}" for reason in reasons]
        if geometry is not None:
            owner = owners.setdefault(codebook_name(config), info.name) if config.is_shared else info.name
            shared_of = "" if owner == info.name else owner
            layer = replace(LayerConfig.of(config, geometry, info.has_bias, shared_of), weight_of=end.weight_of)
            bits = linear_bits(info.name, config, geometry, float_bits, shared_of)
            if end.weight_of:  # stored once, counted once
                layer, bits = replace(layer, codebook_of=""), LinearBits(info.name, 0, dict.fromkeys(ITEMS, 0))
            plans.append(LinearPlan(info, config, layer, bits))
    if faults:
        count = len({fault.split(" ")[0] for fault in faults})
        raise UsageError(
            f"the settings do not fit {count} linears",
            where=faults,
            hint="choose a --group_num that divides in_features, or set --npercent above 0 so that outliers take the rest",
        )
    return tuple(plans)


def _eval_datasets(config: QuantConfig) -> tuple[str, ...]:
    names = []
    if config.eval or config.new_eval:
        names.append("wikitext2")
    if config.eval:
        names.append("c4")
    if config.new_eval:
        names.append("c4-new")
    if config.eval_dataset:
        names.append(config.eval_dataset)
    if config.model_name is None and not names:
        names.append(str(DEMO / "evaluation.txt"))
    return tuple(dict.fromkeys(names))


def _file_bits(linears: tuple[LinearPlan, ...], skeleton: Skeleton, source: FolderSource | None) -> ModelBits:
    quantized = {f"{linear.name}.weight" for linear in linears}
    if source is None:
        rest = [p for name, p in skeleton.model.named_parameters() if name not in quantized | tied_names(skeleton.model)]
        count = sum(parameter.numel() for parameter in rest)
        return ModelBits(tuple(linear.bits for linear in linears), count * skeleton.dtype.itemsize * 8, count)
    files = {one for name in quantized for one in source.file_names(name)}
    kept = [entry for name, entry in source.entries.items() if name not in files]
    others = [(entry.num_bytes * 8 // DTYPE_BITS.get(entry.dtype, 16), entry.num_bytes) for entry in kept]
    for name, parameter in skeleton.model.named_parameters():  # that were stored together with others that are quantized
        if name not in quantized and files.intersection(names := source.file_names(name)):
            bits = DTYPE_BITS.get(source.entries[names[0]].dtype, 16)
            others.append((parameter.numel(), parameter.numel() * bits // 8))
    weights, num_bytes = (sum(counts) for counts in zip(*others, strict=True)) if others else (0, 0)
    return ModelBits(tuple(linear.bits for linear in linears), num_bytes * 8, weights)


def result_bytes(config: QuantConfig, plan: RunPlan, original: int) -> int:
    """Bytes that a run leaves on the disk, or needs there on the way. original: of the model's weights."""
    needed = sum(b.stored for b in plan.bits.linears) // 8
    needed += plan.bits.file_bits // 8 if config.save_packed_model else 0
    return needed + (original if config.save_model else 0)


def check_disk(config: QuantConfig, plan: RunPlan, source: FolderSource, *, already: int, hessians: int) -> None:
    """Raise UsageError, before hours of work, if the results will not fit.

    Args:
        already: bytes that a resumed run's folder holds. hessians: bytes that will be kept in --hessian_path or handed over.
    """
    original = sum(entry.num_bytes for entry in source.entries.values())
    refuse_full_disk(config.output_dir, result_bytes(config, plan, original) - already + hessians)


def refuse_full_disk(output_dir: str, needed: int) -> None:
    """Raise UsageError where so many bytes don't fit."""
    existing = standing_folder(local_folder(output_dir))  # of a URL, its mirror: all is here once, when it is written
    free = shutil.disk_usage(existing).free
    if needed * DISK_SLACK > free:
        wanted, there = f"{needed * DISK_SLACK / 1e6:,.1f} MB", f"{free / 1e6:,.1f} MB free"
        raise UsageError(
            f"the disk is full: results need about {wanted}, `{existing}` has {there}",
            hint="free some space, or give another " + ("TMPDIR" if is_url(output_dir) else "--output_dir"),
        )


def _left_warnings(skeleton: Skeleton) -> list[str]:
    """Large parameters of blocks that belong to no linear, so that they stay as they are."""
    own = {f"{linear.name}.weight" for linear in skeleton.linears()}
    sizes = {f"{skeleton.blocks_name}.{name}": p.numel() for name, p in skeleton.blocks.named_parameters() if p.ndim > 1}
    left = {name: size for name, size in sizes.items() if name not in own}
    share = sum(left.values()) / max(sum(sizes.values()), 1)
    if share < LEFT_FRACTION:
        return []
    largest = max(left, key=lambda name: left[name])
    return [f"{share:.0%} of the weights of the blocks are in no linear, such as {largest}: they stay as they are"]


def _warnings(config: QuantConfig, linears: tuple[LinearPlan, ...]) -> list[str]:
    found = config.linear.loader_warnings()
    wasteful: dict[str, list[str]] = {}
    for linear in linears:
        for warning in geometry_warnings(linear.layer.geometry, linear.config):
            wasteful.setdefault(warning, []).append(linear.name)
    for warning, names in wasteful.items():
        found.append(f"{len(names)} linears such as {names[0]}: {warning}")
    if config.calibration.hessian_path and config.calibration.dataset is None and config.model_name is not None:
        found.append("no --dataset given: where --hessian_path holds no Hessians, they are taken over c4")
    return found
