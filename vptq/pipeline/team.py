"""The processes that fine-tune together: one, or several that a launcher has started."""

from __future__ import annotations

import datetime
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from vptq.models.device import resolve_device

LONGEST_WAIT = datetime.timedelta(days=7)  # while the first process measures, or computes what all need


class Team(Protocol):
    """The processes that share the work; each has the same tensors and takes the same steps."""

    rank: int
    world: int

    def add_up(self, tensor: Tensor) -> None: ...

    def wait(self) -> None: ...

    def share(self, value: Any) -> Any: ...

    def leave(self) -> None: ...


class Alone:
    """One process."""

    rank, world = 0, 1

    def add_up(self, tensor: Tensor) -> None:
        pass

    def wait(self) -> None:
        pass

    def share(self, value: Any) -> Any:
        return value

    def leave(self) -> None:
        pass


class Launched:
    """Processes that `accelerate launch` has started."""

    def __init__(self, device: str | None) -> None:
        from accelerate import PartialState  # noqa: PLC0415 (slow import)

        on_cpu = resolve_device(device).type == "cpu"
        self.state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
        self.rank, self.world, self.device = self.state.process_index, self.state.num_processes, self.state.device

    def add_up(self, tensor: Tensor) -> None:
        """Over all processes, in place; any shape."""
        torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Until all are here: a sum needs all. (A barrier of torch's takes a GPU where there is one, asked for or not.)"""
        here = torch.zeros(1, device=self.device)
        self.add_up(here)
        here.item()

    def share(self, value: Any) -> Any:
        """What the first process has, for all."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def leave(self) -> None:
        """Nothing is shared from here on. All do it together: NCCL waits for the others of a machine (ncclCommDestroy)."""
        self.state.destroy_process_group()
        self.state._reset_state()  # so that the process can begin again


def is_launched() -> bool:
    """Whether this is one of several processes of a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
