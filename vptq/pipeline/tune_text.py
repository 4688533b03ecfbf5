"""What a fine-tuning trains on: texts by name or path, or text that the original writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vptq.checkpoint.reader import load_whole
from vptq.data import calibration_sequences, check_dataset, load_tokenizer
from vptq.errors import UsageError
from vptq.finetune.sample import sample_text
from vptq.finetune_config import SELF, FinetuneConfig
from vptq.models.architecture import DEMO


def datasets_of(config: FinetuneConfig) -> tuple[str, ...]:
    """The texts, with the usual one where none is named. Raises UsageError for one that is not there."""
    usual = str(DEMO / "calibration.txt") if config.original is None else "c4"
    names = config.dataset or (usual,)
    for name in names:
        if name != SELF or Path(name).exists():
            check_dataset(name)
    return names


def tuning_tokens(config: FinetuneConfig, folder: Path, device: torch.device, progress: Callable[[str, int], None]) -> Tensor:
    """The sequences of all texts, each giving an equal part, in an order that the seed chooses.

    Args:
        config: resolved. folder: of the original. progress: called with what is done, and tokens that are new.
    Returns:
        (nsamples, seq_len) int64.
    """
    assert config.nsamples is not None and config.seq_len is not None
    names = datasets_of(config)
    if config.nsamples < len(names):
        raise UsageError(f"nsamples is {config.nsamples}, for {len(names)} texts", hint="give --nsamples one a text at least")
    tokenizer = load_tokenizer(folder, config.trust_remote_code) if set(names) - {SELF} else None
    parts = []
    for number, name in enumerate(names):
        count = config.nsamples // len(names) + (number < config.nsamples % len(names))
        if name == SELF:
            parts.append(_written(config, folder, device, count, progress))
            continue
        found = calibration_sequences(name, tokenizer, nsamples=count, seq_len=config.seq_len, seed=config.seed)
        parts.append(found.tokens)
    tokens = torch.cat(parts)
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))]


def _written(
    config: FinetuneConfig, folder: Path, device: torch.device, count: int, progress: Callable[[str, int], None]
) -> Tensor:
    """Text that the original writes: (count, seq_len) int64."""
    assert config.seq_len is not None
    progress("the original writes text", 0)
    model = load_whole(str(folder), str(device), trust_remote_code=config.trust_remote_code)
    return sample_text(
        model,
        count=count,
        seq_len=config.seq_len,
        seed=config.seed,
        progress=lambda tokens: progress("the original writes text", tokens),
    )
