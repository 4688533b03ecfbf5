"""What is settled before the first linear is quantized: token weights of the loss, every linear's setting, shared codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vptq.calibration.hessian_store import HessianStore
from vptq.config import QuantConfig
from vptq.data import TokenSequences
from vptq.models.architecture import Skeleton
from vptq.models.files import save_json, writing_to
from vptq.models.prefetch import PrefetchingFolder
from vptq.pipeline.allocation import allocate, allocation_table, read_sensitivity, to_json
from vptq.pipeline.cost import fisher_units
from vptq.pipeline.first_plan import ALLOCATION, planned_as_allocated
from vptq.pipeline.fold import Fold
from vptq.pipeline.job import Job
from vptq.pipeline.measure import mean_weights
from vptq.pipeline.plan import RunPlan
from vptq.pipeline.progress import Progress, table
from vptq.pipeline.schedule import BlockWalk, InOrder, Watch
from vptq.pipeline.stages import Passage, blocks_ahead, measuring_stages
from vptq.pipeline.workers import Executor
from vptq.pipeline.works import Weigh


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
    """What a run works with. shares: of the calibration text, runs of sequences. watch: is told of progress."""

    config: QuantConfig
    skeleton: Skeleton
    source: PrefetchingFolder
    tokens: TokenSequences
    job: Job
    progress: Progress
    fold: Fold | None
    executor: Executor
    shares: tuple[range, ...]
    watch: Watch

    @property
    def num_runs(self) -> int:
        return self.shares[-1].stop

    def passage(self, plan: RunPlan, means: Mapping[str, float] | None, last: int, sequential: bool = False) -> Passage:
        """The calibration text before the first block."""
        return Passage(self.skeleton, plan, self.tokens.tokens.numel(), self.shares, last, sequential, means)


def settle(context: Context, plan: RunPlan) -> tuple[RunPlan, dict[str, float] | None]:
    """Measure what the settings ask for, and choose what they leave open; what a stopped run found is taken up.

    Returns:
        The plan, and with --hessian fisher the mean of every linear's token weights, by full name.
    """
    means = None
    if context.config.calibration.hessian == "fisher":
        _weigh_tokens(context, plan)  # for every rung alike: groups of rows are the same on all
        means = mean_weights(context.job, context.num_runs, [linear.name for linear in plan.linears])
    if context.config.bits is not None:
        plan = _allocated(context, plan, context.config.bits, means)
    return plan, means


def _weigh_tokens(context: Context, plan: RunPlan) -> None:
    """Token weights of the loss, a file for each run of sequences."""
    with writing_to(context.job.folder):
        context.job.token_weights_file(0).parent.mkdir(exist_ok=True)
    row_groups = {linear.name: linear.layer.row_groups for linear in plan.linears}
    works = [Weigh(runs, row_groups) for runs in context.shares]
    total = fisher_units(plan, context.tokens.tokens.numel())
    units = [total * len(runs) / context.num_runs for runs in context.shares]
    context.executor.run(InOrder(works, units, "gradients of the loss", context.watch, lambda work, answer: None))


def _allocated(context: Context, plan: RunPlan, bits: float, means: Mapping[str, float] | None) -> RunPlan:
    """The plan with every linear's setting chosen."""
    path = context.job.folder / ALLOCATION
    base = context.config.linear
    if not path.exists():
        infos = [linear.info for linear in plan.linears]
        sensitivity = _sensitivity(context, plan, means)
        found = allocate(infos, sensitivity, base, bits, context.skeleton.dtype.itemsize * 8)
        settings = {name: [config.vector_len, config.trellis_bits] for name, config in found.settings.items()}
        save_json(path, {"bits": found.bits, "loss": found.loss, "settings": settings})
        context.progress.note(f"{found.bits:.4f} stored bits a weight:\n{table(allocation_table(found, infos))}")
        context.job.log(f"allocation: {found.bits:.4f} stored bits a weight, predicted rise of the loss {found.loss:.4f}")
    return planned_as_allocated(context.config, context.skeleton, context.source, path, context.fold)


def _sensitivity(context: Context, plan: RunPlan, means: Mapping[str, float] | None) -> dict[str, float]:
    given = context.config.sensitivity_path
    path = Path(given).expanduser() if given else context.job.folder / "sensitivity.json"
    settings = _measured_with(context)
    names = [linear.name for linear in plan.linears]
    if path.exists():
        return read_sensitivity(path, context.job.fingerprint, settings, names)
    measured: dict[str, float] = {}
    last = max(linear.info.block for linear in plan.linears)
    stages = measuring_stages(context.passage(plan, means, last))
    ahead = blocks_ahead(context.executor.count, False)
    context.executor.run(BlockWalk(stages, ahead, 1.0, context.watch, lambda work, answer: measured.update(answer)))
    found = {name: measured[name] for name in names}
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
