"""Text by name or path -> token sequences, seeded and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vptq.errors import UsageError
from vptq.recipe import HUB_NAMES

TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIXES = (".jsonl", ".json")
C4_NEW_DOCUMENTS = 1100
C4_WINDOWS = 256
CHOICE_TOKENS = 1 << 20  # a text up to this size is read whole, of a larger one its beginning
Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of equal length and where they come from.

    Attributes:
        tokens: (num_sequences, seq_len) int64.
        dataset: the name or path they were read from.
        num_text_tokens: tokens that were read to choose from.
    """

    tokens: Tensor
    dataset: str
    num_text_tokens: int

    @property
    def num_sequences(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises UsageError where there is none that loads."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow import)

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UsageError(
            f"`{folder}` holds no tokenizer that loads",
            where=str(error).strip().splitlines()[:3],
            hint="put its tokenizer files there",
        ) from error


def calibration_sequences(dataset: str, tokenizer: Any, *, nsamples: int, seq_len: int, seed: int) -> TokenSequences:
    """`nsamples` windows of the text that do not overlap, chosen by `seed`, in text order.

    Raises:
        UsageError: a text that can't be had, or that is too short; says how much it holds.
    """
    stream = calibration_stream(dataset, tokenizer, nsamples * seq_len)
    windows = len(stream) // seq_len
    if windows < nsamples:
        raise UsageError(
            f"calibration text `{dataset}` is too short",
            where=[f"{len(stream)} tokens make {windows} sequences of {seq_len}; {nsamples} are asked for"],
            hint=f"set --nsamples {windows}, lower --seq_len, or give more text"
            if windows
            else "lower --seq_len or give more text",
        )
    return TokenSequences(choose_windows(stream, nsamples, seq_len, seed), dataset, len(stream))


def calibration_stream(dataset: str, tokenizer: Any, num_tokens: int) -> Tensor:
    """The text as one run of tokens, (n,) int64; of a long one as much as `num_tokens` of it are to be chosen from."""
    return _tokenize(dataset, "calibration", tokenizer, enough=max(4 * num_tokens, CHOICE_TOKENS))


def choose_windows(stream: Tensor, nsamples: int, seq_len: int, seed: int) -> Tensor:
    """`nsamples` windows of a run of tokens that do not overlap, chosen by `seed`, in order: (nsamples, seq_len)."""
    windows = len(stream) // seq_len
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:nsamples].sort().values
    return stream[: windows * seq_len].view(windows, seq_len)[chosen]


def evaluation_stream(dataset: str, tokenizer: Any, seq_len: int = 0) -> Tensor:
    """The evaluation text as one run of tokens: (num_tokens,) int64.

    The whole text; of c4 and c4-new, which are endless, the first 256 windows of `seq_len`, as is usual.
    """
    if dataset in ("c4", "c4-new") and seq_len:
        enough = C4_WINDOWS * seq_len
        return _tokenize(dataset, "evaluation", tokenizer, enough)[:enough]
    return _tokenize(dataset, "evaluation", tokenizer, enough=None)


def check_dataset(dataset: str) -> None:
    """Raise UsageError, before any work, for a name that is neither a known dataset nor a readable path."""
    if dataset in HUB_NAMES:
        return
    path = Path(dataset).expanduser()
    if not path.exists():
        raise UsageError(
            f"dataset `{dataset}` is neither a known name nor a path here",
            hint=f"known names: {', '.join(HUB_NAMES)}; or give a text or jsonl file, or a folder of them",
        )
    if not _text_files(path):
        raise UsageError(
            f"folder `{dataset}` holds no text", hint=f"files that are read end in {', '.join(TEXT_SUFFIXES + JSONL_SUFFIXES)}"
        )


def _tokenize(dataset: str, purpose: Purpose, tokenizer: Any, enough: int | None) -> Tensor:
    """Tokens of the text, documents joined by two newlines; stops reading once there are `enough`."""
    check_dataset(dataset)
    documents = _hub_documents(dataset, purpose) if dataset in HUB_NAMES else _path_documents(Path(dataset).expanduser())
    pieces, length = [], 0
    for text in documents:
        # A token is rarely over 8 characters: past that the rest would only be thrown away.
        room = None if enough is None else 8 * enough - length
        pieces.append(text[:room])
        length += len(text)
        if room is not None and len(text) >= room:
            break
    joined = (" " if dataset == "c4-new" else "\n\n").join(pieces)
    if not joined.strip():
        raise UsageError(f"{purpose} text `{dataset}` is empty", hint="give a file that holds text")
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "sequence is longer than the model's maximum": it is cut into windows after
    try:
        ids = tokenizer(joined)["input_ids"]
    finally:
        logger.setLevel(level)
    return torch.tensor(ids, dtype=torch.int64)


def _path_documents(path: Path) -> Iterator[str]:
    for file in _text_files(path):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"`{file}` can't be read as UTF-8 text", where=[str(error)]) from error
        if file.suffix.lower() in JSONL_SUFFIXES:
            yield from _jsonl_documents(file, text)
        else:
            yield text


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in TEXT_SUFFIXES + JSONL_SUFFIXES)


def _jsonl_documents(file: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028, which JSON may hold
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            if isinstance(document, dict):
                document = document["text"]
            if not isinstance(document, str):
                raise TypeError("not a string")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"`{file}` line {number} holds no document",
                where=[repr(error)],
                hint='each line: {"text": "..."}, or a JSON string',
            ) from error
        yield document


def _hub_documents(name: str, purpose: Purpose) -> Iterator[str]:
    """The usual splits: WikiText-2 raw train/test; C4 first training file, first validation file."""
    try:
        from datasets import load_dataset  # noqa: PLC0415 (slow import, and absent on some machines)
    except ImportError as error:
        raise UsageError(
            f"dataset `{name}` needs the package `datasets`", hint="pip install datasets, or give a text file"
        ) from error
    for chatty in ("huggingface_hub", "datasets"):  # a line for every retry, before the one message that counts
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        if name == "wikitext2":
            split = "train" if purpose == "calibration" else "test"
            rows: Any = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        else:
            part = "c4-train.00000-of-01024" if purpose == "calibration" else "c4-validation.00000-of-00008"
            split = "train" if purpose == "calibration" else "validation"
            rows = load_dataset("allenai/c4", data_files={split: f"en/{part}.json.gz"}, split=split)
    except Exception as error:
        raise UsageError(
            f"dataset `{name}` can't be had",
            where=[str(error).strip().split("\n")[0]],
            hint="check the network, or give the path of a text or jsonl file in place of the name",
        ) from error
    for number, row in enumerate(rows):
        if name == "c4-new" and purpose == "evaluation" and number >= C4_NEW_DOCUMENTS:
            return
        yield row["text"]
