"""Which linears are quantized, with which settings; experts that see few tokens."""

from __future__ import annotations

import json

import pytest
import torch

from tests.models.zoo import BASE, make_tiny
from vptq.calibration.hessian import BlockHessians
from vptq.checkpoint.reader import load_quantized
from vptq.cli.main import main
from vptq.config import QuantConfig
from vptq.errors import UsageError
from vptq.models.architecture import load_skeleton
from vptq.models.experts import SplitExperts, all_tokens
from vptq.pipeline.run import quantize_model
from vptq.pipeline.selection import select_linears


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_tiny("qwen2_moe", tmp_path_factory.mktemp("moe") / "moe")


def settings(folder, text_file, out, **changes):
    usual = {
        "model_name": str(folder), "output_dir": str(out), "vector_lens": [-1, 4], "num_centroids": [-1, 16], "kiter": 5,
        "dataset": str(text_file), "nsamples": 4, "seq_len": 32, "device": "cpu",
    }  # fmt: skip
    return QuantConfig.from_flat(usual | changes)


def chosen(folder, **changes):
    config = QuantConfig.from_flat({"model_name": str(folder)} | changes)
    return {info.name: own for info, own in select_linears(config, load_skeleton(folder))}


def test_globs_choose_linears(tiny_llama):
    every = chosen(tiny_llama)
    assert len(every) == 14
    assert set(chosen(tiny_llama, include=["*.mlp.*"])) == {name for name in every if ".mlp." in name}
    assert set(chosen(tiny_llama, skip=["model.layers.0.*"])) == {name for name in every if ".layers.1." in name}
    both = chosen(tiny_llama, include=["*.mlp.*"], skip=["*.down_proj", "*.up_proj"])
    assert set(both) == {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"}


def test_routers_stay_unless_they_are_named(moe):
    assert not [name for name in chosen(moe) if "shared_expert_gate" in name]
    assert "model.layers.0.mlp.shared_expert_gate" in chosen(moe, include=["*"])


@pytest.mark.parametrize(
    "kind, routers",
    [
        ("jetmoe", {"mlp.router.layer", "self_attention.experts.router.layer"}),
        ("deepseek_v3", set()),
        ("qwen2_moe", {"mlp.shared_expert_gate"}),
    ],
)
def test_routers_are_found_by_experts_and_outputs(kind, routers, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    folder = tmp_path / kind
    if kind == "jetmoe":
        config = AutoConfig.for_model(kind, **{k: v for k, v in BASE.items() if k != "num_attention_heads"} | sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        make_tiny(kind, folder)
    skeleton = load_skeleton(folder)
    last = [linear for linear in skeleton.linears() if linear.block == 1]
    assert {linear.suffix for linear in last if skeleton.is_router(linear)} == routers


def test_settings_of_single_linears(tiny_llama):
    found = chosen(
        tiny_llama,
        per_linear={
            "*.self_attn.*": {"vector_lens": [-1, 2], "num_centroids": [-1, 64]},
            "*.v_proj": {"num_centroids": [-1, 256]},
        },
    )
    assert found["model.layers.1.self_attn.v_proj"].vector_lens == (-1, 2)
    assert found["model.layers.1.self_attn.v_proj"].num_centroids == (-1, 256)
    assert found["model.layers.1.self_attn.q_proj"].num_centroids == (-1, 64)
    assert found["model.layers.0.mlp.up_proj"].vector_lens == (-1, 8)


@pytest.mark.parametrize(
    "changes, message, hint",
    [
        ({"skip": ["*.donw_proj"]}, "match no linear", "did you mean \\*down_proj"),
        ({"include": ["zzz"]}, "match no linear", "names are such as model.layers.0"),
        ({"per_linear": {"*.q": {}}}, "match no linear", ""),
        ({"skip": ["*"]}, "no linear is left", "--skip"),
    ],
)
def test_globs_that_choose_nothing_are_told(changes, message, hint, tiny_llama):
    with pytest.raises(UsageError, match=message) as caught:
        chosen(tiny_llama, **changes)
    import re

    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize(
    "values, fault",
    [
        ({"vector_length": 4}, "vector_length is no setting of vectors"),
        ({"vector_lens": [-1, 0]}, "vector_lens"),
    ],
)
def test_bad_settings_of_single_linears_are_told(values, fault):
    (found,) = QuantConfig.from_flat({"per_linear": {"*.q_proj": values}}).faults()
    assert found.startswith("per_linear *.q_proj: ") and fault in found


def test_a_run_from_the_command_line(tiny_llama, text_file, tmp_path, capsys):
    """From a YAML file and flags; what was skipped is in the checkpoint as it was."""
    (tmp_path / "own.yaml").write_text("per_linear:\n  '*.o_proj':\n    num_centroids: [-1, 64]\n")
    words = f"quantize --config {tmp_path}/own.yaml --model_name {tiny_llama} --output_dir {tmp_path} --dataset {text_file}"
    words += " --vector_lens -1 4 --num_centroids -1 16 --nsamples 4 --seq_len 32 --kiter 5 --device cpu"
    words += " --include *self_attn* --skip *.k_proj model.layers.0.self_attn.v_proj"
    assert main(words.split()) == 0
    (packed,) = tmp_path.glob("*/*/*/packed_model")
    layers = json.loads((packed / "config.json").read_text())["quantization_config"]["config_for_layers"]
    assert set(layers) == {
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj",
    }  # fmt: skip
    assert layers["model.layers.0.self_attn.o_proj"]["num_centroids"][1] == 64
    model, old = load_quantized(packed), load_skeleton(tiny_llama).source()
    kept = model.get_submodule("model.layers.1.self_attn.k_proj").weight
    assert torch.equal(kept, old.get("model.layers.1.self_attn.k_proj.weight"))


# -- experts ------------------------------------------------------------------------------------------------------------


def experts_of(folder):
    """The first block's experts, with weights."""
    from vptq.checkpoint.reader import load_whole

    model = load_whole(str(folder), "cpu")
    return model.model.layers[0].mlp.experts


def test_experts_that_see_all_tokens_put_out_the_same(moe):
    experts = experts_of(moe)
    hidden = torch.randn(10, 32)
    weights, chosen = torch.rand(10, 4).topk(2)
    seen = []
    experts.get_submodule("3").up_proj.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    usual = experts(hidden, chosen, weights)
    with all_tokens(experts):
        assert torch.allclose(experts(hidden, chosen, weights), usual, atol=1e-6)
    assert seen == [int((chosen == 3).sum()), 10] and not experts.all_tokens


def test_experts_that_no_token_reaches_are_quantized_and_named(moe, text_file, tmp_path, monkeypatch):
    real = SplitExperts.forward
    monkeypatch.setattr(
        SplitExperts, "forward", lambda self, hidden, chosen, weights: real(self, hidden, chosen.clamp(max=2), weights)
    )
    result = quantize_model(settings(moe, text_file, tmp_path))
    figures = {f["name"]: f for f in result.figures}
    assert figures["model.layers.0.mlp.experts.3.up_proj"]["tokens"] == 0
    assert figures["model.layers.0.self_attn.q_proj"]["tokens"] == 128
    (warning,) = [w for w in result.warnings if "too few tokens" in w]
    assert "experts.3" in warning and " 0: --moe_all_experts" in warning
    assert torch.isfinite(load_quantized(result.folder / "packed_model")(input_ids=torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("changes", [{}, {"hessian": "fisher", "sequential": True}])
@pytest.mark.ci
def test_all_experts_can_be_calibrated_on_all_tokens(changes, moe, text_file, tmp_path):
    result = quantize_model(settings(moe, text_file, tmp_path, moe_all_experts=True, **changes))
    assert {f["tokens"] for f in result.figures} == {128}
    assert not [w for w in result.warnings if "too few tokens" in w]


def test_a_model_without_experts_is_told(tiny_llama, text_file, tmp_path):
    with pytest.raises(UsageError, match="moe_all_experts is for models"):
        quantize_model(settings(tiny_llama, text_file, tmp_path, moe_all_experts=True))


def test_skipped_experts_stay_and_load_everywhere(moe, text_file, tmp_path):
    """Some experts of a block skipped, and all of another block."""
    from transformers import AutoModelForCausalLM

    result = quantize_model(
        settings(moe, text_file, tmp_path, skip=["*layers.0.mlp.experts.1.*", "*layers.1.mlp.experts.*"], save_model=True)
    )
    packed = result.folder / "packed_model"
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found = [
            model(input_ids=tokens).logits
            for model in (
                load_quantized(packed), AutoModelForCausalLM.from_pretrained(packed),
                AutoModelForCausalLM.from_pretrained(result.folder / "model"),
            )
        ]  # fmt: skip
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-4)
    old, new = load_skeleton(moe).source(), load_skeleton(packed).source()
    for name in ("model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.1.mlp.experts.0.down_proj.weight"):
        assert torch.equal(old.get(name), new.get(name))


def test_hooks_see_each_expert(moe):
    watcher = BlockHessians("x")
    experts = experts_of(moe)
    with watcher.watching(experts):
        experts(torch.randn(10, 32), torch.tensor([[0, 1]] * 10), torch.ones(10, 2))
        watcher.end_run()
    assert set(watcher.collect().leaders) == {f"{n}.{p}" for n in (0, 1) for p in ("gate_proj", "up_proj", "down_proj")}


def test_a_plan_shows_experts_as_one(moe, text_file, capsys):
    words = f"plan --model_name {moe} --dataset {text_file} --vector_lens -1 4 --num_centroids -1 16 --nsamples 4 --seq_len 32"
    assert main([*words.split(), "--device", "cpu"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("mlp.experts")]
    assert rows == ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj"]


def test_linears_rotated_in_their_own_ways_are_not_folded(tmp_path):
    from vptq.pipeline.fold import Fold, choose_fold

    skeleton = load_skeleton(make_tiny("llama", tmp_path / "m"))
    rotated = {"rotation": "hadamard", "codebook_scope": "shared", "vector_lens": [-1, 4], "num_centroids": [-1, 256]}
    ask = lambda **changes: choose_fold(QuantConfig.from_flat(rotated | changes), skeleton)  # noqa: E731
    assert isinstance(ask(), Fold) and isinstance(ask(skip=["*.o_proj"]), Fold)
    assert ask(per_linear={"*.o_proj": {"rotation_seed": 1}}) is None
    assert ask(skip=["*.o_proj"], rotation_sides="in") is None
    with pytest.raises(UsageError, match="can't be folded"):
        ask(per_linear={"*.o_proj": {"rotation_seed": 1}}, fold=True)


def test_a_shared_codebook_is_not_wasted_on_a_small_linear(moe, text_file, capsys):
    words = f"plan --model_name {moe} --dataset {text_file} --bits 3 --nsamples 4 --seq_len 32 --device cpu"
    assert main(words.split()) == 0 and "never used" not in capsys.readouterr().out
    assert main([*words.replace("--bits 3", "--vector_lens -1 4 --num_centroids -1 4096").split()]) == 0
    assert "never used" in capsys.readouterr().out
