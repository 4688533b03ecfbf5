"""Folded models compute what they did, and need fewer transforms when they run."""

import dataclasses

import pytest
import torch

from tests.conftest import make_tiny_llama
from tests.pipeline.test_run import config_of, packed_bytes
from vptq.checkpoint.reader import load_quantized
from vptq.errors import UsageError
from vptq.models.architecture import load_skeleton
from vptq.models.stream import load_module
from vptq.pipeline.fold import Fold, FoldedFolder, make_fold
from vptq.pipeline.run import quantize_model

SHARED = {"rotation": "hadamard", "codebook_scope": "shared"}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False, attention_bias=True)
    model = load_with(folder, load_skeleton(folder).source())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # as trained ones: no ones and zeros
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.half().save_pretrained(folder)
    return folder


def load_with(folder, source):
    skeleton = load_skeleton(folder, dtype=torch.float32)
    load_module(skeleton.model, "", source, torch.device("cpu"), torch.float32)
    return skeleton.model.eval()


def test_folded_model_computes_what_it_did(untied):
    fold = make_fold(load_skeleton(untied), seed=3)
    assert isinstance(fold, Fold)
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        before = load_with(untied, load_skeleton(untied).source())(tokens).logits
        folded = load_with(untied, FoldedFolder(load_skeleton(untied), fold=fold, device=torch.device("cpu")))
        after = folded(tokens).logits
    assert (after - before).abs().max() < 0.02 * before.abs().max()  # parameters are rounded to float16 once more
    assert folded.model.norm.weight.eq(1).all()


def test_folded_run_keeps_only_the_transforms_that_are_left(untied, text_file, tmp_path):
    result = quantize_model(config_of(untied, text_file, tmp_path, save_model=True, **SHARED))
    model = load_quantized(result.folder / "packed_model", dtype=torch.float32)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    sides = {name: getattr(attention, name).layer_config.rotation_sides for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert sides == {"q_proj": "out", "k_proj": "out", "v_proj": "out", "o_proj": "in"}
    assert (mlp.up_proj.layer_config.rotation_sides, mlp.down_proj.layer_config.rotation_sides) == ("out", "in")
    import transformers

    tokens = torch.arange(40)[None]
    with torch.no_grad():
        dequantized = transformers.AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float32)
        torch.testing.assert_close(model(tokens).logits, dequantized(tokens).logits, rtol=3e-2, atol=3e-2)


@pytest.mark.ci
def test_folded_and_unfolded_are_as_good(untied, text_file, tmp_path):
    errors = {}
    for fold in (None, False):
        result = quantize_model(config_of(untied, text_file, tmp_path / str(fold), fold=fold, **SHARED))
        errors[fold] = sum(figures["error"] for figures in result.figures)
    assert errors[None] == pytest.approx(errors[False], rel=0.15)


@pytest.mark.ci
def test_workers_fold_as_well(untied, text_file, tmp_path):
    one = quantize_model(config_of(untied, text_file, tmp_path / "one", **SHARED))
    two = quantize_model(config_of(untied, text_file, tmp_path / "two", num_gpus=2, **SHARED))
    assert packed_bytes(one.folder) == packed_bytes(two.folder)


def test_tied_models_are_left_and_asking_says_why(tiny_llama, text_file, tmp_path):
    assert make_fold(load_skeleton(tiny_llama), 0) == "head and embeddings are tied"
    with pytest.raises(UsageError, match=r"can't be folded(.|\n)*tied"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path, fold=True, **SHARED))


def test_sides_that_a_fold_leaves(untied):
    from vptq.config import LinearConfig

    fold = make_fold(load_skeleton(untied), 0)
    config = LinearConfig(rotation="hadamard")
    name = "model.layers.1.self_attn.q_proj"
    assert fold.remaining(name, config).rotation_sides == "out"
    assert fold.remaining(name, dataclasses.replace(config, rotation_sides="out")).rotation_sides == "out"
    assert fold.remaining(name, dataclasses.replace(config, rotation_sides="in")).rotation == "none"
    assert fold.remaining("other", config) == config
