"""`vptq inspect`: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vptq.checkpoint.reader import load_quantized
from vptq.cli.main import main
from vptq.config import QuantConfig
from vptq.errors import CheckpointError
from vptq.pipeline.run import quantize_model


@pytest.fixture(scope="module")
def run_folder(tiny_llama, text_file, tmp_path_factory):
    settings = {
        "model_name": str(tiny_llama), "output_dir": str(tmp_path_factory.mktemp("out")), "vector_lens": [4, 2],
        "num_centroids": [16, 48], "num_res_centroids": [-1, 20], "npercent": 10, "bitwidth": 8, "enable_perm": True,
        "kiter": 5, "dataset": str(text_file), "nsamples": 4, "seq_len": 32, "device": "cpu",
    }  # fmt: skip
    return quantize_model(QuantConfig.from_flat(settings)).folder


@pytest.fixture
def broken(run_folder, tmp_path):
    """Makes a copy with some tensors changed."""

    def make(keep_record=False, **changes):
        folder = tmp_path / "packed"
        shutil.copytree(run_folder / "packed_model", folder)
        if not keep_record:
            (folder / "vptq.json").unlink()
        tensors = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            full = f"model.layers.1.mlp.up_proj.{name}" if not name.startswith("model") else name
            tensors[full] = change(tensors[full].clone())
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def put(value, place=(0,)):
    def change(tensor):
        tensor.view(-1)[place[0]] = value
        return tensor

    return change


def test_every_linear_is_shown_with_settings_bits_and_error(run_folder, capsys):
    assert main(["inspect", str(run_folder / "packed_model")]) == 0
    shown = capsys.readouterr()
    rows = [line for line in shown.out.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 14 and not shown.err
    figures = {f["name"]: f for f in json.loads((run_folder / "linears.json").read_text())}
    row = next(row for row in rows if "1.mlp.down_proj" in row)
    assert "32x48" in row and "v=2 k=48, k_res=20, 5 outliers v=4 k=16, codebook 8 bits, norm, perm" in row
    assert row.endswith(f"{figures['model.layers.1.mlp.down_proj']['error']:.5f}")
    assert "stored (every bit of the linears)" in shown.out


def test_json_and_run_folders(run_folder, capsys):
    assert main(["inspect", "--model-name", str(run_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["linears"]) == 14
    assert found["linears"][0]["settings"]["num_centroids"] == [16, 48] and 0 < found["linears"][0]["proxy_error"] < 1
    assert found["bits"]["stored_bits_per_weight"] > 0


def test_a_whole_checkpoint_is_well(run_folder, capsys):
    assert main(["inspect", str(run_folder), "--verify"]) == 0
    assert capsys.readouterr().out == "all is well\n"


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"perm": put(0, (3,))}, "up_proj: perm is no order of 32 columns"),
        ({"outlier_indices": put(16)}, "up_proj: outlier_indices go up to 16, there are 16 centroids"),
        ({"indices": put(-1)}, "up_proj: indices go up to 63, there are 48 centroids"),
        ({"weight_scale": put(float("nan"))}, "model.layers.1.mlp.up_proj.weight_scale: not all of its numbers are finite"),
        ({"model.norm.weight": put(float("inf"))}, "model.norm.weight: not all of its numbers are finite"),
        ({"centroids.packed": lambda tensor: tensor[:, :-2]}, "centroids.packed"),
        ({"perm": lambda tensor: tensor.int()}, "perm"),
    ],
)
def test_faults_are_found(changes, fault, broken, capsys):
    folder = broken(**changes)
    assert main(["inspect", str(folder), "--verify"]) == 1
    shown = capsys.readouterr()
    assert fault in shown.out and "no checksums" in shown.err and "fault" in shown.err


@pytest.mark.parametrize("changes", [{"perm": put(0, (3,))}, {"outlier_indices": put(16)}, {"indices": put(-1)}])
def test_indices_out_of_range_are_not_loaded(changes, broken):
    """Kernels would read past the codebooks."""
    from transformers import AutoModelForCausalLM

    folder = broken(**changes)
    for load in (load_quantized, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="out of range"):
            load(folder)


def test_a_flipped_bit_shows_by_its_checksum(run_folder, tmp_path, capsys):
    folder = tmp_path / "packed"
    shutil.copytree(run_folder / "packed_model", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert main(["inspect", str(folder), "--verify", "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert faults[0] == "model.safetensors: not the file that was written (SHA-256 differs)"
    (folder / "vptq.json").write_text('{"files": {"other.safetensors": "0"}}')
    assert main(["inspect", str(folder), "--verify"]) == 1
    assert "other.safetensors: missing" in capsys.readouterr().out


def test_a_cut_file_is_told(run_folder, tmp_path, capsys):
    folder = tmp_path / "packed"
    shutil.copytree(run_folder / "packed_model", folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert main(["inspect", str(folder), "--verify"]) == 1
    assert "cut short" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "PATH is missing"),
        (["nowhere/at/all"], "does not exist"),
        (["ORIGINAL"], "not a packed"),
        (["ORIGINAL", "--verify"], "not a packed"),
    ],
)
def test_bad_input_is_told(words, message, tiny_llama, capsys):
    words = [str(tiny_llama) if word == "ORIGINAL" else word for word in words]
    assert main(["inspect", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_after_fine_tuning_errors_are_void(run_folder, tiny_llama, text_file, tmp_path, capsys):
    from vptq.finetune_config import FinetuneConfig
    from vptq.pipeline.finetune import finetune_model

    config = FinetuneConfig(
        mode="e2e", model_name=str(run_folder / "packed_model"), original=str(tiny_llama), output_dir=str(tmp_path),
        dataset=(str(text_file),), nsamples=4, seq_len=32, steps=1, device="cpu",
    )  # fmt: skip
    folder = finetune_model(config).folder
    assert main(["inspect", str(folder)]) == 0 and "no proxy errors" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--verify"]) == 0


def test_weights_are_judged_in_their_own_type(run_folder):
    """A number past float16 is not finite there."""
    state = load_file(run_folder / "packed_model/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())
