"""Small problems with known answers, done as this machine does them: are its kernels right?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vptq.backend import use_kernels
from vptq.checkpoint.names import to_tensors
from vptq.config import LinearConfig
from vptq.layer_config import LayerConfig
from vptq.nn.packing import pack_bits, unpack_bits
from vptq.nn.vquant_linear import VQuantLinear
from vptq.pipeline.codebooks import codebook_file, load_codebooks, prepare_codebooks
from vptq.quantize.codebook import Codebook
from vptq.quantize.linear import quantize_linear

ROWS, COLUMNS = 256, 64
PRODUCT_ERROR = 2e-2  # of the largest output; float16 products
SWEEP_ERROR = 0.05  # by which two ways to quantize may differ in what is lost: near ties are decided by rounding
PLAIN = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 256), kiter=20)
TRELLIS = replace(
    PLAIN, vector_lens=(-1, 1), num_centroids=(-1, 4096), rotation="hadamard", codebook_scope="shared", trellis_bits=2
)


@dataclass(frozen=True)
class Finding:
    """One check. seconds: that it took, compiling included. fault: what is wrong; empty if nothing is."""

    name: str
    seconds: float
    fault: str


def self_test(device: torch.device) -> Iterator[Finding]:
    """Check packing, quantization and products on a device, one after the other."""
    checks: dict[str, Callable[[torch.device], str]] = {
        "indices packed and unpacked": _packing,
        "vectors: quantized": lambda device: _quantizing(PLAIN, device),
        "vectors: product with packed weights": lambda device: _product(PLAIN, device),
        "trellis: quantized": lambda device: _quantizing(TRELLIS, device),
        "trellis: product with packed weights": lambda device: _product(TRELLIS, device),
    }
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            fault = check(device)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        yield Finding(name, time.perf_counter() - started, fault)


def _packing(device: torch.device) -> str:
    for bits in (1, 3, 8, 13, 16, 24):
        values = torch.randint(0, 1 << bits, (5, 77), generator=torch.Generator().manual_seed(bits)).to(device)
        if not torch.equal(unpack_bits(pack_bits(values, bits), bits, 77), values):
            return f"{bits} bits come back as others"
    return ""


def _problem(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    inputs = torch.randn(4 * COLUMNS, COLUMNS, generator=generator) * torch.logspace(0, -1, COLUMNS)
    return weight.to(device), (inputs.T @ inputs / len(inputs)).to(device)


def _books(config: LinearConfig, device: torch.device) -> tuple[Codebook, ...] | None:
    if not config.is_shared:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        prepare_codebooks(Path(scratch), [config], device, None, [])
        path = codebook_file(Path(scratch), config)
        return load_codebooks(path, config.bitwidth, config.bsize, torch.float16, device)


def _quantizing(config: LinearConfig, device: torch.device) -> str:
    """As this machine does it, against plain torch on the CPU."""
    errors = []
    for where in (device, torch.device("cpu")):
        weight, hessian = _problem(where)
        errors.append(quantize_linear(weight, hessian, config, shared=_books(config, where))[1].error)
    if not abs(errors[0] - errors[1]) <= SWEEP_ERROR * errors[1]:
        return f"loses {errors[0]:.5f}, plain torch on the CPU {errors[1]:.5f}"
    return ""


def _product(config: LinearConfig, device: torch.device) -> str:
    """The product with packed weights, against that with the dequantized weight."""
    weight, hessian = _problem(device)
    quantized, _ = quantize_linear(weight, hessian, config, shared=_books(config, device))
    layer = LayerConfig.of(config, quantized.geometry, False, "")
    linear = VQuantLinear(**layer.to_dict(), device=device, dtype=torch.float16)
    linear.load_state_dict({name: tensor.to(device) for name, tensor in to_tensors(quantized, layer, torch.float16).items()})
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    linear = linear.to(dtype)
    linear.prepare_kernels(dtype)
    for count in (1, 7, 40):
        inputs = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(count)).to(device, dtype)
        with torch.no_grad():
            found, wanted = linear(inputs).float(), inputs.float() @ linear.dequantize().float().T
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= PRODUCT_ERROR:
            return f"{count} rows: off by {error:.2g} of the largest output"
    return ""


def kernels_in_use(device: torch.device) -> str:
    """What does the work on a device, in a few words."""
    return "Triton and CUDA kernels" if use_kernels(device) and device.type == "cuda" else "plain torch"
