"""What a run gives back, just made or read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vptq.bits import ModelBits, checkpoint_bits
from vptq.errors import UsageError
from vptq.evaluation.perplexity import Perplexity
from vptq.pipeline.job import Job


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        folder: the run folder. figures: of every linear, in module order. bits: of the packed checkpoint, or as planned.
        perplexities: (dataset, original, quantized). warnings: of the plan, and what was mended on the way.
    """

    folder: Path
    figures: tuple[dict[str, Any], ...]
    bits: ModelBits
    perplexities: tuple[tuple[str, Perplexity, Perplexity], ...]
    warnings: tuple[str, ...]
    seconds: float


def finished_result(job: Job) -> RunResult:
    """What a finished run found, read back from its folder."""
    packed = job.folder / "packed_model"
    if not packed.exists():
        raise UsageError(f"the run in `{job.shown}` is finished", hint="start a new run to get a packed checkpoint")
    measured = job.perplexities()
    context: dict[str, Any] = next((v for k, v in measured.items() if k.startswith("ctx_")), {})
    perplexities = tuple(
        (name, Perplexity.from_dict(found["original"]), Perplexity.from_dict(found["quantized"]))
        for name, found in context.items()
    )
    figures = tuple(job.result_figures())
    bits = checkpoint_bits(packed)
    return RunResult(job.folder, figures, bits, perplexities, (), 0.0)
