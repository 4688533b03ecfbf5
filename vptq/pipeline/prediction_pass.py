"""A pass over the blocks: each learns what lowers KL(original ‖ packed), told by how the model's loss depends on its outputs.

Forward through all blocks as they are, keeping what goes into each; then backward, as calibration's gradients go: at each
block its outputs' slopes are known, and it trains on `LocalModel` with what it was given. Only one block's weights are in
memory at a time. All blocks see the model as it was before the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.errors import UsageError
from vptq.finetune.local_model import LocalModel, linearise
from vptq.models.device import free_memory
from vptq.models.runner import BlockRunner
from vptq.pipeline.block_pass import BlockPass, History
from vptq.pipeline.tune_models import Pair

KEPT_FRACTION = 0.5  # of free memory, for what goes into each block
SLOPES = 8  # times what hidden states take at one depth: two slopes and what becomes of them, and outputs, in float32


def bytes_kept(pair: Pair, num_tokens: int) -> int:
    """What the states of all blocks take for a text of so many tokens, and the slopes of one."""
    return (len(pair.packed.blocks) + SLOPES) * pair.states_bytes(num_tokens)


def check_room(pair: Pair, num_tokens: int) -> None:
    """Raise UsageError where neither the GPU nor the machine has the memory that a pass needs for a text of so many tokens."""
    room = free_memory(torch.device("cpu"))
    needed = bytes_kept(pair, num_tokens)
    if needed > max(room, KEPT_FRACTION * free_memory(pair.device)):
        raise UsageError(
            "there is too little memory for what goes into each block",
            where=[f"{needed / 1e9:.1f} GB for {num_tokens:,} tokens, {room / 1e9:.1f} GB are free"],
            hint="lower --nsamples or --seq_len, or leave `predictions` out: --passes outputs",
        )


class PredictionPass(BlockPass):
    """From the last block to the first."""

    parts = (0.0, 0.25, 0.5, 1.0)
    once = 5.0  # the original forward, the packed one forward, and forward and twice backward

    def run(self) -> tuple[dict[str, Tensor], dict[str, History]]:
        """See `BlockPass`."""
        wanted = self._original_states()
        pair = self.settings.pair
        needed = bytes_kept(pair, self.settings.num_tokens)
        ours = pair.packed_runner(spare=needed > KEPT_FRACTION * free_memory(pair.device))
        kept, last = self._forward(ours)
        slopes, start = self._slopes(ours, last, wanted)
        changed: dict[str, Tensor] = {}
        histories = {}
        for block in reversed(range(self.settings.num_blocks)):
            _, items, unpacked = self.load(block)
            batches = self.batches(block, ours, kept.pop(), unpacked)
            outputs, handed, metric = linearise(batches, slopes)
            for tokens in self.settings.batches:
                self.advance(block, tokens)
                self.advance(block, tokens)
                self.advance(block, tokens)
            if items:
                firsts = [pair[0] for pair in slopes]
                values, histories[str(block)] = self.train(
                    block,
                    items,
                    lambda: LocalModel(batches, outputs, firsts, metric, start),  # noqa: B023 (called at once)
                )
                changed |= values
            slopes = handed
            ours.unload_block(block)
        ours.unload()
        return changed, dict(reversed(histories.items()))

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
                states = [batches.output(n).to(hidden.device, hidden.dtype) for n, hidden in enumerate(states)]
            for tokens in self.settings.batches:
                self.advance(block, tokens)
            runner.unload_block(block)
        return kept, states

    def _slopes(self, runner: BlockRunner, found: list[Tensor], wanted: list[Tensor]) -> tuple[list[list[Tensor]], list[float]]:
        """For each batch: gradients of the KL and of a drawn label's loss at the last block's output, and the mean KL."""
        original = self.settings.pair.original_runner()
        generator = torch.Generator(runner.device).manual_seed(self.settings.config.seed)
        slopes, start = [], []
        for hidden, target, tokens in zip(found, wanted, self.settings.batches, strict=True):
            losses = _Losses(original, target, tokens, generator)
            slopes.append([gradient.float().to(hidden.device) for gradient in runner.loss_gradients(hidden, tokens, losses)])
            start.append(sum(losses.divergences) / len(losses.divergences))
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
