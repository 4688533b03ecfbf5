"""The loss end to end against its spelled-out form; which sequences a step sees; processes that share them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vptq.finetune import distill
from vptq.finetune.distill import Distillation, Weights, distillation_loss


@pytest.mark.parametrize("weights", [Weights(1.0, 0.0), Weights(0.0, 1.0), Weights(0.7, 0.4)])
@pytest.mark.parametrize("chunk", [1 << 25, 40])
def test_loss_and_its_gradient(weights, chunk, generator, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_LOGITS", chunk)
    student = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (2, 6), generator=generator)
    expected = torch.zeros((), dtype=torch.float64)
    for sequence in range(2):
        for place in range(5):
            p, q = teacher[sequence, place].softmax(0), student[sequence, place].softmax(0)
            expected = expected + weights.kl * (p * (p / q).log()).sum() - weights.ce * q[tokens[sequence, place + 1]].log()
    found = distillation_loss(student.float(), teacher, tokens, weights)
    assert found.item() == pytest.approx(expected.item() / 10, rel=1e-5)
    own, right = (torch.autograd.grad(loss, student)[0] for loss in (found, expected / 10))
    torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-6)


class Tiny(nn.Module):
    """Logits from a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(5)))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def distillation(model, tokens, **changes):
    settings = {"batch": 4, "micro_batch": 3, "num_held_out": 3, "seed": 1, "device": torch.device("cpu")}
    rows = torch.randn(9, 9, generator=torch.Generator().manual_seed(6))
    teacher = lambda numbers: rows[tokens[numbers]]  # noqa: E731
    return Distillation(model, tokens, teacher, Weights(), compute=torch.float32, **settings | changes)


@pytest.fixture
def tokens(generator):
    return torch.randint(9, (10, 5), generator=generator)


def test_every_sequence_is_seen_once_an_epoch_and_held_out_ones_never(tokens):
    found = distillation(Tiny(), tokens)
    seen = [number for step in range(7) for number in found.sequences_of(step)]
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert seen[:7] != seen[7:14], "in another order"
    assert found.sequences_of(5) == distillation(Tiny(), tokens).sequences_of(5), "whoever asks, and whenever"


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_do_what_one_does(world, tokens):
    alone = Tiny()
    single = distillation(alone, tokens)
    loss, held_out = single.train(0), single.held_out()
    sums, losses, looks = torch.zeros(9, 9), 0.0, 0.0
    for rank in range(world):
        model = Tiny()
        part = distillation(model, tokens, rank=rank, world=world, micro_batch=1)
        losses += part.train(0)
        looks += part.held_out()
        sums += model.table.grad
    assert losses == pytest.approx(loss) and looks == pytest.approx(held_out)
    torch.testing.assert_close(sums, alone.table.grad)
