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
        runner: has the packed block loaded. block: its number. inputs: (sequences, seq_len, hidden_size) each, all of one size
            but the last that is trained on and the last of all. tokens: what they come from. batch: sequences a step.
            num_held_out: of the batches, the last.
        compute: float type of the products. unpacked: the block's packed linears, where they are to stand unpacked in memory.
    """

    runner: BlockRunner
    block: int
    inputs: list[Tensor]
    tokens: list[Tensor]
    batch: int
    num_held_out: int
    seed: int
    compute: torch.dtype
    unpacked: Unpacked | None = None

    @property
    def num_train(self) -> int:
        """Sequences that are trained on; they come first."""
        return sum(map(len, self.inputs[: len(self.inputs) - self.num_held_out]))

    @property
    def num_sequences(self) -> int:
        return sum(map(len, self.inputs))

    def rows(self, tensors: list[Tensor], sequences: list[int]) -> Tensor:
        """What belongs to some sequences, of tensors that go with the inputs, on the device."""
        num_train, found = self.num_train, []
        for number in sequences:
            held_out = number >= num_train
            first, place = (len(tensors) - self.num_held_out, number - num_train) if held_out else (0, number)
            size = len(tensors[first])
            found.append(tensors[first + place // size][place % size])
        return torch.stack(found).to(self.runner.device)

    def output(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The block's output, (sequences, seq_len, hidden_size) float32, with gradients. The residual stream is float32."""
        device = self.runner.device
        with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
            return self.runner.forward_block(self.block, hidden.to(device).float(), tokens).float()

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, but its tensors don't learn."""
        return self.unpacked.looking() if self.unpacked else contextlib.nullcontext()

    def learning(self) -> contextlib.AbstractContextManager[None]:
        """While gradients of a step are made."""
        return self.unpacked.learning() if self.unpacked else contextlib.nullcontext()


class BlockLoss:
    """Gradients and held-out loss of one block: the mean over sequences of what `of_sequences` gives."""

    def __init__(self, batches: BlockBatches) -> None:
        self.batches = batches
        self.at_once = len(batches.inputs[0])

    def of_sequences(self, numbers: list[int]) -> Tensor:
        """The loss of some sequences, a mean over their tokens."""
        raise NotImplementedError

    def train(self, step: int) -> float:
        """Gradients of a step; the loss."""
        generator = torch.Generator().manual_seed(self.batches.seed * 1_000_003 + step)
        chosen = torch.randperm(self.batches.num_train, generator=generator)[: self.batches.batch].tolist()
        with self.batches.learning():
            return self._over(chosen, lambda loss: loss.backward())

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the sequences that are not trained on."""
        with self.batches.looking():
            return self._over(list(range(self.batches.num_train, self.batches.num_sequences)), None)

    def output(self, numbers: list[int]) -> Tensor:
        """The block's output for some sequences, with gradients."""
        batches = self.batches
        return batches.output(batches.rows(batches.inputs, numbers), batches.rows(batches.tokens, numbers))

    def _over(self, numbers: list[int], use: Callable[[Tensor], None] | None) -> float:
        total = torch.zeros((), device=self.batches.runner.device)
        for start in range(0, len(numbers), self.at_once):
            part = numbers[start : start + self.at_once]
            loss = self.of_sequences(part) * (len(part) / len(numbers))
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

    def of_sequences(self, numbers: list[int]) -> Tensor:
        """See the class."""
        found, wanted = self.output(numbers), self.batches.rows(self.targets, numbers).float()
        errors, sizes = (found - wanted).square().sum(-1), wanted.square().sum(-1)
        return (errors / sizes.clamp_min(1e-20)).mean()
