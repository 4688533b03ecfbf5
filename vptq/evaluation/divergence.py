"""KL divergence of a quantized model's predictions from the original's: a finer measure than perplexity, with less noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vptq.errors import NumericalError
from vptq.evaluation.perplexity import plain_figures, token_batches
from vptq.models.runner import BlockRunner


@dataclass(frozen=True)
class Divergence:
    """KL(original ‖ quantized) over the predictions of a text, in nats a token.

    Attributes:
        mean, standard_error: the error from the spread of the windows' means; NaN for a single window.
        median, p90, p99: percentiles over tokens. same_top1: share of tokens for which both think the same token likeliest.
        num_tokens, num_windows, seq_len: predictions compared, and how the text was cut. dataset: the text.
    """

    mean: float
    standard_error: float
    median: float
    p90: float
    p99: float
    same_top1: float
    num_tokens: int
    num_windows: int
    seq_len: int
    dataset: str

    def to_dict(self) -> dict[str, Any]:
        return plain_figures(self)


def last_states(runner: BlockRunner, windows: Tensor, progress: Callable[[], None] | None = None) -> Tensor:
    """What the last block puts out, with one block's weights in memory at a time.

    Args:
        windows: (num_windows, seq_len) int64. progress: called after each batch of each block.
    Returns:
        (num_windows, seq_len, hidden_size) on the CPU, in the type that the blocks run in.
    """
    states = runner.embed(token_batches(windows))
    runner.run_blocks_(states, progress)
    return torch.cat([batch.cpu() for batch in states.batches])


def compare(
    original: tuple[BlockRunner, Tensor], quantized: tuple[BlockRunner, Tensor], windows: Tensor, dataset: str
) -> Divergence:
    """Compare the predictions of two models of one vocabulary, window by window, in float32 or wider.

    Args:
        original, quantized: a runner, which turns states into logits, and its `last_states`.
        windows: (num_windows, seq_len) int64, the text of both.
    Raises:
        NumericalError: logits that are not finite.
    """
    found, same = [], []
    for number in range(len(windows)):
        here = slice(number, number + 1)
        logits = [runner.logits(states[here], windows[here])[0, :-1].float() for runner, states in (original, quantized)]
        found.append(token_divergences(*logits).double().cpu())
        same.append((logits[0].argmax(1) == logits[1].argmax(1)).double().mean().item())
    return summarize(torch.stack(found), sum(same) / len(same), dataset)


def token_divergences(original: Tensor, quantized: Tensor) -> Tensor:
    """KL(softmax(original) ‖ softmax(quantized)) of every row of logits: (n, vocab_size) float -> (n,)."""
    p, q = torch.log_softmax(original, 1), torch.log_softmax(quantized, 1)
    return (p.exp() * (p - q)).sum(1).clamp_min(0)  # below zero by rounding only


def summarize(divergences: Tensor, same_top1: float, dataset: str) -> Divergence:
    """Figures of (num_windows, predictions) float64 in nats."""
    if not bool(torch.isfinite(divergences).all()):
        raise NumericalError("logits are not finite", hint="a checkpoint is damaged, or overflows in this float type")
    means, flat = divergences.mean(1), divergences.flatten().sort().values
    error = (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else math.nan
    median, p90, p99 = (flat[min(int(part * len(flat)), len(flat) - 1)].item() for part in (0.5, 0.9, 0.99))
    count, predictions = divergences.shape
    return Divergence(flat.mean().item(), error, median, p90, p99, same_top1, len(flat), count, predictions + 1, dataset)
