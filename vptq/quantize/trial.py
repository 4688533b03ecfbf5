"""Whether the kernels really run here: found out once, before the long work."""

from __future__ import annotations

import torch

from vptq.backend import VARIABLE, choice, force_plain, use_kernels
from vptq.errors import UsageError
from vptq.quantize.layout import VectorWeights


def settle_kernels(device: torch.device) -> str | None:
    """Try the kernels on `device` if they are to be used; where they fail and were not insisted on, turn to the plain twins.

    Returns:
        What the user should know of a GPU that works without kernels; None if there is nothing to tell.
    Raises:
        UsageError: `VPTQ_KERNELS` is wrong, or insists on kernels that don't run.
    """
    if device.type != "cuda":
        use_kernels(device)
        return None
    fault = "Triton is not installed, or VPTQ_KERNELS says so"
    if use_kernels(device):
        fault = _fault(device)
        if not fault:
            return None
        if choice() == "triton":
            raise UsageError(f"{VARIABLE} is `triton`, but its kernels don't run here", where=[fault], hint=f"unset {VARIABLE}")
        force_plain()
    return f"quantizing without Triton's kernels, which takes many times longer ({fault})"


def _fault(device: torch.device) -> str:
    """Why a small problem can't be solved, in one line; empty if it can."""
    try:
        from vptq.quantize.kernels.clusters import KernelClusters

        vectors = torch.arange(64.0, device=device).view(1, 32, 2)
        weights = VectorWeights(torch.ones(1, 32, device=device), torch.ones(1, 0, 2, device=device))
        found = KernelClusters(vectors, weights, 4).nearest(vectors[:, ::8].contiguous())
        return "" if found[0, ::8].tolist() == [0, 1, 2, 3] else "they give wrong results"
    except Exception as error:  # whatever a compiler or driver may raise
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
