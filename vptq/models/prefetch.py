"""Read tensors from files before they are asked for, while something else computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from torch import Tensor

from vptq.models.origins import Origin
from vptq.models.staging import room_for
from vptq.models.stream import FolderSource

READERS = 2


class PrefetchingFolder(FolderSource):
    """A `FolderSource` that can be told what will be wanted next. An error in reading comes out where it is wanted.

    Args:
        pin: copy into page-locked memory, from which a GPU fetches by itself.
    """

    def __init__(
        self, folder: Path, base_prefix: str = "", origins: Mapping[str, Origin] | None = None, *, pin: bool = False
    ) -> None:
        super().__init__(folder, base_prefix, origins)
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
        if coming is None or coming.cancel():  # not begun: what waits before it in line must not be waited for
            return super().get(name)
        return coming.result()

    def close(self) -> None:
        """Stop reading; what was not fetched is forgotten."""
        self._readers.shutdown(cancel_futures=True)
        self._coming.clear()

    def _read(self, name: str) -> Tensor:
        return _copied(super().get(name), self.pin)


def _copied(tensor: Tensor, pin: bool) -> Tensor:
    """A copy of a mapped tensor, which is read from disk only when it is touched.

    By NumPy, on this thread alone: torch would start a second pool of threads here, and two pools on the same cores halve
    the speed of whatever computes.
    """
    copy = room_for(tensor, pin)
    numpy.copyto(copy.view(-1).view(torch.uint8).numpy(), tensor.reshape(-1).view(torch.uint8).numpy())
    return copy
