"""Carry the calibration text through the model, block by block, and bring back what the errors of its linears cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vptq.calibration.hessian import BlockHessians, Hessian, HessianAccumulator
from vptq.data import TokenSequences
from vptq.evaluation.perplexity import token_batches
from vptq.models.architecture import Skeleton
from vptq.models.runner import BlockRunner, HiddenStates
from vptq.models.stream import TensorSource


class Calibrator:
    """Hidden states of the calibration text on their way through the blocks.

    Args:
        weights: None, or for each linear, by full name, the weights of its tokens (see `calibration.fisher`).
        quantized: None, or gives the weights of the blocks that are quantized already: later ones are then calibrated on
            what these put out.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        tokens: TokenSequences,
        weights: Mapping[str, Tensor] | None = None,
        quantized: TensorSource | None = None,
    ) -> None:
        self.skeleton, self.weights, self.quantized = skeleton, weights, quantized
        self.runner = BlockRunner(skeleton, source, device, dtype)
        self.states = self.runner.embed(token_batches(tokens.tokens))
        self.drifted: HiddenStates | None = None

    @property
    def num_batches(self) -> int:
        return len(self.states.batches)

    def block(self, block: int, wanted: bool, last: bool, progress: Callable[[], None]) -> list[Hessian]:
        """Carry the states past a block; on the way its Hessians, where they are wanted.

        Args:
            last: no later block will be asked for. progress: called after each batch.
        """
        runner, module = self.runner, self.skeleton.blocks[block]
        runner.load_block(block)
        watcher = BlockHessians(self.skeleton.block_name(block), self._weights_of(block), paired=self.drifted is not None)
        watching = watcher.watching(module) if wanted else contextlib.nullcontext()
        drifted = self.drifted
        if self.quantized is not None and drifted is None and not last:  # up to here both are the same
            self.drifted = HiddenStates([batch.clone() for batch in self.states.batches], self.states.tokens)
        with watching:
            aside = None if drifted is None or not wanted else runner.batches_of_block_(block, drifted, keep=False)
            for _ in runner.batches_of_block_(block, self.states):
                if aside is not None:
                    next(aside)
                progress()
        runner.unload_block(block)
        if not last:
            runner.prefetch_block(block + 1)
        return watcher.collect()

    def follow(self, block: int) -> None:
        """Once a block is quantized: carry the states that the quantized model sees past it."""
        if self.quantized is not None and self.drifted is not None:
            self.runner.load_block(block, self.quantized)
            self.runner.run_block_(block, self.drifted)
            self.runner.unload_block(block)

    def head(self, name: str) -> Tensor:
        """Second moment of what goes into the head, once the states are past the last block: (in_features, in_features)."""
        accumulator: HessianAccumulator | None = None
        for hidden, tokens in zip(self.states.batches, self.states.tokens, strict=True):
            inputs = self.runner.head_inputs(hidden, tokens, name)
            if accumulator is None:
                accumulator = HessianAccumulator(inputs.shape[-1], inputs.device)
            accumulator.add(inputs)
        assert accumulator is not None
        return accumulator.mean()

    def close(self) -> None:
        """Free all weights."""
        self.runner.unload()

    def _weights_of(self, block: int) -> dict[str, Tensor] | None:
        if self.weights is None:
            return None
        prefix = f"{self.skeleton.block_name(block)}."
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}


def relative_weights(weights: Tensor, row_groups: int) -> tuple[Tensor, float]:
    """Token weights of a linear, of mean one, for fewer groups of rows where asked, and the mean they had.

    Args:
        weights: (groups, num_tokens) float32 >= 0. row_groups: a divisor of groups, or 1.
    """
    groups = row_groups if len(weights) % row_groups == 0 else 1
    merged = weights.view(groups, -1, weights.shape[1]).mean(1)
    mean = merged.double().mean().item()
    return (merged / mean if mean > 0 else torch.ones_like(merged)), mean
