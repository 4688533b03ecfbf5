"""Text that a model writes: data for those who have none (LLM-QAT, arXiv:2305.17888)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vptq.errors import is_out_of_memory
from vptq.models.device import free_memory

MOST_AT_ONCE = 4096  # sequences, on a GPU: a token of each takes hardly longer than one of a few
AT_ONCE_CPU = 16
CACHE_FRACTION = 0.6  # of a GPU's free memory, for keys and values


def sample_text(model: Any, *, count: int, seq_len: int, seed: int, progress: Callable[[int], None] | None = None) -> Tensor:
    """Sequences drawn from a model's own predictions, each from a first token drawn from all of its vocabulary.

    Args:
        model: a transformers model. progress: called with the number of tokens that are new.
    Returns:
        (count, seq_len) int64 on the CPU.
    """
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(int(model.config.get_text_config().vocab_size), (count, 1), generator=generator)
    step = _at_once(model, seq_len)
    own, model.generation_config = model.generation_config, _settings(seq_len - 1)  # else its own fill what is None here
    found: list[Tensor] = []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            while (done := sum(map(len, found))) < count:
                written = _write_on(model, first[done : done + step], seq_len)
                if written is None and step == 1:
                    raise MemoryError("out of memory: not one sequence can be written")
                if written is None:
                    step = step // 2
                    continue
                found.append(written)
                if progress:
                    progress(written.numel())
    finally:
        model.generation_config = own
    return torch.cat(found)


def _at_once(model: Any, seq_len: int) -> int:
    """How many sequences are written together: on a GPU as many as its memory has room for, as far as the model tells."""
    if model.device.type != "cuda":
        return AT_ONCE_CPU
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * seq_len
    return max(1, min(MOST_AT_ONCE, int(CACHE_FRACTION * free_memory(model.device)) // each))


def _write_on(model: Any, start: Tensor, seq_len: int) -> Tensor | None:
    """Sequences from their first tokens, (n, 1) -> (n, seq_len); None where there is too little memory for so many at once."""
    from vptq.models.kv_cache import cache_for  # noqa: PLC0415 (slow import)

    try:
        start, cache = start.to(model.device), cache_for(model, seq_len)
        given = {} if cache is None else {"past_key_values": cache}
        written = model.generate(input_ids=start, attention_mask=torch.ones_like(start), **given)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return written.cpu()


def _settings(new_tokens: int) -> Any:
    """Plain draws, that go on past the end of a text: so a sequence may hold several, as text cut into windows does."""
    from transformers import GenerationConfig  # noqa: PLC0415 (slow import)

    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0,
        use_cache=True,
    )  # fmt: skip
