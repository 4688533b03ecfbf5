"""The model card of a checkpoint, and its way to the hub."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import make_tiny_llama
from vptq.cli.main import main
from vptq.config import QuantConfig
from vptq.pipeline.card import write_card
from vptq.pipeline.run import quantize_model


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory):
    """The original, with a card of its own, and the run."""
    out = tmp_path_factory.mktemp("out")
    original = make_tiny_llama(out / "tiny-llama")
    (original / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [own]\n---\n# Tiny\n")
    settings = {
        "model_name": str(original), "output_dir": str(out / "out"), "vector_lens": [-1, 4], "num_centroids": [-1, 16],
        "kiter": 5, "dataset": str(text_file), "nsamples": 4, "seq_len": 32, "device": "cpu",
        "eval_dataset": str(text_file), "eval_nsamples": 2,
    }  # fmt: skip
    return original, quantize_model(QuantConfig.from_flat(settings)).folder


def parts(path):
    head, body = re.match(r"---\n(.*?)---\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL).groups()
    return yaml.safe_load(head), body


def test_it_tells_bits_figures_loading_and_the_command(run):
    original, folder = run
    head, body = parts(folder / "packed_model/README.md")
    results = json.loads((folder / "ppl_results.json").read_text())
    assert head["library_name"] == "transformers" and "vptq" in head["tags"] and head["pipeline_tag"] == "text-generation"
    assert head["license"] == "apache-2.0" and head["language"] == ["en", "de"] and "own" not in head["tags"]
    assert "base_model" not in head, "a folder is no name on the hub"
    assert f"{results['bits']['stored_bits_per_weight']:.3f} in the linears" in body
    (figures,) = results["ctx_32"].values()
    assert f"original {figures['original']['perplexity']:.2f}, quantized {figures['quantized']['perplexity']:.2f}" in body
    assert "import vptq" in body and "AutoModelForCausalLM.from_pretrained" in body
    command = "vptq quantize --model_name tiny-llama --vector_lens -1 4 --num_centroids -1 16 --kiter 5"
    assert command in body and str(original.parent) not in body, "no paths of this machine"


def test_a_name_on_the_hub_is_the_base_model(run, tmp_path):
    original, folder = run
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    head, body = parts(write_card(other, original, "some-org/tiny-llama"))
    assert head["base_model"] == "some-org/tiny-llama" and head["base_model_relation"] == "quantized"
    assert "[some-org/tiny-llama](https://huggingface.co/some-org/tiny-llama)" in body


@pytest.mark.parametrize("text", ["no head", "---\nlicense: [\n---\n", "---\n- a\n---\n"])
def test_an_originals_card_may_be_of_any_form(text, run, tmp_path):
    original, folder = run
    other, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(folder, other)
    shutil.copytree(original, model)
    (model / "README.md").write_text(text)
    head, _ = parts(write_card(other, model, None))
    assert "license" not in head


class Hub:
    """What huggingface_hub is asked for."""

    def __init__(self, fault=None, private=True):
        self.asked, self.fault, self.private = [], fault, private

    def create_repo(self, repo, **named):
        self.asked.append(("create", repo, named))
        if self.fault:
            raise self.fault
        return SimpleNamespace(repo_id=repo)

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **named):
        self.asked.append(("upload", named["repo_id"], named))
        return SimpleNamespace(commit_url="https://huggingface.co/me/small/commit/1")


@pytest.mark.parametrize("inner", ["", "packed_model"])
def test_folder_and_card_are_uploaded(inner, run, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    _, folder = run
    assert main(["push", str(folder / inner), "--repo", "me/small", "--private"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/small/commit/1\n"
    assert hub.asked[0] == ("create", "me/small", {"private": True, "exist_ok": True})
    assert hub.asked[1][2]["folder_path"] == folder / "packed_model"


def test_a_hub_that_refuses_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(OSError("401 Client Error\nmore")))
    assert main(["push", str(run[1]), "--repo", "me/small"]) == 1
    shown = capsys.readouterr().err
    assert "`me/small` could not be uploaded to" in shown and "401 Client Error" in shown and "hf auth login" in shown


@pytest.mark.parametrize("words, message", [(["x"], "say what goes where"), (["ORIGINAL", "--repo", "a/b"], "not a packed")])
def test_bad_input_is_told(words, message, run, capsys):
    assert main(["push", *(str(run[0]) if word == "ORIGINAL" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_public_repository_gets_nothing_private(run, monkeypatch, capsys):
    hub = Hub(private=False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert main(["push", str(run[1]), "--repo", "me/small", "--private"]) == 2
    assert "there and public" in capsys.readouterr().err and [kind for kind, *_ in hub.asked] == ["create"]


def test_settings_without_a_flag_are_in_the_card(run, tmp_path):
    original, folder = run
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    job = json.loads((other / "job.json").read_text())
    job["settings"]["per_linear"] = {"*.o_proj": {"num_centroids": [-1, 64]}}
    (other / "job.json").write_text(json.dumps(job))
    _, body = parts(write_card(other, original, None))
    assert "--config per_linear.yaml" in body
    told = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL)[1])
    assert told == {"per_linear": {"*.o_proj": {"num_centroids": [-1, 64]}}}


def test_a_model_that_sees_says_how_it_is_loaded(run, tmp_path):
    original, folder = run
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    config = json.loads((other / "packed_model/config.json").read_text())
    (other / "packed_model/config.json").write_text(json.dumps(config | {"vision_config": {}}))
    head, body = parts(write_card(other, original, None))
    assert head["pipeline_tag"] == "image-text-to-text" and "AutoModelForImageTextToText" in body and "AutoProcessor" in body
