"""Perplexity by closed forms, and streamed against the whole model."""

from __future__ import annotations

import math

import pytest
import torch

from vptq.errors import NumericalError, UsageError
from vptq.evaluation.perplexity import cut_windows, streamed_perplexity, summarize, window_losses
from vptq.models.architecture import load_skeleton
from vptq.models.runner import BlockRunner


def cut(stream, **changes):
    return cut_windows(stream, **{"seq_len": 4, "stride": None, "limit": None, "dataset": "x"} | changes)


def test_uniform_logits_give_the_vocabulary_size():
    tokens = torch.randint(0, 50, (3, 8))
    found = summarize(window_losses(torch.zeros(3, 8, 50), tokens, 7), seq_len=8, stride=8, dataset="x")
    assert found.perplexity == pytest.approx(50) and found.num_tokens == 21 and found.num_windows == 3
    assert found.standard_error == pytest.approx(0, abs=1e-6)


def test_sure_and_right_gives_one():
    tokens = torch.tensor([[1, 2, 3, 0]])
    logits = torch.full((1, 4, 5), -1e4)
    logits[0, torch.arange(3), tokens[0, 1:]] = 0
    assert summarize(window_losses(logits, tokens, 3), seq_len=4, stride=4, dataset="x").perplexity == pytest.approx(1)


def test_standard_error_by_the_delta_method():
    losses = torch.tensor([[1.0, 3.0], [4.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    found = summarize(losses, seq_len=3, stride=3, dataset="x")
    means = torch.tensor([2.0, 4.0, 0.0])
    assert found.perplexity == pytest.approx(math.exp(2))
    assert found.standard_error == pytest.approx(math.exp(2) * means.std().item() / math.sqrt(3), rel=1e-6)


def test_windows_and_remainder():
    stream = torch.arange(11)
    assert cut(stream).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(stream, stride=2).shape == (4, 4)
    assert cut(stream, limit=1).shape == (1, 4)


def test_stride_counts_no_token_twice():
    """Windows of 4 every 2 tokens: each counts its last 2 targets, so targets 2..9 appear once each."""
    stream = torch.arange(10)
    windows = cut(stream, stride=2)
    targets = [t for w in windows.tolist() for t in w[-2:]]
    assert targets == list(range(2, 10))
    losses = window_losses(torch.zeros(len(windows), 4, 20), windows, 2)
    assert losses.shape == (4, 2)


@pytest.mark.parametrize(("changes", "message"), [({"seq_len": 20}, "shorter than one window"), ({"stride": 9}, "stride is 9")])
def test_impossible_windows_raise(changes, message):
    with pytest.raises(UsageError, match=message):
        cut(torch.arange(10), **changes)


def test_non_finite_logits_raise():
    with pytest.raises(NumericalError, match="not finite"):
        summarize(torch.tensor([[float("nan")]]), seq_len=2, stride=2, dataset="x")


@pytest.mark.parametrize("stride", [None, 16])
def test_streamed_equals_the_whole_model(tiny_llama, stride, device, monkeypatch):
    from transformers import AutoModelForCausalLM

    windows = torch.randint(0, 4096, (5, 32), generator=torch.Generator().manual_seed(0))
    skeleton = load_skeleton(tiny_llama)
    monkeypatch.setattr("vptq.evaluation.perplexity.BATCH_TOKENS", 64)  # batches of two windows, and one left over
    runner = BlockRunner(skeleton, skeleton.source(), device, torch.float32)
    found = streamed_perplexity(runner, windows, stride=stride, dataset="x")
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(device).eval()
    counted = min(stride or 32, 31)
    with torch.no_grad():
        losses = window_losses(whole(input_ids=windows.to(device)).logits, windows, counted)
    assert found.perplexity == pytest.approx(summarize(losses, seq_len=32, stride=32, dataset="x").perplexity, rel=1e-4)
    assert found.num_tokens == 5 * counted


def test_groups_of_windows_do_not_matter(tiny_llama, monkeypatch):
    windows = torch.randint(0, 4096, (5, 32), generator=torch.Generator().manual_seed(0))
    skeleton = load_skeleton(tiny_llama)
    runner = BlockRunner(skeleton, skeleton.source(), torch.device("cpu"), torch.float32)
    monkeypatch.setattr("vptq.evaluation.perplexity.BATCH_TOKENS", 32)
    whole = streamed_perplexity(runner, windows, stride=None, dataset="x")
    monkeypatch.setattr("vptq.evaluation.perplexity.GROUP_BYTES", 2 * 32 * 32 * 4)
    assert streamed_perplexity(runner, windows, stride=None, dataset="x") == whole
