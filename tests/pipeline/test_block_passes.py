"""Passes over the blocks: slopes that are the whole model's, each pass held against the whole, resume between them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tests.pipeline.test_finetune import Stop, changed_names
from tests.pipeline.test_run import config_of
from vptq.checkpoint.reader import load_whole
from vptq.errors import UsageError
from vptq.finetune.fit import Schedule
from vptq.finetune.local_model import LocalModel
from vptq.finetune.trainable import Trainable, trainables
from vptq.finetune_config import FinetuneConfig
from vptq.models.architecture import DEMO
from vptq.pipeline import tune_blocks
from vptq.pipeline.block_pass import BlockPass, PassSettings
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.output_pass import OutputPass
from vptq.pipeline.prediction_pass import PredictionPass
from vptq.pipeline.progress import Silent
from vptq.pipeline.quantize_tuned import quantize_and_tune
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair
from vptq.pipeline.tune_text import tuning_tokens


def settings_of(config, original, packed, batches, folder):
    """For passes that nobody hears of; the last batch is held out."""
    pair = Pair.open(original, packed, torch.device("cpu"), False, False)
    job = TuneJob.create(config, "", {}, folder / "run")
    return PassSettings(pair, config, batches, 1, job, lambda *_: None, lambda _: None)


@pytest.mark.parametrize("kind", ["plain", "folded"])
@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.ci
def test_slopes_of_the_blocks_are_those_of_the_whole_model(kind, unpack, wishes, originals, checkpoints, tmp_path, monkeypatch):
    """The gradient of each block's local model is that of KL(original || packed) end to end."""
    config = wishes(kind, mode="block", unpack=unpack).resolved(1000, 128)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(30, (2, 16), generator=generator) for _ in range(3)]
    found = {}

    def watch(self, block, items, make_loss):
        loss = make_loss()
        assert isinstance(loss, LocalModel)
        with loss.batches.learning():
            for number in range(6):
                (loss.of_sequences([number]) / 6).backward()
        found.update({item.name: item.parameter.grad for item in items})
        return {}, []

    monkeypatch.setattr(PredictionPass, "train", watch)
    settings = settings_of(config, originals[kind], checkpoints[kind], batches, tmp_path)
    pair = settings.pair
    PredictionPass(settings, "1 predictions", {}, 1.0).run()

    student = pair.load_student()
    original = load_whole(str(originals[kind]), "cpu").float()
    items = trainables(student, config.train, pair.packed.dtype, lent=pair.lent)
    for tokens in batches:
        with torch.no_grad():
            wanted = original(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        ours = student(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        divergence = torch.nn.functional.kl_div(ours, wanted, reduction="sum", log_target=True)
        (divergence / (3 * tokens.numel())).backward()
    expected = {item.name: item.parameter.grad for item in items if item.name.startswith("model.layers")}
    assert set(found) == set(expected) and found
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-3 * size + 1e-7, msg=name)


def test_a_block_is_told_what_later_ones_have_learned(wishes, originals, checkpoints, tmp_path, monkeypatch):
    config = wishes(mode="block").resolved(1000, 128)
    batches = list(torch.randint(30, (8, 16), generator=torch.Generator().manual_seed(0)).split(2))
    found, factors = [], (1.0, 1.0, 1.02)

    def watch(_self, block, items, make_loss):
        loss = make_loss()
        if block == 1:
            for item in items:
                item.parameter.data.mul_(factors[len(found)])
        else:
            found.append(torch.cat(loss.slopes))
        return {}, []

    monkeypatch.setattr(PredictionPass, "train", watch)
    settings = settings_of(config, originals["plain"], checkpoints["plain"], batches, tmp_path)
    for _ in factors:
        PredictionPass(settings, "1 predictions", {}, 1.0).run()
    assert torch.equal(found[0], found[1])
    assert (found[2] - found[0]).norm() > 0.01 * found[0].norm()


@pytest.mark.ci
def test_what_blocks_are_told_is_near_the_truth(demo, tmp_path, monkeypatch):
    """Where the last block has changed: gradients of those before it, as told, against those of the model that it makes."""
    config = FinetuneConfig(mode="block", model_name=str(demo), nsamples=96, seq_len=128, batch_size=80).resolved(10**6, 128)
    tokens = tuning_tokens(config, DEMO, torch.device("cpu"), lambda *_: None)
    settings = settings_of(config, DEMO, demo, list(tokens.split(16)), tmp_path)
    last = settings.num_blocks - 1

    def gradients(start, factor):
        """By blocks; and the last block's tensors, multiplied by the factor."""
        found, changed = {}, {}

        def watch(_self, block, items, make_loss):
            if block < last:
                make_loss().train(0)
                found[block] = torch.cat([item.parameter.grad.flatten() for item in items])
            for item in items if block == last else []:
                changed[item.name] = item.parameter.data.mul_(factor).clone()
            return {}, []

        monkeypatch.setattr(PredictionPass, "train", watch)
        PredictionPass(settings, "1 predictions", start, 1.0).run()
        return found, changed

    old, _ = gradients({}, 1.0)
    told, changed = gradients({}, 0.95)
    true, _ = gradients(changed, 1.0)
    errors = [((told[block] - true[block]).norm() / (old[block] - true[block]).norm()).item() for block in range(last)]
    assert max(errors) < 0.9 and sum(errors) / len(errors) < 0.75


def test_each_pass_goes_on_from_the_last(wishes, checkpoints):
    notes = []
    progress = Silent()
    progress.note = notes.append
    result = finetune_model(wishes(mode="block", passes=("predictions", "outputs", "predictions")), progress=progress)
    told = [note for note in notes if "KL from the original" in note]
    assert [note.split(":")[0] for note in told] == ["1 predictions", "2 outputs", "3 predictions"]
    numbers = [[float(word) for word in note.split() if word[0].isdigit() and "." in word] for note in told]
    assert numbers[0][1] == numbers[1][0] and numbers[1][1] == numbers[2][0]
    assert numbers[0][1] < numbers[0][0]
    assert result.held_out == pytest.approx((numbers[0][0], numbers[2][1]), abs=1e-4)
    assert changed_names(checkpoints["plain"], result.folder / "packed_model")


@pytest.mark.parametrize(
    "phase, count", [("1 outputs, block 1", 2), ("2 predictions, block 0", 11), ("3 predictions, block 1", 2)]
)
@pytest.mark.ci
def test_a_stopped_pass_goes_on(phase, count, wishes):
    whole = finetune_model(wishes(mode="block"))
    stop = Stop(phase, count)
    with pytest.raises(KeyboardInterrupt):
        finetune_model(wishes(mode="block"), progress=stop)
    again = finetune_model(wishes(), resume=stop.folder)
    assert again.held_out == whole.held_out
    assert changed_names(whole.folder / "packed_model", again.folder / "packed_model") == set()


@pytest.mark.parametrize("kind", [OutputPass, PredictionPass])
def test_a_pass_begins_where_the_last_ended(kind, wishes, originals, checkpoints, tmp_path, monkeypatch):
    config = wishes(mode="block").resolved(1000, 128)
    batches = list(torch.randint(30, (6, 16), generator=torch.Generator().manual_seed(0)).split(2))
    seen = {}

    def watch(_self, _block, items, make):
        make()
        seen.update({item.name: item.parameter.detach().clone() for item in items})
        return {}, []

    monkeypatch.setattr(BlockPass, "train", watch)
    settings = settings_of(config, originals["plain"], checkpoints["plain"], batches, tmp_path)
    kind(settings, "1", {}, 1.0).run()
    name = "model.layers.1.mlp.up_proj.weight_scale"
    start, before = {name: 2 * seen[name].half()}, seen[name]
    kind(settings, "2", start, 1.0).run()
    torch.testing.assert_close(seen[name], 2 * before)


def test_damping_reaches_the_loss_of_every_block(wishes, originals, checkpoints, tmp_path, monkeypatch):
    config = wishes(mode="block").resolved(1000, 128)
    batches = list(torch.randint(30, (6, 16), generator=torch.Generator().manual_seed(0)).split(2))
    losses = []
    monkeypatch.setattr(PredictionPass, "train", lambda _self, _block, _items, make: losses.append(make()) or ({}, []))
    settings = settings_of(config, originals["plain"], checkpoints["plain"], batches, tmp_path)
    PredictionPass(settings, "1 predictions", {}, 3.0).run()
    assert [loss.damping for loss in losses] == [3.0, 3.0]


def test_steps_of_a_pass(wishes):
    folder = finetune_model(wishes(mode="block", passes=("outputs", "predictions"), steps=9, eval_every=3)).folder
    curves = json.loads((folder / "curves.json").read_text())["curves"]
    steps = {name: [(e["step"], "held_out" in e) for e in history] for name, history in curves.items()}
    assert steps["1 outputs: 0"] == [(n, n % 3 == 0) for n in range(10)]
    assert steps["2 predictions: 1"] == [(n, True) for n in range(4)]


class Valley:
    """A loss that is least at a place."""

    def __init__(self, parameter, place):
        self.parameter, self.place = parameter, place

    def held_out(self):
        return (self.parameter - self.place).square().sum().item()

    def train(self, step):
        loss = (self.parameter - self.place).square().sum()
        loss.backward()
        return loss.item()


@pytest.mark.parametrize(
    "place, rates, end", [(0.5, [], 0.5), (0.05, [0.5, 0.125], 0.03125), (0.001, [0.5, 0.125, 0.0312], 0.0)]
)
def test_a_block_that_gains_nothing_is_tried_with_smaller_steps(place, rates, end):
    told, logged = [], []
    one = PredictionPass.__new__(PredictionPass)
    one.settings = SimpleNamespace(told=lambda _, units: told.append(units), job=SimpleNamespace(log=logged.append))
    one.name, one.schedule = "2 predictions", Schedule(1, 0.5, 0, 0.0, eval_every=1, patience=4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    fit = one._fit(3, [Trainable("a", parameter, "scales", torch.float32, 1.0)], Valley(parameter, place), 7.0)
    assert parameter.item() == pytest.approx(end) and fit.best_values["a"].item() == pytest.approx(end)
    assert logged == [f"2 predictions, block 3: nothing gained at learning rate {rate:.3g}" for rate in rates]
    assert sum(told) == 7.0, "what is done once more is not told twice"


@pytest.mark.parametrize(
    "part, rate, square",
    [(1.0, 1e-3, 0.75), (0.75, 1e-3, 1.0), (0.375, 1e-3, 2.0), (0.125, 1e-3, 6.0), (0.0, 1e-3, 6.0), (0.0, 1e-12, 0.0625)],
)
@pytest.mark.ci
def test_damping_aims_at_most_of_the_way_unless_it_lets_nothing_learn(part, rate, square, wishes, monkeypatch):
    asked = []
    real = PredictionPass.__init__
    monkeypatch.setattr(PredictionPass, "__init__", lambda self, *args: asked.append(args[-1]) or real(self, *args))
    found = lambda pair, changed, rest, told, before, parts: (dict(before), dict.fromkeys(parts, 1.0) | {part: 0.5})  # noqa: E731
    monkeypatch.setattr(tune_blocks, "best_part", found)
    finetune_model(wishes(mode="block", passes=("predictions", "predictions"), learning_rate=rate))
    assert asked == pytest.approx([1.0, square**0.5])


def test_a_way_that_leads_too_far_is_not_taken(wishes, monkeypatch):
    from vptq.errors import NumericalError
    from vptq.pipeline import tune_check

    real, calls = tune_check.compare, []

    def overflow(*args):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise NumericalError("logits are not finite")
        return real(*args)

    monkeypatch.setattr(tune_check, "compare", overflow)
    result = finetune_model(wishes(mode="block", passes=("outputs",)))
    assert len(calls) == 3 and result.held_out[1] <= result.held_out[0]


def test_too_little_memory_is_told_before_anything_is_written(wishes, monkeypatch, tmp_path):
    monkeypatch.setattr("vptq.pipeline.prediction_pass.free_memory", lambda _device: 300_000)
    with pytest.raises(UsageError, match=r"too little memory(.|\n)*for 640 tokens(.|\n)*--passes outputs"):
        finetune_model(wishes(mode="block"))
    assert not list(tmp_path.glob("*/finetune_*"))
    assert finetune_model(wishes(mode="block", passes=("outputs",))).held_out


def test_states_are_kept_off_the_gpu_where_they_would_fill_it(wishes, monkeypatch):
    asked = []
    real = Pair.packed_runner
    monkeypatch.setattr(Pair, "packed_runner", lambda self, spare=False: asked.append(spare) or real(self, spare))
    finetune_model(wishes(mode="block", passes=("predictions",)))
    rooms = iter([1 << 40, 1 << 40, 300_000])
    monkeypatch.setattr("vptq.pipeline.prediction_pass.free_memory", lambda _device: next(rooms))
    finetune_model(wishes(mode="block", passes=("predictions",)))
    assert asked == [False, True]


def test_a_model_that_is_quantized_is_tuned_within_memory(tiny_llama, text_file, tmp_path, monkeypatch):
    """Hours of quantizing don't end in a refusal."""
    monkeypatch.setattr("vptq.pipeline.prediction_pass.free_memory", lambda _device: 1000)
    notes, progress = [], Silent()
    progress.note = notes.append
    _, tuned = quantize_and_tune(config_of(tiny_llama, text_file, tmp_path, finetune="block", nsamples=6), progress=progress)
    curves = json.loads((tuned.folder / "curves.json").read_text())["curves"]
    assert set(curves) == {"1 outputs: 0", "1 outputs: 1"}
    assert any("too little memory" in note for note in notes)


class Counting(Silent):
    """Adds up what it is told."""

    total = done = 0.0

    def start(self, total, done):
        self.total, self.done = total, done

    def advance(self, units):
        self.done += units


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "block"},
        {"mode": "e2e"},
        {"mode": "e2e", "train": ("indices",), "rounds": 3, "round_steps": 2, "steps": None, "eval_every": None},
        {"mode": "e2e", "train": ("indices", "norms"), "round_steps": 2, "add": None},
    ],
    ids=["block", "e2e", "indices", "indices and norms"],
)
@pytest.mark.ci
def test_progress_ends_at_its_end(settings, wishes):
    progress = Counting()
    patience = 4 if settings.get("train") == ("indices",) else 100
    finetune_model(wishes("trellis", **{"patience": patience} | settings), progress=progress)
    assert progress.done == pytest.approx(progress.total, rel=1e-6)
