"""Every architecture: quantize, save, reload, the same logits as the dequantized model, and text written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.models.zoo import ARCHITECTURES, make_tiny
from vptq.checkpoint.reader import load_quantized, load_whole
from vptq.config import QuantConfig
from vptq.models.architecture import load_skeleton
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
