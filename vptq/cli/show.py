"""What people see: tables on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from vptq.bits import ITEM_NAMES, ITEMS, ModelBits
from vptq.errors import UsageError
from vptq.pipeline.progress import table


def bits_table(bits: ModelBits) -> str:
    """Bits itemised, and the three sums."""
    totals = bits.to_dict()["total_bits"]
    rows = [("item", "bits", "bits per weight")]
    rows += [
        (ITEM_NAMES[item], f"{totals[item]:,}", f"{totals[item] / bits.num_weights:.4f}") for item in ITEMS if totals[item]
    ]
    if bits.other_bits:
        rows.append(("not quantized", f"{totals['not_quantized']:,}", ""))
    sums = [
        ("ideal (indices and codebooks)", f"{bits.ideal_bits_per_weight:.6f} bits per weight"),
        ("stored (every bit of the linears)", f"{bits.stored_bits_per_weight:.6f} bits per weight"),
        ("file (embeddings, head, all tensors)", f"{bits.file_bits_per_weight:.6f} bits per weight"),
        ("size of all tensors", megabytes(bits)),
    ]
    count = f"{len(bits.linears)} linear{'s' if len(bits.linears) > 1 else ''}, {bits.num_weights:,} weights"
    return f"{count}\n\n{table(rows, right=(1, 2))}\n\n{table(sums)}"


def megabytes(bits: ModelBits) -> str:
    """Size of all tensors of a model file."""
    return f"{bits.file_bits / 8e6:,.4g} MB" if bits.file_bits < 8e6 else f"{bits.file_bits / 8e6:,.1f} MB"


def with_error(value: float, error: float) -> str:
    """`value ± error`; without the error where there is none (NaN)."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def write_json(value: Any, target: str) -> None:
    """To a file, or to stdout for `-`."""
    text = json.dumps(value, indent=2)
    if target == "-":
        print(text)
        return
    try:
        Path(target).expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"`{target}` can't be written", where=[str(error)]) from error


def check_target(target: str | None) -> None:
    """Raise UsageError, before the work, if a results file can't be written where it is asked for."""
    if target not in (None, "-"):
        folder = Path(str(target)).expanduser().absolute().parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UsageError(f"`{target}` can't be written", where=[f"{folder} is no folder that can be written to"])


def say(text: str) -> None:
    """A line for people, beside the results."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """A progress bar with the time left for the whole run, where a person watches; notes in any case."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self._bar: Any = None
        self._shown = sys.stderr.isatty() and "NO_COLOR" not in os.environ

    def start(self, total: float, done: float) -> None:
        if not self._shown:
            return
        from tqdm import tqdm

        layout = "{desc}: {percentage:3.0f}% |{bar:30}| {elapsed} gone, {remaining} left"
        self._bar = tqdm(total=total, initial=done, bar_format=layout, smoothing=0.05, dynamic_ncols=True)

    def run_folder(self, folder: str) -> None:
        self.folder = self.folder or folder  # a command's own first, then those of what it calls
        self.note(f"run folder: {folder}")

    def advance(self, units: float) -> None:
        if self._bar is not None:
            self._bar.update(min(units, self._bar.total - self._bar.n))

    def phase(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            say(text)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
