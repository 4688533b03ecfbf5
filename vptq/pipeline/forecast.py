"""A run seen before it is begun: its plan, what it will take, and all that is wrong with it, at once."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from vptq.calibration.hessian_store import HessianStore
from vptq.checkpoint.reader import is_packed, refuse_packed
from vptq.config import QuantConfig
from vptq.data import check_dataset, load_tokenizer
from vptq.errors import UsageError, VptqError
from vptq.models.architecture import Skeleton, check_weights, load_skeleton, resolve_folder
from vptq.models.device import forced_dtype, resolve_device
from vptq.models.files import standing_folder
from vptq.models.headers import fingerprint
from vptq.models.remote import is_url, local_folder
from vptq.models.runner import KEEP_ON_GPU_FRACTION
from vptq.models.shapes import KNOWN_MODELS, config_folder
from vptq.models.stream import FolderSource
from vptq.pipeline.allocation import nearest_rung
from vptq.pipeline.estimate import Estimate, estimate
from vptq.pipeline.executors import check_gpus
from vptq.pipeline.fold import choose_fold
from vptq.pipeline.plan import RunPlan, make_plan, refuse_full_disk
from vptq.pipeline.rates import Rates, measure_rates

Found = TypeVar("Found")


@dataclass(frozen=True)
class Forecast:
    """What is known of a run beforehand.

    Attributes:
        plan: None where faults leave none. estimates: one for each number of workers; none without a plan.
        rates: that they rest on. faults: all that would stop the run. notes: what the figures leave open.
    """

    plan: RunPlan | None
    estimates: tuple[Estimate, ...]
    rates: Rates | None
    faults: tuple[VptqError, ...]
    notes: tuple[str, ...]


class _Faults:
    """Gathers faults, each once."""

    def __init__(self) -> None:
        self.found: dict[str, VptqError] = {}

    def attempt(self, work: Callable[[], Found]) -> Found | None:
        """What it gives, or None where it finds a fault."""
        try:
            return work()
        except VptqError as error:
            self.found.setdefault(str(error), error)
            return None


def forecast(
    config: QuantConfig,
    *,
    workers: Sequence[int] = (),
    rates: Rates | None = None,
    started: float | None = None,
    weights_needed: bool = False,
) -> Forecast:
    """See what a run would do.

    Args:
        workers: numbers of them to estimate for; none for `config.num_gpus`. rates: measured here if None.
        started: when the command began, `time.perf_counter`. weights_needed: whether it is a fault if they are not here.
    """
    started = time.perf_counter() if started is None else started
    faults, notes = _Faults(), []
    faults.attempt(config.validate)
    device = faults.attempt(lambda: _device(config, given=rates is not None or bool(workers)))
    plan: RunPlan | None = None
    estimates: tuple[Estimate, ...] = ()
    with contextlib.ExitStack() as ending:
        skeleton = faults.attempt(lambda: ending.enter_context(_skeleton(config, device)))
        if skeleton is not None:
            source = _weights(config, skeleton, faults, weights_needed)
            if source is None and not weights_needed:
                notes.append("the model's weights are not here: only shapes were looked at")
            plan = faults.attempt(lambda: _plan(config, skeleton, source))
        _check_texts(config, faults)
        faults.attempt(lambda: _check_output(config))
        if config.bits is not None:
            notes.append(f"settings are those nearest to {config.bits:g} bits; the run measures, and chooses for every linear")
        if plan is not None and skeleton is not None:
            known = plan
            counts = tuple(workers) or (config.num_gpus,)
            if rates is None and device is not None:
                rates = faults.attempt(lambda: _measured(config, skeleton, known, device, started))
            if rates is not None:
                at = rates
                keeps = _keeps_on_gpu(device, known, skeleton, config)
                shared = at.device == "cpu" and config.executor == "local"
                own = {count: at.shared_by(count) if shared else at for count in counts}
                estimates = tuple(estimate(config, skeleton, known, own[count], count, keeps(count)) for count in counts)
            if not workers and estimates:
                scratch = 0 if is_url(config.output_dir) else estimates[0].scratch_bytes
                faults.attempt(lambda: refuse_full_disk(config.output_dir, estimates[0].disk_bytes + scratch))
    return Forecast(plan, estimates, rates, tuple(faults.found.values()), tuple(notes))


def _device(config: QuantConfig, given: bool) -> torch.device:
    """Where it would be done. given: whether the plan is for another machine than this one."""
    device = resolve_device(config.device)
    if not given and config.executor == "local":
        check_gpus(config.num_gpus, device)
    return device


@contextlib.contextmanager
def _skeleton(config: QuantConfig, device: torch.device | None) -> Iterator[Skeleton]:
    """The model without weights; of a name in the table of shapes, too."""
    name = config.model_name
    dtype = forced_dtype(device) if device is not None else None
    if name is not None and name.lower() in KNOWN_MODELS and not Path(name).is_dir():
        with tempfile.TemporaryDirectory() as folder:
            written = KNOWN_MODELS[name.lower()] | {"torch_dtype": "float16", "max_position_embeddings": 4096}
            (Path(folder) / "config.json").write_text(json.dumps(written), encoding="utf-8")
            yield load_skeleton(Path(folder), False, dtype)
        return
    yield load_skeleton(config_folder(name), config.trust_remote_code, dtype)


def _weights(config: QuantConfig, skeleton: Skeleton, faults: _Faults, needed: bool) -> FolderSource | None:
    """The model's weights, if they are here and as they should be."""
    if needed:
        faults.attempt(lambda: resolve_folder(config.model_name))
    if not any(skeleton.folder.glob("*.safetensors")) and not needed:
        return None
    source = faults.attempt(lambda: skeleton.source())
    if source is None:
        return None
    if is_packed(skeleton.folder):
        faults.attempt(lambda: refuse_packed(skeleton.folder))
        return None
    faults.attempt(lambda: load_tokenizer(skeleton.folder, config.trust_remote_code))
    faults.attempt(lambda: choose_fold(config, skeleton))
    kept = config.calibration.hessian_path
    if kept is not None and Path(kept).expanduser().exists():
        store = HessianStore(Path(kept).expanduser(), fingerprint(source.entries))
        faults.attempt(lambda: [store.find(block, []) for block in range(len(skeleton.blocks))])
    return faults.attempt(lambda: _checked(skeleton, source))


