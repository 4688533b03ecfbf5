"""Run a model block by block, with one block's weights in memory at a time.

The model's own `forward` is used throughout, so masks, positions and heads of any architecture come out right: its blocks
are stubbed. A stub on the first block that stops catches what goes in; stubs that only take notes show what else each
block is given; stubs that hand on known hidden states let the model compute its logits from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vptq.models.architecture import Skeleton, tied_names
from vptq.models.device import free_memory
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.staging import Stage, to_main_memory
from vptq.models.stream import TensorSource, load_module, unload_module

KEEP_ON_GPU_FRACTION = 0.25


class _StopForward(Exception):
    """Ends a forward pass early; caught only here."""


@dataclass
class _BlockInputs:
    """What a block is given beside the hidden states, for one shape of batch."""

    args: tuple
    kwargs: dict[str, Any]


@dataclass
class HiddenStates:
    """Hidden states of a set of sequences at one depth: batches of (sequences, seq_len, hidden_size)."""

    batches: list[Tensor]
    tokens: list[Tensor] = field(repr=False)  # the token batches they come from


class BlockRunner:
    """Runs sequences through a skeleton's blocks.

    Args:
        skeleton: its non-block weights are loaded here, its blocks when they run.
        source: gives the weights: the original's, or a quantized checkpoint's dequantized ones.
        device, dtype: where and in which float type the blocks run.
        spare: keep hidden states off a GPU in any case.
    """

    def __init__(
        self, skeleton: Skeleton, source: TensorSource, device: torch.device, dtype: torch.dtype, spare: bool = False
    ) -> None:
        self.skeleton, self.source, self.device, self.dtype, self.spare = skeleton, source, device, dtype, spare
        self.model = skeleton.model
        self._inputs: dict[tuple[int, int], list[_BlockInputs]] = {}
        self._returns_tuple: bool | None = None  # not known before a block has run
        self._load_rest()

    def _load_rest(self) -> None:
        """Everything but the blocks: embeddings, final norm, head, buffers."""
        prefix = f"{self.skeleton.blocks_name}."
        skipped = [n for n, _ in self.model.named_parameters() if n.startswith(prefix)]
        skipped += [n for n in tied_names(self.model) if not self.source.has(n)]
        load_module(self.model, "", self.source, self.device, self.dtype, skip=skipped)
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))

    def load_block(self, block: int, source: TensorSource | None = None) -> None:
        """Weights of a block, from the runner's source or another."""
        name = self.skeleton.block_name(block)
        load_module(self.skeleton.blocks[block], name, source or self.source, self.device, self.dtype)

    def block_parameters(self, block: int) -> list[str]:
        """Full names of a block's parameters."""
        prefix = self.skeleton.block_name(block)
        return [f"{prefix}.{name}" for name, _ in self.skeleton.blocks[block].named_parameters()]

    def prefetch_block(self, block: int) -> None:
        """Begin to read a block's weights, where the source can."""
        if isinstance(self.source, PrefetchingFolder) and 0 <= block < len(self.skeleton.blocks):
            self.source.prefetch(self.block_parameters(block))

    def unload_block(self, block: int) -> None:
        unload_module(self.skeleton.blocks[block])

    def unload(self) -> None:
        """Free all weights, so that the skeleton can serve another runner."""
        unload_module(self.model)
        self.model.tie_weights()

    @torch.no_grad()
    def embed(self, token_batches: list[Tensor]) -> HiddenStates:
        """What goes into the first block. token_batches: (sequences, seq_len) int64 each."""
        batches: list[Tensor] = []
        keep = self._hidden_device(token_batches)

        def catch(block: int, hidden: Tensor, inputs: _BlockInputs) -> Tensor:
            batches.append(hidden.to(keep) if keep.type == self.device.type else to_main_memory(hidden))
            raise _StopForward

        for tokens in token_batches:
            self._note_inputs(tokens)
            with self._stubbed(catch), contextlib.suppress(_StopForward):
                self._forward(tokens)
        return HiddenStates(batches, token_batches)

    def run_block_(self, block: int, states: HiddenStates, progress: Callable[[], None] | None = None) -> None:
        """Replace every batch, in place, by the block's output: inputs and outputs of all never stand side by side.

        The block must be loaded.
        """
        for _ in self.batches_of_block_(block, states):
            if progress:
                progress()

    def run_blocks_(self, states: HiddenStates, progress: Callable[[], None] | None = None) -> None:
        """Carry the states past all blocks, in place, each loaded for its turn only."""
        for block in range(len(self.skeleton.blocks)):
            self.load_block(block)
            self.run_block_(block, states, progress)
            self.unload_block(block)

    @torch.no_grad()
    def batches_of_block_(self, block: int, states: HiddenStates, keep: bool = True) -> Iterator[None]:
        """`run_block_` batch by batch, so that sets of states can go side by side; without `keep` nothing is replaced."""
        stage = Stage(states.batches, self.device)
        for number, (tokens, hidden) in enumerate(zip(states.tokens, stage, strict=True)):
            output = self.forward_block(block, hidden, tokens)
            if keep:
                stage.put(number, output)
            yield
        stage.finish()

    def forward_block(self, block: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The output of a loaded block for one batch: (sequences, seq_len, hidden_size) on the device, also with gradients."""
        if self._shape(tokens) not in self._inputs:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._note_inputs(tokens)
        inputs = self._inputs[self._shape(tokens)][block]
        output = self.skeleton.blocks[block](hidden, *inputs.args, **inputs.kwargs)
        self._returns_tuple = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What the model makes of the last block's output: (sequences, seq_len, vocab_size)."""
        return self._logits(hidden, tokens)

    @torch.no_grad()
    def head_inputs(self, hidden: Tensor, tokens: Tensor, head: str) -> Tensor:
        """What the model makes of the last block's output before its head, the module of that name: (..., in_features)."""
        caught: list[Tensor] = []

        def catch(_module: Any, args: tuple) -> None:
            caught.append(args[0])
            raise _StopForward

        with self.model.get_submodule(head).register_forward_pre_hook(catch), contextlib.suppress(_StopForward):
            self._logits(hidden, tokens)
        return caught[0]

    def loss_gradient(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Gradient of the summed next-token loss, in nats, with respect to the last block's output; of the same shape.

        Summed over tokens, not averaged: so it is of a size that 16-bit floats hold, whatever the number of tokens.
        """

        def next_token(logits: Tensor, sequence: int) -> list[Tensor]:
            targets = tokens[sequence, 1:].to(self.device)
            return [torch.nn.functional.cross_entropy(logits, targets, reduction="sum")]

        return self.loss_gradients(hidden, tokens, next_token)[0]

    @torch.enable_grad()
    def loss_gradients(self, hidden: Tensor, tokens: Tensor, losses: Callable[[Tensor, int], Sequence[Tensor]]) -> list[Tensor]:
        """Gradients of losses with respect to the last block's output, each of its shape.

        Args:
            losses: of the logits that predict something, (seq_len - 1, vocab_size) float32, and the sequence's number.
        """
        rows = []
        for sequence, (state, target) in enumerate(zip(hidden.split(1), tokens.split(1), strict=True)):
            state = state.to(self.device).detach().requires_grad_()
            found = losses(self._logits(state, target)[0, :-1].float(), sequence)
            last = len(found) - 1
            rows.append([torch.autograd.grad(loss, state, retain_graph=n < last)[0] for n, loss in enumerate(found)])
            del found
        return [torch.cat(own) for own in zip(*rows, strict=True)]

    def _logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        if self._returns_tuple is None:
            self._run_one_block(tokens)

        def hand_on(block: int, _hidden: Tensor, _inputs: _BlockInputs) -> Any:
            state = hidden.to(self.device)
            return (state,) if self._returns_tuple else state

        with self._stubbed(hand_on):
            return self._forward(tokens).logits

    @torch.no_grad()
    def _run_one_block(self, tokens: Tensor) -> None:
        """Learn what blocks return, where states come from elsewhere."""
        first = tokens[:1]
        (hidden,) = self.embed([first]).batches
        self.load_block(0)
        self.forward_block(0, hidden.to(self.device), first)
        self.unload_block(0)

    def _forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens.to(self.device), use_cache=False)

    def _note_inputs(self, tokens: Tensor) -> None:
        """Learn what the model gives each block for this shape of batch: masks and positions, not the hidden states."""
        shape = self._shape(tokens)
        if shape in self._inputs:
            return
        noted: list[_BlockInputs] = []
        first: list[Tensor] = []

        def note(block: int, hidden: Tensor, inputs: _BlockInputs) -> Any:
            noted.append(inputs)
            first.append(hidden)
            if len(noted) == len(self.skeleton.blocks):
                raise _StopForward
            # Whether blocks return a tensor or a tuple is not known yet. The first block's input stands for both: a model
            # that takes item 0 of it loses the batch dimension once, not once a block.
            return first[0]

        with self._stubbed(note), contextlib.suppress(_StopForward):
            self._forward(tokens)
        self._inputs[shape] = noted

    @contextlib.contextmanager
    def _stubbed(self, handle: Callable[[int, Tensor, _BlockInputs], Any]) -> Iterator[None]:
        """Every block's forward replaced by `handle(block, hidden, other inputs)`."""

        def stub(number: int) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if args:
                    return handle(number, args[0], _BlockInputs(args[1:], kwargs))
                others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                return handle(number, kwargs["hidden_states"], _BlockInputs((), others))

            return forward

        blocks = list(self.skeleton.blocks)
        for number, block in enumerate(blocks):
            block.forward = stub(number)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _hidden_device(self, token_batches: list[Tensor]) -> torch.device:
        """Hidden states stay on the GPU if they take little of it, else in main memory."""
        if self.device.type != "cuda":
            return self.device
        size = self.skeleton.hidden_size
        needed = sum(t.numel() for t in token_batches) * size * self.dtype.itemsize
        stays = not self.spare and needed < free_memory(self.device) * KEEP_ON_GPU_FRACTION
        return self.device if stays else torch.device("cpu")

    @staticmethod
    def _shape(tokens: Tensor) -> tuple[int, int]:
        return tokens.shape[0], tokens.shape[1]
