"""Read tensors from files before they are asked for, while something else computes."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from vptq.models.stream import FolderSource

READERS = 2


class PrefetchingFolder(FolderSource):
    """A `FolderSource` that can be told what will be wanted next. An error in reading comes out where it is wanted.

    Args:
        pin: copy into page-locked memory, from which a GPU fetches by itself.
    """

    def __init__(self, folder: Path, base_prefix: str = "", *, pin: bool = False) -> None:
        super().__init__(folder, base_prefix)
        self.pin = pin
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="prefetch")
        self._coming: dict[str, Future[Tensor]] = {}

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to read these parameters; names the folder lacks are left out, those under way are not read twice."""
        for name in names:
            if name not in self._coming and self.has(name):
                self._coming[name] = self._readers.submit(self._read, name)

    def get(self, name: str) -> Tensor:
        """The tensor of the model's parameter `name`, on the CPU, in its stored type; read now if it isn't coming."""
        coming = self._coming.pop(name, None)
        return coming.result() if coming is not None else super().get(name)

    def close(self) -> None:
        """Stop reading; what was not fetched is forgotten."""
        self._readers.shutdown(cancel_futures=True)
        self._coming.clear()

    def _read(self, name: str) -> Tensor:
        tensor = super().get(name)
        return tensor.pin_memory() if self.pin else tensor.clone()  # a mapped tensor is read when it is touched
