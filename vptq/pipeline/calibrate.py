"""Carry a share of the calibration text through the model, block by block, and take down what its linears are given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vptq.calibration.hessian import BlockHessians, BlockSums, HessianAccumulator
from vptq.calibration.runs import Subtree, TreeSum, split_runs
from vptq.evaluation.perplexity import token_batches
from vptq.models.runner import BlockRunner, HiddenStates
from vptq.models.stream import TensorSource


class CalibrationText:
    """The calibration tokens in batches, and the runs that these make up.

    Args:
        tokens: (num_sequences, seq_len) int64.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.batches = token_batches(tokens)
        self.runs = split_runs(len(self.batches))

    def of_runs(self, runs: Iterable[int]) -> list[Tensor]:
        """The batches of some runs."""
        return [self.batches[batch] for run in runs for batch in self.runs[run]]


class Calibrator:
    """Hidden states of some runs of the calibration text on their way through the blocks.

    Where they are not yet, or no longer, they are brought from the embeddings: so a share can change hands.

    Args:
        runs: the share, numbers of runs of `text`.
        quantized: None, or the weights of the blocks that are quantized already: later ones are then calibrated on what these
            put out.
    """

    def __init__(self, runner: BlockRunner, text: CalibrationText, runs: range, quantized: TensorSource | None = None) -> None:
        self.runner, self.text, self.runs, self.quantized = runner, text, runs, quantized
        self.states: HiddenStates | None = None
        self.drifted: HiddenStates | None = None  # what the quantized model sees, where it differs
        self.depth = self.drifted_depth = 0  # blocks that the states are past

    def block(
        self,
        block: int,
        *,
        wanted: bool,
        last: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> BlockSums:
        """Carry the states past a block; on the way sum up what its linears are given, where that is wanted.

        Args:
            last: no later block will be asked for.
            weights: None, or for each linear of the block, (groups, tokens of these runs), see `calibration.fisher`.
            progress: called after each batch with the part of all that it was.
        """
        runner, states = self.runner, self._bring_to(block)
        drifted = self.drifted
        paired = drifted is not None and wanted
        watcher = BlockHessians(runner.skeleton.block_name(block), weights, drifted is not None, self.runs.start)
        runner.load_block(block)
        if self.quantized is not None and drifted is None and not last:  # up to here both are the same
            self.drifted, self.drifted_depth = _copied(states), block
        aside = runner.batches_of_block_(block, drifted, keep=False) if paired and drifted is not None else None
        carried = runner.batches_of_block_(block, states)
        self.depth = -1  # until all batches are past
        with watcher.watching(runner.skeleton.blocks[block]) if wanted else contextlib.nullcontext():
            for run in self.runs:
                for _ in self.text.runs[run]:
                    next(carried)
                    if aside is not None:
                        next(aside)
                    if progress:
                        progress(1 / len(states.batches))
                if wanted:
                    watcher.end_run()
        for ending in (carried, aside):
            if ending is not None:
                next(ending, None)  # results are where they belong
        self.depth = block + 1
        runner.unload_block(block)
        if not last:
            runner.prefetch_block(block + 1)
        return watcher.collect()

    def head(self, name: str) -> BlockSums:
        """Sums of what goes into the head, the module of that name, once the states are past the last block."""
        states = self._bring_to(len(self.runner.skeleton.blocks))
        tree, number = TreeSum(), 0
        for run in self.runs:
            accumulator: HessianAccumulator | None = None
            for _ in self.text.runs[run]:
                inputs = self.runner.head_inputs(states.batches[number], states.tokens[number], name)
                accumulator = accumulator or HessianAccumulator(inputs.shape[-1], inputs.device)
                accumulator.add(inputs)
                number += 1
            tree.add(Subtree(0, run, None if accumulator is None else accumulator.take()))
        return BlockSums({name: tree.subtrees}, {name: name})

    def _bring_to(self, block: int) -> HiddenStates:
        """The states before a block; those of the quantized model as well."""
        runner = self.runner
        if self.states is None or self.depth != block:
            self.states = self.drifted = None  # freed before the new ones are made
            self.states = runner.embed(self.text.of_runs(self.runs))
            if self.quantized is not None and 0 < block < len(runner.skeleton.blocks):
                self.drifted, self.drifted_depth = _copied(self.states), 0
            self._carry(self.states, range(block), None)
            self.depth = block
        if self.drifted is not None and block < len(runner.skeleton.blocks):
            self._carry(self.drifted, range(self.drifted_depth, block), self.quantized)
            self.drifted_depth = block
        return self.states

    def _carry(self, states: HiddenStates, blocks: range, source: TensorSource | None) -> None:
        for block in blocks:
            self.runner.load_block(block, source)
            self.runner.run_block_(block, states)
            self.runner.unload_block(block)


def relative_weights(weights: Sequence[Tensor], mean: float) -> Tensor:
    """Token weights of a linear, of mean one over the whole text.

    Args:
        weights: of some runs, (groups, tokens of the run) float32 >= 0 each. mean: over groups and tokens of all runs.
    """
    found = torch.cat(list(weights), 1)
    return found / mean if mean > 0 else torch.ones_like(found)


def _copied(states: HiddenStates) -> HiddenStates:
    return HiddenStates([batch.clone() for batch in states.batches], states.tokens)
