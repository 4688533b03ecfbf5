"""Batches that live in main memory, worked on by a GPU: the next one comes and the last one goes while this one computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def room_for(tensor: Tensor, pin: bool) -> Tensor:
    """Main memory, not filled, for a tensor (any shape); with `pin` page-locked where that can be had."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
    except RuntimeError:  # page-locked memory is short on some machines
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def to_main_memory(tensor: Tensor) -> Tensor:
    """A copy in main memory, of a GPU's tensor in page-locked memory. (any shape) -> (the same)."""
    return room_for(tensor, pin=tensor.is_cuda).copy_(tensor)


class Stage:
    """Takes batches through a device, in place.

    Args:
        batches: tensors of any shape, all on `device` or all in main memory; `put` changes them.
    """

    def __init__(self, batches: list[Tensor], device: torch.device) -> None:
        self.batches, self.device = batches, device
        away = device.type == "cuda" and any(not batch.is_cuda for batch in batches)
        self._coming = torch.cuda.Stream(device) if away else None
        self._going = torch.cuda.Stream(device) if away else None

    def __iter__(self) -> Iterator[Tensor]:
        """Each batch on the device, in order."""
        if self._coming is None:
            yield from (batch.to(self.device) for batch in self.batches)
            return
        following = self._fetch(0)
        for number in range(len(self.batches)):
            tensor, ready = following
            if number + 1 < len(self.batches):
                following = self._fetch(number + 1)
            torch.cuda.current_stream(self.device).wait_event(ready)
            tensor.record_stream(torch.cuda.current_stream(self.device))
            yield tensor

    def put(self, number: int, result: Tensor) -> None:
        """Replace batch `number`, which has been yielded, by a result on the device."""
        old = self.batches[number]
        if self._going is None:
            self.batches[number] = result.to(old.device)
        elif old.is_pinned() and old.shape == result.shape and old.dtype == result.dtype:
            self._going.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._going):
                old.copy_(result, non_blocking=True)
            result.record_stream(self._going)
        else:
            self.batches[number] = to_main_memory(result)

    def finish(self) -> None:
        """Wait until all results are where they belong."""
        if self._going is not None:
            self._going.synchronize()

    def _fetch(self, number: int) -> tuple[Tensor, torch.cuda.Event]:
        assert self._coming is not None
        with torch.cuda.stream(self._coming):
            tensor = self.batches[number].to(self.device, non_blocking=True)
            return tensor, self._coming.record_event()
