"""Where the work is done, and in which float type."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vptq.errors import UsageError


def resolve_device(name: str | None) -> torch.device:
    """cuda where there is one, unless told otherwise; a GPU named by its number becomes the current one.

    Raises:
        UsageError: a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no device is called `{name}`", hint="cuda, cuda:0, cuda:1, ... or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device `{name}` is not there", where=[f"{torch.cuda.device_count()} CUDA devices"], hint="--device cpu"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels are launched on the current one
    return device


def forced_dtype(device: torch.device) -> torch.dtype | None:
    """Float type that blocks run in: float32 on a CPU; on a GPU the model's own (None)."""
    return None if device.type == "cuda" else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that can be had: of a GPU, or of the machine (all there are, where the system tells no more)."""
    if device.type == "cuda":  # what torch holds without use is free as well
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    told = Path("/proc/meminfo")
    if told.exists():
        found = dict(line.split(":", 1) for line in told.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in found:
            return int(found["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
