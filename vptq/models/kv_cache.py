"""A cache of keys and values that takes its memory once: transformers' own is copied for every token that comes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import cache_utils

_DynamicLayer: Any = getattr(cache_utils, "DynamicLayer", object)  # transformers 4.54


def cache_for(model: Any, length: int) -> Any:
    """A cache for texts of `length` tokens, for `generate`; None where the model's own kind is best left to transformers.

    Layers that keep all of the text take their memory with their first token; those of other kinds grow as they do anyway.
    """
    known = "config" in inspect.signature(cache_utils.DynamicCache).parameters
    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if not known or supported is None or not supported() or model.config.is_encoder_decoder:
        return None
    cache = cache_utils.DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer(length) if type(layer) is _DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(_DynamicLayer):
    """Keys and values of one layer, (sequences, heads, tokens, size), as views into tensors of `length` tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self._room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states behind those that are there; all of them up to now."""
        new = key_states, value_states
        if not self._room:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._room = [own.new_empty(*own.shape[:2], self.length, own.shape[3]) for own in new]
            self.keys, self.values = (room[:, :, :0] for room in self._room)
        first = self.keys.shape[2]
        end = first + key_states.shape[2]
        for room, own in zip(self._room, new, strict=True):
            room[:, :, first:end] = own
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values
