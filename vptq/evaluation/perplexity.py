"""Perplexity: one definition for original, dequantized and packed models.

The text is one run of tokens, cut into windows of `seq_len`, each starting `stride` after the last; the last window is
whole or left out. A window's first token predicts nothing of itself and is not counted; with `stride` under `seq_len` only
the last `stride` tokens of a window are, so that no token counts twice.
perplexity = exp(mean negative log-likelihood of the counted tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vptq.errors import NumericalError, UsageError
from vptq.models.runner import BlockRunner, HiddenStates

BATCH_TOKENS = 4096
GROUP_BYTES = 4 << 30


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it rests on.

    Attributes:
        standard_error: of `perplexity`, by the delta method from the spread of the windows' means; tokens of one window
            are not independent, windows nearly are. NaN for a single window.
        num_tokens: tokens counted. num_windows, seq_len, stride: how the text was cut. dataset: the text.
    """

    perplexity: float
    standard_error: float
    num_tokens: int
    num_windows: int
    seq_len: int
    stride: int
    dataset: str

    def to_dict(self) -> dict[str, Any]:
        return plain_figures(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Perplexity:
        """The inverse of `to_dict`."""
        filled: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items()}
        return cls(**filled)


def plain_figures(figures: Any) -> dict[str, Any]:
    """A dataclass of figures as JSON takes it: None where there is no number."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(figures).items()}


def cut_windows(stream: Tensor, *, seq_len: int, stride: int | None, limit: int | None, dataset: str) -> Tensor:
    """(num_windows, seq_len) int64 from a run of tokens (n,).

    Raises:
        UsageError: a text shorter than one window, or a stride that is not 1 to seq_len.
    """
    stride = stride or seq_len
    if not 1 <= stride <= seq_len or seq_len < 2:
        raise UsageError(f"stride is {stride} and seq_len {seq_len}; need 1 <= stride <= seq_len, seq_len at least 2")
    if len(stream) < seq_len:
        raise UsageError(
            f"evaluation text `{dataset}` is shorter than one window",
            where=[f"{len(stream)} tokens, seq_len {seq_len}"],
            hint=f"set --seq_len {max(len(stream), 2)} or less, or give more text",
        )
    return stream.unfold(0, seq_len, stride)[:limit].contiguous()


def window_losses(logits: Tensor, tokens: Tensor, counted: int) -> Tensor:
    """Negative log-likelihoods of the last `counted` predictions of each window, (windows, counted) float64.

    logits: (windows, seq_len, vocab_size); tokens: (windows, seq_len).
    """
    losses = [
        torch.nn.functional.cross_entropy(row[-counted - 1 : -1].float(), target[-counted:], reduction="none")
        for row, target in zip(logits, tokens.to(logits.device), strict=True)
    ]
    return torch.stack(losses).double().cpu()


def summarize(losses: Tensor, *, seq_len: int, stride: int, dataset: str) -> Perplexity:
    """losses: (windows, counted) float64, negative log-likelihoods in nats."""
    if not bool(torch.isfinite(losses).all()):
        raise NumericalError(
            "the model's logits are not finite", hint="the checkpoint is damaged, or overflows in this float type"
        )
    value = math.exp(min(losses.mean().item(), 700))
    means = losses.mean(1)
    error = value * (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else math.nan
    return Perplexity(value, error, losses.numel(), len(losses), seq_len, stride, dataset)


def streamed_perplexity(
    runner: BlockRunner, windows: Tensor, *, stride: int | None, dataset: str, progress: Callable[[], None] | None = None
) -> Perplexity:
    """Perplexity with one block's weights in memory at a time.

    Args:
        windows: (num_windows, seq_len) int64, from `cut_windows` with the same stride.
        progress: called after each batch of each block: `progress_steps` times in all.
    """
    seq_len = windows.shape[1]
    stride = stride or seq_len
    counted = min(stride, seq_len - 1)
    losses = []
    for group in _groups(runner, windows):
        states = runner.embed(group)
        runner.run_blocks_(states, progress)
        losses += [_batch_losses(runner, states, i, counted) for i in range(len(group))]
    return summarize(torch.cat(losses), seq_len=seq_len, stride=stride, dataset=dataset)


@torch.no_grad()
def whole_perplexity(
    model: Any, windows: Tensor, *, stride: int | None, dataset: str, progress: Callable[[], None] | None = None
) -> Perplexity:
    """As `streamed_perplexity`, of a transformers model that is in memory as a whole, with adapters perhaps.

    Args:
        windows: (num_windows, seq_len) int64. progress: called after each window.
    """
    seq_len = windows.shape[1]
    stride = stride or seq_len
    losses = []
    for window in windows.split(1):
        logits = model(input_ids=window.to(model.device), use_cache=False).logits
        losses.append(window_losses(logits, window, min(stride, seq_len - 1)))
        if progress:
            progress()
    return summarize(torch.cat(losses), seq_len=seq_len, stride=stride, dataset=dataset)


def progress_steps(runner: BlockRunner, windows: Tensor) -> int:
    """How often `streamed_perplexity` calls its progress for windows (num_windows, seq_len)."""
    return sum(len(group) for group in _groups(runner, windows)) * len(runner.skeleton.blocks)


def token_batches(tokens: Tensor) -> list[Tensor]:
    """(n, seq_len) -> batches of about BATCH_TOKENS tokens, all but the last of one shape."""
    return list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))


def _groups(runner: BlockRunner, windows: Tensor) -> list[list[Tensor]]:
    """Windows whose hidden states fit GROUP_BYTES together; each group goes through all blocks before the next."""
    size = runner.skeleton.hidden_size
    batches = token_batches(windows)
    each = max(1, GROUP_BYTES // (batches[0].numel() * size * runner.dtype.itemsize))
    return [batches[i : i + each] for i in range(0, len(batches), each)]


def _batch_losses(runner: BlockRunner, states: HiddenStates, batch: int, counted: int) -> Tensor:
    tokens = states.tokens[batch]
    rows = [
        window_losses(runner.logits(states.batches[batch][i : i + 1], tokens[i : i + 1]), tokens[i : i + 1], counted)
        for i in range(len(tokens))
    ]
    return torch.cat(rows)
