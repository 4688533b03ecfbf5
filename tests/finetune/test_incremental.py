"""Parts of a model, and Hessians of a model as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vptq.calibration.whole import LossHessians
from vptq.finetune.incremental import parts_of


def test_parts_are_runs_of_about_equal_weight():
    linears = [(f"l{n}", size) for n, size in enumerate([4, 4, 8, 8, 4, 4, 16, 16])]
    parts = parts_of(linears, 4)
    assert [name for part in parts for name in part] == [name for name, _ in linears]
    assert parts == [("l0", "l1", "l2"), ("l3", "l4", "l5"), ("l6",), ("l7",)]
    assert parts_of(linears[:2], 9) == [("l0",), ("l1",)], "no part is empty"
    assert parts_of(linears, 1) == [tuple(name for name, _ in linears)]


@pytest.mark.parametrize("groups", [1, 3])
def test_hessians_are_weighed_by_the_squared_gradients(groups):
    torch.manual_seed(0)
    first, second = nn.Linear(5, 6, bias=False), nn.Linear(6, 4)
    watcher = LossHessians({"first": first}, {"first": groups})
    expected = torch.zeros(groups, 5, 5, dtype=torch.float64)
    for count in (7, 9):
        x = torch.randn(count, 5)
        with watcher.watching():
            second(torch.tanh(first(x))).square().sum().backward()
        out = (x @ first.weight.T).detach().requires_grad_()
        second(torch.tanh(out)).square().sum().backward()
        for group, gradient in enumerate(out.grad.double().chunk(groups, 1)):
            weights = gradient.square().mean(1)
            expected[group] += (x.double() * weights[:, None]).T @ x.double()
    found = watcher.collect()["first"]
    torch.testing.assert_close(found, (expected / 16).float(), rtol=1e-5, atol=1e-6)


def test_a_linear_that_no_token_came_to_counts_all_inputs_alike():
    watcher = LossHessians({"expert": nn.Linear(3, 2)}, {"expert": 2})
    assert torch.equal(watcher.collect()["expert"], torch.eye(3).expand(2, 3, 3))
