"""A pass over the blocks: each learns what lowers KL(original ‖ packed), told by how the model's loss depends on its outputs.

Forward through all blocks as they are, keeping what goes into each; then backward, as calibration's gradients go: at each
block its outputs' slopes are known, and it trains on `LocalModel` with what it was given. What it learned is told to the blocks
before it, to second order. Only one block's weights are in memory at a time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vptq.errors import UsageError
from vptq.finetune.local_model import LocalModel, hand_on, linearise
from vptq.models.architecture import Skeleton
from vptq.models.device import free_memory
from vptq.models.runner import BlockRunner
from vptq.pipeline.block_pass import BlockPass, History
from vptq.pipeline.tune_models import Pair

KEPT_FRACTION = 0.5  # of free memory, for what goes into each block
SLOPES = 6  # tensors as large as hidden states, in float32: two slopes, what becomes of them, outputs, those of a block before


def bytes_kept(packed: Skeleton, dtype: torch.dtype, num_tokens: int) -> int:
    """What the states of all blocks take for a text of so many tokens, of type `dtype`, and the slopes of one."""
    states = (len(packed.blocks) + 2) * dtype.itemsize + SLOPES * torch.float32.itemsize
    return num_tokens * packed.hidden_size * states


def has_room(packed: Skeleton, dtype: torch.dtype, num_tokens: int, device: torch.device) -> bool:
    """Whether the GPU or the machine has the memory that a pass needs for a text of so many tokens."""
    room = max(free_memory(torch.device("cpu")), KEPT_FRACTION * free_memory(device))
    return bytes_kept(packed, dtype, num_tokens) <= room


def check_room(pair: Pair, num_tokens: int) -> None:
    """Raise UsageError where there is not the memory that a pass needs for a text of so many tokens."""
    if not has_room(pair.packed, pair.dtype, num_tokens, pair.device):
        needed, room = bytes_kept(pair.packed, pair.dtype, num_tokens), free_memory(torch.device("cpu"))
        raise UsageError(
            "there is too little memory for what goes into each block",
            where=[f"{needed / 1e9:.1f} GB for {num_tokens:,} tokens, {room / 1e9:.1f} GB are free"],
            hint="lower --nsamples or --seq_len, or leave `predictions` out: --passes outputs",
        )


class PredictionPass(BlockPass):
    """From the last block to the first."""

    share = 1 / 3  # the local model is good for a short way only
    parts = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
    once = 6.0  # the original forward, the packed one twice, then forward and twice backward

    def run(self) -> tuple[dict[str, Tensor], dict[str, History]]:
        """See `BlockPass`."""
        wanted = self._original_states()
        pair = self.settings.pair
        needed = bytes_kept(pair.packed, pair.dtype, self.settings.num_tokens)
        ours = pair.packed_runner(spare=needed > KEPT_FRACTION * free_memory(pair.device))
        kept, last = self._forward(ours)
        slopes, start = self._slopes(ours, last, wanted)
        del last, wanted
        changed: dict[str, Tensor] = {}
        histories = {}
        for block in reversed(range(self.settings.num_blocks)):
            _, items, unpacked = self.load(block)
            batches = self.batches(block, ours, kept.pop(), unpacked)
            outputs, curvature = linearise(batches, slopes)
            self._advance_all(block, 1)
            if items:
                firsts = [pair[0] for pair in slopes]
                make = functools.partial(LocalModel, batches, outputs, firsts, curvature, self.damping, start)
                values, histories[str(block)] = self.train(block, items, make)
                changed |= values
                del firsts, make
            if block:
                slopes = hand_on(batches, slopes, outputs)
            self._advance_all(block, 3)
            del batches, unpacked, outputs
            ours.unload_block(block)
        ours.unload()
        return changed, dict(reversed(histories.items()))

    def _advance_all(self, block: int, times: int) -> None:
        """Tell that the whole text went through a block so many times."""
        for tokens in self.settings.batches * times:
            self.advance(block, tokens)

    def _original_states(self) -> list[Tensor]:
        """What the original's last block puts out for each batch."""
        runner = self.settings.pair.original_runner()
        states = runner.embed(self.settings.batches)
        for block in range(self.settings.num_blocks):
            runner.load_block(block)
            for number, _ in enumerate(runner.batches_of_block_(block, states)):
                self.advance(block, states.tokens[number])
            runner.unload_block(block)
        runner.unload()
        return states.batches

    @torch.no_grad()
    def _forward(self, runner: BlockRunner) -> tuple[list[list[Tensor]], list[Tensor]]:
        """What goes into each block, and what the last puts out."""
        states, kept = runner.embed(self.settings.batches).batches, []
        for block in range(self.settings.num_blocks):
            _, _, unpacked = self.load(block)
            batches = self.batches(block, runner, states, unpacked)
            kept.append(states)
            with batches.looking():
                pairs = zip(states, self.settings.batches, strict=True)
                states = [batches.output(hidden, tokens).to(hidden.device, hidden.dtype) for hidden, tokens in pairs]
            self._advance_all(block, 1)
            del batches, unpacked  # before it is asked what memory is free for the next
            runner.unload_block(block)
        return kept, states

    def _slopes(self, runner: BlockRunner, found: list[Tensor], wanted: list[Tensor]) -> tuple[list[list[Tensor]], list[float]]:
        """Gradients of the KL and of a drawn label's loss at the last block's output, by batches; each sequence's mean KL."""
        original = self.settings.pair.original_runner()
        generator = torch.Generator(runner.device).manual_seed(self.settings.config.seed)
        slopes, start = [], []
        for hidden, target, tokens in zip(found, wanted, self.settings.batches, strict=True):
            losses = _Losses(original, target, tokens, generator)
            slopes.append([gradient.float().to(hidden.device) for gradient in runner.loss_gradients(hidden, tokens, losses)])
            start += losses.divergences
        original.unload()
        return slopes, start


class _Losses:
    """Of one batch's logits: KL from the original's, and the loss of labels that they draw themselves, each summed.

    Args:
        target: the original's last states. divergences, an attribute: the mean KL of each sequence that was asked for.
    """

    def __init__(self, original: BlockRunner, target: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
        self.original, self.target, self.tokens, self.generator = original, target, tokens, generator
        self.divergences: list[float] = []

    def __call__(self, logits: Tensor, sequence: int) -> list[Tensor]:
        rows = slice(sequence, sequence + 1)
        theirs = self.original.logits(self.target[rows], self.tokens[rows])[0, :-1].float().log_softmax(1)
        ours = logits.log_softmax(1)
        divergence = torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
        labels = torch.multinomial(ours.detach().exp(), 1, generator=self.generator)[:, 0]
        self.divergences.append(divergence.item() / len(logits))
        return [divergence, torch.nn.functional.nll_loss(ours, labels, reduction="sum")]
