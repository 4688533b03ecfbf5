"""The model's loss as one block sees it: what its outputs' changes do to KL(original ‖ packed), to second order."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.finetune.blockwise import BlockBatches, BlockLoss


class LocalModel(BlockLoss):
    """KL(original ‖ packed) as far as one block's outputs change it, to second order about the model as it is.

    With δ the change of a token's output, g the gradient of the KL there, s = |y| the size of the output before:

        KL ≈ KL₀ + mean over tokens of gᵀδ + ½ (δ/s)ᵀ F (δ/s),    F = mean over tokens of (s u)(s u)ᵀ,

    u the gradient of -log p of a label that the packed model itself draws: F is its Fisher matrix, one for all tokens, in units
    of the outputs' sizes, since what follows begins with a norm and a few tokens are thousands of times larger than all others.

    Args:
        before: the outputs before, y, for each batch of inputs, float32. slopes: g, of the same shapes.
        metric: F, (hidden_size, hidden_size), or a multiple of it, where other blocks change at the same time: their outputs'
            changes add up. start: KL₀ of each sequence.
    """

    def __init__(
        self, batches: BlockBatches, before: list[Tensor], slopes: list[Tensor], metric: Tensor, start: list[float]
    ) -> None:
        super().__init__(batches)
        self.before, self.slopes, self.metric, self.start = before, slopes, metric, start

    def of_sequences(self, numbers: list[int]) -> Tensor:
        """See the class."""
        before, slopes = self.batches.rows(self.before, numbers), self.batches.rows(self.slopes, numbers)
        change = self.output(numbers) - before
        relative = change / sizes_of(before)
        first, second = (slopes * change).sum(-1), ((relative @ self.metric) * relative).sum(-1)
        return sum(self.start[number] for number in numbers) / len(numbers) + (first + 0.5 * second).mean()


def sizes_of(outputs: Tensor) -> Tensor:
    """|y| of every token: (..., hidden_size) -> (..., 1), never nought."""
    return outputs.norm(dim=-1, keepdim=True).clamp_min(1e-10)


def linearise(batches: BlockBatches, slopes: list[list[Tensor]]) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """A block as it is: its outputs, the slopes of what goes into it, and the metric of `LocalModel`.

    Args:
        slopes: for each batch, gradients with respect to the block's outputs, of the KL and of the label's loss.
    Returns:
        outputs (float32) and slopes of the inputs for each batch, the metric.
    """
    outputs, handed, num_tokens = [], [], 0
    metric: Tensor | None = None
    with batches.looking():
        for number, (of_divergence, of_label) in enumerate(slopes):
            device = batches.runner.device
            state = batches.inputs[number].to(device).float().requires_grad_()
            output = batches.output(state, batches.tokens[number])
            first, second = of_divergence.to(device), of_label.to(device)
            own = torch.autograd.grad(output, state, first, retain_graph=True)[0], torch.autograd.grad(output, state, second)[0]
            handed.append([gradient.to(of_divergence.device) for gradient in own])
            outputs.append(output.detach().to(of_divergence.device))
            rows = (second * sizes_of(output.detach())).flatten(0, -2)
            metric = rows.T @ rows if metric is None else metric + rows.T @ rows
            num_tokens += len(rows)
    assert metric is not None
    return outputs, handed, metric / num_tokens
