"""One process a folder: a file lock here, or, behind a URL, an object that is renewed while its owner lives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import IO

from vptq.errors import UsageError
from vptq.models.remote import Mirror, make_parent, mirror_of, shown

LOCK = ".lock"
RENEWED_EVERY = 20.0  # seconds
SETTLES_IN = 1.0  # seconds until both of two that came together see who was last
DEAD_AFTER = 90.0  # seconds without renewal


class FolderLock:
    """A folder that other processes are kept out of, until `release` or this process's end."""

    def __init__(self, file: IO[str], lease: _Lease | None) -> None:
        self._file, self._lease = file, lease

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the folder over."""
        return self._lease is not None and self._lease.is_lost

    def release(self) -> None:
        """Let others in."""
        if self._lease is not None:
            self._lease.end()
        self._file.close()


def lock_folder(folder: Path) -> FolderLock:
    """Keep other processes out. Raises UsageError where another one works in it."""
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(folder) from None
    except OSError as error:
        raise UsageError(
            f"files in `{folder}` can't be locked",
            where=[str(error)],
            hint="mount it with locks (Lustre: -o flock), or work elsewhere",
        ) from None
    mirror = mirror_of(folder)
    return FolderLock(file, None if mirror is None else _Lease(mirror, folder))


class _Lease:
    """An object that says who works there, and when that was last so."""

    def __init__(self, mirror: Mirror, folder: Path) -> None:
        self.filesystem, self.url = mirror.filesystem, mirror.url_of(folder / LOCK)
        make_parent(mirror, folder / LOCK)
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        held = self._held()
        if held is not None and time.time() - held["time"] < DEAD_AFTER:
            hint = f"it was at work {time.time() - held['time']:.0f} s ago, as {held['owner']}; if it was killed, wait "
            raise _taken(folder, hint + f"{DEAD_AFTER:.0f} s after that")
        self._renew()
        time.sleep(SETTLES_IN)
        if not self._is_ours():  # somebody else was there in the same moment
            raise _taken(folder)
        self.is_lost = False
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._renewer.start()

    def end(self) -> None:
        """Give it up."""
        self._ended.set()
        self._renewer.join()
        with contextlib.suppress(Exception):
            if self._is_ours():
                self.filesystem.rm(self.url)

    def _keep(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with contextlib.suppress(Exception):  # a network that is gone for a moment
                held = self._held()
                if held is not None and held["owner"] != self.owner:
                    self.is_lost = True
                    return
                self._renew()

    def _is_ours(self) -> bool:
        return (self._held() or {}).get("owner") == self.owner

    def _renew(self) -> None:
        self.filesystem.pipe_file(self.url, json.dumps({"owner": self.owner, "time": time.time()}).encode())

    def _held(self) -> dict | None:
        try:
            self.filesystem.invalidate_cache()
            return json.loads(self.filesystem.cat_file(self.url))
        except (FileNotFoundError, ValueError):
            return None


def _taken(folder: Path, hint: str = "wait until it is done, or stop it, and resume then") -> UsageError:
    return UsageError(f"another process works in `{shown(folder)}`", hint=hint)
