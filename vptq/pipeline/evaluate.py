"""Perplexity of a model folder: original, dequantized or packed, by the one definition of `evaluation.perplexity`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vptq.checkpoint.reader import open_source
from vptq.data import check_dataset, evaluation_stream, load_tokenizer
from vptq.errors import UsageError
from vptq.evaluation.perplexity import Perplexity, cut_windows, progress_steps, streamed_perplexity
from vptq.models.architecture import DEMO, Skeleton, load_skeleton, resolve_folder
from vptq.models.device import forced_dtype, resolve_device
from vptq.models.runner import BlockRunner
from vptq.pipeline.progress import Progress, Silent
from vptq.recipe import DEFAULT_SEQ_LEN


def evaluate_model(
    model_name: str | None = None,
    datasets: Sequence[str] | None = None,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Perplexity on each dataset, with one block's weights in memory at a time.

    Args:
        model_name: folder or hub name; None for the demo model. datasets: names or paths; None for the model's usual one.
        seq_len: context in tokens; None for 2048, or the model's if shorter. stride: see `cut_windows`. limit: most windows.
    Raises:
        UsageError: bad input, before any work.
    """
    progress = progress or Silent()
    target = resolve_device(device)
    names = list(datasets or [str(DEMO / "evaluation.txt") if model_name is None else "wikitext2"])
    for name in names:
        check_dataset(name)
    skeleton = load_skeleton(resolve_folder(model_name), trust_remote_code, forced_dtype(target))
    seq_len = resolve_seq_len(seq_len, skeleton.max_seq_len)
    windows = load_windows(skeleton, names, seq_len=seq_len, stride=stride, limit=limit, trust_remote_code=trust_remote_code)
    runner = make_runner(skeleton, target)
    progress.start(sum(progress_steps(runner, w) for w in windows.values()), 0)
    results = []
    for name, cut in windows.items():
        progress.phase(f"perplexity, {name}")
        results.append(streamed_perplexity(runner, cut, stride=stride, dataset=name, progress=lambda: progress.advance(1)))
    progress.finish()
    return results


def make_runner(skeleton: Skeleton, device: torch.device) -> BlockRunner:
    """A model folder of any kind, block by block, as it is evaluated: packed weights dequantized."""
    return BlockRunner(skeleton, open_source(skeleton, device), device, forced_dtype(device) or skeleton.dtype)


def load_windows(
    skeleton: Skeleton,
    datasets: Sequence[str],
    *,
    seq_len: int,
    stride: int | None,
    limit: int | None,
    trust_remote_code: bool,
) -> dict[str, Tensor]:
    """Each evaluation text, tokenized by the model's tokenizer and cut: (num_windows, seq_len) int64 by dataset."""
    if not datasets:
        return {}
    tokenizer = load_tokenizer(skeleton.folder, trust_remote_code)
    return {
        name: cut_windows(
            evaluation_stream(name, tokenizer, seq_len), seq_len=seq_len, stride=stride, limit=limit, dataset=name
        )
        for name in datasets
    }


def resolve_seq_len(asked: int | None, longest: int | None) -> int:
    """The context: as asked, else 2048, or the model's if shorter. Raises UsageError for more than the model takes."""
    if asked is None:
        return min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    if asked < 2 or (longest is not None and asked > longest):
        limit = f"at most {longest} tokens" if longest is not None else "any number of tokens from 2 on"
        raise UsageError(
            f"seq_len is {asked}, the model takes {limit}", hint=f"set --seq_len {longest or DEFAULT_SEQ_LEN} or less"
        )
    return asked
