"""What is settled before the first linear is quantized: token weights of the loss, every linear's setting, shared codebooks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.calibration.fisher import token_weights
from vptq.calibration.hessian_store import HessianStore
from vptq.config import LinearConfig, QuantConfig
from vptq.data import TokenSequences
from vptq.evaluation.perplexity import token_batches
from vptq.models.architecture import Skeleton
from vptq.models.files import save_json
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.runner import BlockRunner
from vptq.models.stream import TensorSource
from vptq.pipeline.allocation import allocate, allocation_table, nearest_rung, read_sensitivity, to_json
from vptq.pipeline.calibrate import Calibrator
from vptq.pipeline.cost import fisher_units, forward_units, hessian_units
from vptq.pipeline.fold import Fold
from vptq.pipeline.job import Job
from vptq.pipeline.measure import LossWeights, kept_weights, measure_sensitivity
from vptq.pipeline.plan import RunPlan, make_plan
from vptq.pipeline.progress import Progress, table
from vptq.recipe import OFF

ALLOCATION = "allocation.json"
TOKEN_WEIGHTS = "fisher.safetensors"


def first_plan(
    config: QuantConfig, skeleton: Skeleton, source: PrefetchingFolder, job: Job | None, fold: Fold | None
) -> RunPlan:
    """The plan as far as it is known: with --bits as a stopped run chose, or, before that, all at the nearest rung."""
    if config.bits is None:
        return make_plan(config, skeleton, source, fold=fold)
    config.validate()
    path = job.folder / ALLOCATION if job is not None else None
    if path is not None and path.exists():
        return make_plan(config, skeleton, source, _read_allocation(path, config.linear), fold)
    return make_plan(replace(config, linear=nearest_rung(config.linear, config.bits)), skeleton, source, fold=fold)


def run_notes(
    slow: str | None, fold: Fold | None, kept: list[tuple[HessianStore, Path]], num_kept: int, tokens: TokenSequences | None
) -> list[str]:
    """What the user should know before the work.

    Args:
        slow: why kernels don't run. kept: Hessian files that serve num_kept linears. tokens: the calibration text.
    """
    notes = [slow] if slow else []
    if fold is not None:
        notes.append("rotations are folded into embeddings, norms and head")
    if kept:
        origins = sorted({store.provenance(path) for store, path in kept})
        notes.append(
            f"Hessians of {num_kept} linears come from `{kept[0][0].folder}` ({'; '.join(origins)}): "
            "for them --dataset, --nsamples, --seq_len and --seed say nothing"
        )
    if tokens is not None:
        notes.append(f"calibration: {tokens.num_sequences} sequences of {tokens.seq_len} tokens of {tokens.dataset}")
    return notes


@dataclass(frozen=True)
class Context:
    """What a run works with."""

    config: QuantConfig
    skeleton: Skeleton
    source: PrefetchingFolder
    device: torch.device
    dtype: torch.dtype
    tokens: TokenSequences
    job: Job
    progress: Progress
    fold: Fold | None

    def calibrator(self, weights: LossWeights | None, quantized: TensorSource | None = None) -> Calibrator:
        """The calibration text before the first block."""
        relative = weights.relative if weights is not None else None
        return Calibrator(self.skeleton, self.source, self.device, self.dtype, self.tokens, relative, quantized)


def settle(context: Context, plan: RunPlan) -> tuple[RunPlan, LossWeights | None]:
    """Measure what the settings ask for, and choose what they leave open; what a stopped run found is taken up."""
    weights = None
    if context.config.calibration.hessian == "fisher":
        context.progress.phase("gradients of the loss")
        absolute = kept_weights(context.job.folder / TOKEN_WEIGHTS, lambda: _loss_weights(context, plan))
        weights = LossWeights(absolute, plan)  # for every rung alike: groups of rows are the same on all
    if context.config.bits is not None:
        plan = _allocated(context, plan, context.config.bits, weights)
    return plan, weights


def _loss_weights(context: Context, plan: RunPlan) -> dict[str, Tensor]:
    row_groups = {linear.name: linear.layer.row_groups for linear in plan.linears}
    total = fisher_units(plan, context.tokens.tokens.numel())
    runner = BlockRunner(context.skeleton, context.source, context.device, context.dtype)
    batches = token_batches(context.tokens.tokens)
    found = token_weights(runner, batches, row_groups, lambda part: context.progress.advance(part * total))
    runner.unload()
    return found


def _allocated(context: Context, plan: RunPlan, bits: float, weights: LossWeights | None) -> RunPlan:
    """The plan with every linear's setting chosen."""
    path = context.job.folder / ALLOCATION
    base = context.config.linear
    if not path.exists():
        infos = [linear.info for linear in plan.linears]
        sensitivity = _sensitivity(context, plan, weights)
        found = allocate(infos, sensitivity, base, bits, context.skeleton.dtype.itemsize * 8)
        settings = {name: [config.vector_len, config.trellis_bits] for name, config in found.settings.items()}
        save_json(path, {"bits": found.bits, "loss": found.loss, "settings": settings})
        context.progress.note(f"{found.bits:.4f} stored bits a weight:\n{table(allocation_table(found, infos))}")
        context.job.log(f"allocation: {found.bits:.4f} stored bits a weight, predicted rise of the loss {found.loss:.4f}")
    return make_plan(context.config, context.skeleton, context.source, _read_allocation(path, base), context.fold)


def _read_allocation(path: Path, base: LinearConfig) -> dict[str, LinearConfig]:
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    return {name: replace(base, vector_lens=(OFF, v), trellis_bits=bits) for name, (v, bits) in stored.items()}


def _sensitivity(context: Context, plan: RunPlan, weights: LossWeights | None) -> dict[str, float]:
    given = context.config.sensitivity_path
    path = Path(given).expanduser() if given else context.job.folder / "sensitivity.json"
    settings = _measured_with(context)
    if path.exists():
        return read_sensitivity(path, context.job.fingerprint, settings, [linear.name for linear in plan.linears])
    context.progress.phase("sensitivity of the linears")
    calibrator = context.calibrator(weights)
    count = context.tokens.tokens.numel()

    def advance(block: int) -> None:
        units = forward_units(plan, block, count) + hessian_units(plan, block, count)
        context.progress.advance(units / calibrator.num_batches)

    means = weights.means if weights is not None else None
    found = measure_sensitivity(calibrator, plan, means, context.source, context.device, advance)
    calibrator.close()
    save_json(path, to_json(found, context.job.fingerprint, settings, context.job.facts))
    return found


def _measured_with(context: Context) -> dict[str, Any]:
    """The settings that sensitivities depend on, beside model and text."""
    linear = context.config.linear
    return {
        "hessian": context.config.calibration.hessian,
        "percdamp": linear.percdamp,
        "row_groups": linear.row_groups,
        "rotation": linear.rotation,
        "rotation_sides": linear.rotation_sides,
        "rotation_seed": linear.rotation_seed,
        "folded": context.fold is not None,
    }
