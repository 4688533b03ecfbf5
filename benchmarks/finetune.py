#!/usr/bin/env python3
"""Several fine-tunings, a few at once on one GPU, and what each takes of the excess over the original.

    python -m benchmarks.finetune --original smollm2 --model_name outputs/smollm2/2bits/TIME/packed_model \\
        --common "--dataset c4.txt self --cache_dir kept --eval_dataset wikitext2.txt moby_dick.txt" --at_once 3 \\
        --run "--mode block" --run "--mode e2e --add row_scales biases --steps 400" --run "--mode e2e --train head scales"

Every run is a `vptq finetune` of each checkpoint, with the words of --common and its own. *Taken* is the part of the excess of
log-perplexity over the original that is gone. The times are of runs that share the GPU, unless --at_once is 1. The losses on
the held-out text are drawn in OUTPUT_DIR/curves.png.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import default_device, describe, show_table


@dataclass
class Run:
    """One `vptq finetune`, and what came of it."""

    name: str
    words: list[str]
    log: Path
    started: float = 0.0
    seconds: float = 0.0
    process: subprocess.Popen | None = None
    results: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def start(self) -> None:
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "vptq", "finetune", *self.words]
        self.process = subprocess.Popen(command, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def is_done(self) -> bool:
        if self.process is None or self.process.poll() is None:
            return False
        self.seconds = time.perf_counter() - self.started
        said = self.log.read_text(encoding="utf-8")
        if self.process.returncode:
            print(f"{self.name} failed:\n{said[-2000:]}", flush=True)
            return True
        folder = Path(re.findall(r"^run folder: (.+)$", said, re.MULTILINE)[-1].strip())
        self.results = json.loads((folder / "ppl_results.json").read_text(encoding="utf-8"))
        self.curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))["curves"]
        print("\n".join([f"{self.name}: {folder}", *said.splitlines()[-8:]]), flush=True)
        return True


def taken(figures: Mapping[str, Mapping[str, float]]) -> float:
    """The part of the excess of log-perplexity over the original that is gone."""
    original, before, after = (math.log(figures[which]["perplexity"]) for which in ("original", "before", "after"))
    return (before - after) / (before - original)


def do_all(runs: list[Run], at_once: int) -> None:
    """Every run, some at a time."""
    waiting, going = list(runs), []
    while waiting or going:
        while waiting and len(going) < at_once:
            going.append(waiting.pop(0))
            going[-1].start()
        time.sleep(0.5)
        going = [run for run in going if not run.is_done()]


def show(runs: list[Run]) -> None:
    done = [run for run in runs if run.results]
    texts = sorted({text for run in done for key in run.results if key.startswith("ctx_") for text in run.results[key]})
    rows = []
    for run in done:
        contexts = [value for key, value in run.results.items() if key.startswith("ctx_")]
        row = [run.name, f"{run.results['bits']['stored_bits_per_weight']:.3f}"]
        row.append(" to ".join(f"{run.results['held_out'][which]:.4g}" for which in ("before", "after")))
        for text in texts:
            figures = contexts[0][text]
            row.append(", ".join(f"{figures[which]['perplexity']:.2f}" for which in ("original", "before", "after")))
            row.append(f"{taken(figures):.0%}")
        rows.append([*row, f"{run.results['training_seconds']:.0f}", f"{run.seconds:.0f}"])
    names = [word for text in texts for word in (f"{Path(text).name}: original, before, after", "taken")]
    show_table(["run", "stored bits", "held out", *names, "training, s", "all, s"], rows)


def draw(runs: list[Run], path: Path) -> None:
    """The held-out losses of runs of the whole model, by steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        history = run.curves.get("whole model")  # block by block there are as many as blocks and passes
        if history:
            looks = [(entry["step"], entry["held_out"]) for entry in history if "held_out" in entry]
            axes.plot(*zip(*looks, strict=True), marker=".", label=run.name)
    axes.set(xlabel="step", ylabel="loss on the held-out text, nats a token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True)
    parser.add_argument("--model_name", nargs="+", required=True, help="packed checkpoints")
    parser.add_argument("--common", default="", help="words of all runs")
    parser.add_argument("--run", action="append", required=True, help="words of one run; may be given again")
    parser.add_argument("--at_once", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark-finetune"))
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    print(describe(default_device()))
    print(f"all with: --original {given.original} {given.common}")
    runs = []
    for number, checkpoint in enumerate(given.model_name):
        for place, words in enumerate(given.run):
            own = given.output_dir / f"{number}-{place}"
            base = ["--original", given.original, "--model_name", checkpoint, "--output_dir", str(own)]
            name = words if len(given.model_name) == 1 else f"{number}: {words}"
            runs.append(Run(name, [*base, *shlex.split(given.common), *shlex.split(words)], own.with_suffix(".log")))
    if len(given.model_name) > 1:
        print("\n".join(f"{number}: {checkpoint}" for number, checkpoint in enumerate(given.model_name)))
    do_all(runs, given.at_once)
    draw(runs, given.output_dir / "curves.png")
    show(runs)


if __name__ == "__main__":
    main()
