"""Checkpoints of the hub's other layouts: shared settings, and the flat ones of the first releases."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import is_packed, load_quantized, load_whole
from vptq.config import QuantConfig
from vptq.errors import CheckpointError
from vptq.pipeline.run import quantize_model

TOKENS = torch.arange(1, 25)[None]
FORMS = {
    "residual": {"num_res_centroids": [-1, 16]},
    "outliers": {"vector_lens": [4, 4], "num_centroids": [16, 16], "npercent": 10},
    "absorbed": {"absorb_perm": True},
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module", params=sorted(FORMS))
def packed(request, tiny_llama, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")
    usual = {
        "model_name": str(tiny_llama), "output_dir": str(out), "vector_lens": [-1, 4], "num_centroids": [-1, 16], "kiter": 5,
        "dataset": str(text_file), "nsamples": 4, "seq_len": 32, "device": "cpu",
    }  # fmt: skip
    return quantize_model(QuantConfig.from_flat(usual | FORMS[request.param])).folder / "packed_model"


def rewritten(packed, folder, change):
    """A copy whose config.json is changed."""
    shutil.copytree(packed, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    return folder


def shared(config):
    """One entry a kind of linear, without what the model tells itself."""
    layers = config["quantization_config"].pop("config_for_layers")
    dropped = ("in_features", "out_features", "bias")
    own = {"model.layers.1.mlp.up_proj": layers["model.layers.1.mlp.up_proj"]}
    kinds = {name.rpartition(".")[2]: layer for name, layer in layers.items() if ".layers.0." in name}
    config["quantization_config"]["shared_layer_config"] = {
        kind: {key: value for key, value in layer.items() if key not in dropped} for kind, layer in kinds.items()
    }
    config["quantization_config"]["config_for_layers"] = own
    return config


def first(config):
    """As the first releases wrote it."""
    layers = config.pop("quantization_config")["config_for_layers"]
    return config | {"quant_config": {name: layer | {"enable_proxy_error": False} for name, layer in layers.items()}}


def flat(config):
    return config | {"quantization_config": config["quantization_config"]["config_for_layers"]}


@pytest.mark.parametrize("change", [shared, first, flat])
@pytest.mark.ci
def test_other_layouts_give_the_same_model(change, packed, tmp_path):
    folder = rewritten(packed, tmp_path / "m", change)
    assert is_packed(folder)
    old, new = ({linear.name: linear for linear in checkpoint_bits(path).linears} for path in (packed, folder))
    assert old == new
    wanted = logits(load_quantized(packed))
    assert torch.equal(logits(load_quantized(folder)), wanted)
    assert torch.allclose(logits(load_whole(str(folder), "cpu")), wanted.float(), atol=1e-2)


def test_transformers_reads_shared_settings(packed, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = rewritten(packed, tmp_path / "m", shared)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(load_quantized(packed)))


def test_shared_settings_that_leave_one_out_are_told(packed, tmp_path):
    def change(config):
        config = shared(config)
        del config["quantization_config"]["shared_layer_config"]["v_proj"]
        return config

    with pytest.raises(CheckpointError, match=r"no settings for the quantized linear `model.layers.0.self_attn.v_proj`"):
        load_quantized(rewritten(packed, tmp_path / "m", change))


@pytest.mark.parametrize(
    "key, value, what", [("is_indice_packed", False, "unpacked indices"), ("norm_dim", 1, "normalised by rows")]
)
def test_forms_that_are_not_read_are_told(key, value, what, packed, tmp_path):
    def change(config):
        for layer in config["quantization_config"]["config_for_layers"].values():
            layer[key] = value
        return config

    with pytest.raises(CheckpointError, match=what):
        load_quantized(rewritten(packed, tmp_path / "m", change))
