#!/usr/bin/env python3
"""Hessians: speed and error against float64 of the ways to add up x xᵀ.

    python -m benchmarks.hessian [--sizes 4096 11008] [--tokens 32768]

The error is the largest |H - H64|_ij / sqrt(H64_ii H64_jj): what a linear with unit inputs would see.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import default_device, describe, measure_ceilings, show_table, timed
from vptq.calibration.hessian import HessianAccumulator
from vptq.calibration.runs import mean_of


def accumulate(rows: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator(rows.shape[1], rows.device)
    for batch in rows.split(4096):
        accumulator.add(batch)
    return mean_of(accumulator.take())[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 11008])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--device", type=torch.device, default=default_device())
    given = parser.parse_args()
    print(describe(given.device))
    ceilings = measure_ceilings(given.device)
    print(ceilings)
    rows = []
    for size in given.sizes:
        inputs = torch.randn(given.tokens, size, device=given.device) * torch.logspace(0.5, -2, size, device=given.device)
        inputs = inputs + 0.5 * inputs.roll(1, 1)
        operations = 2.0 * given.tokens * size**2
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            typed = inputs.to(dtype)
            exact = sum((part.double().T @ part.double() for part in typed.split(4096)), torch.zeros(())) / given.tokens
            spread = exact.diagonal().sqrt()
            error = ((accumulate(typed).double() - exact).abs() / (spread[:, None] * spread)).max().item()
            taken = timed(lambda typed=typed: accumulate(typed))
            floor = operations / (ceilings.matrix32 if dtype == torch.float32 else ceilings.matrix)
            name = str(dtype).removeprefix("torch.")
            rows.append([str(size), name, str(taken), f"{floor * 1e3:.1f} ms, {floor / taken.median:.0%}", f"{error:.1e}"])
    show_table(["in_features", "inputs", f"{given.tokens} tokens", "floor, share", "largest error"], rows)


if __name__ == "__main__":
    main()
