"""Losses of one packed block while the others stand still, for `Fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.finetune.unpacked import Unpacked
from vptq.models.runner import BlockRunner


@dataclass(frozen=True)
class BlockBatches:
    """What one block is given, and how it is gone through.

    Attributes:
        runner: has the packed block loaded. block: its number. inputs: (sequences, seq_len, hidden_size) each. tokens: what
            they come from. batches_a_step: batches that make one step. num_held_out: of the batches, the last.
        compute: float type of the products. unpacked: the block's packed linears, where they are to stand unpacked in memory.
    """

    runner: BlockRunner
    block: int
    inputs: list[Tensor]
    tokens: list[Tensor]
    batches_a_step: int
    num_held_out: int
    seed: int
    compute: torch.dtype
    unpacked: Unpacked | None = None

    def output(self, number: int) -> Tensor:
        """Of a batch: (sequences, seq_len, hidden_size) float32, with gradients."""
        return self.output_of(self.inputs[number].to(self.runner.device), number)

    def output_of(self, hidden: Tensor, number: int) -> Tensor:
        """The same for other inputs, of that batch's shape."""
        device = self.runner.device
        with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
            return self.runner.forward_block(self.block, hidden, self.tokens[number]).float()

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, but its tensors don't learn."""
        return self.unpacked.looking() if self.unpacked else contextlib.nullcontext()

    def learning(self) -> contextlib.AbstractContextManager[None]:
        """While gradients of a step are made."""
        return self.unpacked.learning() if self.unpacked else contextlib.nullcontext()


class BlockLoss:
    """Gradients and held-out loss of one block: the mean over sequences of what `of_batch` gives."""

    def __init__(self, batches: BlockBatches) -> None:
        self.batches = batches
        self.num_train = len(batches.inputs) - batches.num_held_out

    def of_batch(self, number: int) -> Tensor:
        """The loss of one batch, a mean over its tokens."""
        raise NotImplementedError

    def train(self, step: int) -> float:
        """Gradients of a step; the loss."""
        generator = torch.Generator().manual_seed(self.batches.seed * 1_000_003 + step)
        chosen = torch.randperm(self.num_train, generator=generator)[: self.batches.batches_a_step].tolist()
        with self.batches.learning():
            return self._over(chosen, lambda loss: loss.backward())

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the batches that are not trained on."""
        with self.batches.looking():
            return self._over(list(range(self.num_train, len(self.batches.inputs))), None)

    def _over(self, numbers: list[int], use: Callable[[Tensor], None] | None) -> float:
        total = torch.zeros((), device=self.batches.runner.device)
        sequences = sum(len(self.batches.inputs[number]) for number in numbers)
        for number in numbers:
            loss = self.of_batch(number) * (len(self.batches.inputs[number]) / sequences)
            if use:
                use(loss)
            total += loss.detach()
        return total.item()


class OutputMatching(BlockLoss):
    """The mean over tokens of |ŷ - y|² / |y|², y what the original block makes of the original's inputs.

    ŷ is made of what the packed blocks before put out: so the block also makes up for what went wrong before it. A few tokens
    have states thousands of times larger than all others (arXiv:2402.17762), and would be all that a plain mean sees.

    Args:
        targets: (sequences, seq_len, hidden_size) for each batch of inputs.
    """

    def __init__(self, batches: BlockBatches, targets: list[Tensor]) -> None:
        super().__init__(batches)
        self.targets = targets

    def of_batch(self, number: int) -> Tensor:
        """See the class."""
        found, wanted = self.batches.output(number), self.targets[number].to(self.batches.runner.device).float()
        errors, sizes = (found - wanted).square().sum(-1), wanted.square().sum(-1)
        return (errors / sizes.clamp_min(1e-20)).mean()
