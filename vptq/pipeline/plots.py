"""Pictures of a quantization: error along depth, bits, use of codebooks, time; as PNG files and as SVG for a page."""

from __future__ import annotations

import functools
import io
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vptq.models.architecture import all_experts
from vptq.models.files import whole_file

STAGES = {
    "error_kmeans": "nearest centroid",
    "error_sweep": "with error feedback",
    "error_residual": "+ residual",
    "error_refined": "+ refinement",
}
COLORS = ("#1f9bcf", "#e4572e", "#3aa655", "#b25fc9", "#d9a404", "#7b8794", "#00a6a6", "#c2185b")
TEXT, GRID = "#777777", "#9a9a9b"  # replaced in a page by its own colours
SIZE = (4.6, 2.9)


def kind_of(name: str, blocks: str) -> tuple[int, str]:
    """Block and kind of a linear, experts of a block as one kind; -1 for those outside of blocks.

    blocks: full name of the list of blocks.
    """
    match = re.match(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name)
    return (int(match[1]), all_experts(match[2])) if match else (-1, name)


def by_kind(figures: Sequence[Mapping[str, Any]], blocks: str, value: Callable[[Mapping[str, Any]], Any]) -> dict[str, dict]:
    """Means along depth: kind -> block -> mean of what `value` gives, where it gives something."""
    found: dict[str, dict[int, list[float]]] = {}
    for figure in figures:
        block, kind = kind_of(figure["name"], blocks)
        number = value(figure)
        if number is not None and block >= 0:
            found.setdefault(kind, {}).setdefault(block, []).append(float(number))
    return {kind: {block: sum(own) / len(own) for block, own in blocks.items()} for kind, blocks in found.items()}


def quantization_plots(figures: Sequence[Mapping[str, Any]], blocks: str) -> dict[str, Any]:
    """Figures by name. figures: of all linears, as `linears.json` has them. Raises ImportError without matplotlib."""
    found = {}
    stages = {label: by_kind(figures, blocks, operator.itemgetter(key)) for key, label in STAGES.items()}
    kinds = list(by_kind(figures, blocks, operator.itemgetter("error")))
    for number, kind in enumerate(kinds):
        lines = {label: along.get(kind, {}) for label, along in stages.items()}
        found[f"error-{number:02d}"] = _draw(functools.partial(_error_along_depth, lines=lines, kind=kind))
    found["bits"] = _draw(lambda axes: _lines(axes, by_kind(figures, blocks, lambda f: f["bits"]), "stored bits a weight"))
    use = by_kind(figures, blocks, lambda figure: figure.get("codebook_use"))
    if use:
        found["codebooks"] = _draw(lambda axes: _lines(axes, use, "entropy of indices, of its most", bottom=None))
    seconds = by_kind(figures, blocks, lambda figure: figure["seconds"])
    found["time"] = _draw(lambda axes: _lines(axes, seconds, "seconds a linear", bottom=0.0))
    return found


def save_plots(plots: Mapping[str, Any], folder: Path) -> None:
    """As PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in plots.items():
        with whole_file(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=150, facecolor="white")


def as_svg(figure: Any) -> str:
    """For a page: without a size and colours of its own for text and grid, no reference to anything outside."""
    from matplotlib import rc_context  # noqa: PLC0415

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vptq"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" '
                  r'xmlns:xlink="http://www.w3.org/1999/xlink" role="img">', text, count=1)  # fmt: skip
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ?[^;\"]*;?", lambda m: re.sub(r"'[^']*'(, ?)?", "", m[0]), text)
    return text.replace(TEXT, "currentColor").replace(GRID, "var(--line)")


def _draw(paint: Callable[[Any], None]) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow import)

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    paint(axes)
    axes.tick_params(which="both", colors=TEXT, labelsize=8)
    for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
        label.set(color=TEXT, fontsize=9)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.grid(color=GRID, alpha=0.35, linewidth=0.6)
    lines, names = axes.get_legend_handles_labels()
    if names:
        columns = 2 if len(names) < 5 else 3
        figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=7, labelcolor=TEXT, frameon=False)
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)
    return figure


def _error_along_depth(axes: Any, lines: Mapping[str, Mapping[int, float]], kind: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415 (slow import)

    for number, (label, line) in enumerate(lines.items()):
        if line:
            style = {"color": COLORS[number], "marker": "o", "markersize": 2.5, "linewidth": 1.2}
            axes.plot(list(line), list(line.values()), label=label, **style)
    axes.set(title=kind, xlabel="block", ylabel="proxy error", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(_plainly)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plainly(value: float, _place: int) -> str:
    return f"{value:g}"


def _lines(axes: Any, lines: Mapping[str, Mapping[int, float]], label: str, bottom: float | None = None) -> None:
    for number, (kind, line) in enumerate(lines.items()):
        style = {"color": COLORS[number % len(COLORS)], "linestyle": "-" if number < len(COLORS) else "--"}
        axes.plot(list(line), list(line.values()), marker="o", markersize=2.5, linewidth=1.2, label=kind, **style)
    axes.set(xlabel="block", ylabel=label)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
