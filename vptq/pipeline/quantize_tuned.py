"""A `quantize` run that fine-tunes what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vptq.config import QuantConfig
from vptq.finetune_config import FinetuneConfig
from vptq.pipeline.finetune import TuneResult, finetune_model
from vptq.pipeline.job import Job
from vptq.pipeline.outcome import RunResult
from vptq.pipeline.progress import Progress
from vptq.pipeline.run import quantize_model


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
    wishes = FinetuneConfig(
        mode=settings.finetune,
        model_name=str(result.folder / "packed_model"),
        original=settings.model_name,
        dataset=None if calibration.dataset is None else (calibration.dataset,),
        nsamples=max(calibration.nsamples, 2),  # as many as there were before, so there are enough
        seq_len=job.facts["seq_len"],
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
