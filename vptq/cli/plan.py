"""`vptq plan`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vptq.cli.options import add_fields, make_parser, merge_settings, normalise_flags, with_defaults
from vptq.cli.show import say, table, write_json
from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.errors import UsageError

if TYPE_CHECKING:
    from vptq.pipeline.estimate import Estimate
    from vptq.pipeline.forecast import Forecast
    from vptq.pipeline.plan import LinearPlan

EXAMPLES = """\
  vptq plan                                        the demo model on this machine
  vptq plan --model_name ./my-llama --dataset my_text.txt --bits 3 --num_gpus 2
  vptq plan --model_name llama-3-70b --save_rates rates.json
  vptq plan --model_name llama-3.1-405b --rates rates.json --gpus 1 8 64 512"""
GB = 1e9
HOUR = 3600.0


def run(argv: Sequence[str]) -> int:
    """Say what a run would do; returns the exit code: 2 if something would stop it."""
    started = time.perf_counter()
    parser = make_parser(
        "plan",
        "What a run of `vptq quantize` with these flags will do and take; nothing is begun, no weight is read.",
        EXAMPLES,
    )
    parser.add_argument(
        "--gpus", nargs="+", type=int, metavar="N", help="numbers of GPUs to estimate for (default: --num_gpus)"
    )
    parser.add_argument("--rates", metavar="FILE", help="rates of another machine, from --save_rates (default: measured here)")
    parser.add_argument("--save_rates", metavar="FILE", help="keep what was measured here")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON for programs, to stdout or FILE")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the names below; a flag wins over it")
    add_fields(parser, QuantConfig, CalibrationConfig, LinearConfig)
    flags = vars(parser.parse_args(normalise_flags(argv)))
    gpus, rates_file, save, target = (flags.pop(name, None) for name in ("gpus", "rates", "save_rates", "json"))
    if gpus is not None and min(gpus) < 1:
        raise UsageError(f"gpus are {' '.join(map(str, gpus))}, must be 1 or more each")
    if save is not None and rates_file is not None:
        raise UsageError("--rates and --save_rates are opposites", hint="give one of them")
    config = QuantConfig.from_flat(with_defaults(merge_settings(flags, flags.pop("config", None))))
    return show_forecast(config, gpus or (), rates_file, save, target, started)


def show_forecast(
    config: QuantConfig,
    gpus: Sequence[int] = (),
    rates_file: str | None = None,
    save: str | None = None,
    target: str | None = None,
    started: float | None = None,
    weights_needed: bool = False,
) -> int:
    """Print what `forecast` sees; returns the exit code."""
    from vptq.pipeline.forecast import forecast
    from vptq.pipeline.rates import Rates

    rates = Rates.load(Path(rates_file).expanduser()) if rates_file is not None else None
    if rates is None:
        say("measuring this machine, a few seconds")
    seen = forecast(config, workers=gpus, rates=rates, started=started, weights_needed=weights_needed)
    if save is not None and seen.rates is not None:
        seen.rates.save(Path(save).expanduser())
    if target is not None:
        write_json(_as_json(seen), target)
    if target != "-":
        print(_as_text(seen))
    return 2 if seen.faults else 0


def _as_text(seen: Forecast) -> str:
    parts = []
    if seen.plan is not None:
        bits = seen.plan.bits
        parts.append(table(_linear_rows(seen.plan.everything), right=(2, 4)))
        parts.append(
            f"{bits.ideal_bits_per_weight:.3f} bits per weight ideal, {bits.stored_bits_per_weight:.3f} stored in the linears, "
            f"{bits.file_bits_per_weight:.3f} in the whole file of {bits.file_bits / 8 / GB:,.2f} GB"
        )
    if seen.estimates:
        assert seen.rates is not None
        parts.append(table(_estimate_rows(seen.estimates), right=range(1, 10)))
        parts.append(f"estimated from rates of {seen.rates.machine}; perplexity is not in it")
    notes = [*seen.notes, *(seen.plan.warnings if seen.plan is not None else ())]
    if notes:
        parts.append("\n".join(f"note: {note}" for note in notes))
    if seen.faults:
        parts.append("this run would be refused:\n" + "\n".join(f"- {fault}" for fault in seen.faults))
    return "\n\n".join(parts)


def _linear_rows(linears: Sequence[LinearPlan]) -> list[tuple[str, ...]]:
    """Linears of one name, shape and setting in one row, with the blocks they are in."""
    alike: dict[tuple[str, ...], list[LinearPlan]] = {}
    for linear in linears:
        bits = f"{linear.bits.stored / linear.bits.num_weights:.3f}" if linear.bits.num_weights else "as the embeddings"
        shape = f"{linear.info.out_features}x{linear.info.in_features}"
        alike.setdefault((linear.info.kind, shape, _setting(linear), bits), []).append(linear)
    rows: list[tuple[str, ...]] = [("linear", "blocks", "shape", "setting", "stored bits a weight")]
    for (suffix, shape, setting, bits), group in alike.items():
        rows.append((suffix, _ranges([linear.info.block for linear in group]), shape, setting, bits))
    return rows


def _setting(linear: LinearPlan) -> str:
    config = linear.config
    parts = [f"v {config.vector_len}, k {config.num_centroids[1]}"]
    if config.has_residual:
        parts.append(f"+ {config.num_res_centroids[1]}")
    if config.has_trellis:
        parts.append(f"trellis {config.trellis_bits} bits")
    if config.has_outliers:
        parts.append(f"outliers {config.npercent:g} %: v {config.vector_lens[0]}, k {config.num_centroids[0]}")
    if linear.layer.group_num > 1:
        parts.append(f"{linear.layer.group_num} groups")
    if config.rotation != "none":
        parts.append(config.rotation)
    return ", ".join(parts)


def _ranges(blocks: Sequence[int]) -> str:
    """0-3, 5 for 0 1 2 3 5."""
    found: list[list[int]] = []
    for block in sorted(set(blocks)):
        if found and found[-1][1] == block - 1:
            found[-1][1] = block
        else:
            found.append([block, block])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _estimate_rows(estimates: Sequence[Estimate]) -> list[tuple[str, ...]]:
    head = (
        "GPUs",
        "time",
        "GPU-hours",
        "at work",
        "GPU memory",
        "main memory: first, worker",
        "disk",
        "scratch",
        "read, written",
        "together",
    )
    rows: list[tuple[str, ...]] = [head]
    for e in estimates:
        rows.append(
            (
                str(e.workers),
                _duration(e.seconds),
                f"{e.workers * e.seconds / HOUR:.2f}",
                f"{e.busy:.0%}",
                _size(e.gpu_bytes) if e.gpu_bytes else "none",
                f"{_size(e.main_bytes)}, {_size(e.worker_bytes)}",
                _size(e.disk_bytes),
                _size(e.scratch_bytes),
                f"{_size(e.read_bytes)}, {_size(e.written_bytes)}",
                f"{_size((e.read_bytes + e.written_bytes) / e.seconds)}/s",
            )
        )
    return rows


def _size(count: float) -> str:
    return f"{count / GB:,.1f} GB" if count >= GB / 10 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def _as_json(seen: Forecast) -> dict[str, Any]:
    linears = []
    if seen.plan is not None:
        linears = [
            {
                "name": linear.name,
                "shape": [linear.info.out_features, linear.info.in_features],
                "setting": _setting(linear),
                "stored_bits": linear.bits.stored,
                "weights": linear.bits.num_weights,
            }
            for linear in seen.plan.everything
        ]
    return {
        "linears": linears,
        "bits": seen.plan.bits.to_dict() if seen.plan is not None else None,
        "estimates": [dataclasses.asdict(e) for e in seen.estimates],
        "rates": dataclasses.asdict(seen.rates) if seen.rates is not None else None,
        "notes": list(seen.notes),
        "faults": [str(fault) for fault in seen.faults],
    }
