"""The model's loss as one block sees it: what its outputs' changes do to KL(original ‖ packed), to second order."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.finetune.blockwise import BlockBatches, BlockLoss


class LocalModel(BlockLoss):
    """KL(original ‖ packed) as far as one block's outputs change it, to second order about the model as it is.

    With δ the change of a token's output, g the gradient of the KL there, s = |y| the size of the output before:

        KL ≈ KL₀ + mean over tokens of gᵀδ + ½ w (δ/s)ᵀ C (δ/s),    w = |s u|²,    C = mean over tokens of (u/|u|)(u/|u|)ᵀ,

    u the gradient of -log p of labels that the packed model itself draws, so that w C stands for the token's Fisher matrix
    E[(s u)(s u)ᵀ]: what matters is alike for all tokens, how much is not. Sizes are divided by since what follows begins with a
    norm. Both count for the few tokens that all others look at: their outputs are thousands of times larger than others'
    (arXiv:2402.17762), and their w is 150 to 5000 times the median in SmolLM2.

    Args:
        before: the outputs before, y, for each batch of inputs, float32. slopes: g, of the same shapes. curvature: w, of theirs
            without the last dimension, and C, (hidden_size, hidden_size). damping: of the second order, more where other
            blocks change at the same time: their outputs' changes add up. start: KL₀ of each sequence.
    """

    def __init__(
        self,
        batches: BlockBatches,
        before: list[Tensor],
        slopes: list[Tensor],
        curvature: tuple[list[Tensor], Tensor],
        damping: float,
        start: list[float],
    ) -> None:
        super().__init__(batches)
        self.before, self.slopes, self.damping, self.start = before, slopes, damping, start
        self.weights, self.metric = curvature

    def of_sequences(self, numbers: list[int]) -> Tensor:
        """See the class."""
        before, slopes, weights = (self.batches.rows(own, numbers) for own in (self.before, self.slopes, self.weights))
        change = self.output(numbers) - before
        relative = change / sizes_of(before)
        first, second = (slopes * change).sum(-1), weights * ((relative @ self.metric) * relative).sum(-1)
        return sum(self.start[number] for number in numbers) / len(numbers) + (first + 0.5 * self.damping * second).mean()


def sizes_of(vectors: Tensor) -> Tensor:
    """Of a vector for every token: (..., hidden_size) -> (..., 1), never nought, as a token's slope is that nothing follows."""
    return vectors.norm(dim=-1, keepdim=True).clamp_min(1e-10)


@torch.no_grad()
def linearise(batches: BlockBatches, slopes: list[list[Tensor]]) -> tuple[list[Tensor], tuple[list[Tensor], Tensor]]:
    """A block as it is: its outputs (float32) for each batch, and the curvature that `LocalModel` takes.

    Args:
        slopes: for each batch, gradients with respect to the block's outputs, of the KL and of the label's loss.
    """
    outputs, weights, num_tokens = [], [], 0
    metric: Tensor | None = None
    with batches.looking():
        for number, (_, of_label) in enumerate(slopes):
            output = batches.output(batches.inputs[number], batches.tokens[number])
            second = of_label.to(output.device)
            length = sizes_of(second)
            outputs.append(output.to(of_label.device))
            weights.append((length * sizes_of(output)).square()[..., 0].to(of_label.device))
            rows = (second / length).flatten(0, -2)
            metric = rows.T @ rows if metric is None else metric + rows.T @ rows
            num_tokens += len(rows)
    assert metric is not None
    return outputs, (weights, metric / num_tokens)


def hand_on(batches: BlockBatches, slopes: list[list[Tensor]], before: list[Tensor]) -> list[list[Tensor]]:
    """Slopes of what goes into a block that has learned, for each batch, from those of its outputs as they were.

    The block's own change δ makes g + u uᵀδ of the KL's slope g at its outputs: in the mean over labels u uᵀ is the token's
    Fisher matrix, and a block that learns from it sees the mean over many tokens. So the blocks before learn what is left to
    make up for, not the same once more.

    Args:
        slopes: see `linearise`. before: the outputs that it gave.
    Returns:
        For each batch both slopes, (sequences, seq_len, hidden_size) float32 each.
    """
    handed = []
    with batches.looking():
        for number, (of_divergence, of_label) in enumerate(slopes):
            device = batches.runner.device
            state = batches.inputs[number].detach().to(device).float().requires_grad_()
            output = batches.output(state, batches.tokens[number])
            second = of_label.to(device)
            change = output.detach() - before[number].to(device)
            first = of_divergence.to(device) + second * (second * change).sum(-1, keepdim=True)
            own = torch.autograd.grad(output, state, first, retain_graph=True)[0], torch.autograd.grad(output, state, second)[0]
            handed.append([gradient.to(of_divergence.device) for gradient in own])
    return handed
