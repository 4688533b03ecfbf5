"""One token after the other through a cache of fixed size: on a GPU a step is one CUDA graph, so that Python sets no pace."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from vptq.backend import choice
from vptq.models.architecture import LLAMA_FAMILY
from vptq.nn.decoder_block import FusedBlock, fused_block
from vptq.nn.kernels.nvrtc import kernels_run

_capturing = threading.Lock()
COLDEST = 1e-4  # a temperature below is the likeliest token
WARM_STEPS = 2  # before a step is captured: kernels are compiled and memory is found
ROUND_TO = 256  # tokens of the cache, so that answers of about one length use one graph
TRIAL_TOKENS = 4  # that fused blocks and the model's own have to agree on
MOST_DIFFERENCE = 0.1  # of their logits, over the spread of those; rounding makes it a few hundredths


def choose(logits: Tensor, temperature: float = 0.0, top_p: float = 1.0) -> Tensor:
    """The next token of each row: (n, vocabulary) -> (n, 1) int64, drawn from torch's generator of the device.

    temperature: 0 for the likeliest. top_p: draws are among the likeliest tokens that have this probability together.
    """
    if temperature < COLDEST:
        return logits.argmax(-1, keepdim=True)
    odds = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        falling, order = odds.sort(-1, descending=True)
        before = falling.cumsum(-1) - falling
        odds = torch.zeros_like(odds).scatter(-1, order, falling * ((before < top_p) | (before == 0)))  # the first in any case
    return (odds / torch.empty_like(odds).exponential_()).argmax(-1, keepdim=True)  # as likely as its odds: Gumbel's trick


class StaticDecoder:
    """A model, a cache for so many tokens of one text, and the step that writes the next token.

    Decoders of one GPU are not for threads that run at once: they share a stream to capture on, and the model's modules.

    Args:
        model: of transformers, whole on one device. length: most tokens, prompt and answer together.
        temperature, top_p: see `choose`.
        compiled: whether the step goes through torch.compile instead: a minute, then faster than the model's own code.
        graph: whether the step is captured; None for wherever there is a GPU.
        fused: whether blocks that the kernels know are replaced by theirs in the step, see nn/decoder_block.py.
    Raises:
        ValueError: a model whose cache can't be of fixed size, or whose step can't be captured; a text longer than `length`.
    """

    def __init__(
        self, model: Any, length: int, temperature: float = 0.0, top_p: float = 1.0, *,
        compiled: bool = False, graph: bool | None = None, fused: bool = True,
    ) -> None:  # fmt: skip
        from transformers import StaticCache

        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.length = -(-length // ROUND_TO) * ROUND_TO
        device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=self.length)
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            raise ValueError("its cache keeps a window of the text")
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._call = torch.compile(model, dynamic=False) if compiled else model
        self._graph: torch.cuda.CUDAGraph | None = None
        self.blocks: Sequence[FusedBlock] = []
        self._written = 0  # tokens of the text
        known = inspect.signature(model.forward).parameters
        if "past_key_values" not in known or getattr(model, "_is_stateful", False):
            raise ValueError("it keeps no keys and values")
        self._takes_position = "cache_position" in known
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        if device.type == "cuda" if graph is None else graph:
            with self._on_device(), torch.no_grad():
                self._logits(self.model, self.token, self.position)  # so that the cache has its memory
                with _capturing:
                    if fused and not compiled:
                        self.blocks = self._agreeing_blocks()
                    self._capture()

    def fits(self, length: int, temperature: float, top_p: float) -> bool:
        """Whether this decoder can write such a text."""
        return length <= self.length and (temperature, top_p) == (self.temperature, self.top_p)

    @torch.no_grad()
    def start(self, tokens: Tensor) -> None:
        """Read a prompt, (1, n) int64, n at least 1: `token` is the first one after it."""
        with self._on_device():
            self._read(tokens)

    def _read(self, tokens: Tensor) -> None:
        self._check_room(tokens.shape[1])
        self._reset()
        self._written = tokens.shape[1]
        positions = torch.arange(tokens.shape[1], device=self.token.device)
        logits = self._logits(self.model, tokens.to(self.token.device), positions)
        self.token.copy_(choose(logits, self.temperature, self.top_p))
        self.position.fill_(tokens.shape[1])

    @torch.no_grad()
    def step(self) -> None:
        """Write `token` into the text: then it is the next one. Returns before the GPU is done."""
        self._check_room(self._written + 1)
        self._written += 1
        with self._on_device():
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _check_room(self, count: int) -> None:
        if count > self.length:
            raise ValueError(f"the text is longer than the {self.length} tokens that this decoder has room for")

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.token.device) if self.token.is_cuda else contextlib.nullcontext()

    def _logits(self, call: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        given = {"cache_position": positions} if self._takes_position else {}
        answer = call(
            tokens, past_key_values=self.cache, use_cache=True, position_ids=positions[None], **given, **self._last_only
        )
        return answer.logits[:, -1]

    def _step(self) -> None:
        with _in_place(self.model, self.blocks):
            logits = self._logits(self._call, self.token, self.position)
        self.token.copy_(choose(logits, self.temperature, self.top_p))
        self.position.add_(1)

    def _reset(self) -> None:
        self.cache.reset()
        self.position.zero_()

    def _agreeing_blocks(self) -> Sequence[FusedBlock]:
        """Fused blocks for all of the model, when they compute what it computes; else none, with a warning."""
        try:
            blocks = self._fused_blocks()
            if not blocks:
                return []
            tokens = torch.arange(1, TRIAL_TOKENS + 1, device=self.token.device) % self.model.config.vocab_size
            right, found = self._trial(tokens, []), self._trial(tokens, blocks)
            spread = (right - right.mean(-1, keepdim=True)).norm(dim=-1)
            if bool(((found - right).norm(dim=-1) <= MOST_DIFFERENCE * spread).all()):
                return blocks
            said = "they don't compute what its own do"
        except Exception as error:  # whatever a model of any kind makes of it: its own blocks are there
            said = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"this model writes without fused blocks: {said}", stacklevel=2)
        return []

    def _trial(self, tokens: Tensor, blocks: Sequence[FusedBlock]) -> Tensor:
        """Logits of a text, token by token: (tokens, vocabulary) float32."""
        self._reset()
        found = []
        for token in tokens:
            with _in_place(self.model, blocks):
                found.append(self._logits(self.model, token.view(1, 1), self.position).float())
            self.position.add_(1)
        return torch.cat(found)

    def _fused_blocks(self) -> Sequence[FusedBlock]:
        layers, config, device = _layers_of(self.model), self.model.config, self.token.device
        known = not self.model.training and config.model_type in LLAMA_FAMILY and getattr(config, "hidden_act", None) == "silu"
        if not known or not layers or choice() == "torch" or not kernels_run(device):
            return []
        caches: list[Any] = [(layer.keys, layer.values) for layer in cast(list[Any], self.cache.layers)]
        arrived = torch.zeros(max(keys.shape[1] for keys, _ in caches), dtype=torch.int32, device=device)
        blocks = []
        for layer, cache in zip(layers, caches, strict=True):
            block = fused_block(layer, cache, self.position, arrived)
            if block is None:
                return []
            blocks.append(block)
        return blocks

    @torch.no_grad()
    def _capture(self) -> None:
        self._reset()
        side = _side_stream(self.token.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                self._step()
        except RuntimeError as error:
            raise ValueError(f"its step can't be captured: {str(error).splitlines()[0]}") from error
        self._graph = graph


def _layers_of(model: Any) -> Sequence[Any]:
    return list(getattr(getattr(model, "model", None), "layers", []))


@contextlib.contextmanager
def _in_place(model: Any, blocks: Sequence[FusedBlock]) -> Iterator[None]:
    """The model's blocks replaced by `blocks`, one for each, or not at all."""
    layers = _layers_of(model)[: len(blocks)]
    try:
        for layer, block in zip(layers, blocks, strict=True):
            layer.forward = block
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all decoders of a device: the libraries keep memory for every stream."""
    return torch.cuda.Stream(device)


def make_decoder(model: Any, length: int, temperature: float, top_p: float, compiled: bool = False) -> StaticDecoder | None:
    """A decoder for a model on a GPU; None, with a warning, for a model that has none."""
    try:
        return StaticDecoder(model, length, temperature, top_p, compiled=compiled)
    except Exception as error:  # whatever a model of any kind makes of it: there is another way to write with it
        said = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"this model is written with token by token, without CUDA graphs: {said}", stacklevel=2)
        return None
