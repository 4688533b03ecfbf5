"""Linears with one input are multiplied together once that is known, and give what they give alone."""

import copy

import pytest
import torch

from tests.nn.test_fused import random_module
from vptq.nn.companions import Companions
from vptq.nn.vquant_linear import prepare_kernels


class Linear:
    """Stands for a packed linear: its product is x times a number."""

    def __init__(self, factor):
        self.factor = factor


class Parent:
    def __init__(self, count):
        self.linears = [Linear(i + 2) for i in range(count)]
        self.company = Companions()
        self.launched = []
        self.together = True

    def call(self, number, x):
        linear = self.linears[number]
        found = self.company.product(linear, x, self.multiply_all)
        if found is None:
            self.launched.append([linear.factor])
            return x * linear.factor
        return found

    def multiply_all(self, linears, x):
        if not self.together:
            return None
        self.launched.append([linear.factor for linear in linears])
        return [x * linear.factor for linear in linears]


def check(parent, calls, launched):
    """calls: (linear, x) one after the other."""
    parent.launched.clear()
    for number, x in calls:
        assert torch.equal(parent.call(number, x), x * parent.linears[number].factor)
    assert parent.launched == launched


def test_those_that_followed_are_made_together_the_next_time():
    parent = Parent(4)
    x, other = torch.ones(3), torch.full((3,), 2.0)
    check(parent, [(0, x), (1, x), (2, x), (3, other)], [[2], [3], [4], [5]])
    for _ in range(3):
        x, other = torch.randn(3), torch.randn(3)
        check(parent, [(0, x), (1, x), (2, x), (3, other)], [[2, 3, 4], [5]])
    equal = [torch.zeros(3) for _ in range(3)]  # equal numbers are not the same tensor
    check(parent, [(0, equal[0]), (1, equal[1]), (2, equal[2])], [[2, 3, 4], [3], [4]])


def test_what_nobody_fetched_is_not_made_again():
    parent = Parent(3)
    x = torch.ones(3)
    check(parent, [(0, x), (1, x), (2, x)], [[2], [3], [4]])
    check(parent, [(0, x), (1, x)], [[2, 3, 4]])
    check(parent, [(0, x), (1, x)], [[2, 3]])
    check(parent, [(0, x), (1, x), (2, x)], [[2, 3], [4]])


def test_what_can_not_go_together_goes_alone():
    parent = Parent(2)
    parent.together = False
    x = torch.ones(3)
    for _ in range(3):
        check(parent, [(0, x), (1, x)], [[2], [3]])


def test_what_was_written_to_is_not_fetched():
    parent = Parent(2)
    x = torch.ones(3)
    check(parent, [(0, x), (1, x)], [[2], [3]])
    check(parent, [(0, x)], [[2, 3]])
    x.add_(1)
    check(parent, [(1, x)], [[3]])
    with torch.inference_mode():
        y = torch.ones(3)
        check(parent, [(0, y), (1, y)], [[2], [3]])


def test_the_last_is_left_out_where_not_all_go_together():
    parent = Parent(4)
    real = parent.multiply_all
    parent.multiply_all = lambda linears, x: None if len(linears) > 2 else real(linears, x)
    x = torch.ones(3)
    for launched in ([[2], [3], [4], [5]], [[2], [3], [4], [5]], [[2], [3], [4], [5]], [[2, 3], [4], [5]], [[2, 3], [4], [5]]):
        check(parent, [(i, x) for i in range(4)], launched)


def test_copies_begin_empty():
    parent = Parent(2)
    x = torch.ones(3)
    check(parent, [(0, x), (1, x)], [[2], [3]])
    parent.call(0, x)
    other = copy.deepcopy(parent.company)
    assert not other._kept and not other._followers
    parent.company.forget()
    assert not parent.company._kept


class Attention(torch.nn.Module):
    def __init__(self, device, generator, settings):
        super().__init__()
        shapes = {"q": (384, 512), "k": (128, 512), "v": (128, 512)}
        for (name, shape), setting in zip(shapes.items(), settings, strict=True):
            setattr(self, name, random_module(setting, shape, torch.float16, device, generator, bias=name == "k"))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings, launches",
    [
        (["v8k4096"] * 3, 1),
        (["rotated"] * 3, 1),
        (["trellis 2"] * 3, 1),
        (["outliers"] * 3, 1),
        (["v8k4096"] * 2 + ["v6k4096"], 2),
    ],
)
@pytest.mark.parametrize("count", [1, 5])
def test_attention_takes_one_launch(settings, launches, count, generator, monkeypatch):
    from vptq.nn.kernels import fused

    device = torch.device("cuda", 0)
    module = Attention(device, generator, settings)
    x = [torch.randn(count, 512, generator=generator).to(device).half() for _ in range(3)]
    with torch.no_grad():
        alone = [module(one) for one in x]
        module.dtype = torch.float16
        assert prepare_kernels(module) == 3
        module(x[0])
        module(x[0])
        seen = []
        real = fused.products
        monkeypatch.setattr(fused, "products", lambda *args: seen.append(len(args[1])) or real(*args))
        for one, right in zip(x, alone, strict=True):
            seen.clear()
            for y, expected in zip(module(one), right, strict=True):
                torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
            assert len(seen) == launches
