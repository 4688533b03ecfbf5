"""Which of two equal ways does the work: Triton kernels, or their plain twins in torch."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from vptq.errors import UsageError

VARIABLE = "VPTQ_KERNELS"
CHOICES = ("auto", "triton", "torch")


def use_kernels(device: torch.device) -> bool:
    """Whether work on `device` goes to the Triton kernels.

    `VPTQ_KERNELS=torch` forces the twins, `triton` the kernels (on a CPU these run in Triton's interpreter, which needs
    TRITON_INTERPRET=1 and is for tests only); `auto`, the default, takes kernels on CUDA where Triton is installed.

    Raises:
        UsageError: a value that is none of these, or kernels where they can't run.
    """
    if choice() == "torch":
        return False
    if choice() == "auto":
        return device.type == "cuda" and has_triton()
    if not has_triton():
        raise UsageError(f"{VARIABLE} is `triton`, but Triton is not installed", hint="pip install triton")
    if device.type != "cuda" and not interpreting():
        raise UsageError(
            f"{VARIABLE} is `triton`, but the work is on `{device.type}`", hint=f"unset {VARIABLE}, or use a CUDA device"
        )
    return True


def choice() -> str:
    """What `VPTQ_KERNELS` says. Raises UsageError for what it can't say."""
    said = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if said not in CHOICES:
        raise UsageError(f"{VARIABLE} is `{said}`", hint=f"set it to one of {', '.join(CHOICES)}, or unset it")
    return said


def force_plain() -> None:
    """From here on the plain twins, in this process and those it starts."""
    os.environ[VARIABLE] = "torch"


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
