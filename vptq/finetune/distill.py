"""The loss of a packed model against its original's predictions: KL(original ‖ packed), and cross-entropy if asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vptq.finetune.unpacked import Unpacked

CHUNK_LOGITS = 1 << 25  # taken at once, so that a few copies of them in float32 fit beside the rest


@dataclass(frozen=True)
class Weights:
    """What the loss is made of: KL from the original's predictions, cross-entropy of the text itself."""

    kl: float = 1.0
    ce: float = 0.0


def distillation_loss(student: Tensor, teacher: Tensor | None, tokens: Tensor, weights: Weights) -> Tensor:
    """Mean over all predictions, in nats a token.

    Args:
        student, teacher: logits, (sequences, seq_len, vocab_size) float. tokens: (sequences, seq_len) int64.
    """
    vocab = student.shape[-1]
    step = max(1, CHUNK_LOGITS // vocab)
    parts = []
    teachers = [None] * len(tokens) if teacher is None else teacher.unbind(0)
    for own, given, text in zip(student.unbind(0), teachers, tokens, strict=True):  # views: logits are not copied
        rows, targets = own[:-1].split(step), text[1:].split(step)
        theirs = [None] * len(rows) if given is None else given[:-1].split(step)
        for part in zip(rows, theirs, targets, strict=True):
            parts.append(checkpoint(_summed_loss, *part, weights, use_reentrant=False))
    return torch.stack(parts).sum() / tokens[:, 1:].numel()


def _summed_loss(student: Tensor, teacher: Tensor | None, targets: Tensor, weights: Weights) -> Tensor:
    logs = torch.log_softmax(student.float(), -1)
    loss = logs.new_zeros(())
    if weights.ce:
        loss = loss + weights.ce * torch.nn.functional.nll_loss(logs, targets, reduction="sum")
    if weights.kl and teacher is not None:
        wanted = torch.log_softmax(teacher.float(), -1)
        loss = loss + weights.kl * torch.nn.functional.kl_div(logs, wanted, reduction="sum", log_target=True)
    return loss


class Distillation:
    """Gradients and held-out loss of a packed model over a text, for `Fit`.

    Args:
        model: takes tokens, gives `.logits`. tokens: (num_sequences, seq_len) int64, on the CPU.
        teacher: the original's logits of some of these sequences, by their numbers; None where cross-entropy alone counts.
        batch, micro_batch: sequences a step, and at once. num_held_out: of the sequences, the last.
        compute: float type of the products. rank, world: this process among those that share the work.
        reduce: adds a tensor up over these processes, in place. unpacked: the model's packed linears, where they are to stand
            unpacked in memory.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        teacher: Callable[[list[int]], Tensor] | None,
        weights: Weights,
        *,
        batch: int,
        micro_batch: int,
        num_held_out: int,
        seed: int,
        device: torch.device,
        compute: torch.dtype,
        rank: int = 0,
        world: int = 1,
        reduce: Callable[[Tensor], None] | None = None,
        unpacked: Unpacked | None = None,
    ) -> None:
        self.model, self.tokens, self.teacher, self.weights = model, tokens, teacher, weights
        self.batch, self.micro_batch, self.seed, self.device, self.compute = batch, micro_batch, seed, device, compute
        self.rank, self.world, self.reduce, self.unpacked = rank, world, reduce, unpacked
        self.num_train = len(tokens) - num_held_out

    def order(self, epoch: int) -> Tensor:
        """The sequences in the order of an epoch: (num_train,) int64."""
        return torch.randperm(self.num_train, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))

    def sequences_of(self, step: int) -> list[int]:
        """Numbers of the sequences of a step, over all processes."""
        places = range(step * self.batch, (step + 1) * self.batch)
        epochs = {place // self.num_train: None for place in places}
        orders = {epoch: self.order(epoch) for epoch in epochs}
        return [int(orders[place // self.num_train][place % self.num_train]) for place in places]

    def train(self, step: int) -> float:
        """Gradients of a step, summed over processes; the loss."""
        numbers = self.sequences_of(step)
        with self.unpacked.learning() if self.unpacked else contextlib.nullcontext():
            loss = self._over(numbers, lambda part: part.backward())
        if self.reduce is not None:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    self.reduce(parameter.grad)
        return loss

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the sequences that are not trained on."""
        with self.unpacked.looking() if self.unpacked else contextlib.nullcontext():
            return self._over(list(range(self.num_train, len(self.tokens))), None)

    def _over(self, numbers: list[int], use: Callable[[Tensor], None] | None) -> float:
        """Mean loss over some sequences; this process does its share of them."""
        own = numbers[self.rank :: self.world]
        total = torch.zeros((), device=self.device)
        for start in range(0, len(own), self.micro_batch):
            part = own[start : start + self.micro_batch]
            loss = self._loss(part) * (len(part) / len(numbers))
            if use:
                use(loss)
            total += loss.detach()
        if self.reduce is not None:
            self.reduce(total)
        return total.item()

    def text_loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of a text, summed: (). tokens: (sequences, seq_len) int64."""
        here = tokens.to(self.device)
        return distillation_loss(self._logits(here), None, here, Weights(0.0, 1.0)) * here[:, 1:].numel()

    def _loss(self, numbers: list[int]) -> Tensor:
        tokens = self.tokens[numbers].to(self.device)
        wanted = None if self.teacher is None else self.teacher(numbers)
        return distillation_loss(self._logits(tokens), wanted, tokens, self.weights)

    def _logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            return self.model(input_ids=tokens, use_cache=False).logits
