"""`finetune --train indices`: quantized anew in parts; the same form, never worse, resumable."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.pipeline.conftest import ROTATED
from tests.pipeline.test_finetune import changed_names, reload_alike, tensors_of
from tests.pipeline.test_run import config_of
from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import load_whole, read_layers
from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.errors import UsageError
from vptq.finetune import incremental
from vptq.finetune.distill import Distillation
from vptq.finetune.incremental import HELD_OUT_DRAW, Incremental
from vptq.finetune.noise import ErrorNoise
from vptq.finetune_config import FinetuneConfig
from vptq.models.architecture import DEMO
from vptq.pipeline import tune_indices
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.progress import Silent
from vptq.pipeline.run import quantize_model
from vptq.pipeline.teacher import Teacher
from vptq.pipeline.tune_indices import IndexTuning
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_text import tuning_tokens


@pytest.fixture
def any_gain(monkeypatch):
    """New indices are taken whatever they are worth: on weights that are noise there is nothing to gain."""
    monkeypatch.setattr(IndexTuning, "_before", lambda self: math.inf)


def indices_only(wishes, kind="plain", **changes):
    settings = {"mode": "e2e", "train": ("indices",), "rounds": 3, "round_steps": 2, "steps": None, "eval_every": None}
    return wishes(kind, **settings | changes)


@pytest.mark.parametrize("kind", ["plain", "trellis", "folded"])
@pytest.mark.ci
def test_quantized_anew_to_the_same_form(kind, wishes, checkpoints, any_gain):
    result = finetune_model(indices_only(wishes, kind))
    packed = result.folder / "packed_model"
    names = changed_names(checkpoints[kind], packed)
    assert {name for name in tensors_of(packed) if name.endswith(".indices")} <= names
    assert read_layers(packed) == read_layers(checkpoints[kind])
    assert checkpoint_bits(packed) == checkpoint_bits(checkpoints[kind])
    reload_alike(packed)
    assert math.isfinite(result.held_out[1])


@pytest.fixture
def changed_before(originals, wishes, text_file, tmp_path):
    """Makes checkpoints that differ from what `vptq quantize` writes, or hold more than blocks packed."""

    def make(which):
        if which == "packed head":
            config = config_of(originals["folded"], text_file, tmp_path / "q", **ROTATED)
            return quantize_model(replace(config, head_bits=4)).folder / "packed_model"
        if which == "packed embeddings that are the head":
            config = config_of(originals["plain"], text_file, tmp_path / "q")
            return quantize_model(replace(config, embed_bits=4)).folder / "packed_model"
        kind, settings = {
            "head that learned": ("folded", {"train": ("head", "norms")}),
            "scales of rows": ("plain", {"train": ("scales",), "add": ("row_scales",)}),
            "codebooks of their own": ("trellis", {"train": ("codebooks",), "add": ("codebooks",)}),
        }[which]
        return finetune_model(wishes(kind, mode="e2e", learning_rate=0.01, **settings)).folder / "packed_model"

    return make


@pytest.mark.parametrize(
    "kind, which",
    [
        ("plain", ""),
        ("trellis", ""),
        ("folded", ""),
        ("folded", "packed head"),
        ("plain", "packed embeddings that are the head"),
        ("folded", "head that learned"),
        ("plain", "scales of rows"),
        ("trellis", "codebooks of their own"),
    ],
)
@pytest.mark.ci
def test_what_is_packed_is_what_was_held_out(kind, which, wishes, checkpoints, changed_before, any_gain):
    """The loss of the float model whose linears were quantized is that of the packed one."""
    given = changed_before(which) if which else checkpoints[kind]
    packed = finetune_model(indices_only(wishes, kind, model_name=str(given)))
    again = finetune_model(wishes(kind, mode="e2e", model_name=str(packed.folder / "packed_model"), steps=1, eval_every=1))
    assert again.held_out[0] == pytest.approx(packed.held_out[1], rel=2e-4)
    reload_alike(packed.folder / "packed_model")


@pytest.mark.ci
def test_what_is_float_makes_up_for_what_is_quantized(wishes, originals, any_gain, monkeypatch):
    """Later linears are quantized from what they have learned; without training in between the loss is higher."""
    weights, real = {}, incremental.quantize_linears

    def watch(inputs, *args, **named):
        weights.update({own.name: own.weight.clone() for own in inputs})
        return real(inputs, *args, **named)

    monkeypatch.setattr(incremental, "quantize_linears", watch)
    losses = []
    for rate in (1e-9, 2e-3):
        settings = {"rounds": 6, "round_steps": 8, "round_rate": rate}
        losses.append(finetune_model(indices_only(wishes, "trellis", **settings)).held_out[1])
    assert losses[1] < 0.97 * losses[0]
    original = tensors_of(originals["trellis"])
    first, last = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.mlp.down_proj"))
    assert torch.equal(weights[first], original[f"{first}.weight"].float())
    assert not torch.allclose(weights[last], original[f"{last}.weight"].float(), rtol=1e-4)


@pytest.mark.slow
def test_the_demo_model_gains(tmp_path):
    """A hundred steps of a thousand tokens take a few percent of the KL; no bit more is stored."""
    text = str(DEMO / "calibration.txt")
    linear = LinearConfig(rotation="hadamard", codebook_scope="shared", vector_lens=(-1, 4), num_centroids=(-1, 256))
    calibration = CalibrationConfig(hessian="fisher", sequential=True, nsamples=64, seq_len=128)
    packed = quantize_model(QuantConfig(linear=linear, calibration=calibration, output_dir=str(tmp_path), device="cpu"))
    result = finetune_model(
        FinetuneConfig(
            mode="e2e", model_name=str(packed.folder / "packed_model"), train=("indices",), dataset=(text,), nsamples=332,
            num_held_out=32, seq_len=128, batch_size=8, rounds=6, round_steps=15, round_rate=3e-3, output_dir=str(tmp_path),
            eval_nsamples=8, device="cpu", gradient_checkpointing=False,
        )
    )  # fmt: skip
    assert result.held_out[1] < 0.98 * result.held_out[0]
    assert result.bits == checkpoint_bits(packed.folder / "packed_model")


def test_hessians_are_the_losss_and_steps_go_on_through_the_text(wishes, originals, any_gain, monkeypatch):
    seen, steps = {}, []
    real, train = incremental.quantize_linears, Distillation.train
    monkeypatch.setattr(
        incremental,
        "quantize_linears",
        lambda inputs, *args, **named: seen.update({own.name: own.hessian for own in inputs}) or real(inputs, *args, **named),
    )
    monkeypatch.setattr(Distillation, "train", lambda self, step: steps.append(step) or train(self, step))
    result = finetune_model(indices_only(wishes, "plain"))
    assert steps == list(range(6))
    config = TuneJob.at(result.folder).config
    name = "model.layers.0.self_attn.q_proj"
    texts = tuning_tokens(config, originals["plain"], torch.device("cpu"), lambda *_: None)[:8]
    model = load_whole(str(originals["plain"]), "cpu").float()
    linear, rows = model.get_submodule(name), {}
    linear.weight.requires_grad_()

    def watch(_module, inputs, output):
        rows["x"] = inputs[0].detach()
        output.register_hook(lambda gradient: rows.update(g=gradient))

    linear.register_forward_hook(watch)
    logits = model(input_ids=texts).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten(), reduction="sum").backward()
    weights, x = rows["g"].square().mean(-1).flatten(), rows["x"].flatten(0, 1)
    torch.testing.assert_close(seen[name], (x * weights[:, None]).T @ x / len(x), rtol=1e-3, atol=1e-6)


def test_the_original_is_not_held_longer_than_it_trains(wishes, monkeypatch):
    made, held = [], []
    real = Teacher.__init__
    monkeypatch.setattr(Teacher, "__init__", lambda self, *args: made.append(self) or real(self, *args))

    class Watch(Silent):
        def phase(self, text):
            if text in ("training", "perplexity, after"):
                held.append(made[0]._logits is not None)

    finetune_model(wishes(mode="e2e", teacher="live"), progress=Watch())
    assert held[0] and not held[-1]


def test_old_indices_stay_where_new_ones_are_no_gain(wishes, checkpoints, monkeypatch):
    monkeypatch.setattr(IndexTuning, "_before", lambda self: 0.0)
    result = finetune_model(indices_only(wishes))
    assert not changed_names(checkpoints["plain"], result.folder / "packed_model")
    assert result.held_out == (0.0, 0.0)


def test_all_else_trains_after(wishes, checkpoints, any_gain):
    config = wishes("trellis", mode="e2e", train=("indices", "norms"), add=("biases",), rounds=2, round_steps=1)
    result = finetune_model(replace(config, train=("indices", "norms", "offsets")))
    tensors = tensors_of(result.folder / "packed_model")
    assert any(name.endswith("proj.bias") and tensor.abs().max() > 0 for name, tensor in tensors.items())
    assert result.held_out[1] < math.inf


def test_what_was_added_before_is_neutral_after(wishes, any_gain):
    added = ("row_scales", "column_scales", "biases", "codebooks")
    first = finetune_model(wishes("trellis", mode="e2e", add=added, learning_rate=0.005))
    learned = {key: own for key, own in tensors_of(first.folder / "packed_model").items() if key.endswith("proj.bias")}
    assert all(own.any() for own in learned.values())
    second = finetune_model(indices_only(wishes, "trellis", model_name=str(first.folder / "packed_model")))
    packed = second.folder / "packed_model"
    assert read_layers(packed) == read_layers(first.folder / "packed_model")
    for name, tensor in tensors_of(packed).items():
        if name.endswith(("weight_bias", "proj.bias")):
            assert not tensor.any(), name
        if name.endswith("weight_scale"):
            assert bool((tensor == 1).all()), name
    reload_alike(packed)


def test_a_stopped_run_goes_on(wishes, any_gain, monkeypatch):
    monkeypatch.setattr(tune_indices, "SAVE_SECONDS", 0.0)
    whole = finetune_model(indices_only(wishes, "trellis", noise=1.0))
    real = Incremental._train

    def fail(self, *args):
        if self.done == 3:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(Incremental, "_train", fail)
    config = indices_only(wishes, "trellis", noise=1.0)
    with pytest.raises(KeyboardInterrupt):
        finetune_model(replace(config, output_dir=f"{config.output_dir}/stopped"))
    monkeypatch.setattr(Incremental, "_train", real)
    quantized = []
    step = Incremental._quantize
    monkeypatch.setattr(Incremental, "_quantize", lambda self, part: quantized.append(part) or step(self, part))
    folder = next(path.parent for path in (whole.folder.parents[2] / "stopped").rglob("job.json"))
    again = finetune_model(FinetuneConfig(), resume=folder)
    assert len(quantized) == 1, "the parts before are kept"
    assert not changed_names(whole.folder / "packed_model", again.folder / "packed_model")
    assert again.held_out == whole.held_out


@pytest.mark.ci
def test_what_is_float_has_noise_while_it_trains_and_at_every_look(wishes, any_gain):
    """The loss of what is held out counts what is not quantized yet; it falls, and at the end it is that of no noise."""
    last = {}
    for noise in (0.0, 1.0):
        settings = {"rounds": 2, "round_steps": 40, "round_rate": 1e-3, "noise": noise}
        result = finetune_model(indices_only(wishes, "trellis", **settings))
        entries = json.loads((result.folder / "curves.json").read_text())["curves"]["indices"]
        looks = [entry["held_out"] for entry in entries if "held_out" in entry]
        last[noise] = looks
        assert len(looks) == 4 and looks[3] == result.held_out[1]
        assert looks[1] < 0.97 * looks[0]
    assert last[1.0][0] > 1.3 * last[0.0][0]


def test_draws_are_of_steps_and_one_for_all_looks(wishes, any_gain, monkeypatch):
    made, draws = [], []
    real, added = ErrorNoise.__init__, ErrorNoise.added
    monkeypatch.setattr(ErrorNoise, "__init__", lambda self, *args: made.append(args) or real(self, *args))
    monkeypatch.setattr(ErrorNoise, "added", lambda self, *args: draws.append((args[1], len(args[0]))) or added(self, *args))
    finetune_model(indices_only(wishes, "trellis", noise=0.5, rounds=2))
    first, look = 7, HELD_OUT_DRAW
    assert draws == [(look, first), (0, first), (1, first), (look, first), (look, 0), (2, 0), (3, 0), (look, 0)]
    weights, errors, shrinkage, _, seed = made[0]
    assert seed == 0 and set(shrinkage) == set(weights) == set(errors) and len(weights) == 14
    assert all(0 < value < 0.5 for value in shrinkage.values())
    finetune_model(indices_only(wishes, "trellis", noise=1.0, rounds=2, seed=1))
    _, twice, _, _, seed = made[1]
    name = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(twice[name].float(), 2 * errors[name].float(), rtol=1e-2, atol=1e-5)
    assert seed == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "e2e", "noise": 0.5}, "noise goes with train indices"),
        ({"mode": "e2e", "train": ("indices",), "noise": -1.0}, "noise is -1.0, must be 0 or more"),
        ({"mode": "block", "train": ("indices",)}, "train indices goes with mode e2e"),
        ({"mode": "e2e", "rounds": 4}, "rounds goes with train indices"),
        ({"mode": "e2e", "train": ("indices",), "round_steps": 0}, "round_steps is 0"),
        ({"mode": "e2e", "train": ("indices",), "round_rate": 2.0}, "round_rate is 2.0"),
        ({"mode": "e2e", "train": ("indices",), "steps": 5}, "steps is for what trains after indices"),
    ],
)
def test_faults_are_told(changes, said):
    with pytest.raises(UsageError) as caught:
        FinetuneConfig(model_name="x", **changes).validate()
    assert said in str(caught.value)
