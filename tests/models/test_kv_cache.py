"""A cache that takes its memory once: the same text as with transformers' own, whatever the layers keep."""

from __future__ import annotations

import pytest
import torch
from transformers import cache_utils

from tests.models.zoo import ARCHITECTURES, make_tiny
from vptq.checkpoint.reader import load_whole
from vptq.models.kv_cache import RoomyLayer, cache_for

LENGTH = 20
BOTH, WINDOW = {"all of it", "window"}, {"window"}
KEPT = {"gemma2": BOTH, "gpt_oss": BOTH, "gemma3": WINDOW, "gemma3_text": WINDOW, "mistral": WINDOW}


def write(model, cache):
    """A text of three sequences; cache: None for transformers' own."""
    torch.manual_seed(3)
    start = torch.tensor([[5], [17], [99]])
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=LENGTH - 1, do_sample=True, eos_token_id=None,
        pad_token_id=0, **given,
    )  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_the_same_text_is_written(kind, tmp_path):
    model = load_whole(str(make_tiny(kind, tmp_path / kind)), "cpu")
    cache = cache_for(model, LENGTH)
    kinds = {"window" if layer.is_sliding else "all of it" for layer in cache.layers}
    assert kinds == KEPT.get(kind, {"all of it"})
    assert all(isinstance(layer, RoomyLayer) != layer.is_sliding for layer in cache.layers)
    assert torch.equal(write(model, cache), write(model, None))


def test_memory_is_taken_once():
    layer = RoomyLayer(6)
    states = torch.randn(3, 2, 6, 4).split([2, 1, 3], dim=2)
    places = set()
    for new in states:
        keys, values = layer.update(new, -new)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    assert torch.equal(keys, torch.cat(states, 2)) and torch.equal(values, -keys)
    assert layer.get_seq_length() == 6


def test_models_of_other_kinds_keep_their_own(tmp_path, monkeypatch):
    model = load_whole(str(make_tiny("llama", tmp_path / "m")), "cpu")
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", classmethod(lambda cls: False))
    assert cache_for(model, LENGTH) is None
    monkeypatch.undo()
    assert cache_for(model, LENGTH) is not None
    monkeypatch.setattr(cache_utils, "DynamicCache", type("DynamicCache", (), {}))  # an older transformers
    assert cache_for(model, LENGTH) is None
