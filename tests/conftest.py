"""Shared pieces: generators, small problems, tiny models, devices."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports one

from vptq.models.architecture import DEMO


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def kernel_device(monkeypatch) -> torch.device:
    """Where Triton kernels run: on the GPU, or, where there is none, in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("VPTQ_KERNELS", "triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr("triton.runtime.interpreter.ReduceOps.generic_reduce", _reduce_whole)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def emulated(monkeypatch) -> None:
    """CUDA sources run on the CPU, on three processors, and packed linears there take them."""
    from tests.nn.cuda_on_cpu import can_emulate, get_emulated
    from vptq.nn.kernels import attention, products, turns
    from vptq.nn.kernels.fused import fused_linear
    from vptq.nn.kernels.nvrtc import Limits
    from vptq.nn.vquant_linear import VQuantLinear

    if not can_emulate():
        pytest.skip("needs g++ on x86-64")
    for module in (products, turns, attention):
        monkeypatch.setattr(module, "get_kernel", get_emulated)
    for module in (products, attention):
        monkeypatch.setattr(module, "limits_of", lambda device: Limits(processors=3, shared=227 << 10))
    monkeypatch.setattr(
        VQuantLinear, "fused_form", lambda self, dtype: fused_linear(self.stored_tensors(), self.layer_config, dtype)
    )


def _reduce_whole(self, inputs):
    """The interpreter's reduction by a function of ours, which it applies number by number, for whole slices at a time."""
    slices = [np.moveaxis(given.handle.data, self.axis, 0) for given in inputs]
    wrap = [functools.partial(self.to_tensor, dtype=given.dtype) for given in inputs]
    found = [wrapped(part[0]) for wrapped, part in zip(wrap, slices, strict=True)]
    for number in range(1, len(slices[0])):
        following = [wrapped(part[number]) for wrapped, part in zip(wrap, slices, strict=True)]
        found = self.combine_fn.fn(*found, *following)
    return list(found)


def correlated_hessian(size: int, generator: torch.Generator, tokens: int | None = None) -> torch.Tensor:
    """Second moment of inputs with correlated columns of very different sizes."""
    mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -1.5, size)
    inputs = torch.randn(tokens or 4 * size, size, generator=generator) @ mix
    return inputs.T @ inputs / len(inputs)


def problem(out_features: int, in_features: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose columns differ in size and offset, and a Hessian."""
    weight = torch.randn(out_features, in_features, generator=generator)
    weight = weight * (0.2 + torch.rand(in_features, generator=generator)) + 0.3 * torch.randn(in_features, generator=generator)
    return weight, correlated_hessian(in_features, generator)


def make_tiny_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float16, **changes) -> Path:
    """A random two-block Llama with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.to(dtype).save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 2,500 tokens of the demo's calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:10_000], encoding="utf-8")
    return path
