"""What all benchmarks share: clocks, ceilings of the machine, tables."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vptq.config import LinearConfig


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of several runs, and how far apart fastest and slowest were."""

    median: float
    fastest: float
    slowest: float

    def __str__(self) -> str:
        if self.median < 1e-3:
            return f"{self.median * 1e6:.1f} µs ({self.fastest * 1e6:.1f} to {self.slowest * 1e6:.1f})"
        digits = 2 if self.median < 0.1 else 1
        return (
            f"{self.median * 1e3:.{digits}f} ms ({self.fastest * 1e3:.{digits}f} to {self.slowest * 1e3:.{digits}f})"
            if self.median < 1
            else f"{self.median:.2f} s ({self.fastest:.2f} to {self.slowest:.2f})"
        )


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], repeats: int = 5, warm: int = 1) -> Timing:
    """Wall time with the device's work done, after `warm` runs that don't count."""
    for _ in range(warm):
        work()
    wait()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or 'CPU'}, {os.cpu_count()} cores"
    try:
        import triton

        kernels = f"triton {triton.__version__}"
    except ImportError:
        kernels = "no triton"
    return f"{name}, torch {torch.__version__}, {kernels}, VPTQ_KERNELS={os.environ.get('VPTQ_KERNELS', 'auto')}"


@dataclass(frozen=True)
class Ceilings:
    """Measured now, on this machine: operations a second of a large matrix product, bytes a second of a large copy."""

    matrix: float
    matrix32: float
    copy: float

    def __str__(self) -> str:
        return (
            f"ceilings measured now: {self.matrix / 1e12:.1f} TFLOP/s in 16 bits, {self.matrix32 / 1e12:.1f} in float32, "
            f"copy {self.copy / 1e9:.0f} GB/s"
        )


def measure_ceilings(device: torch.device) -> Ceilings:
    size = 8192 if device.type == "cuda" else 1024
    wide = torch.randn(size, size, device=device)
    narrow = wide.to(torch.bfloat16)
    data = torch.randint(0, 100, (1 << (31 if device.type == "cuda" else 26),), dtype=torch.int8, device=device)
    other = torch.empty_like(data)
    operations = 2.0 * size**3
    return Ceilings(
        matrix=operations / timed(lambda: narrow @ narrow).median,
        matrix32=operations / timed(lambda: wide @ wide).median,
        copy=2.0 * data.numel() / timed(lambda: other.copy_(data)).median,
    )


def add_linear_arguments(parser: argparse.ArgumentParser, vector_len: int, num_centroids: int, ktol: float) -> None:
    """The settings of a linear that benchmarks take, with these defaults; `linear_config` reads them."""
    parser.add_argument("--vector_len", type=int, default=vector_len)
    parser.add_argument("--num_centroids", type=int, default=num_centroids)
    parser.add_argument("--num_res_centroids", type=int, default=-1)
    parser.add_argument("--vector_quant_dim", choices=["out", "in"], default="out")
    parser.add_argument("--kiter", type=int, default=100)
    parser.add_argument("--ktol", type=float, default=ktol, help="0: all iterations, so that times compare")


def linear_config(given: argparse.Namespace) -> LinearConfig:
    return LinearConfig(
        vector_lens=(-1, given.vector_len),
        num_centroids=(-1, given.num_centroids),
        num_res_centroids=(-1, given.num_res_centroids),
        vector_quant_dim=given.vector_quant_dim,
        kiter=given.kiter,
        ktol=given.ktol,
    )


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, ready for docs/performance.md."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [list(head), ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
