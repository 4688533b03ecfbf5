"""The loss of a packed block against its original's outputs, for `Fit`.

What goes into the packed block is what the packed blocks before it put out; what it should put out is what the original
block makes of the original's inputs: so it also makes up for what went wrong before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from vptq.finetune.unpacked import Unpacked
from vptq.models.runner import BlockRunner, HiddenStates


class BlockMatching:
    """Gradients and held-out loss of one block.

    The loss is the mean over tokens of |ŷ - y|² / |y|²: a few tokens have states thousands of times larger than all others
    (arXiv:2402.17762), and would be all that a plain mean sees.

    Args:
        runner: has the packed block loaded. inputs: what goes in, one batch a step's share. targets: (sequences, seq_len,
            hidden_size) for each batch of inputs.
        batches_a_step: batches that make one step. num_held_out: of the batches, the last.
        compute: float type of the products. unpacked: the block's packed linears, where they are to stand unpacked in memory.
    """

    def __init__(
        self,
        runner: BlockRunner,
        block: int,
        inputs: HiddenStates,
        targets: list[Tensor],
        *,
        batches_a_step: int,
        num_held_out: int,
        seed: int,
        compute: torch.dtype,
        unpacked: Unpacked | None = None,
    ) -> None:
        self.runner, self.block, self.inputs, self.targets = runner, block, inputs, targets
        self.batches_a_step, self.seed, self.compute, self.unpacked = batches_a_step, seed, compute, unpacked
        self.num_train = len(targets) - num_held_out

    def train(self, step: int) -> float:
        """Gradients of a step; the loss."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randperm(self.num_train, generator=generator)[: self.batches_a_step].tolist()
        with self.unpacked.learning() if self.unpacked else contextlib.nullcontext():
            return self._over(chosen, lambda loss: loss.backward())

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the batches that are not trained on."""
        with self.unpacked.looking() if self.unpacked else contextlib.nullcontext():
            return self._over(list(range(self.num_train, len(self.targets))), None)

    def _over(self, numbers: list[int], use: Callable[[Tensor], None] | None) -> float:
        total = torch.zeros((), device=self.runner.device)
        sequences = sum(len(self.targets[number]) for number in numbers)
        for number in numbers:
            loss = self._loss(number) * (len(self.targets[number]) / sequences)
            if use:
                use(loss)
            total += loss.detach()
        return total.item()

    def _loss(self, number: int) -> Tensor:
        device = self.runner.device
        hidden, wanted = self.inputs.batches[number].to(device), self.targets[number].to(device).float()
        with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
            found = self.runner.forward_block(self.block, hidden, self.inputs.tokens[number]).float()
        errors, sizes = (found - wanted).square().sum(-1), wanted.square().sum(-1)
        return (errors / sizes.clamp_min(1e-20)).mean()
