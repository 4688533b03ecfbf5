#!/usr/bin/env python3
"""A whole run, from files to packed checkpoint, on a Llama of any size with random weights.

    python -m benchmarks.quantize_model [--blocks 4] [--vector_len 6] [--num_centroids 4096] [--nsamples 128] [--seq_len 4096]
    python -m benchmarks.quantize_model --bits 2

The model is written block by block to --folder (32 blocks of LLaMA-2-7B: 13.5 GB; made once, used again). With fewer blocks
than 32 the whole of 32 is told too: measured time of the blocks times 32 / blocks, plus what does not grow with them.
Random weights and random words calibrate a model as fast as real ones do; perplexity is not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from benchmarks.common import add_linear_arguments, default_device, describe, linear_config, measure_ceilings, show_table
from vptq.config import LinearConfig, QuantConfig
from vptq.models.architecture import DEMO
from vptq.pipeline.progress import Silent
from vptq.pipeline.run import quantize_model
from vptq.recipe import RECIPE

WHOLE = 32
GROWING = ("calibrating", "quantizing", "gradients of the loss", "sensitivity of the linears")  # with the number of blocks


class PhaseClock(Silent):
    """Seconds of each kind of phase, and when the blocks began and ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._kind, self._since = "start", time.perf_counter()

    def phase(self, text: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._kind] = self.seconds.get(self._kind, 0.0) + now - self._since
        self._kind, self._since = text.split(": ")[-1] if text.startswith("block") else text, now


def write_model(folder: Path, config: LlamaConfig) -> None:
    """Random weights, one file a block."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    files: dict[str, str] = {}
    generator = torch.Generator(default_device()).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator, device=generator.device)).half().cpu()

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.float16)
    save("rest.safetensors", {
        "model.embed_tokens.weight": normal(config.vocab_size, hidden),
        "lm_head.weight": normal(config.vocab_size, hidden), "model.norm.weight": ones,
    })  # fmt: skip
    for block in range(config.num_hidden_layers):
        prefix = f"model.layers.{block}."
        tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        norms = {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        save(f"block-{block:03d}.safetensors", tensors | norms)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    config.save_pretrained(folder)


def write_text(path: Path, tokens: int) -> None:
    """Words of the demo's text in random order, about two tokens each."""
    words = (DEMO / "calibration.txt").read_text(encoding="utf-8").split()
    chosen = random.Random(0).choices(words, k=tokens)
    path.write_text("\n".join(" ".join(chosen[i : i + 400]) for i in range(0, len(chosen), 400)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--intermediate_size", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=32)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--blocks", type=int, default=4)
    add_linear_arguments(parser, vector_len=6, num_centroids=4096, ktol=LinearConfig().ktol)
    parser.add_argument("--bits", type=float, help="the recipe of `vptq quantize --bits`, in place of settings of vectors")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vptq-benchmark")
    given = parser.parse_args()
    print(describe(default_device()))
    print(
        f"{given.blocks} blocks, {given.hidden_size} wide, {given.intermediate_size} in, {given.nsamples} x {given.seq_len} "
        "tokens, "
        + (
            f"--bits {given.bits:g}"
            if given.bits
            else f"vectors of {given.vector_len}, {given.num_centroids} + {max(given.num_res_centroids, 0)} centroids"
        )
    )
    shape = f"{given.hidden_size}-{given.intermediate_size}-{given.kv_heads}-{given.vocab_size}-{given.blocks}"
    model, text = given.folder / f"llama-{shape}", given.folder / f"words-{given.nsamples * given.seq_len}.txt"
    config = LlamaConfig(
        vocab_size=given.vocab_size, hidden_size=given.hidden_size, intermediate_size=given.intermediate_size,
        num_hidden_layers=given.blocks, num_attention_heads=given.heads, num_key_value_heads=given.kv_heads,
        max_position_embeddings=given.seq_len, tie_word_embeddings=False, dtype="float16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    if not (model / "config.json").exists():
        started = time.perf_counter()
        write_model(model, config)
        print(f"wrote {model} in {time.perf_counter() - started:.0f} s")
    assert AutoConfig.from_pretrained(model).num_hidden_layers == given.blocks
    if not text.exists():
        write_text(text, given.nsamples * given.seq_len)
    run(given, model, text)


def run(given: argparse.Namespace, model: Path, text: Path) -> None:
    clock = PhaseClock()
    with tempfile.TemporaryDirectory(dir=given.folder) as output:
        started = time.perf_counter()
        config = make_config(given, model, text, output)
        result = quantize_model(config, progress=clock)
        clock.phase("end")
        whole = time.perf_counter() - started
    blocks = sum(seconds for kind, seconds in clock.seconds.items() if kind in GROWING)
    rows = [[kind, f"{seconds:.1f}", f"{seconds / given.blocks:.2f}"] for kind, seconds in clock.seconds.items()]
    rows.append(["all", f"{whole:.1f}", f"{whole / given.blocks:.2f}"])
    show_table(["phase", "seconds", "a block"], rows)
    iterations = [count for figures in result.figures for count in figures["kmeans_iterations"]]
    if iterations:
        mean = sum(iterations) / len(iterations)
        print(f"k-means iterations a codebook: {min(iterations)} to {max(iterations)}, mean {mean:.0f}")
    print(f"mean proxy error {sum(figures['error'] for figures in result.figures) / len(result.figures):.5f}")
    kinds: dict[str, list[float]] = {}
    for figures in result.figures:
        kinds.setdefault("x".join(map(str, figures["shape"])), []).append(figures["seconds"])
    spread = (f"{kind} {statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for kind, s in kinds.items())
    print("seconds a linear, median (range): " + ", ".join(spread))
    if torch.cuda.is_available():
        ceilings = measure_ceilings(default_device())
        print(ceilings)
        print(f"GPU memory at most: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        if iterations:
            floor = block_floor(given, iterations, ceilings.matrix)
            print(f"floor of a block: {floor:.2f} s of tensor-core time, {floor * given.blocks / blocks:.0%} of what it took")
    print(f"main memory at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if given.blocks < WHOLE:
        print(f"{WHOLE} blocks by multiplication: {(whole - blocks + blocks / given.blocks * WHOLE) / 60:.1f} minutes")


def make_config(given: argparse.Namespace, model: Path, text: Path, output: str) -> QuantConfig:
    calibration = {"dataset": str(text), "nsamples": given.nsamples, "seq_len": given.seq_len}
    common = {"model_name": str(model), "output_dir": output, "num_gpus": given.num_gpus, **calibration}
    if given.bits:
        return QuantConfig.from_flat(RECIPE | common | {"bits": given.bits})
    return dataclasses.replace(QuantConfig.from_flat(common), linear=linear_config(given))


def block_floor(given: argparse.Namespace, iterations: list[int], rate: float) -> float:
    """Forward pass, Hessians and k-means scores (rows of 16) of one block, all at the measured 16-bit matrix rate."""
    hidden, inner, tokens = given.hidden_size, given.intermediate_size, given.nsamples * given.seq_len
    keys = hidden // given.heads * given.kv_heads
    weights = 2 * hidden**2 + 2 * keys * hidden + 3 * hidden * inner
    forward = 2.0 * tokens * (weights + given.seq_len * hidden)
    hessians = 2.0 * tokens * (3 * hidden**2 + inner**2)
    mean = sum(iterations) / len(iterations)
    scores = 2.0 * weights / given.vector_len * given.num_centroids * 16 * (mean + 3)
    return (forward + hessians + scores) / rate


if __name__ == "__main__":
    main()
