"""A pass over the blocks: each learns to put out what the original's block makes of the original's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.finetune.blockwise import BlockBatches, OutputMatching
from vptq.models.runner import BlockRunner, HiddenStates
from vptq.pipeline.block_pass import BlockPass, History


class OutputPass(BlockPass):
    """From the first block to the last; each sees what the packed ones before it put out, as they are by then."""

    once = 2.0

    def run(self) -> tuple[dict[str, Tensor], dict[str, History]]:
        """See `BlockPass`."""
        pair = self.settings.pair
        theirs, ours = pair.original_runner(like_packed=True), pair.packed_runner()
        wanted, found = theirs.embed(self.settings.batches), ours.embed(self.settings.batches)
        changed: dict[str, Tensor] = {}
        histories = {}
        for block in range(self.settings.num_blocks):
            theirs.load_block(block)
            for number, _ in enumerate(theirs.batches_of_block_(block, wanted)):
                self.advance(block, wanted.tokens[number])
            theirs.unload_block(block)
            values, history = self._block(block, ours, found, wanted.batches)
            changed |= values
            if history:
                histories[str(block)] = history
        theirs.unload()
        ours.unload()
        return changed, histories

    def _block(
        self, block: int, runner: BlockRunner, inputs: HiddenStates, targets: list[Tensor]
    ) -> tuple[dict[str, Tensor], History]:
        """Train one block, and carry the inputs past it, in place."""
        _, items, unpacked = self.load(block)
        batches = self.batches(block, runner, inputs.batches, unpacked)
        values: dict[str, Tensor] = {}
        history: History = []
        if items:  # what is left of a block may be of other kinds
            values, history = self.train(block, items, lambda: OutputMatching(batches, targets))
        with batches.looking():
            self._carry(block, batches, inputs)
        runner.unload_block(block)
        return values, history

    @torch.no_grad()
    def _carry(self, block: int, batches: BlockBatches, inputs: HiddenStates) -> None:
        for number, hidden in enumerate(inputs.batches):
            inputs.batches[number] = batches.output(hidden, inputs.tokens[number]).to(hidden.device, hidden.dtype)
            self.advance(block, inputs.tokens[number])
