#!/usr/bin/env python3
"""Products of activations with packed linears, beside those with the weight in full: `python -m benchmarks.matmul`.

    python -m benchmarks.matmul --shapes 4096x4096 --batches 1 4 64 --settings v8k65536 v6k4096 v4k256shared trellis2

Settings: v6k4096 and v8k256+256 are plain linears with a codebook of their own, normalised and permuted; what ends in `shared`,
and trellis1 to trellis4, are rotated on both sides with one codebook for the model, transforms included.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Timing, default_device, describe, show_table, timed
from vptq.config import LinearConfig
from vptq.geometry import plan_geometry
from vptq.layer_config import LayerConfig
from vptq.nn.vquant_linear import VQuantLinear

SHAPES = ["4096x4096"]
SETTINGS = ["v8k65536", "v8k4096", "v6k4096", "v8k256+256", "v4k256shared", "trellis2", "trellis3"]
TRELLIS_STATES = 4096
# Of random tensors, so that weights spread by some 0.02, as in a model that is not trained, and sums stay in float16.
MEANS = {"weight_scale": 0.02, "row_scale": 0.02}
SPREAD = {"weight_scale": 0.002, "row_scale": 0.0, "weight_bias": 0.0005}
COLD_BYTES = 200 << 20  # of weights that take turns, so that L2 does not hold them


def parse_setting(name: str) -> LinearConfig:
    """The settings that a name stands for. Raises SystemExit for one that it is not."""
    if found := re.fullmatch(r"trellis(\d)", name):
        shared = {"rotation": "hadamard", "codebook_scope": "shared"}
        return LinearConfig(vector_lens=(-1, 1), num_centroids=(-1, TRELLIS_STATES), trellis_bits=int(found[1]), **shared)
    if found := re.fullmatch(r"v(\d+)k(\d+)(?:\+(\d+))?(shared)?", name):
        vector_len, main, residual, shared_scope = found.groups()
        rotated = {"rotation": "hadamard", "codebook_scope": "shared"} if shared_scope else {}
        return LinearConfig(
            vector_lens=(-1, int(vector_len)), num_centroids=(-1, int(main)), num_res_centroids=(-1, int(residual or -1)),
            **rotated,
        )  # fmt: skip
    raise SystemExit(f"error: setting {name!r} is none of: trellis1 to trellis8, v8k4096, v8k256+256, v4k256shared")


def random_linear(
    config: LinearConfig, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, codebook_of: str = ""
) -> VQuantLinear:
    """A packed linear with random indices and codebooks; codebook_of: the linear whose codebook it shares."""
    geometry, faults = plan_geometry(*shape, config)
    if geometry is None:
        raise SystemExit(f"error: {faults}")
    layer = LayerConfig.of(config, geometry, bias=False, codebook_of=codebook_of)
    module = VQuantLinear(**layer.to_dict(), device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if name == "perm":
            parameter.data.copy_(torch.randperm(shape[1], generator=generator, device=device).to(torch.int16))
        elif name == "outlier_indices":
            parameter.data.copy_(torch.randint(config.num_centroids[0], parameter.shape, generator=generator, device=device))
        elif parameter.dtype == torch.int32:
            parameter.data.random_(-(2**31), 2**31 - 1, generator=generator)
        else:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device=device) * SPREAD.get(name, 1.0))
            if name in MEANS:
                parameter.data.add_(MEANS[name])
    return module


def packed_bytes(module: VQuantLinear) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def in_graphs(calls: list[Callable[[], Any]]) -> Timing:
    """On a GPU: seconds of one call, all calls one after the other in a CUDA graph, so that Python and launches don't count.

    Calls with weights of their own, together larger than L2, read these from memory as a model does.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = timed(graph.replay, repeats=9, warm=2)
    return Timing(*(seconds / len(calls) for seconds in (found.median, found.fastest, found.slowest)))


def clock(make: Callable[[int], Callable[[], Any]], bytes_read: int, device: torch.device) -> Timing:
    """Time of a call that reads so many bytes of weights; make: the call with the weights of a number."""
    if device.type != "cuda":
        return timed(make(0))
    return in_graphs([make(number) for number in range(max(4, min(64, COLD_BYTES // max(bytes_read, 1))))])


@torch.no_grad()
def measure(name: str, shape: tuple[int, int], batches: list[int], dtype: torch.dtype, device: torch.device) -> list[list[str]]:
    """One row a batch: ours, the same weight in full in each type, and the time that reading our bytes takes at least."""
    setting = parse_setting(name)
    modules: dict[int, VQuantLinear] = {}
    types = [torch.float16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    full: dict[tuple[torch.dtype, int], Tensor] = {}

    def module(number: int) -> VQuantLinear:
        if number not in modules:
            modules[number] = random_linear(setting, shape, dtype, device)
        return modules[number]

    def weight(kind: torch.dtype, number: int) -> Tensor:
        if (kind, number) not in full:
            full[kind, number] = torch.randn(shape, device=device).to(kind)
        return full[kind, number]

    rows, own, size = [], types[0], packed_bytes(module(0))
    for batch in batches:
        inputs = {kind: torch.randn(batch, shape[1], device=device).to(kind) for kind in types}
        ours = clock(lambda i, x=inputs[own]: functools.partial(module(i), x), size, device)
        theirs = {
            kind: clock(
                lambda i, x=inputs[kind], kind=kind: functools.partial(torch.nn.functional.linear, x, weight(kind, i)),
                shape[0] * shape[1] * kind.itemsize, device,
            )
            for kind in types
        }  # fmt: skip
        rows.append([
            f"{shape[0]}x{shape[1]}", name, str(batch), str(ours), *map(str, theirs.values()),
            f"{theirs[own].median / ours.median:.2f}", f"{size / shape[0] / shape[1] * 8:.2f}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 64])
    given = parser.parse_args()
    device = default_device()
    names = ["float16"] if device.type == "cuda" else ["float32", "bfloat16"]
    print(f"{describe(device)}, {torch.get_num_threads()} threads")
    rows = []
    for shape in given.shapes:
        out_features, in_features = map(int, shape.split("x"))
        for name in given.settings:
            rows += measure(name, (out_features, in_features), given.batches, torch.float16, device)
    show_table(["shape", "setting", "batch", "packed", *names, f"{names[0]} / packed", "bits a weight"], rows)


if __name__ == "__main__":
    main()
