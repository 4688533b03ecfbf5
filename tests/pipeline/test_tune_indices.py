"""`finetune --train indices`: quantized anew in parts; the same form, never worse, resumable."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.pipeline.test_finetune import changed_names, reload_alike, tensors_of
from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import read_layers
from vptq.errors import UsageError
from vptq.finetune.incremental import Incremental
from vptq.finetune_config import FinetuneConfig
from vptq.pipeline import tune_indices
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.tune_indices import IndexTuning


@pytest.fixture
def any_gain(monkeypatch):
    """New indices are taken whatever they are worth: on weights that are noise there is nothing to gain."""
    monkeypatch.setattr(IndexTuning, "_before", lambda self: math.inf)


def indices_only(wishes, kind="plain", **changes):
    return wishes(kind, mode="e2e", train=("indices",), rounds=3, round_steps=2, **changes)


@pytest.mark.parametrize("kind", ["plain", "trellis", "folded"])
def test_quantized_anew_to_the_same_form(kind, wishes, checkpoints, any_gain):
    result = finetune_model(indices_only(wishes, kind))
    packed = result.folder / "packed_model"
    names = changed_names(checkpoints[kind], packed)
    assert {name for name in tensors_of(packed) if name.endswith(".indices")} <= names
    assert read_layers(packed) == read_layers(checkpoints[kind])
    assert checkpoint_bits(packed) == checkpoint_bits(checkpoints[kind])
    reload_alike(packed)
    assert math.isfinite(result.held_out[1])


def test_what_is_packed_is_what_was_held_out(wishes, any_gain):
    """The loss of the float model whose linears were quantized is that of the packed one."""
    first = finetune_model(indices_only(wishes, "folded"))
    again = finetune_model(wishes("folded", mode="e2e", model_name=str(first.folder / "packed_model"), steps=1))
    assert again.held_out[0] == pytest.approx(first.held_out[1], rel=2e-3)


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
    added = ("row_scales", "column_scales", "biases")
    first = finetune_model(wishes("trellis", mode="e2e", add=added, learning_rate=0.05))
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
    whole = finetune_model(indices_only(wishes, "trellis"))
    real = Incremental._train

    def fail(self, *args):
        if self.done == 2:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(Incremental, "_train", fail)
    config = indices_only(wishes, "trellis")
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


def test_head_that_is_packed_stays_as_it_is(originals, text_file, tmp_path, wishes, any_gain):
    from tests.pipeline.conftest import ROTATED
    from tests.pipeline.test_run import config_of
    from vptq.pipeline.run import quantize_model

    config = config_of(originals["folded"], text_file, tmp_path / "q", **ROTATED)
    packed = quantize_model(replace(config, head_bits=4)).folder / "packed_model"
    result = finetune_model(indices_only(wishes, "folded", model_name=str(packed)))
    assert not any("lm_head" in name for name in changed_names(packed, result.folder / "packed_model"))
    reload_alike(result.folder / "packed_model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "block", "train": ("indices",)}, "train indices goes with mode e2e"),
        ({"mode": "e2e", "rounds": 4}, "rounds goes with train indices"),
        ({"mode": "e2e", "train": ("indices",), "round_steps": 0}, "round_steps is 0"),
        ({"mode": "e2e", "train": ("indices",), "round_rate": 2.0}, "round_rate is 2.0"),
    ],
)
def test_faults_are_told(changes, said):
    with pytest.raises(UsageError) as caught:
        FinetuneConfig(model_name="x", **changes).validate()
    assert said in str(caught.value)
