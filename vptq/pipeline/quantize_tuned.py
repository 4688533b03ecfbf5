"""A `quantize` run that fine-tunes what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vptq.config import QuantConfig
from vptq.finetune_config import FinetuneConfig
from vptq.models.architecture import load_skeleton
from vptq.models.device import forced_dtype, resolve_device
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.job import Job
from vptq.pipeline.outcome import RunResult
from vptq.pipeline.prediction_pass import has_room
from vptq.pipeline.progress import Progress
from vptq.pipeline.run import quantize_model
from vptq.pipeline.tune_result import TuneResult
from vptq.recipe import BlockPassKind


def quantize_and_tune(
    config: QuantConfig,
    *,
    resume: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[RunResult, TuneResult | None]:
    """`quantize_model`, and, where its settings say so, `finetune_model` on what came out, in the same run folder.

    Args: those of `quantize_model`; a run that was stopped goes on wherever it was.
    """
    result = quantize_model(config, resume=resume, given=given, progress=progress)
    job = Job.at(result.folder)
    settings = job.config
    if settings.finetune is None:
        return result, None
    parent = result.folder / f"finetune_{settings.finetune}"
    begun = sorted(path.parent for path in parent.glob("*/job.json"))
    calibration = settings.calibration
    nsamples, seq_len = max(calibration.nsamples, 2), job.facts["seq_len"]  # as many as there were before, so there are enough
    wishes = FinetuneConfig(
        mode=settings.finetune,
        passes=_passes(result.folder / "packed_model", settings, nsamples * seq_len, progress),
        model_name=str(result.folder / "packed_model"),
        original=settings.model_name,
        dataset=None if calibration.dataset is None else (calibration.dataset,),
        nsamples=nsamples,
        seq_len=seq_len,
        seed=calibration.seed,
        eval=settings.eval,
        new_eval=settings.new_eval,
        eval_dataset=None if settings.eval_dataset is None else (settings.eval_dataset,),
        eval_nsamples=settings.eval_nsamples,
        save_model=settings.save_model,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    return result, finetune_model(wishes, resume=begun[-1] if begun else None, progress=progress, folder=parent)


def _passes(packed: Path, settings: QuantConfig, num_tokens: int, progress: Progress | None) -> tuple[BlockPassKind, ...]:
    """The usual passes over the blocks, without those that there is too little memory for."""
    usual = FinetuneConfig().passes
    if settings.finetune != "block":
        return usual
    device = resolve_device(settings.device)
    skeleton = load_skeleton(packed, settings.trust_remote_code, forced_dtype(device))
    if has_room(skeleton, forced_dtype(device) or skeleton.dtype, num_tokens, device):
        return usual
    if progress is not None:
        progress.note("too little memory for passes that follow the predictions: blocks only learn the original's outputs")
    return ("outputs",)
