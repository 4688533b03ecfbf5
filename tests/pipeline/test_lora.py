"""Adapters on packed linears: as peft's users know them, by transformers' Trainer, by `vptq finetune --mode lora`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pipeline.test_finetune import Stop, logits, tune_demo
from vptq.checkpoint.reader import load_quantized, load_whole
from vptq.errors import UsageError
from vptq.finetune_config import FinetuneConfig
from vptq.nn.vquant_linear import VQuantLinear
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.progress import Silent

peft = pytest.importorskip("peft")

RELOAD = """
import sys, torch, vptq
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2])
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(40)[None] % 30).logits}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def packed(tiny_llama, text_file, tmp_path_factory):
    from tests.pipeline.conftest import ROTATED
    from tests.pipeline.test_run import config_of, quantize_model

    settings = ROTATED | {"trellis_bits": 2}
    return (
        quantize_model(config_of(tiny_llama, text_file, tmp_path_factory.mktemp("packed"), **settings)).folder / "packed_model"
    )


def with_adapters(packed, **changes):
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(load_quantized(packed, dtype=torch.float32), peft.LoraConfig(**settings | changes))


def stir(model):
    """Adapters that do something: they begin at nought."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)


def test_saves_and_loads_as_peft_does(packed, tmp_path):
    model = with_adapters(packed)
    before = logits(model)
    torch.testing.assert_close(before, logits(load_quantized(packed, dtype=torch.float32)))
    stir(model)
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_quantized(packed, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), changed)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), before)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*mlp\..*_proj"])
def test_targets_are_found(packed, targets):
    model = with_adapters(packed, target_modules=targets)
    on = {
        name.split(".base_layer")[0]
        for name, m in model.named_modules()
        if isinstance(m, VQuantLinear) and "base_layer" in name
    }
    expected = {"all-linear": 14, "['q_proj']": 2}.get(str(targets), 6)
    assert len(on) == expected and not any("lm_head" in name for name in on)


def test_only_adapters_get_gradients(packed):
    model = with_adapters(packed)
    tokens = torch.arange(20)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    with_gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradients and all("lora_" in name for name in with_gradients)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert with_gradients == trained


def test_merging_is_refused_with_a_reason(packed):
    model = with_adapters(packed)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"can't be merged into a packed linear.*--save_model"):
            merge()
    assert torch.isfinite(logits(model)).all(), "still whole"


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_kinds_that_need_the_weight_are_refused(packed, changes):
    with pytest.raises(ValueError, match="plain LoRA only"):
        with_adapters(packed, **changes)


def test_other_models_are_left_to_peft(tiny_llama):
    model = peft.get_peft_model(load_whole(str(tiny_llama), "cpu"), peft.LoraConfig(r=2, target_modules="all-linear"))
    stir(model)
    changed = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), changed, rtol=1e-3, atol=1e-3)


def test_trainer_takes_a_model_from_pretrained(packed, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    base = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": list(range(16)), "labels": list(range(16))}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        use_cpu=True,
        report_to=[],
        learning_rate=1e-2,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.fixture
def wishes(packed, tiny_llama, text_file, tmp_path):
    def make(**changes):
        settings = {
            "mode": "lora", "model_name": str(packed), "original": str(tiny_llama), "output_dir": str(tmp_path),
            "dataset": (str(text_file),), "nsamples": 10, "num_held_out": 2, "seq_len": 64, "steps": 8, "eval_every": 2,
            "batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "device": "cpu", "eval_dataset": (str(text_file),),
            "eval_nsamples": 4,
        }  # fmt: skip
        return FinetuneConfig(**settings | changes)

    return make


@pytest.mark.ci
def test_a_run_trains_saves_and_is_read_in_a_new_process(wishes, packed, tmp_path):
    result = finetune_model(wishes(save_model=True))
    assert result.held_out[1] < result.held_out[0]
    (figures,) = result.perplexities.values()
    assert set(figures) == {"original", "before", "after"}
    assert figures["after"].perplexity < figures["before"].perplexity
    adapter = result.folder / "adapter"
    assert sum(path.stat().st_size for path in adapter.iterdir()) < 1e6
    own = peft.PeftModel.from_pretrained(load_quantized(packed, dtype=torch.float32), adapter)
    subprocess.run([sys.executable, "-c", RELOAD, str(packed), str(adapter), str(tmp_path / "out")], check=True, timeout=300)
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(own))
    merged = load_whole(str(result.folder / "model"), "cpu")
    torch.testing.assert_close(logits(merged), logits(own), rtol=2e-2, atol=2e-2)
    names = {p.name for p in result.folder.iterdir()}
    assert {"adapter", "curves.json", "curves.png", "ppl_results.json", "model"} <= names and "packed_model" not in names
    again = finetune_model(wishes(), resume=result.folder)
    assert again.held_out == result.held_out


def test_what_was_measured_is_what_was_saved_in_half_the_bytes(wishes, packed, monkeypatch):
    """Adapters train in float32 and are kept as the model's floats are."""
    from vptq.pipeline.tune_adapters import AdapterTuning

    seen = []
    real = AdapterTuning.perplexity
    monkeypatch.setattr(AdapterTuning, "perplexity", lambda self, *args: seen.append(logits(self.model)) or real(self, *args))
    adapter = finetune_model(wishes(learning_rate=0.02)).folder / "adapter"
    assert {tensor.dtype for tensor in load_file(adapter / "adapter_model.safetensors").values()} == {torch.float16}
    own = peft.PeftModel.from_pretrained(load_quantized(packed, dtype=torch.float32), adapter)
    torch.testing.assert_close(logits(own), seen[0], rtol=1e-5, atol=1e-5)


