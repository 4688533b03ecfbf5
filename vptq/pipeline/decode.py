"""One token after the other through a cache of fixed size: on a GPU a step is one CUDA graph, so that Python sets no pace."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

COLDEST = 1e-4  # a temperature below is the likeliest token
WARM_STEPS = 2  # before a step is captured: kernels are compiled and memory is found
ROUND_TO = 256  # tokens of the cache, so that answers of about one length use one graph


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

    Args:
        model: of transformers, whole on one device. length: most tokens, prompt and answer together.
        temperature, top_p: see `choose`. compiled: whether the step goes through torch.compile (a minute, then faster).
        graph: whether the step is captured; None for wherever there is a GPU.
    Raises:
        ValueError: a model whose cache can't be of fixed size, or whose step can't be captured.
    """

    def __init__(
        self, model: Any, length: int, temperature: float = 0.0, top_p: float = 1.0, *,
        compiled: bool = False, graph: bool | None = None,
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
        known = inspect.signature(model.forward).parameters
        if "past_key_values" not in known or getattr(model, "_is_stateful", False):
            raise ValueError("it keeps no keys and values")
        self._takes_position = "cache_position" in known
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        if device.type == "cuda" if graph is None else graph:
            with self._on_device():
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
        self._reset()
        positions = torch.arange(tokens.shape[1], device=self.token.device)
        logits = self._logits(self.model, tokens.to(self.token.device), positions)
        self.token.copy_(choose(logits, self.temperature, self.top_p))
        self.position.fill_(tokens.shape[1])

    @torch.no_grad()
    def step(self) -> None:
        """Write `token` into the text: then it is the next one. Returns before the GPU is done."""
        with self._on_device():
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.token.device) if self.token.is_cuda else contextlib.nullcontext()

    def _logits(self, call: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        given = {"cache_position": positions} if self._takes_position else {}
        answer = call(
            tokens, past_key_values=self.cache, use_cache=True, position_ids=positions[None], **given, **self._last_only
        )
        return answer.logits[:, -1]

    def _step(self) -> None:
        logits = self._logits(self._call, self.token, self.position)
        self.token.copy_(choose(logits, self.temperature, self.top_p))
        self.position.add_(1)

    def _reset(self) -> None:
        self.cache.reset()
        self.position.zero_()

    @torch.no_grad()
    def _capture(self) -> None:
        self._logits(self.model, self.token, self.position)  # so that the cache has its memory
        self._reset()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            raise ValueError(f"its step can't be captured: {str(error).splitlines()[0]}") from error
        self._graph = graph


def make_decoder(model: Any, length: int, temperature: float, top_p: float, compiled: bool = False) -> StaticDecoder | None:
    """A decoder for a model on a GPU; None, with a warning, for a model that has none."""
    try:
        return StaticDecoder(model, length, temperature, top_p, compiled=compiled)
    except Exception as error:  # whatever a model of any kind makes of it: there is another way to write with it
        said = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"this model is written with token by token, without CUDA graphs: {said}", stacklevel=2)
        return None
