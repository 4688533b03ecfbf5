"""What a fine-tuning trains on: texts by name or path, or text that the original writes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vptq.checkpoint.reader import load_whole
from vptq.data import calibration_stream, check_dataset, choose_windows, load_tokenizer
from vptq.errors import UsageError
from vptq.finetune.sample import sample_text
from vptq.finetune_config import SELF, FinetuneConfig
from vptq.models.architecture import DEMO
from vptq.models.files import save_tensors, writing_to
from vptq.models.headers import fingerprint
from vptq.models.stream import FolderSource

NAME = "tokens"


def datasets_of(config: FinetuneConfig) -> tuple[str, ...]:
    """The texts, with the usual one where none is named. Raises UsageError for one that is not there."""
    usual = str(DEMO / "calibration.txt") if config.original is None else "c4"
    names = config.dataset or (usual,)
    for name in names:
        if name != SELF or Path(name).exists():
            check_dataset(name)
    return names


def check_length(config: FinetuneConfig) -> None:
    """Raise UsageError where all sequences are held out."""
    held_out, nsamples = config.num_held_out or 0, config.nsamples or 0
    if nsamples <= held_out:
        raise UsageError(
            f"{nsamples} sequences leave nothing to train on",
            where=[f"{held_out} are held out"],
            hint="give more text, raise --nsamples, or lower --num_held_out or --seq_len",
        )


def tuning_tokens(
    config: FinetuneConfig,
    folder: Path,
    device: torch.device,
    progress: Callable[[str, int], None],
    short: bool = False,
) -> Tensor:
    """The sequences of all texts, in an order that the seed chooses.

    Each text gives an equal part; one that is too short for that gives all it has, and the others more.

    Args:
        config: resolved. folder: of the original. progress: called with what is done, and tokens that are new.
        short: take what there is, where it is less than `nsamples` sequences.
    Returns:
        (nsamples, seq_len) int64, or fewer.
    """
    assert config.nsamples is not None and config.seq_len is not None
    nsamples, seq_len = config.nsamples, config.seq_len
    names = datasets_of(config)
    if nsamples < len(names):
        raise UsageError(f"nsamples is {nsamples}, for {len(names)} texts", hint="give --nsamples one a text at least")
    tokenizer = load_tokenizer(folder, config.trust_remote_code) if set(names) - {SELF} else None
    streams = {name: calibration_stream(name, tokenizer, nsamples * seq_len) for name in dict.fromkeys(names) if name != SELF}
    sizes = {name: nsamples if name == SELF else len(streams[name]) // seq_len for name in names}
    if short:
        nsamples = min(nsamples, sum(sizes.values()))
    if sum(sizes.values()) < nsamples or not nsamples:
        raise UsageError(
            "text is too short",
            where=[
                f"`{name}`: {len(stream)} tokens make {sizes[name]} sequences of {seq_len}" for name, stream in streams.items()
            ],
            hint=f"--nsamples is {nsamples}: lower that or --seq_len, or give more text, {SELF} perhaps",
        )
    parts = [
        _written(config, folder, device, count, progress)
        if name == SELF
        else choose_windows(streams[name], count, seq_len, config.seed)
        for name, count in share_out(nsamples, sizes).items()
    ]
    tokens = torch.cat(parts)
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))]


def share_out(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Shares of `total` that are as equal as they can be, none larger than its size; they must be enough together."""
    shares: dict[str, int] = {}
    left = total
    for number, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):  # what the small ones lack, larger ones give
        shares[name] = min(sizes[name], left // (len(sizes) - number))
        left -= shares[name]
    return {name: shares[name] for name in sizes}


def _written(
    config: FinetuneConfig, folder: Path, device: torch.device, count: int, progress: Callable[[str, int], None]
) -> Tensor:
    """Text that the original writes: (count, seq_len) int64; kept in `cache_dir`, if there is one."""
    kept = _kept_text(config, folder, device, count)
    if kept is not None and kept.exists():
        with contextlib.suppress(Exception):  # damaged: written anew
            return load_file(kept)[NAME]
    assert config.seq_len is not None
    progress("the original writes text", 0)
    model = load_whole(str(folder), str(device), trust_remote_code=config.trust_remote_code)
    tokens = sample_text(
        model,
        count=count,
        seq_len=config.seq_len,
        seed=config.seed,
        progress=lambda tokens: progress("the original writes text", tokens),
    )
    if kept is not None:
        with writing_to(kept.parent):
            kept.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(kept, {NAME: tokens})
    return tokens


def _kept_text(config: FinetuneConfig, folder: Path, device: torch.device, count: int) -> Path | None:
    """The file of a text that an original, a seed and sizes make."""
    if config.cache_dir is None:
        return None
    key = f"{fingerprint(FolderSource(folder).entries)} {device.type} {count} {config.seq_len} {config.seed}"
    return Path(config.cache_dir).expanduser() / f"text-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
