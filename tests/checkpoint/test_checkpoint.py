"""Checkpoints written and read, by us and through transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import vptq
from tests.conftest import make_tiny_llama
from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import is_packed, open_source
from vptq.checkpoint.writer import CheckpointWriter
from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.errors import CheckpointError
from vptq.layer_config import EXTENDED_VERSION, PLAIN_KEYS
from vptq.models.architecture import load_skeleton
from vptq.models.headers import read_headers
from vptq.models.stream import FolderSource
from vptq.nn.vquant_linear import VQuantLinear
from vptq.pipeline.run import quantize_model

SETTINGS = {
    "plain": {},
    "residual-groups-outliers": {
        "vector_lens": (4, 8), "num_centroids": (16, 16), "num_res_centroids": (-1, 8), "npercent": 5, "group_num": 2,
    },
    "in-8-bit": {"vector_quant_dim": "in", "bitwidth": 8},
}  # fmt: skip


def quantize(folder, text, output, **linear):
    config = QuantConfig(
        model_name=str(folder),
        output_dir=str(output),
        save_model=True,
        linear=LinearConfig(**{"vector_lens": (-1, 4), "num_centroids": (-1, 16), "kiter": 5} | linear),
        calibration=CalibrationConfig(dataset=str(text), nsamples=4, seq_len=64),
    )
    return quantize_model(config)


@pytest.fixture(scope="module", params=SETTINGS)
def run(request, tiny_llama, text_file, tmp_path_factory):
    return quantize(tiny_llama, text_file, tmp_path_factory.mktemp("out"), **SETTINGS[request.param])


@pytest.fixture(scope="module")
def plain(tiny_llama, text_file, tmp_path_factory):
    return quantize(tiny_llama, text_file, tmp_path_factory.mktemp("plain")).folder / "packed_model"


TOKENS = torch.arange(1, 25)[None]


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS.to(next(model.parameters()).device)).logits.float().cpu()


@pytest.mark.ci
def test_every_road_gives_the_same_logits(run, device):
    from transformers import AutoModelForCausalLM

    packed, model = run.folder / "packed_model", run.folder / "model"
    ours = vptq.load_quantized(packed, device)
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float16).to(device)
    dequantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).to(device)
    assert isinstance(theirs.model.layers[0].mlp.up_proj, VQuantLinear)
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(logits(ours), logits(dequantized))
    cached = vptq.load_quantized(packed, device, cache_weights=True)
    assert torch.equal(logits(cached), logits(ours)) and torch.equal(logits(cached), logits(ours))


def test_loaded_model_is_frozen_and_generates(run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.folder / "packed_model")
    linear = model.model.layers[0].mlp.up_proj
    assert not any(p.requires_grad for p in linear.parameters())
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, TOKENS.shape[1] + 3)


def test_packed_model_survives_saving_again(run, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.folder / "packed_model", dtype=torch.float16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(vptq.load_quantized(tmp_path)), logits(model))


def test_our_loaded_model_can_be_saved_and_loaded_again(run, tmp_path):
    model = vptq.load_quantized(run.folder / "packed_model")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(vptq.load_quantized(tmp_path)), logits(model))


def test_predicted_bits_are_the_bytes_in_the_file(run):
    """Plan == reality, item by item, and the sum over all tensors."""
    packed = run.folder / "packed_model"
    found = checkpoint_bits(packed)
    entries = read_headers(packed)
    names = [f"{linear.name}.{key}" for linear in found.linears for key in _config(packed)[linear.name]]
    stored = sum(entries[name].num_bytes * 8 for name in names)
    assert sum(linear.stored for linear in found.linears) == stored
    total = sum(linear["bits"] * linear["shape"][0] * linear["shape"][1] for linear in run.figures)
    assert total == pytest.approx(stored)


def _config(packed):
    from vptq.checkpoint.reader import read_layers

    return {name: layer.tensor_shapes() for name, layer in read_layers(packed).items()}


def test_plain_checkpoint_holds_exactly_the_published_form(plain, tiny_llama):
    config = json.loads((plain / "config.json").read_text())["quantization_config"]
    assert set(config) == {"quant_method", "config_for_layers"} and config["quant_method"] == "vptq"
    original = set(FolderSource(tiny_llama).entries)
    entries = read_headers(plain)
    per_linear = {"centroids.weight", "indices", "perm", "weight_scale", "weight_bias"}
    expected = {n for n in original if n.removesuffix(".weight") not in config["config_for_layers"]}
    for name, layer in config["config_for_layers"].items():
        assert tuple(layer) == PLAIN_KEYS
        expected |= {f"{name}.{key}" for key in per_linear}
    assert set(entries) == expected
    name = "model.layers.0.mlp.down_proj"
    kinds = {key: (entries[f"{name}.{key}"].shape, entries[f"{name}.{key}"].dtype) for key in per_linear}
    assert kinds == {
        "centroids.weight": ((1, 64), "F16"),
        "indices": ((1, 8, 6), "I32"),  # 32 rows in vectors of 4; 48 indices of 4 bits in 6 words
        "perm": ((48,), "I16"),
        "weight_scale": ((48,), "F16"),
        "weight_bias": ((48,), "F16"),
    }


def test_dequantize_by_the_formula_of_the_format(plain):
    """W_p[r, c] = C[idx[r div v, c], r mod v]; W = W_p[:, argsort(perm)] * scale + offset. Loops, Python integers."""
    name = "model.layers.0.self_attn.k_proj"
    t = {k.removeprefix(f"{name}."): v for k, v in load_file(plain / "model.safetensors").items() if k.startswith(name)}
    book = t["centroids.weight"].float().view(16, 4)
    perm = [int(p) & 0xFFFF for p in t["perm"]]
    weight = torch.zeros(16, 32)
    for row in range(16):
        words = [int(w) & 0xFFFFFFFF for w in t["indices"][0, row // 4]]
        stream = sum(word << (32 * i) for i, word in enumerate(words))
        for j in range(32):
            weight[row, perm[j]] = book[(stream >> (4 * j)) & 15][row % 4]
    weight = weight * t["weight_scale"].float() + t["weight_bias"].float()
    found = vptq.load_quantized(plain).model.layers[0].self_attn.k_proj.dequantize()
    assert torch.equal(found, weight.half())


def test_extension_is_marked(tiny_llama, text_file, tmp_path):
    folder = quantize(tiny_llama, text_file, tmp_path, bitwidth=4).folder / "packed_model"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == EXTENDED_VERSION


def edited(plain, tmp_path, edit):
    folder = tmp_path / "edited"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_later_format_version_is_refused(plain, tmp_path):
    folder = edited(plain, tmp_path, lambda c: c.update(format_version=99))
    with pytest.raises(CheckpointError, match=r"format version 99(.|\n)*upgrade"):
        vptq.load_quantized(folder)
    from transformers import AutoModelForCausalLM

    with pytest.raises(CheckpointError, match="format version 99"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_unpacked_model_is_refused(tiny_llama):
    assert not is_packed(tiny_llama)
    with pytest.raises(CheckpointError, match="not a packed VPTQ checkpoint"):
        vptq.load_quantized(tiny_llama)


@pytest.mark.parametrize("road", ["ours", "transformers"])
def test_missing_tensor_is_refused_not_guessed(plain, tmp_path, road):
    folder = edited(plain, tmp_path, lambda c: None)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.indices"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    from transformers import AutoModelForCausalLM

    load = vptq.load_quantized if road == "ours" else AutoModelForCausalLM.from_pretrained
    with pytest.raises(CheckpointError, match=r"up_proj\.indices: missing"):
        load(folder)


@pytest.mark.ci
def test_import_order_does_not_matter(plain):
    """vptq imported before or after transformers, in a process of its own."""
    for first, second in (("vptq", "transformers"), ("transformers", "vptq")):
        code = (
            f"import {first}; import {second}; from transformers import AutoModelForCausalLM as A;"
            f"print(type(A.from_pretrained({str(plain)!r}).model.layers[0].mlp.up_proj).__module__)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "vptq.nn.vquant_linear"


def test_open_source_dequantizes(plain):
    skeleton = load_skeleton(plain)
    source = open_source(skeleton, torch.device("cpu"))
    weight = source.get("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == torch.float16 and weight.shape == (48, 32)
    assert source.has("model.embed_tokens.weight") and not source.has("model.layers.0.mlp.up_proj.nothing")


def test_writer_shards_and_index(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    with CheckpointWriter(tmp_path / "m", max_shard_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    files = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "m" / files[-1]).read_text())
    assert index["metadata"]["total_size"] == 2000 and set(index["weight_map"]) == set(tensors)
    source = FolderSource(tmp_path / "m")
    assert all(torch.equal(source.get(name), tensor) for name, tensor in tensors.items())


def test_writer_leaves_nothing_half_written(tmp_path):
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "m") as writer:
        writer.add("x", torch.zeros(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_and_generation_config_come_along(plain, tiny_llama):
    from transformers import AutoTokenizer, GenerationConfig

    text = "import numpy"
    assert AutoTokenizer.from_pretrained(plain)(text) == AutoTokenizer.from_pretrained(tiny_llama)(text)
    assert GenerationConfig.from_pretrained(plain).eos_token_id == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_float_types_round_trip(dtype, text_file, tmp_path):
    folder = make_tiny_llama(tmp_path / "m", dtype=dtype, tie_word_embeddings=False, attention_bias=True)
    result = quantize(folder, text_file, tmp_path / "out")
    model = vptq.load_quantized(result.folder / "packed_model")
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == dtype
    from transformers import AutoModelForCausalLM

    dequantized = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=dtype)
    assert torch.equal(logits(model), logits(dequantized))


SMALL = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
OTHERS = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.ci
def test_other_architectures_round_trip(kind, text_file, tmp_path):
    """Biases, fused linears, sliding windows, tied heads: packed equals dequantized, and calibration reached every linear."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from vptq.models.architecture import DEMO

    torch.manual_seed(0)
    folder = tmp_path / kind
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **OTHERS[kind]))
    model.half().save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    result = quantize(folder, text_file, tmp_path / "out")
    packed = AutoModelForCausalLM.from_pretrained(result.folder / "packed_model", dtype=torch.float16)
    dequantized = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float16)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert torch.equal(logits(packed), logits(dequantized))
    assert torch.equal(logits(vptq.load_quantized(result.folder / "packed_model", dtype=torch.float16)), logits(packed))
    distance = (logits(packed) - logits(original)).norm() / logits(original).norm()
    assert 0 < distance < 1
    assert all(0 < f["error"] < 0.9 for f in result.figures)


def test_checkpoint_without_the_base_prefix_is_written_under_the_models_names(text_file, tmp_path):
    """Old OPT checkpoints call their tensors decoder.layers..., the model model.decoder.layers..."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from vptq.models.architecture import DEMO

    torch.manual_seed(0)
    folder = tmp_path / "opt"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **SMALL, **OTHERS["opt"])).half().save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    result = quantize(folder, text_file, tmp_path / "out")
    packed = AutoModelForCausalLM.from_pretrained(result.folder / "packed_model", dtype=torch.float16)
    dequantized = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float16)
    assert torch.equal(logits(packed), logits(dequantized))
    assert result.bits.stored_bits_per_weight == pytest.approx(
        sum(f["bits"] * f["shape"][0] * f["shape"][1] for f in result.figures) / result.bits.num_weights
    )