def test_a_stopped_run_goes_on(wishes):
    whole = finetune_model(wishes())
    stop = Stop("training", 5)
    with pytest.raises(KeyboardInterrupt):
        finetune_model(wishes(), progress=stop)
    again = finetune_model(wishes(), resume=stop.folder)
    found = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (whole, again)]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)
    assert again.held_out == pytest.approx(whole.held_out)


def test_a_rate_that_diverges_is_told_and_nothing_worse_is_kept(wishes, packed, monkeypatch):
    monkeypatch.setattr("vptq.pipeline.tune_adapters.DIVERGED", 0.5)
    notes = []
    progress = Silent()
    progress.note = notes.append
    result = finetune_model(wishes(learning_rate=1.0, steps=30), progress=progress)
    assert result.held_out[1] == result.held_out[0], "as it was before"
    assert any("diverged" in note for note in notes) and any("left at nought" in note for note in notes)
    own = peft.PeftModel.from_pretrained(load_quantized(packed, dtype=torch.float32), result.folder / "adapter")
    torch.testing.assert_close(logits(own), logits(load_quantized(packed, dtype=torch.float32)))


@pytest.mark.parametrize("steps, patience", [(7, 4), (30, 1)])
@pytest.mark.ci
def test_a_run_stopped_after_its_training_trains_no_more(steps, patience, wishes):
    changes = {"steps": steps, "eval_every": 2, "patience": patience, "learning_rate": 0.05}
    whole = finetune_model(wishes(**changes))
    stop = Stop("perplexity, after", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune_model(wishes(**changes), progress=stop)
    again = finetune_model(wishes(), resume=stop.folder)
    assert again.held_out == pytest.approx(whole.held_out)
    curves = [json.loads((run.folder / "curves.json").read_text())["curves"]["adapters"] for run in (whole, again)]
    assert curves[0][-1]["step"] == curves[1][-1]["step"] <= steps
    found = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (whole, again)]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)


def test_adapters_go_to_the_runs_url(wishes, tmp_path):
    stop = Stop("perplexity, after", 1)
    stop.run_folder = lambda folder: setattr(stop, "folder", folder)
    with pytest.raises(KeyboardInterrupt):
        finetune_model(wishes(output_dir=f"file://{tmp_path}/remote"), progress=stop)
    names = {path.name for path in (tmp_path / "remote").rglob("*")}
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json"} <= names
    again = finetune_model(wishes(), resume=stop.folder)
    assert again.held_out[1] < again.held_out[0]


def test_without_peft_it_is_told(wishes, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="needs the package `peft`"):
        finetune_model(wishes())


def test_a_damaged_adapter_folder_is_no_concern_of_the_checkpoint(packed, tmp_path):
    """peft reads what it saved by name: a tensor that is not there is told by it."""
    with_adapters(packed).save_pretrained(tmp_path)
    path = Path(tmp_path) / "adapter_model.safetensors"
    save_file({"other": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(load_quantized(packed, dtype=torch.float32), tmp_path)


@pytest.mark.ci
def test_adapters_learn_on_the_demo_model(tmp_path):
    from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
    from vptq.pipeline.run import quantize_model

    linear = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 256), kiter=10)
    config = QuantConfig(
        output_dir=str(tmp_path), device="cpu", linear=linear, calibration=CalibrationConfig(nsamples=16, seq_len=128)
    )
    demo = quantize_model(config).folder / "packed_model"
    result = tune_demo(demo, tmp_path, mode="lora", learning_rate=1e-3, steps=20, nsamples=64)
    assert result.held_out[1] < result.held_out[0]
    (figures,) = result.perplexities.values()
    assert figures["after"].perplexity < figures["before"].perplexity
