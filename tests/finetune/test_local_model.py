"""What one block sees of the model's loss: its slope is the true one, its curvature the Fisher matrix's."""

import pytest
import torch

from tests.nn.test_vquant_linear import module_of, packed
from vptq.finetune.blockwise import BlockBatches, OutputMatching
from vptq.finetune.local_model import LocalModel, hand_on, linearise, sizes_of
from vptq.finetune.unpacked import Unpacked


class OneBlock:
    """A runner whose block is x + linear(x)."""

    device = torch.device("cpu")

    def __init__(self, linear):
        self.linear = linear

    def forward_block(self, _block, hidden, _tokens):
        return hidden + torch.nn.functional.pad(self.linear(hidden), (0, 18))


@pytest.fixture
def linear(generator):
    _, layer, tensors = packed("residual", generator, dtype=torch.float32)
    return module_of(layer, tensors, dtype=torch.float32)


def batches_of(linear, inputs, **changes):
    settings = {"batch": 4, "num_held_out": 1, "seed": 0, "compute": torch.float32}
    tokens = [torch.zeros(x.shape[:2], dtype=torch.int64) for x in inputs]
    return BlockBatches(OneBlock(linear), 0, inputs, tokens, **settings | changes)


def problem_of(linear, generator):
    inputs = [torch.randn(2, 5, 48, generator=generator) for _ in range(4)]
    slopes = [[torch.randn(2, 5, 48, generator=generator) for _ in range(2)] for _ in inputs]
    return inputs, slopes


def weight_of(linear):
    """Of the block as a whole."""
    return torch.nn.functional.pad(linear.dequantize().float(), (0, 0, 0, 18)) + torch.eye(48)


@pytest.mark.parametrize("unpack", [False, True])
def test_block_is_linearised(linear, generator, unpack):
    inputs, slopes = problem_of(linear, generator)
    unpacked = Unpacked(linear, torch.float32) if unpack else None
    slopes[2][1][1, 4] = 0  # the last token has no label
    outputs, (weights, metric) = linearise(batches_of(linear, inputs, unpacked=unpacked), slopes)
    expected = torch.zeros(48, 48)
    for x, found, (_, label), sizes in zip(inputs, outputs, slopes, weights, strict=True):
        torch.testing.assert_close(found, x @ weight_of(linear).T, rtol=1e-4, atol=1e-4)
        for y, u, size in zip(found.flatten(0, 1), label.flatten(0, 1), sizes.flatten(), strict=True):
            assert size.item() == pytest.approx((y.norm() * u.norm()).item() ** 2, rel=1e-3)
            expected += torch.outer(u, u) / u.dot(u).clamp_min(1e-9) / 40
    torch.testing.assert_close(metric, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_slopes_are_handed_on_with_what_the_block_has_done(linear, generator, learned, unpack):
    inputs, slopes = problem_of(linear, generator)
    linear.weight_scale.requires_grad_()
    batches = batches_of(linear, inputs, unpacked=Unpacked(linear, torch.float32) if unpack else None)
    outputs, _ = linearise(batches, slopes)
    if learned:
        with torch.no_grad():
            linear.weight_scale.mul_(1.2)
    handed = hand_on(batches, slopes, outputs)
    weight = weight_of(linear)
    for x, before, (of_divergence, u), (first, second) in zip(inputs, outputs, slopes, handed, strict=True):
        change = x @ weight.T - before
        told = of_divergence + torch.einsum("nti, ntj, ntj -> nti", u, u, change)
        torch.testing.assert_close(second, u @ weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(first, told @ weight, rtol=1e-3, atol=1e-3)
        assert torch.allclose(first, of_divergence @ weight, rtol=1e-3, atol=1e-3) != learned


def test_loss_is_what_it_says(linear, generator):
    inputs, slopes = problem_of(linear, generator)
    batches = batches_of(linear, inputs)
    outputs, curvature = linearise(batches, slopes)
    loss = LocalModel(batches, outputs, [pair[0] for pair in slopes], curvature, 3.0, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.5, 4.5])
    assert loss.of_sequences([2, 3]).item() == pytest.approx(2.0) and loss.held_out() == pytest.approx(4.0)
    with torch.no_grad():
        linear.weight_scale.mul_(1.1)
        change = batches.output(inputs[1], batches.tokens[1]) - outputs[1]
    relative = change / outputs[1].norm(dim=-1, keepdim=True)
    weights, metric = curvature
    tokens = (own.flatten(0, 1) for own in (slopes[1][0], change, relative, weights[1][..., None]))
    right = 2.0 + sum((g @ d + 0.5 * 3.0 * w * r @ metric @ r) / 10 for g, d, r, w in zip(*tokens, strict=True))
    assert loss.of_sequences([2, 3]).item() == pytest.approx(right.item(), rel=1e-4)


def test_a_token_without_size_is_no_division_by_nought():
    assert torch.isfinite(1 / sizes_of(torch.zeros(2, 3, 4))).all()


def sequences_of(loss, monkeypatch, steps):
    """The sequences of each step."""
    seen = []
    monkeypatch.setattr(loss, "_over", lambda numbers, _use: seen.append(numbers) or 0.0)
    for step in range(steps):
        loss.train(step)
    return seen


def test_steps_draw_sequences_whatever_goes_at_once(linear, generator, monkeypatch):
    x = torch.randn(8, 5, 48, generator=generator)
    found = []
    linear.weight_scale.requires_grad_()
    for size in (1, 2, 3, 4, 6):
        parts = [*x[:6].split(size), *x[6:].split(size)]
        loss = OutputMatching(batches_of(linear, parts, batch=4, num_held_out=len(x[6:].split(size))), parts)
        seen = sequences_of(loss, monkeypatch, 20)
        assert all(len(set(step)) == 4 and max(step) < 6 for step in seen) and len({tuple(sorted(s)) for s in seen}) > 5
        monkeypatch.undo()
        torch.testing.assert_close(loss.batches.rows(parts, [5, 0, 6, 7]), x[[5, 0, 6, 7]])
        found.append((seen, loss.train(3), loss.held_out()))
    for seen, trained, held_out in found[1:]:
        assert seen == found[0][0] and (trained, held_out) == pytest.approx(found[0][1:])
