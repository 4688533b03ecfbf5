"""What an original's blocks put out for a text, kept on disk: its predictions follow from that, and it is much smaller."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vptq.evaluation.divergence import last_states
from vptq.evaluation.perplexity import token_batches
from vptq.models.files import save_tensors, writing_to
from vptq.models.headers import fingerprint
from vptq.models.runner import BlockRunner
from vptq.pipeline.codebooks import cache_folder

NAME = "states"
FILE_BYTES = 1 << 30  # in main memory while they are made


def states_folder(cache_dir: str | None = None) -> Path:
    """Where they are kept; None for the user's cache folder."""
    return Path(cache_dir).expanduser() if cache_dir else cache_folder() / "states"


def states_file(runner: BlockRunner, windows: Tensor, folder: Path, progress: Callable[[], None]) -> Path:
    """A file that holds `last_states` of windows, (num_windows, seq_len) int64: an old one, or one that is made now."""
    source = runner.skeleton.source()
    key = hashlib.sha256(f"{fingerprint(source.entries)} {runner.dtype} {runner.device.type}".encode())
    key.update(windows.numpy().tobytes())
    path = folder / f"{key.hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                shape = file.get_slice(NAME).get_shape()
                first = file.get_slice(NAME)[:1]
            if tuple(shape[:2]) == tuple(windows.shape) and first.dtype == runner.dtype:
                return path
        except Exception:  # damaged: computed anew
            path.unlink(missing_ok=True)
    states = last_states(runner, windows, progress)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {NAME: states})
    return path


def read_states(path: Path) -> Tensor:
    """All of a file's: (num_windows, seq_len, hidden_size)."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(NAME)


class KeptTeacher:
    """The original's logits of the sequences of a text, from its last block's output in files.

    Args:
        runner: of the original, which needs none of its blocks any more. files: of `each` sequences, in order.
    """

    def __init__(self, runner: BlockRunner, tokens: Tensor, files: Sequence[Path], each: int) -> None:
        self.runner, self.tokens, self.each = runner, tokens, each
        self.files = [safe_open(path, framework="pt") for path in files]

    @classmethod
    def make(cls, runner: BlockRunner, tokens: Tensor, folder: Path, progress: Callable[[int], None]) -> KeptTeacher:
        """For tokens, (num_sequences, seq_len) int64; what is not in the folder yet is computed, one block in memory.

        progress: called with tokens that went through a block.
        """
        bytes_each = tokens.shape[1] * runner.skeleton.hidden_size * runner.dtype.itemsize
        each = max(1, FILE_BYTES // bytes_each)
        size = token_batches(tokens)[0].numel()
        files = [states_file(runner, part.contiguous(), folder, lambda: progress(size)) for part in tokens.split(each)]
        return cls(runner, tokens, files, each)

    def __call__(self, numbers: list[int]) -> Tensor:
        """(len(numbers), seq_len, vocab_size) on the runner's device."""
        rows = [self.files[n // self.each].get_slice(NAME)[n % self.each : n % self.each + 1] for n in numbers]
        return self.runner.logits(torch.cat(rows), self.tokens[numbers])
