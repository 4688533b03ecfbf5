#!/usr/bin/env python3
"""Tokens a second of a Llama of any size with random weights, in full and packed, in one loop: `python -m benchmarks.decode`.

    python -m benchmarks.decode --settings v6k4096 v4k256shared trellis2 --blocks 32 [--compile]

The loop is that of `vptq generate`: a cache of fixed size, fused blocks, one CUDA graph a token; all ratios are to float16 in
the same loop. A first row has float16 with the model's own code in the graph. Settings are named as in benchmarks.matmul.
Beside the speed: the GPU memory that a model takes, and what its stored tensors, embeddings and head among them, and its cache
add up to.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import default_device, describe, show_table
from benchmarks.matmul import parse_setting, random_linear
from vptq.nn.vquant_linear import VQuantLinear, prepare_kernels
from vptq.pipeline.decode import StaticDecoder


def make_model(config: LlamaConfig, device: torch.device) -> torch.nn.Module:
    """Random float16 weights, made on the device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rotary = type(model.model.rotary_emb)(config)  # what is computed, not stored
    model = model.half().to_empty(device=device).eval()
    model.model.rotary_emb = rotary.to(device)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model.requires_grad_(False)


def pack(model: torch.nn.Module, name: str, device: torch.device) -> None:
    """Replace the linears of all blocks by packed ones with random indices; a shared codebook is kept once."""
    setting = parse_setting(name)
    owner: tuple[str, VQuantLinear] | None = None
    for place, linear in list(model.model.layers.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        packed = random_linear(setting, tuple(linear.weight.shape), torch.float16, device, owner[0] if owner else "")
        if setting.is_shared and owner is not None:
            packed.share_codebook(owner[1])
        elif setting.is_shared:
            owner = place, packed
        parent, _, child = place.rpartition(".")
        setattr(model.model.layers.get_submodule(parent), child, packed)


@torch.no_grad()
def measure(model: torch.nn.Module, prompt: int, count: int, compiled: bool, fused: bool = True) -> tuple[float, int, int]:
    """Seconds a token, the median of three texts; bytes of the cache, and of all that is allocated while texts are written."""
    decoder = StaticDecoder(model, prompt + count, compiled=compiled, fused=fused)
    assert bool(decoder.blocks) == (fused and not compiled), "fused blocks were asked for"
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt))
    seconds = []
    for _ in range(3):
        decoder.start(tokens)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            decoder.step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / count)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoder.cache.layers)
    return statistics.median(seconds), cache, torch.cuda.memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["v6k4096", "v4k256shared", "trellis2"])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--count", type=int, default=128, help="tokens written")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    device = default_device()
    if device.type != "cuda":
        raise SystemExit("error: this benchmark needs a CUDA device")
    print(describe(device))
    config = LlamaConfig(
        hidden_size=given.hidden, intermediate_size=given.inner, num_hidden_layers=given.blocks,
        num_attention_heads=given.hidden // 128, max_position_embeddings=4096,
    )  # fmt: skip
    rows: list[list[str]] = []
    seconds_of: dict[str, float] = {}
    for name in [OWN, "float16", *given.settings]:
        model = make_model(config, device)
        if name not in (OWN, "float16"):
            pack(model, name, device)
            prepare_kernels(model)
        gc.collect()
        torch.cuda.empty_cache()
        stored = sum(parameter.nbytes for parameter in {id(p): p for p in model.parameters()}.values())
        seconds, cache, kept = measure(model, given.prompt, given.count, given.compile, name != OWN)
        seconds_of[name] = seconds
        rows.append([
            name, f"{1 / seconds:.1f}", f"{seconds * 1e3:.2f} ms",
            f"{seconds_of.get('float16', float('nan')) / seconds:.2f}", f"{stored / 1e9:.2f} GB",
            f"{cache / 1e9:.2f} GB", f"{kept / 1e9:.2f} GB", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB",
        ])  # fmt: skip
        show_table(HEAD, rows[-1:])
        del model
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    show_table(HEAD, rows)


OWN = "float16, own code"
HEAD = ["weights", "tokens/s", "a token", "/ float16", "stored tensors", "cache", "memory", "memory peak"]


if __name__ == "__main__":
    main()
