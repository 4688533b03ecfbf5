"""How fast a machine is at each kind of work: measured here in a few seconds, or given in a file."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vptq.calibration.hessian import HessianAccumulator
from vptq.config import LinearConfig
from vptq.errors import UsageError
from vptq.geometry import plan_geometry
from vptq.layer_config import LayerConfig
from vptq.models.files import save_json, standing_folder
from vptq.pipeline.codebooks import codebook_file, load_codebooks, prepare_codebooks
from vptq.pipeline.cost import UNIT, linear_units
from vptq.pipeline.plan import LinearPlan
from vptq.quantize.linear import LinearInput, quantize_linears
from vptq.quantize.problem import LinearReport
from vptq.quantize.result import Codebook

SAMPLE_SECONDS = {"cuda": 1.5, "cpu": 3.0}  # about what a sample linear may take
FIRST_GUESS = {"cuda": 5e5, "cpu": 50.0}  # units a second, to choose its size by
TOKENS = {"cuda": 4096, "cpu": 512}
FILE_BYTES = 64 << 20
SMALLEST = 64  # rows and columns of a sample
SMALLER = 4  # times, the second sample, which tells what does not grow with the size


@dataclass(frozen=True)
class Rates:
    """Of one worker. A unit is a billion operations (see `pipeline.cost`).

    Attributes:
        machine: what was measured, and with which settings of the linears. device: cuda or cpu.
        linear_units: a second, of quantizing. linear_seconds: of a linear, whatever its size.
        forward_units: a second, of products in the model's type. hessian_units: a second, of Hessians.
        disk_bytes: a second, written where results go.
        start_seconds: from the command to the first work.
    """

    machine: str
    device: str
    linear_units: float
    linear_seconds: float
    forward_units: float
    hessian_units: float
    disk_bytes: float
    start_seconds: float

    def shared_by(self, workers: int) -> Rates:
        """Of each of several workers on the cores of one machine."""
        own = {name: getattr(self, name) / workers for name in ("linear_units", "forward_units", "hessian_units")}
        return replace(self, **own, linear_seconds=self.linear_seconds * workers)

    def save(self, path: Path) -> None:
        """For `--rates` of another plan."""
        save_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Raises UsageError for a file that is none of ours."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"`{path}` holds no rates",
                where=[str(error)],
                hint="make it with `vptq plan --save_rates FILE` on the machine that will do the work",
            ) from error


def measure_rates(
    linear: LinearPlan, hidden: int, device: torch.device, dtype: torch.dtype, folder: Path, start_seconds: float
) -> Rates:
    """Measure this machine, in a few seconds.

    Args:
        linear: a typical one of the model, with its setting. hidden: size of the model's hidden states.
        folder: where results will go. start_seconds: that it took to get here.
    """
    units, seconds = _sample_seconds(linear, device, SAMPLE_SECONDS[device.type])
    fewer, less = _sample_seconds(linear, device, SAMPLE_SECONDS[device.type] / SMALLER)
    rate = (units - fewer) / (seconds - less) if units > fewer and seconds > less else units / seconds
    count = TOKENS[device.type]
    inputs = torch.randn(count, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, hidden, device=device).to(dtype)
    accumulator = HessianAccumulator(hidden, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Rates(
        machine=f"{name}; v = {linear.config.vector_len}, k = {linear.config.num_centroids[1]}, kiter {linear.config.kiter}",
        device=device.type,
        linear_units=rate,
        linear_seconds=max(seconds - units / rate, 0.0),
        forward_units=2.0 * count * hidden**2 / UNIT / _seconds(lambda: torch.mm(inputs, weight), device),
        hessian_units=2.0 * count * hidden**2 / UNIT / _seconds(lambda: accumulator.add(inputs), device),
        disk_bytes=_disk_bytes(folder),
        start_seconds=start_seconds,
    )


def _sample_seconds(linear: LinearPlan, device: torch.device, budget: float) -> tuple[float, float]:
    """Units and seconds of quantizing a random linear of about as many seconds as the budget."""
    plan = _shrunk(linear, budget * FIRST_GUESS[device.type])
    generator = torch.Generator().manual_seed(0)
    rows, columns = plan.layer.geometry.out_features, plan.layer.geometry.in_features
    weight = torch.randn(rows, columns, generator=generator).to(device)
    inputs = torch.randn(2 * columns, columns, generator=generator).to(device) * torch.linspace(1, 0.1, columns, device=device)
    given = LinearInput("sample", weight, inputs.T @ inputs / len(inputs))
    with tempfile.TemporaryDirectory() as folder:
        shared = _shared_codebooks(plan.config, Path(folder), device)

        def quantize() -> LinearReport:
            return quantize_linears([given], plan.config, shared=shared)[0][1]

        taken = quantize().kmeans_iterations  # k-means of a small sample stops sooner than that of a whole linear
        units = linear_units(plan, sum(taken) / len(taken) if taken else None)
        return units, _seconds(quantize, device, repeats=1, warm=False)


def _shrunk(linear: LinearPlan, units: float) -> LinearPlan:
    """A linear of the same setting, halved until it costs no more than so many units."""
    rows, columns = linear.info.out_features, linear.info.in_features
    while linear_units(linear) > units and min(rows, columns) > SMALLEST:
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
        geometry, faults = plan_geometry(rows, columns, linear.config)
        if geometry is None or faults:
            break
        info = replace(linear.info, out_features=rows, in_features=columns)
        linear = replace(linear, info=info, layer=LayerConfig.of(linear.config, geometry, bias=False))
    return linear


def _shared_codebooks(config: LinearConfig, folder: Path, device: torch.device) -> tuple[Codebook, ...] | None:
    if not config.is_shared:
        return None
    own = replace(config, codebook_source="gaussian")  # as large, and takes no model
    prepare_codebooks(folder, [own], device, None, [])
    return load_codebooks(codebook_file(folder, own), own.bitwidth, own.bsize, torch.float16, device)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 3, warm: bool = True) -> float:
    """Of one repeat. warm: whether to do it once before."""
    if warm:
        work()
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _disk_bytes(folder: Path) -> float:
    folder = standing_folder(folder)
    data = os.urandom(FILE_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return FILE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        raise UsageError(f"`{folder}` can't be written", where=[str(error)], hint="give another --output_dir") from error
