#!/usr/bin/env python3
"""One linear: the whole of it, and its parts.

    python -m benchmarks.quantize_linear [--shapes 4096x4096] [--vector_len 8] [--num_centroids 65536] [--kiter 100]

A shape is out_features x in_features. Weights are normal, inputs correlated with sizes over two decades. The floor of k-means
is the tensor cores' time for the scores of all its assignments; that of the sweep the same for one assignment of all vectors;
that of the factorisation n³ operations at float64's rate, taken as measured for a float64 product now.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.common import (
    Ceilings,
    Timing,
    add_linear_arguments,
    default_device,
    describe,
    linear_config,
    measure_ceilings,
    show_table,
    timed,
    wait,
)
from vptq.config import LinearConfig
from vptq.geometry import plan_geometry
from vptq.quantize.linear import quantize_linear
from vptq.quantize.metric import factor_inverse, proxy_error
from vptq.quantize.segments import Segment
from vptq.quantize.sweep import sweep


def make_problem(out_features: int, in_features: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(out_features, in_features, device=device)
    inputs = torch.randn(2 * in_features, in_features, device=device) * torch.logspace(0, -2, in_features, device=device)
    inputs = inputs + 0.3 * inputs.roll(1, 1)
    return weight, inputs.T @ inputs / len(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], metavar="OUTxIN")
    add_linear_arguments(parser, vector_len=8, num_centroids=65536, ktol=0.0)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(describe(given.device))
    ceilings = measure_ceilings(given.device)
    print(ceilings)
    wide = torch.randn(2048, 2048, dtype=torch.float64, device=given.device)
    rate64 = 2 * 2048**3 / timed(lambda: wide @ wide).median
    config = linear_config(given)
    rows = []
    for shape in given.shapes:
        rows += measure(shape, config, given, ceilings, rate64)
    show_table(["linear", "part", "median (range)", "floor, share", "note"], rows)


def measure(shape: str, config: LinearConfig, given: argparse.Namespace, ceilings: Ceilings, rate64: float) -> list[list[str]]:
    out_features, in_features = (int(word) for word in shape.split("x"))
    weight, hessian = make_problem(out_features, in_features, given.device)
    geometry, faults = plan_geometry(out_features, in_features, config)
    if geometry is None:
        raise SystemExit("; ".join(faults))
    quantize_linear(weight, hessian, LinearConfig(**{**vars(config), "kiter": 1}))  # compile, warm up
    if given.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait()
    started = time.perf_counter()
    quantized, report = quantize_linear(weight, hessian, config)
    wait()
    whole = time.perf_counter() - started
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most" if given.device.type == "cuda" else ""
    inv_chol = factor_inverse(hessian, 0.01).inv_chol
    books = [book[0] for book in (quantized.codebook.centroids,)]
    if quantized.residual_codebook is not None:
        books.append(quantized.residual_codebook.centroids[0])
    segments = [Segment(0, in_features, tuple(books))]
    normal = torch.randn_like(weight)
    scores = sum(2.0 * geometry.num_vectors * len(book) * 16 for book in books) / ceilings.matrix
    sweeping = timed(lambda: sweep(normal, inv_chol, segments, geometry, config.blocksize), given.repeats)
    factoring = timed(lambda: factor_inverse(hessian, 0.01), given.repeats)
    errors = timed(lambda: proxy_error(weight, weight * 0.9, hessian), given.repeats)
    iterations = sum(report.kmeans_iterations)
    note = f"k-means iterations {iterations}, proxy error {report.error:.5f}{memory}"
    products = 4.0 * out_features * in_features**2 / ceilings.matrix32

    def row(part: str, taken: Timing, floor: float, note: str = "") -> list[str]:
        return [shape, part, str(taken), f"{floor * 1e3:.1f} ms, {floor / taken.median:.0%}", note]

    return [
        row("all", Timing(whole, whole, whole), scores * (iterations + 2), f"one run, floor of the scores; {note}"),
        row("sweep", sweeping, scores, "floor of the scores"),
        row("factor of the inverse", factoring, in_features**3 / rate64, "float64"),
        row("proxy error", errors, products, "float32"),
    ]


if __name__ == "__main__":
    main()
