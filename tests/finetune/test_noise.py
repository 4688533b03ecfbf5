"""Noise like a quantized model's error: what it keeps of the errors, what becomes of weights and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vptq.finetune import noise as noise_module
from vptq.finetune.noise import ErrorNoise, measure_shrinkage

ROWS, COLUMNS, GROUPS = 24, 8, 3


@pytest.fixture
def linears():
    torch.manual_seed(0)
    return {f"l{i}": nn.Linear(COLUMNS, ROWS if i < 3 else 6, bias=False) for i in range(5)}


@pytest.fixture
def errors(linears):
    generator = torch.Generator().manual_seed(1)
    draws = {name: torch.randn(linear.weight.shape, generator=generator) for name, linear in linears.items()}
    return {name: (own * torch.linspace(0.1, 1, own.shape[1])).bfloat16().float() for name, own in draws.items()}


def make(linears, errors, seed=0, groups=GROUPS, shrinkage=0.0):
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    return ErrorNoise(weights, errors, dict.fromkeys(linears, shrinkage), dict.fromkeys(linears, groups), seed)


def draw(noise, number):
    """What a draw adds to weights of the sizes that they had, by name."""
    found = {}
    for place, lot in enumerate(noise.lots):
        drawn = noise_module._drawn(lot, list(range(len(lot.names))), noise._seed_of(number, place))
        found |= zip(lot.names, drawn, strict=True)
    return found


def test_rows_change_places_within_their_groups_and_signs(linears, errors):
    drawn = draw(make(linears, errors), 3)
    for name, error in errors.items():
        found, rows = drawn[name].float(), len(error) // GROUPS
        torch.testing.assert_close(found.norm(dim=1), error.norm(dim=1), rtol=2e-2, atol=0)
        cosines = nn.functional.normalize(found, dim=1) @ nn.functional.normalize(error, dim=1).T
        best, places = cosines.abs().max(1)
        assert bool((best > 0.999).all())
        assert sorted(places.tolist()) == list(range(len(error))), "every row is somewhere"
        assert bool((places // rows == torch.arange(len(error)) // rows).all()), "in its own group"
        assert name != "l0" or places.tolist() != sorted(places.tolist())
        signs = cosines.gather(1, places[:, None]).sign()
        assert name != "l0" or (bool((signs > 0).any()) and bool((signs < 0).any()))


def test_a_row_of_noughts_stays_one(linears, errors):
    errors["l0"][5] = 0
    drawn = draw(make(linears, errors, groups=1), 0)["l0"]
    assert bool(drawn.isfinite().all())
    assert not drawn[5].any()


def test_draws_differ_and_depend_on_the_seed_alone(linears, errors):
    first, same, other = make(linears, errors), make(linears, errors), make(linears, errors, seed=1)
    for name in linears:
        assert torch.equal(draw(first, 4)[name], draw(same, 4)[name])
        assert not torch.equal(draw(first, 4)[name], draw(first, 5)[name])
        assert not torch.equal(draw(first, 4)[name], draw(other, 4)[name])
    assert not torch.equal(draw(first, 4)["l0"].abs().sum(1), draw(first, 4)["l1"].abs().sum(1))


@pytest.mark.parametrize("elements", [1 << 26, 1])
def test_what_is_added_is_the_draw_and_goes_again(linears, errors, elements, monkeypatch):
    monkeypatch.setattr(noise_module, "LOT_ELEMENTS", elements)
    noise = make(linears, errors, shrinkage=0.2)
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    chosen = {name: linears[name] for name in ("l0", "l2", "l4")}
    drawn = draw(noise, 7)
    with noise.added(chosen, 7):
        for name, linear in linears.items():
            wanted = 0.8 * before[name] + drawn[name].float() if name in chosen else before[name]
            torch.testing.assert_close(linear.weight.detach(), wanted)
    for name, linear in linears.items():
        assert torch.equal(linear.weight, before[name]), "to the bit"


def test_weights_are_whole_again_after_a_fault(linears, errors):
    noise, before = make(linears, errors), linears["l0"].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), noise.added(linears, 0):
        raise KeyboardInterrupt
    assert torch.equal(linears["l0"].weight, before)


def test_noise_grows_with_the_weight_and_gradients_know_it(linears, errors):
    noise = make(linears, errors, shrinkage=0.3)
    with torch.no_grad():
        for linear in linears.values():
            linear.weight.mul_(1.7).add_(0.01)
    drawn, generator = draw(noise, 2), torch.Generator().manual_seed(2)
    inputs = torch.randn(5, COLUMNS, generator=generator)
    with noise.added(linears, 2):
        for name, linear in linears.items():
            if name != "l3":  # an expert that no token came to
                linear(inputs).square().sum().backward()
    norms = {name: own.item() for lot in noise.lots for name, own in zip(lot.names, lot.norms, strict=True)}
    for name, linear in linears.items():
        if name == "l3":
            assert linear.weight.grad is None
            continue
        weight = linear.weight.detach().clone().requires_grad_()
        noisy = 0.7 * weight + drawn[name].float() * weight.norm() / norms[name]
        (inputs @ noisy.T).square().sum().backward()
        torch.testing.assert_close(linear.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_what_shrinks_is_kept_and_only_the_rest_is_drawn(linears):
    """Of an error that is the weight's own shrinking nothing is left to draw."""
    noise = make(linears, {name: -0.25 * linear.weight.detach() for name, linear in linears.items()}, shrinkage=0.25)
    assert not any(own.any() for own in draw(noise, 0).values())
    before = linears["l1"].weight.detach().clone()
    with noise.added(linears, 0):
        torch.testing.assert_close(linears["l1"].weight.detach(), 0.75 * before)


def test_shrinkage_is_of_the_outputs(linears):
    """Not of the weights: what inputs don't have does not count."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears, self.weight = nn.ModuleList([linears["l0"], linears["l1"]]), nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache):
            states = nn.functional.one_hot(input_ids, COLUMNS).float()
            return self.linears[0](states)

    errors = {name: torch.zeros(ROWS, COLUMNS) for name in ("l0", "l1")}
    first, second = linears["l0"].weight.detach()[:, :2].unbind(1)
    errors["l0"][:, 0], errors["l0"][:, 1], errors["l0"][:, 2] = -0.5 * first, -0.1 * second, 9.0
    watched = {name: linears[name] for name in errors}
    found = measure_shrinkage(Model(), watched, errors, [torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 1]])])
    a, b = first.square().sum().item(), second.square().sum().item()
    assert found == {"l0": pytest.approx((0.5 * a + 0.1 * b) / (a + b)), "l1": 0.0}
    assert not any(linear._forward_hooks for linear in watched.values())
