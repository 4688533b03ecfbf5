"""Every architecture: quantize, save, reload, the same logits as the dequantized model, and text written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.zoo import ARCHITECTURES, make_tiny
from vptq.checkpoint.reader import load_quantized, load_whole
from vptq.config import QuantConfig
from vptq.errors import CheckpointError, UsageError
from vptq.models.architecture import check_weights, load_skeleton
from vptq.pipeline.evaluate import load_windows
from vptq.pipeline.run import quantize_model

TOKENS = torch.randint(1, 4000, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def run(request, tmp_path_factory, text_file):
    """A model, and a run that quantized it."""
    out = tmp_path_factory.mktemp(request.param)
    folder = make_tiny(request.param, out / request.param)
    config = QuantConfig.from_flat(
        {
            "model_name": str(folder), "output_dir": str(out / "out"), "vector_lens": [-1, 4], "num_centroids": [-1, 16],
            "enable_norm": True, "enable_perm": True, "dataset": str(text_file), "nsamples": 6, "seq_len": 64, "kiter": 5,
            "save_packed_model": True, "save_model": True, "device": "cpu", "eval_dataset": str(text_file), "eval_nsamples": 2,
        }
    )  # fmt: skip
    return request.param, folder, quantize_model(config)


def own_model(folder):
    """As transformers loads it."""
    from transformers import AutoConfig

    from vptq.models.architecture import _class_of

    return _class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.ci
def test_weights_are_read_as_transformers_reads_them(run):
    _, folder, _ = run
    assert torch.allclose(logits(load_whole(str(folder), "cpu")), logits(own_model(folder)), atol=1e-5)


def test_all_linears_are_quantized(run):
    _, folder, result = run
    skeleton = load_skeleton(folder)
    weights = sum(p.numel() for name, p in skeleton.blocks.named_parameters() if p.ndim > 1)
    quantized = sum(linear.out_features * linear.in_features for linear in skeleton.linears())
    names = set(
        json.loads((result.folder / "packed_model/config.json").read_text())["quantization_config"]["config_for_layers"]
    )
    assert quantized > 0.9 * weights
    assert {linear.name for linear in skeleton.linears() if not skeleton.is_router(linear)} == names
    assert not [name for name in names if "vision" in name]


def test_packed_and_dequantized_models_give_the_same_logits_everywhere(run):
    _, folder, result = run
    packed, model = result.folder / "packed_model", result.folder / "model"
    wanted = logits(own_model(model))
    assert torch.isfinite(wanted).all() and not torch.allclose(wanted, logits(own_model(folder)), atol=1e-3)
    for found in (load_quantized(packed), load_whole(str(model), "cpu"), own_model(packed)):
        assert torch.allclose(logits(found), wanted, atol=1e-4)


def test_the_dequantized_model_has_the_originals_tensors(run):
    _, folder, result = run
    old, new = (load_file(path / "model.safetensors") for path in (folder, result.folder / "model"))
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in new.items()}


def test_the_packed_model_writes(run):
    _, _, result = run
    model = own_model(result.folder / "packed_model")
    found = model.generate(input_ids=TOKENS[:1, :6], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.shape[1] > 6


def test_perplexity_of_blocks_is_that_of_the_whole(run):
    """Blocks run one at a time see what transformers gives them."""
    _, folder, result = run
    ((_, before, after),) = result.perplexities
    windows = load_windows(load_skeleton(folder), [before.dataset], seq_len=64, stride=None, limit=2, trust_remote_code=False)
    (tokens,) = windows.values()
    for figures, path in ((before, folder), (after, result.folder / "model")):
        with torch.no_grad():
            logits = own_model(path)(input_ids=tokens).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert figures.perplexity == pytest.approx(loss.exp().item(), rel=1e-3)


def test_the_table_of_models_tells_of_it(run):
    """docs/models.md has this row; what it promises is what the tests above try."""
    kind, folder, _ = run
    skeleton = load_skeleton(folder)
    last = len(skeleton.blocks) - 1
    chosen = [linear.kind for linear in skeleton.linears() if linear.block == last and not skeleton.is_router(linear)]
    names = list(dict.fromkeys(chosen))
    own = "Conv1D" if skeleton.form.transposed else "fused experts" if skeleton.form.pieces else "linears"
    row = f"| `{kind}` | {type(skeleton.model).__name__} | {own} | {', '.join(names)} |"
    table = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    assert row in table.splitlines(), f"docs/models.md lacks this row:\n{row}"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_in_several_files_of_any_float_type(kind, dtype, tmp_path):
    folder = make_tiny(kind, tmp_path / "m", dtype, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    skeleton = load_skeleton(folder)
    source = skeleton.source()
    check_weights(skeleton, source)
    model = own_model(folder)
    assert skeleton.dtype == dtype
    for name, tensor in own_tensors(skeleton, source).items():
        assert torch.equal(tensor.float(), model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_files_may_hold_experts_fused(kind, tmp_path):
    """As a model saves them that is written without transformers' way back to the names of before."""
    folder = make_tiny(kind, tmp_path / "m")
    wanted = logits(own_model(folder))
    state = {name: tensor.clone() for name, tensor in own_model(folder).state_dict().items()}
    assert any("gate_up_proj" in name for name in state)
    save_file(state, folder / "model.safetensors")
    skeleton = load_skeleton(folder)
    source = skeleton.source()
    check_weights(skeleton, source)
    assert torch.allclose(logits(load_whole(str(folder), "cpu")), wanted, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in own_tensors(skeleton, source).items())


def own_tensors(skeleton, source):
    """All parameters, read one by one, as transformers' own modules hold them."""
    names = [name for name, _ in skeleton.model.named_parameters() if source.has(name)]  # not what is tied
    return dict(skeleton.form.as_own((name, source.get(name)) for name in names))


def test_experts_with_norms_are_refused(tmp_path, monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    folder = make_tiny("mixtral", tmp_path / "m")
    monkeypatch.setattr(MixtralExperts, "has_post_expert_norm", True, raising=False)
    real = MixtralExperts.__init__

    def marked(self, *args, **named):
        real(self, *args, **named)
        self.has_post_expert_norm = True

    monkeypatch.setattr(MixtralExperts, "__init__", marked)
    with pytest.raises(UsageError, match=r"experts in `model.layers.0.mlp.experts` are not handled"):
        load_skeleton(folder)


def test_files_of_another_model_are_told(tmp_path):
    folder = make_tiny("gpt_neox", tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    skeleton = load_skeleton(folder)
    with pytest.raises(CheckpointError, match="not those of the model") as caught:
        check_weights(skeleton, skeleton.source())
    assert "another transformers" in caught.value.hint


def test_experts_stored_transposed(tmp_path, monkeypatch):
    """Under the same name, with matrices turned, as the table of some models says."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    folder = make_tiny("mixtral", tmp_path / "m")
    state = {name: tensor.clone() for name, tensor in own_model(folder).state_dict().items()}
    names = [name for name in state if name.endswith(("gate_up_proj", "down_proj")) and state[name].ndim == 3]
    save_file({n: t.transpose(1, 2).contiguous() if n in names else t for n, t in state.items()}, folder / "model.safetensors")
    parts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    table = [WeightConverter(part, part, [Transpose(1, 2, check_dims=True)]) for part in parts]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: table)
    skeleton = load_skeleton(folder)
    source = skeleton.source()
    check_weights(skeleton, source)
    found = own_tensors(skeleton, source)
    assert len(names) == 4 and all(torch.equal(found[name], state[name]) for name in names)
