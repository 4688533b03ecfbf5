"""The plan of a run as far as its folder tells: what `--bits` left open may have been chosen already."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vptq.config import LinearConfig, QuantConfig
from vptq.models.architecture import Skeleton
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.remote import fetch
from vptq.pipeline.allocation import nearest_rung
from vptq.pipeline.fold import Fold
from vptq.pipeline.job import Job
from vptq.pipeline.plan import RunPlan, make_plan
from vptq.recipe import OFF

ALLOCATION = "allocation.json"


def first_plan(
    config: QuantConfig, skeleton: Skeleton, source: PrefetchingFolder, job: Job | None, fold: Fold | None
) -> RunPlan:
    """The plan as far as it is known: with --bits as a stopped run chose, or, before that, all at the nearest rung."""
    if config.bits is None:
        return make_plan(config, skeleton, source, fold=fold)
    config.validate()
    path = fetch(job.folder / ALLOCATION) if job is not None else None
    if path is not None and path.exists():
        return planned_as_allocated(config, skeleton, source, path, fold)
    return make_plan(replace(config, linear=nearest_rung(config.linear, config.bits)), skeleton, source, fold=fold)


def planned_as_allocated(
    config: QuantConfig, skeleton: Skeleton, source: PrefetchingFolder, allocation: Path, fold: Fold | None
) -> RunPlan:
    """The plan with every linear's setting as a file says."""
    return make_plan(config, skeleton, source, _read_allocation(allocation, config.linear), fold)


def _read_allocation(path: Path, base: LinearConfig) -> dict[str, LinearConfig]:
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    return {name: replace(base, vector_lens=(OFF, v), trellis_bits=bits) for name, (v, bits) in stored.items()}
