"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor

from vptq.errors import UsageError
from vptq.models.remote import mirror_of, partial_of, publish, writing


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under its name only when it is whole."""
    with whole_file(path) as partial:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt", **(metadata or {})})


def save_json(path: Path, value: Any) -> None:
    """Write JSON under its name only when it is whole."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def standing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that is there. Raises UsageError where one may not look."""
    path = path.absolute()
    try:
        while not path.exists():
            path = path.parent
    except PermissionError as error:
        raise UsageError(f"`{path}` can't be looked at", where=[str(error)], hint="give another --output_dir") from error
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path to write at; what is there when the block ends well appears under `path`, at once, and behind its URL."""
    partial = partial_of(path)
    with writing_to(path):
        if mirror_of(path) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # another machine may have made it
        try:
            yield partial
            publish(path, partial)  # first: what is here counts as done
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_stream(path: Path) -> Iterator[BinaryIO]:
    """A file to write at; it appears under `path` when the block ends well, or behind its URL alone."""
    mirror = mirror_of(path)
    if mirror is not None:
        with writing(mirror, path) as stream:
            yield stream
        return
    with whole_file(path) as partial, partial.open("wb", buffering=0) as file:
        yield file


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that can't be written, into a message."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = str(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text
        if full:
            raise UsageError(
                f"the disk is full: `{path}` can't be written",
                hint="free some space; a run goes on with --resume RUN_FOLDER",
            ) from error
        if isinstance(error, NotADirectoryError | FileExistsError):
            raise UsageError(
                f"`{path}` can't be written", where=[text], hint="a part of this path is a file, not a folder"
            ) from error
        denied = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS
        if denied or "Permission denied" in text or "Read-only file system" in text:
            raise UsageError(f"`{path}` can't be written", where=[text], hint="give another --output_dir") from error
        raise
