"""What a fine-tuning gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vptq.bits import ModelBits, checkpoint_bits
from vptq.evaluation.perplexity import Perplexity
from vptq.models.architecture import resolve_folder
from vptq.pipeline.tune_job import TuneJob


@dataclass(frozen=True)
class TuneResult:
    """What a fine-tuning gave.

    Attributes:
        folder: the run folder. bits: of the packed checkpoint.
        held_out: loss on what was held out, (before, after). loss: what that is.
        perplexities: dataset -> "original", "before", "after".
    """

    folder: Path
    bits: ModelBits
    held_out: tuple[float, float]
    loss: str
    perplexities: Mapping[str, Mapping[str, Perplexity]]
    seconds: float


def finished_result(job: TuneJob) -> TuneResult:
    """What a finished run found, read back from its folder."""
    stored = job.perplexities()
    context: dict[str, Any] = next((values for key, values in stored.items() if key.startswith("ctx_")), {})
    perplexities = {name: {which: Perplexity.from_dict(p) for which, p in of.items()} for name, of in context.items()}
    held_out = stored["held_out"]["before"], stored["held_out"]["after"]
    packed = job.folder / "packed_model"
    bits = checkpoint_bits(packed if packed.exists() else resolve_folder(job.config.model_name))
    return TuneResult(job.folder, bits, held_out, stored["held_out"]["loss"], perplexities, 0.0)
