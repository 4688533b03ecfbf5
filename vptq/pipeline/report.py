"""`report.html` of a run folder: one file that opens offline, in light and dark, on a phone, made of what the folder holds."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vptq.bits import ITEM_NAMES, ITEMS, ModelBits, checkpoint_bits
from vptq.errors import CheckpointError, UsageError, VptqError
from vptq.models.files import whole_file
from vptq.pipeline.facts import FILE
from vptq.pipeline.plots import as_svg, by_kind, quantization_plots, save_plots

NAME = "report.html"
PLOTS = "plots"
STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1d2329; --soft: #5d6772; --line: #d7dce1; --card: #f5f7f9;
  --mark: #1f9bcf; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --ink: #e6eaee; --soft: #9aa5b1; --line: #333b44; --card: #1c2228; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p, figcaption { color: var(--soft); } p { margin: .3rem 0 .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin-top: 1.2rem; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; } .tile span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .5rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; } th { color: var(--soft); font-weight: 500; }
.warn { border-left: 3px solid #e4a11b; padding-left: .7rem; } code { font-size: .88em; overflow-wrap: anywhere; }
details summary { cursor: pointer; color: var(--soft); }
.heat td { min-width: 3.2rem; text-align: right; } .heat td:first-child { text-align: left; }
"""


