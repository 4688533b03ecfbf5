"""Training itself: schedule, units, best values, early stop, divergence, going on later."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from tests.nn.test_vquant_linear import module_of, packed
from vptq.finetune.fit import Fit, Schedule
from vptq.finetune.trainable import Trainable, at_rest, rate_groups, trainables


def schedule(**changes):
    settings = {"steps": 20, "learning_rate": 0.1, "warmup_steps": 4, "weight_decay": 0.0, "eval_every": 5, "patience": 3}
    return Schedule(**settings | changes)


def parabola(start=(3.0, -2.0), stored=torch.float32, **changes):
    """A Fit whose loss is the squared distance from nought."""
    parameter = nn.Parameter(torch.tensor(start))
    items = [Trainable("p", parameter, "scales", stored, 1.0)]

    def train(_step):
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    return Fit(items, schedule(**changes), train, lambda: parameter.detach().square().sum().item()), parameter


def test_rate_rises_then_falls_as_a_cosine():
    plan = schedule()
    assert [plan.factor(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert plan.factor(4) == 1.0 and plan.factor(12) == pytest.approx(0.5)
    assert 0 < plan.factor(19) < 0.02
    assert schedule(warmup_steps=0).factor(0) == 1.0


def test_finds_the_lowest_point_and_tells_its_history():
    fit, parameter = parabola(steps=60, learning_rate=0.3, patience=99)
    fit.run()
    assert fit.first == pytest.approx(13.0) and fit.best < 0.1
    assert [entry["step"] for entry in fit.history] == list(range(61))
    looks = [entry["held_out"] for entry in fit.history if "held_out" in entry]
    assert len(looks) == 13 and looks[0] == pytest.approx(13.0) and min(looks) == fit.best
    assert parameter.detach().square().sum().item() == pytest.approx(fit.best)
    assert parameter.grad is None


def test_keeps_the_best_values_where_it_only_gets_worse():
    fit, parameter = parabola((0.0, 0.0), patience=2)
    fit.held_out = lambda: 100.0 + parameter.detach().square().sum().item()
    fit.train = lambda step: (parameter.grad is None and setattr(parameter, "grad", torch.ones(2))) or 1.0
    fit.run()
    assert parameter.tolist() == [0.0, 0.0] and fit.best_step == 0
    assert "no gain in 2 looks" in fit.stopped and fit.step == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_it_with_the_best_kept(bad):
    fit, parameter = parabola()
    real = fit.train
    fit.train = lambda step: real(step) if step < 7 else bad
    fit.run()
    assert fit.stopped.startswith("diverged at step 8") and fit.best_step == 5
    assert parameter.detach().square().sum().item() == pytest.approx(fit.best)


def test_gradients_that_are_no_numbers_end_it():
    fit, parameter = parabola()

    def train(_step):
        parameter.grad = torch.tensor([math.nan, 0.0])
        return 1.0

    fit.train = train
    fit.run()
    assert "diverged at step 1" in fit.stopped and parameter.tolist() == [3.0, -2.0]


def test_a_held_out_loss_far_above_the_first_ends_it():
    fit, parameter = parabola((0.1, 0.1), learning_rate=50.0, patience=99)
    fit.run()
    assert "diverged: the held-out loss" in fit.stopped and fit.step == 5
    assert parameter.tolist() == pytest.approx([0.1, 0.1])


def test_looks_see_values_as_they_are_stored():
    fit, parameter = parabola((1.0 + 2**-12, 0.0), stored=torch.float16)
    assert fit.items[0].rounded().tolist() == [1.0, 0.0]
    seen = []
    fit.held_out = lambda: seen.append(parameter.tolist()) or 1.0
    fit.run()
    assert seen[0] == [1.0, 0.0] and fit.best_values["p"].dtype == torch.float16
    with at_rest(fit.items):
        parameter.data.zero_()
    assert parameter.tolist() == [1.0, 0.0], "what was there before"


def test_goes_on_from_a_state_as_if_it_had_not_stopped():
    whole, _ = parabola()
    whole.run()
    first, _ = parabola()
    kept = []
    first.run(lambda fit: kept.append(_copy(fit.state())) if fit.step == 10 else None)
    again, parameter = parabola((9.0, 9.0))
    tensors, numbers = kept[0]
    again.load_state(tensors, json.loads(json.dumps(numbers)))
    again.run()
    told = [{k: v for k, v in entry.items() if k != "seconds"} for entry in again.history]
    assert told == [{k: v for k, v in entry.items() if k != "seconds"} for entry in whole.history]
    assert torch.equal(parameter, whole.items[0].parameter)


def test_goes_on_where_a_tensor_has_had_no_gradient(generator):
    fit, _ = parabola()
    idle = Trainable("idle", nn.Parameter(torch.ones(3)), "norms", torch.float32, 1.0)
    both = Fit([*fit.items, idle], fit.schedule, fit.train, fit.held_out)
    both.run()
    again, _ = parabola()
    last = Fit([*again.items, idle], fit.schedule, again.train, again.held_out)
    last.load_state(*_copy(both.state()))
    assert last.step == 20 and not last.optimizer.state[idle.parameter]


def _copy(state):
    tensors, numbers = state
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(numbers))


def test_rates_follow_the_size_of_the_numbers():
    small, large = (nn.Parameter(torch.full((4,), size)) for size in (0.031, 1.1))
    items = [Trainable("a", small, "scales", torch.float16, 2.0**-5), Trainable("b", large, "norms", torch.float16, 1.0)]
    assert {group["unit"]: group["lr"] for group in rate_groups(items, 0.01)} == {2.0**-5: 0.01 / 32, 1.0: 0.01}


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))


class Model(nn.Module):
    """A packed linear, a norm, and a head."""

    def __init__(self, linear):
        super().__init__()
        self.norm, self.linear, self.head = Norm(), linear, nn.Linear(30, 7)


@pytest.fixture
def model(generator):
    _, layer, tensors = packed("out", generator)
    return Model(module_of(layer, tensors))


def test_kinds_name_what_learns(model):
    def names(*kinds):
        return {item.name for item in trainables(model, kinds, torch.float16, head=model.head)}

    assert names("norms") == {"norm.weight"}
    assert names("codebooks") == {"linear.centroids.weight"}
    assert names("scales", "offsets") == {"linear.weight_scale", "linear.weight_bias"}
    assert names("head") == {"head.weight", "head.bias"}
    items = trainables(model, ["codebooks", "head"], torch.float16, head=model.head, prefix="blocks.3", head_rate=0.5)
    assert {item.name for item in items} == {"blocks.3.linear.centroids.weight", "blocks.3.head.weight", "blocks.3.head.bias"}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"linear.centroids.weight", "head.weight", "head.bias"}
    assert all(item.parameter.dtype == torch.float32 for item in items)
    assert trainables(nn.Linear(2, 2), ["norms"], torch.float16) == []


def test_units_are_sizes_as_powers_of_two(model):
    with torch.no_grad():
        model.linear.weight_scale.fill_(0.03)
        model.linear.weight_bias.zero_()
        model.head.weight.fill_(0.26)
    units = {i.name: i.unit for i in trainables(model, ["scales", "offsets", "norms", "head"], torch.float16, head=model.head)}
    assert units["linear.weight_scale"] == 2.0**-5 and units["norm.weight"] == 1.0 and units["head.weight"] == 0.25
    centroids = model.linear.centroids.weight.float().square().mean().sqrt().item()
    assert units["linear.weight_bias"] == 2.0 ** round(math.log2(centroids * 0.03)), "of the weights that it is added to"


def test_shared_codebooks_are_left_where_that_is_asked(generator):
    _, layer, tensors = packed("out", generator)
    lent = {name: tensor for name, tensor in tensors.items() if "centroids" not in name}
    owner, sharer = module_of(layer, tensors), module_of(dataclasses.replace(layer, codebook_of="0"), lent)
    sharer.share_codebook(owner)
    both = nn.ModuleList([owner, sharer])
    alone = {i.name for i in trainables(both, ["codebooks", "scales"], torch.float16, prefix="block", lent={"block.0"})}
    assert alone == {"block.0.weight_scale", "block.1.weight_scale"}
    assert {i.name for i in trainables(both, ["codebooks"], torch.float16)} == {"0.centroids.weight"}, "once"
