"""Make the Gaussian codebooks that come with the package: vptq/pipeline/gaussian.safetensors (on a GPU: under 2 minutes)."""

from __future__ import annotations

import sys
import time

import torch

from vptq.config import LinearConfig
from vptq.models.files import save_tensors
from vptq.pipeline.codebooks import SHIPPED, codebook_name, make_codebooks
from vptq.quantize.gaussian import mean_squared_error

TRELLISES = [(1, bits) for bits in range(1, 9)] + [(2, bits) for bits in (3, 5, 7)]
STATES = 4096
VECTORS = [(2, 16), (2, 64), (2, 256), (4, 256), (4, 4096), (4, 65536), (6, 4096), (8, 256), (8, 4096), (8, 65536)]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors, errors = {}, {}
    trellises = [_config(v, STATES, trellis_bits=bits) for v, bits in TRELLISES]
    for config in trellises + [_config(v, k) for v, k in VECTORS]:
        started = time.perf_counter()
        made = {stage: table.half() for stage, table in make_codebooks(config, device).items()}
        name = codebook_name(config)
        tensors |= {f"{name}.{stage}": table.cpu() for stage, table in made.items()}
        errors[name] = mean_squared_error(config, made["main"].float())
        print(f"{name}  mean squared error {errors[name]:.6f}  {time.perf_counter() - started:.1f} s", file=sys.stderr)
    save_tensors(SHIPPED, tensors, {name: f"{error:.6g}" for name, error in errors.items()})


def _config(vector_len: int, num_centroids: int, **others: int) -> LinearConfig:
    return LinearConfig(
        vector_lens=(-1, vector_len),
        num_centroids=(-1, num_centroids),
        codebook_scope="shared",
        rotation="hadamard",
        **others,
    )


if __name__ == "__main__":
    main()