def write_report(folder: Path) -> Path:
    """Make a run folder's report, and its plots as PNG files; the page's path.

    Raises:
        UsageError: no folder of a finished quantization or fine-tuning.
    """
    found = read_run(folder)
    job, linears, figures, run = found.job, found.linears, found.results, found.facts
    packed = folder / "packed_model"
    bits = None
    try:
        bits = checkpoint_bits(packed) if packed.exists() else None
    except VptqError:
        bits = None  # the rest is worth showing
    settings = job.get("settings") or {}
    parts = [_head(job, settings, folder), _tiles(bits, figures, linears, run), _warnings(run), _perplexities(figures)]
    if bits is not None:
        parts.append(_bits_table(bits))
    if linears:
        parts += _linears(folder, linears, allocated=settings.get("bits") is not None)
    curves = folder / "curves.png"
    if curves.exists():
        parts.append("<h2>Training</h2>" + _embedded(curves))
    parts.append(_settings(settings, run))
    title = html.escape(f"{_model_name(settings)}: vptq {job.get('command', '')}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    with whole_file(folder / NAME) as partial:
        partial.write_text(page, encoding="utf-8")
    return folder / NAME


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder's JSON files hold: settings, figures of linears, perplexities, facts; empty where there are none."""

    job: Mapping[str, Any]
    linears: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    facts: Mapping[str, Any]


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder. Raises UsageError where it is none of a finished quantization or fine-tuning."""
    job, linears, results, facts = (_read(folder, name) for name in ("job.json", "linears.json", "ppl_results.json", FILE))
    if not isinstance(job, Mapping) or (linears is None and results is None):
        raise UsageError(f"`{folder}` is no folder of a finished run", hint="give one that `vptq quantize` or `finetune` made")
    return FinishedRun(job, linears or [], results or {}, facts or {})


def report_on(folder: Path, note: Callable[[str], None]) -> None:
    """The report of a run that has just ended; a fault in it is told, and takes nothing else down."""
    try:
        write_report(folder)
    except Exception as error:
        note(f"warning: no report was made: {error}")


def _read(folder: Path, name: str) -> Any:
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"`{path}` is damaged", where=[str(error)]) from error


def _model_name(settings: Mapping[str, Any]) -> str:
    name = settings.get("original") if "mode" in settings else settings.get("model_name")
    return Path(str(name)).name if name else "demo"


def _head(job: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> str:
    what = "fine-tuned" if job.get("command") == "finetune" else "quantized"
    name, where = html.escape(_model_name(settings)), html.escape(f"{folder.parent.name}/{folder.name}")
    return f"<h1>{name}, {what}</h1><p>{where}</p>"


def _tiles(
    bits: ModelBits | None, figures: Mapping[str, Any], linears: Sequence[Mapping[str, Any]], run: Mapping[str, Any]
) -> str:
    found = []
    if bits is not None:
        found.append((f"{bits.stored_bits_per_weight:.3f}", "bits a weight, stored in the linears"))
        found.append((f"{bits.file_bits / 8e6:,.1f} MB", f"all tensors, {bits.file_bits_per_weight:.2f} bits a weight"))
    for name, (before, after) in _pairs(figures).items():
        found.append((f"{after['perplexity']:.2f}", f"perplexity, {Path(name).name} ({before['perplexity']:.2f} before)"))
    if linears:
        mean = sum(one["error"] for one in linears) / len(linears)
        found.append((f"{mean:.4f}", f"mean proxy error of {len(linears)} linears"))
    if run.get("seconds"):
        since = ", since it was resumed" if run.get("resumed") else ""
        found.append((_duration(run["seconds"]), f"on {run.get('device', 'this machine')}{since}"))
    for key, where in (("peak_gpu_bytes", "the GPU"), ("peak_main_bytes", "this process, in main memory")):
        if run.get(key):
            found.append((f"{run[key] / 1e9:.1f} GB", f"most memory of {where}"))
    tiles = (f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>' for value, label in found)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _pairs(figures: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Perplexities by text, before and after: of a quantization the original's and the quantized."""
    found = {}
    for key, texts in figures.items():
        if key.startswith("ctx_"):
            for name, of in texts.items():
                first, last = of.get("before") or of.get("original"), of.get("after") or of.get("quantized")
                if first and last:
                    found[name] = (first, last)
    return found


def _warnings(run: Mapping[str, Any]) -> str:
    return "".join(f'<p class="warn">{html.escape(str(text))}</p>' for text in run.get("warnings") or ())


def _perplexities(figures: Mapping[str, Any]) -> str:
    rows = []
    for key, texts in figures.items():
        for name, of in texts.items() if key.startswith("ctx_") else ():
            for which, figure in of.items():
                value, error = figure["perplexity"], figure.get("standard_error")
                spread = "" if error is None else f" ± {error:.2f}"
                rows.append([Path(name).name, which, f"{value:.3f}{spread}", key[4:], f"{figure['num_tokens']:,}"])
    if not rows:
        return ""
    return "<h2>Perplexity</h2>" + _table(["text", "model", "perplexity", "context", "tokens counted"], rows, numbers=(2, 3, 4))


def _bits_table(bits: ModelBits) -> str:
    totals = bits.to_dict()["total_bits"]
    rows = [[ITEM_NAMES[i], f"{totals[i]:,}", f"{totals[i] / bits.num_weights:.4f}"] for i in ITEMS if totals[i]]
    rows.append(["stored in the linears", f"{sum(totals[i] for i in ITEMS):,}", f"{bits.stored_bits_per_weight:.4f}"])
    rows.append(["not quantized", f"{totals['not_quantized']:,}", ""])
    return "<h2>Where the bits are</h2>" + _table(["", "bits", "a weight"], rows, numbers=(1, 2))


def _linears(folder: Path, linears: Sequence[Mapping[str, Any]], allocated: bool) -> list[str]:
    """Along depth, as pictures, and every linear as a row."""
    blocks = _blocks_name([one["name"] for one in linears])
    parts = []
    try:
        plots = quantization_plots(linears, blocks)
        save_plots(plots, folder / PLOTS)
        svgs = {name: f"<figure>{as_svg(figure)}</figure>" for name, figure in plots.items()}
        errors = "".join(svg for name, svg in svgs.items() if name.startswith("error"))
        others = "".join(svg for name, svg in svgs.items() if not name.startswith("error"))
        text = "tr(E H Eᵀ)/tr(W H Wᵀ) of each linear, mean over those of one kind in a block"
        parts.append(f'<h2>Error along depth</h2><p>{text}</p><div class="plots">{errors}</div>')
        parts.append(f'<h2>Bits, codebooks, time</h2><div class="plots">{others}</div>')
    except ImportError:
        parts.append("<p>Pictures need matplotlib.</p>")
    if allocated:
        parts.append(_allocation(linears, blocks))
    columns = ["linear", "shape", "bits", "proxy error", "use of codebook", "seconds"]
    rows = [
        [
            one["name"], "x".join(map(str, one["shape"])), f"{one['bits']:.3f}", f"{one['error']:.5f}",
            "" if one.get("codebook_use") is None else f"{one['codebook_use']:.1%}", f"{one['seconds']:.2f}",
        ]
        for one in linears
    ]  # fmt: skip
    every = _table(columns, rows, numbers=(2, 3, 4, 5))
    parts.append(f"<h2>Every linear</h2><details><summary>{len(rows)} rows</summary>{every}</details>")
    return parts


def _allocation(linears: Sequence[Mapping[str, Any]], blocks: str) -> str:
    """Bits of every kind in every block."""
    lines = by_kind(linears, blocks, lambda one: one["bits"])
    values = [bits for line in lines.values() for bits in line.values()]
    depth = sorted({block for line in lines.values() for block in line})
    head = "".join(f'<th class="n">{block}</th>' for block in depth)
    rows = []
    for kind, line in lines.items():
        cells = []
        for block in depth:
            bits = line.get(block)
            share = 0.0 if bits is None else (bits - min(values)) / max(max(values) - min(values), 1e-9)
            shade = f"background: color-mix(in srgb, var(--mark) {15 + 70 * share:.0f}%, transparent)"
            cells.append("<td></td>" if bits is None else f'<td style="{shade}">{bits:.2f}</td>')
        rows.append(f"<tr><td>{html.escape(kind)}</td>{''.join(cells)}</tr>")
    body = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    return f'<h2>Allocation</h2><p>stored bits a weight, kinds by blocks</p><div class="wide heat">{body}</div>'


def _settings(settings: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    rows = [[name, json.dumps(value)] for name, value in settings.items() if value is not None]
    versions = [[name, str(version)] for name, version in (run.get("versions") or {}).items()]
    command = f"<p><code>{html.escape(run['command'])}</code></p>" if run.get("command") else ""
    inner = _table(["setting", "value"], rows) + (_table(["package", "version"], versions) if versions else "")
    return f"<h2>How it was made</h2>{command}<details><summary>all settings</summary>{inner}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{' class=n' if number in numbers else ''}>{html.escape(cell)}</{tag}>" for number, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def _embedded(path: Path) -> str:
    import base64  # noqa: PLC0415

    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="loss curves" style="width:100%" src="data:image/png;base64,{data}"></figure>'


def _blocks_name(names: Sequence[str]) -> str:
    """The list that most linears are in."""
    lists = [match[1] for name in names if (match := re.match(r"(.+?)\.\d+\.", name))]
    return max(set(lists), key=lists.count) if lists else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
