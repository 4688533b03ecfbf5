"""Folders behind a URL (s3://, gs://, hdfs://, ... through fsspec), each mirrored by a folder here.

Code works with paths of the mirror. What is written there is published when it is whole; what is missing there is fetched
when it is read. Large things that nobody here reads again go past the mirror, as streams.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vptq.errors import UsageError

STREAM_BYTES = 16 << 20
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss"}
PARTIAL = ".partial"  # end of a name that something has until it is whole


def partial_of(path: Path) -> Path:
    """Where this process writes a file until it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")


@dataclass(frozen=True)
class Mirror:
    """A URL and the folder that stands for it: small enough to send to other machines, where the folder may be empty."""

    url: str
    root: Path

    @property
    def filesystem(self) -> Any:
        return _filesystem(self.url)

    def url_of(self, path: Path) -> str:
        """Where a path of the mirror really is."""
        rest = path.relative_to(self.root).as_posix()
        return self.url if rest == "." else f"{self.url}/{rest}"


_mirrors: dict[Path, Mirror] = {}


def is_url(name: str | Path) -> bool:
    """Whether it names something behind fsspec."""
    return "://" in str(name)


def local_folder(name: str) -> Path:
    """A folder here: itself, or the mirror of a URL, from now on known as such.

    Raises:
        UsageError: a URL whose file system is not installed or not there.
    """
    if not is_url(name):
        return Path(name).expanduser()
    url = name.rstrip("/")
    root = Path(tempfile.gettempdir()) / f"vptq-{getpass.getuser()}" / hashlib.sha256(url.encode()).hexdigest()[:16]
    return know(Mirror(url, root)).root


def know(mirror: Mirror) -> Mirror:
    """Let paths under its root be those of its URL, in this process."""
    mirror.filesystem  # noqa: B018 (says what is missing)
    mirror.root.mkdir(parents=True, exist_ok=True)
    _mirrors[mirror.root] = mirror
    return mirror


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a path is in, if any."""
    return next((mirror for root, mirror in _mirrors.items() if path.is_relative_to(root)), None)


def shown(path: Path) -> str:
    """The path as the user knows it."""
    mirror = mirror_of(path)
    return str(path) if mirror is None else mirror.url_of(path)


def publish(path: Path, content: Path | None = None) -> None:
    """Bring a file of a mirror to its URL, where it appears at once; elsewhere nothing is to do.

    Args:
        content: the file that has what belongs there, if that is not at its place yet.
    """
    mirror = mirror_of(path)
    if mirror is None or any(part.endswith(PARTIAL) for part in path.relative_to(mirror.root).parts):
        return
    whole = mirror.url_of(path)
    with _asking(whole, missing=True):
        make_parent(mirror, path)
        if _is_object_store(mirror.filesystem):
            mirror.filesystem.put_file(str(content or path), whole)
        else:
            part = mirror.url_of(partial_of(path))
            mirror.filesystem.put_file(str(content or path), part)
            mirror.filesystem.mv(part, whole)


def publish_folder(folder: Path, last: str) -> None:
    """Bring a folder of a mirror to its URL. last: the file whose presence there says that all is there."""
    if mirror_of(folder) is not None:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        for file in sorted(files, key=lambda file: file == folder / last):
            publish(file)


def fetch(path: Path) -> Path:
    """See that a file of a mirror is here, if it is anywhere; gives the path itself."""
    mirror = mirror_of(path)
    if mirror is not None and not path.exists():
        with _asking(mirror.url_of(path)), contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_of(path)
            mirror.filesystem.get_file(mirror.url_of(path), str(partial))
            os.replace(partial, path)
    return path


def fetch_all(folder: Path, but: Collection[str]) -> None:
    """Make a folder of a mirror what its URL holds, but for what has these names in it."""
    mirror = mirror_of(folder)
    if mirror is None:
        return
    for old in folder.iterdir():
        if old.name not in but:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    with _asking(mirror.url):
        mirror.filesystem.invalidate_cache()
        base = mirror.filesystem._strip_protocol(mirror.url_of(folder))
        for name in mirror.filesystem.find(base):
            rest = Path(str(name).removeprefix(base).lstrip("/"))
            if rest.parts and rest.parts[0] not in but and not rest.name.endswith(PARTIAL):
                fetch(folder / rest)


def remove(path: Path) -> None:
    """Delete a file or a folder, here and behind its URL; nothing is said of what is not there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    mirror = mirror_of(path)
    if mirror is not None:
        with contextlib.suppress(FileNotFoundError), _asking(mirror.url_of(path)):
            mirror.filesystem.rm(mirror.url_of(path), recursive=True)


def remove_empty(path: Path) -> None:
    """Delete a folder, here and behind its URL, if nothing is in it."""
    with contextlib.suppress(OSError):
        path.rmdir()
    mirror = mirror_of(path)
    if mirror is not None and not _is_object_store(mirror.filesystem):  # these have no folders
        with contextlib.suppress(Exception):
            mirror.filesystem.rmdir(mirror.url_of(path))


def exists(path: Path) -> bool:
    """Whether it is here or behind its URL."""
    mirror = mirror_of(path)
    if path.exists() or mirror is None:
        return path.exists()
    with _asking(mirror.url_of(path)):
        return bool(mirror.filesystem.exists(mirror.url_of(path)))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A file as a stream, past the mirror."""
    mirror = mirror_of(path)
    if mirror is None:
        with path.open("rb", buffering=0) as file:
            yield file
        return
    with _asking(mirror.url_of(path)):
        file = mirror.filesystem.open(mirror.url_of(path), "rb", block_size=STREAM_BYTES)
    with _asking(mirror.url_of(path), OSError), file:
        yield file


@contextlib.contextmanager
def writing(mirror: Mirror, path: Path) -> Iterator[BinaryIO]:
    """A stream into a file behind a URL, past the mirror; it is there when the stream is closed, whole or not at all."""
    part, whole = mirror.url_of(partial_of(path)), mirror.url_of(path)
    with _asking(whole, missing=True):
        make_parent(mirror, path)
        file = mirror.filesystem.open(part, "wb", block_size=STREAM_BYTES)
    with _asking(whole, OSError), file:
        yield file
    with _asking(whole):
        mirror.filesystem.mv(part, whole)


def make_parent(mirror: Mirror, path: Path) -> None:
    """Make the folder behind the URL that a path will be in, where there are folders at all; writing tells why it can't be."""
    if _is_object_store(mirror.filesystem):
        return  # a folder there is nothing, and its first part a bucket that must not be made by mistake
    with contextlib.suppress(Exception):
        mirror.filesystem.makedirs(mirror.url_of(path.parent), exist_ok=True)


def _is_object_store(filesystem: Any) -> bool:
    found = filesystem.protocol
    return not OBJECT_STORES.isdisjoint({found} if isinstance(found, str) else found)


def _filesystem(url: str) -> Any:
    import fsspec  # noqa: PLC0415

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UsageError(f"`{url}` can't be reached", where=[str(error)], hint="install what fsspec needs for it") from error
    except Exception as error:
        raise _unreachable(url, error) from error


@contextlib.contextmanager
def _asking(url: str, kind: type[Exception] = Exception, missing: bool = False) -> Iterator[None]:
    """Turn a fault of a remote file system, of this kind, into a message; what is missing too only with `missing`."""
    try:
        yield
    except UsageError:
        raise
    except kind as error:
        if isinstance(error, FileNotFoundError) and not missing:
            raise
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> UsageError:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return UsageError(
        f"`{url}` can't be reached", where=[reason], hint="check address, rights and network; a run can be resumed"
    )