def _checked(skeleton: Skeleton, source: FolderSource) -> FolderSource:
    check_weights(skeleton, source)
    return source


def _plan(config: QuantConfig, skeleton: Skeleton, source: FolderSource | None) -> RunPlan:
    if config.bits is not None:
        config = replace(config, linear=nearest_rung(config.linear, config.bits))
    return make_plan(config, skeleton, source, fold=choose_fold(config, skeleton))


def _check_texts(config: QuantConfig, faults: _Faults) -> None:
    for name in (config.calibration.dataset, config.eval_dataset):
        if name is not None:
            faults.attempt(lambda name=name: check_dataset(name))  # type: ignore[misc]


def _check_output(config: QuantConfig) -> None:
    folder = standing_folder(local_folder(config.output_dir))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"`{config.output_dir}` can't be written", where=[str(folder)], hint="give another --output_dir")


def _measured(config: QuantConfig, skeleton: Skeleton, plan: RunPlan, device: torch.device, started: float) -> Rates:
    start_seconds = time.perf_counter() - started
    typical = max(plan.linears, key=lambda linear: linear.bits.num_weights)
    dtype = forced_dtype(device) or skeleton.dtype
    hidden = min(linear.info.in_features for linear in plan.linears)
    return measure_rates(typical, hidden, device, dtype, local_folder(config.output_dir), start_seconds)


def _keeps_on_gpu(device: torch.device | None, plan: RunPlan, skeleton: Skeleton, config: QuantConfig) -> Callable[[int], bool]:
    """Whether a worker's hidden states have room on a GPU like this machine's, by number of workers."""
    memory = torch.cuda.mem_get_info(device)[1] if device is not None and device.type == "cuda" else 80 << 30
    size = skeleton.hidden_size * skeleton.dtype.itemsize
    return lambda workers: config.calibration.nsamples * plan.seq_len * size / workers < KEEP_ON_GPU_FRACTION * memory
