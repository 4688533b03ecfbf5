"""Whole fine-tuning runs: each mode on tiny models, resume, faults; on the demo model in CI."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_tiny_llama
from tests.pipeline.test_run import config_of
from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import load_quantized, load_whole, read_layers
from vptq.errors import RunError, UsageError
from vptq.evaluation.divergence import compare, last_states
from vptq.finetune.additions import with_additions
from vptq.finetune_config import FinetuneConfig
from vptq.models.architecture import load_skeleton
from vptq.pipeline import block_pass
from vptq.pipeline.evaluate import make_runner
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.fold import find_fold
from vptq.pipeline.progress import Silent
from vptq.pipeline.quantize_tuned import quantize_and_tune
from vptq.pipeline.tune_text import share_out, tuning_tokens
from vptq.pipeline.tune_whole import compute_blocks_twice

INDICES = ("indices", "perm", "packed")


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def changed_names(before, after):
    old, new = tensors_of(before), tensors_of(after)
    assert set(old) == set(new)
    return {name for name in old if not torch.equal(old[name], new[name])}


def logits(model):
    tokens = torch.arange(40)[None] % 30
    with torch.no_grad():
        return model(input_ids=tokens.to(model.device)).logits


def reload_alike(folder):
    """Both ways to load a checkpoint give the same logits."""
    from transformers import AutoModelForCausalLM

    own = logits(load_quantized(folder))
    assert torch.isfinite(own).all()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), own)


@pytest.mark.parametrize("kind", ["plain", "trellis", "folded"])
def test_blocks_learn(kind, wishes, checkpoints):
    result = finetune_model(wishes(kind, mode="block"))
    names = changed_names(checkpoints[kind], result.folder / "packed_model")
    assert result.held_out[1] < result.held_out[0]
    assert not any(name.endswith(INDICES) for name in names)
    if kind != "plain":
        assert not any("centroids" in name for name in names), "they belong to the whole model"
    reload_alike(result.folder / "packed_model")
    assert {p.name for p in result.folder.iterdir()} == {
        ".lock", "config.yaml", "curves.json", "curves.png", "job.json", "logs", "packed_model", "ppl_results.json",
        "report.html", "run.json",
    }  # fmt: skip
    curves = json.loads((result.folder / "curves.json").read_text())["curves"]
    passes = ("1 outputs", "2 predictions", "3 predictions")
    assert set(curves) == {f"{name}: {block}" for name in passes for block in (0, 1)} and curves["1 outputs: 1"][0]["step"] == 0
    stored = json.loads((result.folder / "ppl_results.json").read_text())
    (figures,) = stored["ctx_64"].values()
    assert set(figures) == {"original", "before", "after"}
    assert stored["held_out"] == {"loss": result.loss, "before": result.held_out[0], "after": result.held_out[1]}


@pytest.mark.parametrize("kind", ["plain", "trellis"])
def test_whole_models_learn(kind, wishes, checkpoints):
    result = finetune_model(wishes(kind, mode="e2e", steps=10))
    names = changed_names(checkpoints[kind], result.folder / "packed_model")
    assert result.held_out[1] < result.held_out[0]
    assert not any(name.endswith(INDICES) for name in names)
    assert any("centroids" in name for name in names) and any("norm" in name for name in names)
    assert not any("embed" in name for name in names)
    reload_alike(result.folder / "packed_model")


def test_the_result_is_what_was_held_out(wishes, monkeypatch):
    """The loss that training told of its best values is that of the checkpoint, read anew."""
    kept = []
    taken = lambda *args, **named: kept.append(tuning_tokens(*args, **named)) or kept[0]  # noqa: E731
    monkeypatch.setattr("vptq.pipeline.finetune.tuning_tokens", taken)
    config = wishes(mode="e2e", eval_dataset=None)
    result = finetune_model(config)
    rest, device = kept[0][-2:].contiguous(), torch.device("cpu")
    folders = Path(config.original), result.folder / "packed_model"
    runners = [make_runner(load_skeleton(folder, False, torch.float32), device) for folder in folders]
    pairs = [(runner, last_states(runner, rest)) for runner in runners]
    assert compare(*pairs, rest, "held out").mean == pytest.approx(result.held_out[1], rel=1e-3)


def test_head_learns_if_asked(wishes, checkpoints):
    result = finetune_model(wishes(mode="e2e", train=("head",), learning_rate=0.05))
    assert changed_names(checkpoints["plain"], result.folder / "packed_model") == {"model.embed_tokens.weight"}


def test_the_heads_rate_is_a_part_of_the_others(wishes, monkeypatch):
    from vptq.pipeline import tune_whole

    seen = []
    real = tune_whole.trainables
    monkeypatch.setattr(tune_whole, "trainables", lambda *args, **named: seen.append(real(*args, **named)) or seen[-1])
    for rate in (0.5, 0.125):
        finetune_model(wishes(mode="e2e", train=("head",), head_rate=rate, steps=1))
    units = [items[0].unit for items in seen]
    assert units[0] == 4 * units[1]


def test_a_step_has_as_many_sequences_as_are_asked_for(wishes):
    for batch, micro, found in ((16, 12, 8), (2, 8, 2), (6, 4, 3), (7, 3, 1), (64, None, 64), (512, None, 128)):
        assert wishes(batch_size=batch, micro_batch_size=micro).resolved(1000, 128).micro_batch_size == found


def test_text_that_is_written_goes_on_past_its_end(originals):
    """Ends of text come as often as the model draws them, and none of its own settings of generation hold."""
    from transformers import GenerationConfig

    from vptq.finetune.sample import sample_text

    model = load_whole(str(originals["plain"]), "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every token is as likely as any other
    model.config.vocab_size = 8
    model.lm_head = torch.nn.Linear(32, 8, bias=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    own = model.generation_config = GenerationConfig(eos_token_id=3, temperature=0.1, top_k=2, repetition_penalty=1.5)
    tokens = sample_text(model, count=16, seq_len=65, seed=1)
    counts = torch.bincount(tokens[:, 1:].flatten(), minlength=8)
    assert tokens.shape == (16, 65) and counts.sum() == 1024
    assert counts.min() > 90 and counts.max() < 170, counts
    assert model.generation_config is own


def test_predictions_from_files_alone_have_the_form_of_the_models_own(originals, tmp_path):
    """Of a runner whose blocks have never run, on a transformers whose blocks return tuples."""
    from vptq.models.runner import BlockRunner

    def tuples(runner):
        for block in runner.skeleton.blocks:
            block.register_forward_hook(lambda _module, _inputs, output: (output,) if not isinstance(output, tuple) else output)
        return runner

    tokens = torch.arange(24)[None]
    skeletons = [load_skeleton(originals["plain"], False, torch.float32) for _ in range(2)]
    runners = [tuples(BlockRunner(s, s.source(), torch.device("cpu"), torch.float32)) for s in skeletons]
    (hidden,) = runners[0].embed([tokens]).batches
    assert runners[1]._returns_tuple is None
    runners[1]._run_one_block(tokens)
    assert runners[1]._returns_tuple is True
    runners[1]._returns_tuple = None
    assert hidden.shape == runners[1].embed([tokens]).batches[0].shape


def test_row_scales_leave_the_weights_and_can_learn(wishes, checkpoints):
    result = finetune_model(wishes("trellis", mode="e2e", train=("scales",), add=("row_scales",), save_model=True))
    packed = result.folder / "packed_model"
    before, after = tensors_of(checkpoints["trellis"]), tensors_of(packed)
    name = "model.layers.0.self_attn.q_proj.row_scale"
    assert before[name].shape == (1,) and after[name].shape == (32,) and len(set(after[name].tolist())) > 1
    assert after["model.layers.0.self_attn.q_proj.indices"].equal(before["model.layers.0.self_attn.q_proj.indices"])
    reload_alike(packed)
    own, plain = logits(load_quantized(packed, dtype=torch.float32)), logits(load_whole(str(result.folder / "model"), "cpu"))
    torch.testing.assert_close(own, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["plain", "trellis", "folded"])
def test_additions_change_nothing_learn_and_are_seen_by_all(kind, wishes, checkpoints, text_file):
    """A bias that the model's own linears lack is easily lost where weights are dequantized."""
    result = finetune_model(wishes(kind, mode="e2e", add=("row_scales", "column_scales", "biases"), learning_rate=0.02))
    packed = result.folder / "packed_model"
    old, new = tensors_of(checkpoints[kind]), tensors_of(packed)
    name = "model.layers.1.mlp.up_proj"
    for added, size in (("row_scale", 48), ("weight_scale", 32), ("weight_bias", 32), ("bias", 48)):
        assert new[f"{name}.{added}"].shape == (size,) and len(set(new[f"{name}.{added}"].tolist())) > 2, added
    assert all(new[key].equal(tensor) for key, tensor in old.items() if key.endswith(INDICES))
    reload_alike(packed)
    assert result.held_out[1] < 0.98 * result.held_out[0]
    model = load_quantized(packed, dtype=torch.float32)
    skeleton = load_skeleton(packed, False, torch.float32)
    runner = make_runner(skeleton, torch.device("cpu"))
    tokens = torch.arange(40)[None] % 30
    streamed = runner.logits(last_states(runner, tokens), tokens)
    torch.testing.assert_close(streamed, logits(model), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    assert not torch.allclose(streamed, logits(model), rtol=1e-3, atol=1e-3), "biases say something"
    more = 48 + 48 if kind == "plain" else 47 + 48 + 2 * 32  # the plain one has scales of columns
    bits = [
        next(linear.stored for linear in checkpoint_bits(folder).linears if linear.name == name)
        for folder in (checkpoints[kind], packed)
    ]
    assert bits[1] - bits[0] == 16 * more


def test_additions_begin_as_nothing(originals, checkpoints, tmp_path):
    from vptq.checkpoint.reader import open_packed
    from vptq.checkpoint.writer import write_changed

    for kind in checkpoints:
        skeleton, source, layers = open_packed(checkpoints[kind])
        everything = ("row_scales", "column_scales", "biases", "codebooks")
        more, tensors = with_additions(source, layers, skeleton.dtype, everything, skeleton.blocks_name)
        write_changed(tmp_path / kind, source, [n for n, _ in skeleton.model.named_parameters()], more, tensors)
        found = [logits(load_quantized(folder, dtype=torch.float32)) for folder in (checkpoints[kind], tmp_path / kind)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        assert with_additions(source, more, skeleton.dtype, everything, skeleton.blocks_name)[1] == {}, "once"


@pytest.mark.parametrize("mode", ["block", "e2e"])
def test_each_linear_can_learn_a_codebook_of_its_own(mode, wishes, checkpoints):
    result = finetune_model(wishes("trellis", mode=mode, train=("codebooks",), add=("codebooks",), learning_rate=0.005))
    packed = result.folder / "packed_model"
    layers, old, new = read_layers(packed), tensors_of(checkpoints["trellis"]), tensors_of(packed)
    assert not any(layer.codebook_of for layer in layers.values())
    books = {tuple(new[f"{name}.centroids.weight"].flatten().tolist()) for name in layers}
    assert len(books) > len(layers) // 2  # a block of noise may have nothing to gain
    assert all(new[key].equal(tensor) for key, tensor in old.items() if key.endswith(INDICES))
    assert result.held_out[1] < result.held_out[0]
    bits = [checkpoint_bits(folder).stored_bits_per_weight for folder in (checkpoints["trellis"], packed)]
    assert bits[1] > bits[0]
    reload_alike(packed)


def test_a_checkpoint_with_added_biases_is_not_dequantized(wishes):
    with_biases = finetune_model(wishes("trellis", mode="e2e", add=("biases",), steps=2)).folder / "packed_model"
    with pytest.raises(UsageError, match="no place for added biases"):
        finetune_model(wishes("trellis", mode="e2e", model_name=str(with_biases), save_model=True))


def test_no_learning_changes_nothing(wishes, checkpoints):
    """A rate of next to nothing: the best values are those of before."""
    for mode in ("block", "e2e"):
        result = finetune_model(wishes(mode=mode, learning_rate=1e-12))
        assert changed_names(checkpoints["plain"], result.folder / "packed_model") == set()


@pytest.mark.parametrize("mode", ["block", "e2e"])
def test_a_rate_that_diverges_is_told_and_the_best_is_kept(mode, wishes, checkpoints, monkeypatch):
    monkeypatch.setattr(block_pass, "SLOWER", (1.0,))
    notes = []
    progress = Silent()
    progress.note = notes.append
    result = finetune_model(wishes(mode=mode, learning_rate=1.0, steps=40, patience=40), progress=progress)
    assert result.held_out[1] <= result.held_out[0]
    assert any("diverged" in note and "--learning_rate" in note for note in notes)
    reload_alike(result.folder / "packed_model")


def test_blocks_that_make_a_worse_model_are_left_as_they_were(wishes, checkpoints, monkeypatch):
    from vptq.pipeline import tune_check

    monkeypatch.setattr(tune_check, "_divergence_of", lambda pair, original, wanted, windows, values: float(len(values)))
    notes = []
    progress = Silent()
    progress.note = notes.append
    result = finetune_model(wishes(mode="block"), progress=progress)
    assert changed_names(checkpoints["plain"], result.folder / "packed_model") == set()
    assert any("all is left as it was" in note for note in notes)
    assert result.held_out == (0.0, 0.0), "what is told is of what was kept"


class Stop(Silent):
    """Interrupts at the nth time that it hears of a phase."""

    def __init__(self, phase, after):
        self.wanted, self.left, self.folder = phase, after, None

    def run_folder(self, folder):
        self.folder = Path(folder)

    def phase(self, text):
        if text.startswith(self.wanted):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    "mode, phase, after", [("block", "1 outputs, block 1", 6), ("e2e", "training", 5), ("e2e", "perplexity, after", 1)]
)
@pytest.mark.ci
def test_a_stopped_run_goes_on_to_the_same_bytes(mode, phase, after, wishes):
    whole = finetune_model(wishes(mode=mode))
    stop = Stop(phase, after)
    with pytest.raises(KeyboardInterrupt):
        finetune_model(wishes(mode=mode), progress=stop)
    again = finetune_model(wishes(), resume=stop.folder)
    assert again.folder == stop.folder
    for path in (whole.folder / "packed_model").iterdir():
        assert path.read_bytes() == (again.folder / "packed_model" / path.name).read_bytes(), path.name
    assert again.perplexities.keys() == whole.perplexities.keys()
    third = finetune_model(wishes(), resume=stop.folder)
    assert third.held_out == again.held_out and third.seconds == 0.0
    with pytest.raises(UsageError, match="keeps its settings"):
        finetune_model(wishes(), resume=stop.folder, given={"steps": 7})


def test_live_and_cached_predictions_teach_the_same(wishes):
    results = [finetune_model(wishes(mode="e2e", teacher=teacher)) for teacher in ("cached", "live")]
    assert results[0].held_out == pytest.approx(results[1].held_out, rel=1e-4)


def test_predictions_are_kept_where_that_is_asked(wishes, tmp_path):
    first = finetune_model(wishes(mode="e2e", cache_dir=str(tmp_path / "kept")))
    files = list((tmp_path / "kept").glob("*.safetensors"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    assert finetune_model(wishes(mode="e2e", cache_dir=str(tmp_path / "kept"))).held_out == first.held_out
    assert files[0].stat().st_mtime_ns == stamp


def test_text_that_the_original_writes(wishes, text_file, originals, tmp_path):
    config = dataclasses.replace(wishes(dataset=("self", str(text_file)), nsamples=5), seq_len=12).resolved(1000, 128)
    found = [tuning_tokens(config, originals["plain"], torch.device("cpu"), lambda *_: None) for _ in range(2)]
    assert found[0].shape == (5, 12) and torch.equal(*found), "one seed for all"
    alone = dataclasses.replace(config, dataset=("self",), nsamples=3)
    own = tuning_tokens(alone, originals["plain"], torch.device("cpu"), lambda *_: None)
    assert own.shape == (3, 12) and len({tuple(row) for row in own.tolist()}) == 3


def test_written_text_is_kept_where_that_is_asked(wishes, originals, tmp_path, monkeypatch):
    config = dataclasses.replace(wishes(dataset=("self",), nsamples=3, cache_dir=str(tmp_path / "kept")), seq_len=12)
    ask = lambda **changes: tuning_tokens(  # noqa: E731
        dataclasses.replace(config, **changes).resolved(1000, 128), originals["plain"], torch.device("cpu"), lambda *_: None
    )
    first = ask()
    (file,) = (tmp_path / "kept").iterdir()
    other = ask(seed=5)
    assert len(list((tmp_path / "kept").iterdir())) == 2 and not torch.equal(other, first)
    monkeypatch.setattr("vptq.pipeline.tune_text.sample_text", lambda *_args, **_named: first + 1)
    assert torch.equal(ask(), first)
    file.write_bytes(b"damaged")
    assert torch.equal(ask().sort(0).values, (first + 1).sort(0).values)


def test_what_a_short_text_lacks_the_others_give(wishes, originals, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("abc " * 40)
    config = wishes(dataset=(str(short), str(text_file), "self"), nsamples=14).resolved(1000, 128)
    config = dataclasses.replace(config, seq_len=12)
    assert tuning_tokens(config, originals["plain"], torch.device("cpu"), lambda *_: None).shape == (14, 12)
    fewer = dataclasses.replace(config, dataset=(str(short),), nsamples=512)
    assert tuning_tokens(fewer, originals["plain"], torch.device("cpu"), lambda *_: None, short=True).shape == (6, 12)
    assert share_out(14, {"a": 3, "b": 100, "c": 14}) == {"a": 3, "b": 6, "c": 5}
    assert share_out(10, {"a": 1, "b": 2, "c": 7}) == {"a": 1, "b": 2, "c": 7}
    assert share_out(7, {"a": 9, "b": 9}) == {"a": 3, "b": 4}


def test_without_a_number_a_short_text_gives_all_it_has(wishes, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat sat on the mat. " * 40)
    result = finetune_model(wishes(mode="e2e", nsamples=None, num_held_out=None, dataset=(str(short),), steps=1))
    settings = json.loads((result.folder / "job.json").read_text())["settings"]
    assert 2 <= settings["nsamples"] < 30 and settings["num_held_out"] == max(1, settings["nsamples"] // 8)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"nsamples": None, "num_held_out": None, "dataset": "SHORT"}, "too short"),
        ({"model_name": None}, "model_name is missing"),
        ({"model_name": "ORIGINAL"}, "not a packed VPTQ checkpoint"),
        ({"original": "PACKED"}, "quantized already"),
        ({"original": "OTHER"}, "was not quantized from"),
        ({"original": None}, "was not quantized from"),
        ({"nsamples": 2, "num_held_out": 2}, "nothing is left to train on"),
        ({"nsamples": 100000}, "too short"),
        ({"seq_len": 1000}, "seq_len is 1000"),
        ({"train": ("codebooks", "biases")}, "biases"),
        ({"train": ("head",)}, "goes with mode e2e"),
        ({"mode": "all"}, "mode is 'all'"),
        ({"mode": "lora", "add": ("biases",)}, "add goes with"),
        ({"add": ("biases",), "train": ("codebooks",)}, "add biases goes with train offsets"),
        ({"mode": "block", "add": ("column_scales",), "train": ("scales",)}, "column_scales goes with train scales offsets"),
        ({"add": ("scales",)}, "add names 'scales', must be of row_scales, column_scales, biases, codebooks"),
        ({"add": ("biases",), "save_model": True}, "no place for added biases"),
        ({"mode": "block", "ce_weight": 0.5}, "ce_weight goes with mode e2e"),
        ({"mode": "e2e", "lora_rank": 3}, "lora_rank goes with mode lora"),
        ({"mode": "block", "train": ("offsets",), "kind": "trellis"}, "nothing of this model is of a kind"),
        ({"mode": "block", "train": ("codebooks",), "kind": "trellis"}, "nothing of this model is of a kind"),
        ({"train": ()}, "train names nothing"),
        ({"mode": "block", "passes": ()}, "passes names nothing"),
        ({"mode": "block", "passes": ("outputs", "all")}, "passes names 'all', must be of outputs, predictions"),
        ({"mode": "e2e", "passes": ("outputs",)}, "passes goes with mode block"),
        ({"mode": "lora", "unpack": True}, "unpack goes with mode"),
        ({"mode": "e2e", "cache_dir": "s3://bucket/kept"}, "a folder here is needed"),
        ({"mode": "lora", "target_modules": ("q_proj", "nothing")}, "no packed linear has this name"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"kl_weight": 0.0, "mode": "e2e"}, "both 0"),
        ({"dataset": ("no-such-file",)}, "neither a known name nor a path"),
        ({"dataset": ("self", "self", "self"), "nsamples": 2, "num_held_out": 1}, "for 3 texts"),
        ({"device": "cuda:99"}, "is not there"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(changes, what, wishes, originals, checkpoints, tmp_path):
    stand_ins = {"ORIGINAL": str(originals["plain"]), "PACKED": str(checkpoints["plain"])}
    if changes.get("original") == "OTHER":
        stand_ins["OTHER"] = str(make_tiny_llama(tmp_path / "models" / "other", num_hidden_layers=3))
    if changes.get("dataset") == "SHORT":
        stand_ins["SHORT"] = (str(tmp_path / "short.txt"),)
        (tmp_path / "short.txt").write_text("a word or two")
    changes = {name: stand_ins.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UsageError, match=what):
        finetune_model(wishes(changes.pop("kind", "plain"), **changes))
    assert not list(tmp_path.glob("*/finetune_*"))


def test_memory_that_runs_out_is_told_with_what_to_lower(wishes, monkeypatch, tmp_path):
    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("vptq.finetune.distill.distillation_loss", full)
    with pytest.raises(RunError, match="memory ran out") as caught:
        finetune_model(wishes(mode="e2e", gradient_checkpointing=False, teacher="live"))
    for word in ("--micro_batch_size (now 2)", "--seq_len in a new run", "--teacher cached", "--gradient_checkpointing True"):
        assert word in caught.value.hint
    (folder,) = (tmp_path / Path(wishes().original).name / "finetune_e2e").iterdir()
    monkeypatch.undo()
    less = {"micro_batch_size": 1, "teacher": "cached", "gradient_checkpointing": True}
    assert finetune_model(wishes(), resume=folder, given=less).held_out[1] > 0


def test_memory_that_runs_out_while_text_is_written(wishes, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("vptq.finetune.sample._write_on", lambda model, start, seq_len: None)
    with pytest.raises(RunError, match="memory ran out"):
        finetune_model(wishes(dataset=("self",)))
    from vptq.finetune import sample

    tried = []
    monkeypatch.setattr(sample, "AT_ONCE_CPU", 4)
    real = torch.zeros(8, 6, dtype=torch.int64)
    write = lambda model, start, _: tried.append(len(start)) or (None if len(start) > 2 else real[: len(start)])  # noqa: E731
    monkeypatch.setattr(sample, "_write_on", write)
    model = load_whole(wishes().original, "cpu")
    assert sample.sample_text(model, count=5, seq_len=6, seed=0).shape == (5, 6)
    assert tried == [4, 2, 2, 1], "fewer at once, and none twice"


def test_only_e2e_is_shared_by_processes(wishes, monkeypatch):
    class First:
        rank, world, device = 0, 2, torch.device("cpu")

        def share(self, value):
            return value

        def __init__(self, _device):
            pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("vptq.pipeline.finetune.Launched", First)
    with pytest.raises(UsageError, match="works in one process"):
        finetune_model(wishes(mode="block"))


def test_gradient_checkpointing_changes_no_number(originals, checkpoints, tmp_path):
    """Nor does a dropout that the model's configuration asks for."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints["plain"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    model = load_quantized(folder, dtype=torch.float32)
    model.model.layers[0].self_attn.q_proj.centroids.weight.requires_grad_()
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.arange(30)[None]
    before = model(input_ids=tokens, use_cache=False).logits
    compute_blocks_twice(model)
    after = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    calls.clear()
    after.sum().backward()
    assert calls == [1], "the block is computed again on the way back"


def test_folds_are_found(originals, checkpoints):
    from vptq.checkpoint.reader import read_layers

    for kind, folded in (("plain", False), ("trellis", False), ("folded", True)):
        found = find_fold(load_skeleton(originals[kind]), read_layers(checkpoints[kind]))
        assert (found is not None) == folded, kind


@pytest.mark.ci
def test_quantize_and_tune_in_one_run(tiny_llama, text_file, tmp_path):
    config = config_of(tiny_llama, text_file, tmp_path, finetune="block", nsamples=6)
    stop = Stop("1 outputs, block 1", 3)
    folders = []
    stop.run_folder = folders.append
    with pytest.raises(KeyboardInterrupt):
        quantize_and_tune(config, progress=stop)
    assert len(folders) == 2 and Path(folders[1]).parent.name == "finetune_block"
    result, tuned = quantize_and_tune(config, resume=folders[0])
    assert str(result.folder) == folders[0] and str(tuned.folder) == folders[1]
    assert tuned.held_out[1] <= tuned.held_out[0]
    reload_alike(tuned.folder / "packed_model")
    assert quantize_and_tune(dataclasses.replace(config, finetune=None), progress=Silent())[1] is None


# -- the demo model ------------------------------------------------------------------------------------------------------


def tune_demo(demo, output, **changes):
    settings = {"nsamples": 32, "seq_len": 128, "steps": 12, "batch_size": 8, "micro_batch_size": 8, "eval_nsamples": 40}
    return finetune_model(FinetuneConfig(model_name=str(demo), output_dir=str(output), device="cpu", **settings | changes))


@pytest.mark.ci
@pytest.mark.parametrize("mode", ["block", "e2e"])
def test_the_demo_model_comes_closer_to_its_original(mode, demo, tmp_path):
    result = tune_demo(demo, tmp_path, mode=mode)
    assert result.held_out[1] < result.held_out[0]
    (figures,) = result.perplexities.values()
    assert figures["original"].perplexity < figures["after"].perplexity < figures["before"].perplexity
    names = changed_names(demo, result.folder / "packed_model")
    assert names and not any(name.endswith(INDICES) for name in names)
    reload_alike(result.folder / "packed_model")


@pytest.mark.ci
def test_two_processes_train_the_demo_model(demo, tmp_path):
    """The first measures what takes long, and is not cut off by the other's end."""
    words = f"--mode e2e --model_name {demo} --output_dir {tmp_path} --nsamples 12 --num_held_out 2 --seq_len 64 --steps 3"
    words += " --batch_size 4 --eval_nsamples 100 --device cpu"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom vptq.cli.main import main\ncode = main()\nsys.exit(code or torch.distributed.is_initialized())"
    )
    done = subprocess.run(
        [*launch, script, "finetune", *words.split()], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1 and done.stderr.count("run folder:") == 1, "the first alone speaks"
    (folder,) = (tmp_path / "demo" / "finetune_e2e").iterdir()
    alone = tune_demo(
        demo, tmp_path / "alone", mode="e2e", nsamples=12, num_held_out=2, seq_len=64, steps=3, batch_size=4,
        micro_batch_size=1, eval_nsamples=2,
    )  # fmt: skip
    stored = json.loads((folder / "ppl_results.json").read_text())["held_out"]
    assert (stored["before"], stored["after"]) == pytest.approx(alone.held_out, rel=1e-4)
