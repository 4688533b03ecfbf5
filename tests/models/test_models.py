"""Finding blocks and linears, reading weights, refusing what is damaged; the demo model itself."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_tiny_llama
from vptq.data import evaluation_stream, load_tokenizer
from vptq.errors import CheckpointError, UsageError
from vptq.models.architecture import DEMO, check_weights, load_skeleton, resolve_folder, skeleton_shapes
from vptq.models.headers import fingerprint, folder_bytes, read_header, read_headers
from vptq.models.runner import BlockRunner
from vptq.models.shapes import KNOWN_MODELS, known_shapes, shapes_from_config
from vptq.models.stream import FolderSource


def tiny_opt(folder):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    OPTForCausalLM(config).half().save_pretrained(folder)
    return folder


def test_skeleton_holds_no_weights(tiny_llama):
    skeleton = load_skeleton(tiny_llama)
    assert skeleton.blocks_name == "model.layers" and skeleton.dtype == torch.float16
    assert all(p.is_meta for p in skeleton.model.parameters())
    names = [linear.suffix for linear in skeleton.linears() if linear.block == 1]
    assert names == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    check_weights(skeleton, skeleton.source())


@pytest.mark.parametrize("make", [make_tiny_llama, tiny_opt], ids=["llama", "opt"])
def test_block_by_block_equals_the_whole_model(make, tmp_path, device):
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path / "m")
    skeleton = load_skeleton(folder)
    runner = BlockRunner(skeleton, skeleton.source(), device, torch.float32)
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    states = runner.embed([tokens, tokens[:1]])
    for block in range(2):
        runner.load_block(block)
        runner.run_block_(block, states)
        runner.unload_block(block)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    with torch.no_grad():
        expected = whole(input_ids=tokens.to(device)).logits
    assert torch.allclose(runner.logits(states.batches[0], tokens), expected, atol=1e-4)
    assert torch.allclose(runner.logits(states.batches[1], tokens[:1]), expected[:1], atol=1e-4)
    assert all(p.is_meta for p in skeleton.blocks.parameters()), "blocks are unloaded after they ran"
    runner.unload()
    assert all(p.is_meta for p in skeleton.model.parameters())


@pytest.mark.parametrize("make", [make_tiny_llama, tiny_opt], ids=["llama", "opt"])
def test_shapes_from_config_equal_the_real_model(make, tmp_path):
    folder = make(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    derived, real = shapes_from_config(config), skeleton_shapes(folder)
    assert sorted(map(str, derived.linears)) == sorted(map(str, real.linears))
    assert derived.other_weights == real.other_weights and derived.float_bits == real.float_bits == 16


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "qwen3"])
def test_shapes_of_other_types_equal_the_real_model(kind, tmp_path):
    from transformers import AutoConfig

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoConfig.for_model(kind, **sizes, num_key_value_heads=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert shapes_from_config(config).other_weights == skeleton_shapes(tmp_path).other_weights


def test_table_of_shapes_gives_the_published_sizes():
    billions = {"llama-2-7b": 6.738, "llama-2-13b": 13.016, "llama-2-70b": 68.977, "llama-3-8b": 8.030, "llama-3-70b": 70.554,
                    "llama-3.1-405b": 405.853,
                "mistral-7b": 7.242, "opt-125m": 0.1252, "opt-1.3b": 1.316, "opt-6.7b": 6.658, "qwen2.5-0.5b": 0.494,
                "qwen2.5-7b": 7.616, "smollm2-135m": 0.1345}  # fmt: skip
    assert set(billions) == set(KNOWN_MODELS)
    for name, expected in billions.items():
        shapes = known_shapes(name)
        total = sum(s.out_features * s.in_features for s in shapes.linears) + shapes.other_weights
        assert total / 1e9 == pytest.approx(expected, rel=1e-3), name
    with pytest.raises(UsageError, match="no model `gpt-9`"):
        known_shapes("gpt-9")


def test_sharded_folder_reads_like_a_single_file(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single, sharded = FolderSource(tiny_llama), FolderSource(tmp_path)
    assert set(single.entries) == set(sharded.entries)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(single.get(name), sharded.get(name))


def test_names_without_the_base_prefix_are_found(tmp_path):
    folder = tiny_opt(tmp_path / "opt")
    path = folder / "model.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    skeleton = load_skeleton(folder)
    check_weights(skeleton, skeleton.source())
    assert skeleton.source().get("model.decoder.layers.0.fc1.weight").shape == (64, 32)


def test_fingerprint_tells_models_apart(tiny_llama, tmp_path):
    """A sibling with the same shapes and norms but other weights is another model."""
    first = fingerprint(read_headers(tiny_llama))
    assert first == fingerprint(read_headers(tiny_llama))
    copy = make_tiny_llama(tmp_path / "copy", seed=1)
    assert torch.equal(load_file(copy / "model.safetensors")["model.norm.weight"], torch.ones(32).half())
    assert fingerprint(read_headers(copy)) != first


def damaged(tiny_llama, tmp_path, how):
    folder = tmp_path / how
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    if how == "no-config":
        (folder / "config.json").unlink()
    elif how == "bad-config":
        (folder / "config.json").write_text("{")
    elif how == "no-weights":
        weights.unlink()
    elif how == "cut-short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "huge-header":
        weights.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    elif how == "not-safetensors":
        weights.write_bytes(b"hello world, this is text")
    return folder


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_every_weight_is_checked_before_the_work(tiny_llama, tmp_path):
    folder = edit_weights(damaged(tiny_llama, tmp_path, "x"), lambda t: t.pop("model.layers.1.input_layernorm.weight"))
    skeleton = load_skeleton(folder)
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm\.weight: missing"):
        check_weights(skeleton, skeleton.source())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"model.norm.weight": torch.ones(7).half()}), r"norm\.weight: \(7,\) in the file, \(32,\)"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).int()}), "I32: already quantized"),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny_llama, tmp_path, edit, message):
    folder = edit_weights(damaged(tiny_llama, tmp_path, "x"), edit)
    skeleton = load_skeleton(folder)
    with pytest.raises(CheckpointError, match=message):
        check_weights(skeleton, skeleton.source())


def test_other_quantization_methods_are_refused(tiny_llama, tmp_path):
    folder = damaged(tiny_llama, tmp_path, "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match="quantized by 'fp8'"):
        load_skeleton(folder)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": "six"}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"model_type": "x"}]
)
def test_nonsense_in_the_config_is_a_message(tiny_llama, tmp_path, change):
    folder = damaged(tiny_llama, tmp_path, "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="can't build a causal language model"):
        load_skeleton(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no-config", "holds no config.json"),
        ("bad-config", "config.json` is damaged"),
        ("no-weights", "holds no safetensors weights"),
        ("cut-short", "cut short"),
        ("huge-header", "no readable safetensors file"),
        ("not-safetensors", "no readable safetensors file"),
    ],
)
def test_damaged_folders_are_named(tiny_llama, tmp_path, how, message):
    folder = damaged(tiny_llama, tmp_path, how)
    with pytest.raises(CheckpointError, match=message):
        load_skeleton(folder).source()


def test_pickled_weights_are_refused_with_the_cure(tiny_llama, tmp_path):
    folder = damaged(tiny_llama, tmp_path, "no-weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        read_headers(folder)


def test_missing_folder_is_told_apart_from_a_hub_name():
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_folder("./nowhere/at/all")


def test_header_sizes_equal_the_tensors(tiny_llama):
    entries = read_header(tiny_llama / "model.safetensors")
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        assert entries[name].shape == tuple(tensor.shape)
        assert entries[name].num_bytes == tensor.numel() * tensor.element_size()


@pytest.mark.ci
def test_demo_model_is_small_and_has_learnt():
    skeleton = load_skeleton(DEMO)
    parameters = sum(p.numel() for n, p in skeleton.model.named_parameters() if n != "lm_head.weight")
    assert 3e6 <= parameters <= 6e6 and len(skeleton.blocks) >= 6 and skeleton.model.config.hidden_size >= 192
    assert folder_bytes(DEMO) < 12e6
    from vptq.pipeline.evaluate import evaluate_model

    found = evaluate_model()[0]
    tokenizer = load_tokenizer(DEMO)
    train = evaluation_stream(str(DEMO / "calibration.txt"), tokenizer)
    counts = torch.bincount(train, minlength=4096).double() + 1
    heldout = evaluation_stream(str(DEMO / "evaluation.txt"), tokenizer)
    unigram = math.exp(-(counts / counts.sum()).log()[heldout].mean())
    assert found.perplexity * 5 < unigram
