"""Where the work is done, and in which float type."""

from __future__ import annotations

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
