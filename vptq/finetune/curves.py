"""Loss curves: the numbers as JSON, and a picture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vptq.models.files import save_json, whole_file

History = Sequence[Mapping[str, float]]


def save_curves(folder: Path, curves: Mapping[str, History], label: str) -> bool:
    """Write `curves.json` and `curves.png` to a folder; whether there is something to draw with.

    Args:
        curves: by what was trained, dicts with `step`, `loss` and now and then `held_out`. What stands before a colon in the
            name parts them into groups, such as passes over the blocks; without one a training is drawn for itself. label: of
            the loss.
    """
    save_json(folder / "curves.json", {"loss": label, "curves": {name: list(history) for name, history in curves.items()}})
    try:
        import matplotlib  # noqa: PLC0415 (slow import, and absent on some machines)
    except ImportError:
        return False
    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure  # noqa: PLC0415

    groups: dict[str, dict[str, History]] = {}
    for name, history in curves.items():
        group, colon, part = name.rpartition(": ")
        groups.setdefault(group if colon else name, {})[part] = history
    figure = Figure(figsize=(8, 4.5 if len(groups) == 1 else 3.2 * len(groups)), dpi=120, layout="constrained")
    many = any(": " in name for name in curves)
    for row, (group, own) in zip(figure.subplots(len(groups), 1 + many, squeeze=False), groups.items(), strict=True):
        if many:
            _draw_many(row, own, label)
        else:
            _draw_one(row[0], own[group], label)
        if len(groups) > 1 or many:
            row[0].set_title(group, loc="left", fontsize="medium")
    with whole_file(folder / "curves.png") as partial:
        figure.savefig(partial, format="png")
    return True


def _draw_one(axes: Any, history: History, label: str) -> None:
    """Training and held-out loss of one training."""
    trained = [entry for entry in history if "loss" in entry]
    held_out = [entry for entry in history if "held_out" in entry]
    axes.plot([e["step"] for e in trained], [e["loss"] for e in trained], color="0.7", linewidth=1, label="training")
    axes.plot([e["step"] for e in held_out], [e["held_out"] for e in held_out], "o-", color="tab:blue", label="held out")
    axes.set(xlabel="step", ylabel=label)
    axes.legend()
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_many(both: Any, curves: Mapping[str, History], label: str) -> None:
    """Held-out loss of every training: before and after, and relative to before as it went."""
    firsts, lasts = [], []
    for number, history in enumerate(curves.values()):
        looks = [entry for entry in history if "held_out" in entry]
        firsts.append(looks[0]["held_out"])
        lasts.append(min(entry["held_out"] for entry in looks))
        shade = 0.85 * number / max(len(curves) - 1, 1)
        both[1].plot(
            [e["step"] for e in looks], [e["held_out"] / firsts[-1] for e in looks], color=(shade, 0.3, 1 - shade), linewidth=1
        )
    places = range(len(firsts))
    both[0].plot(places, firsts, "o-", color="0.6", label="before")
    both[0].plot(places, lasts, "o-", color="tab:blue", label="after")
    if min(*firsts, *lasts) > 0:
        both[0].set_yscale("log")
    both[0].set(xlabel="block", ylabel=f"held out: {label}")
    both[0].legend()
    both[1].set(xlabel="step", ylabel="held out, of that before\n(first block blue, last red)")
    for axes in both:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
