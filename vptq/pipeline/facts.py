"""What a finished run tells of itself beside its figures: `run.json`."""

from __future__ import annotations

import platform
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vptq.recipe import HUB_NAMES

FILE = "run.json"
PACKAGES = ("vptq", "torch", "transformers", "triton", "safetensors", "numpy")
PATHS = ("model_name", "original", "dataset", "eval_dataset", "output_dir", "hessian_path", "sensitivity_path", "cache_dir")


def run_facts(
    command: str, seconds: float, device: torch.device, warnings: Sequence[str], *, resumed: bool = False, shared: bool = False
) -> dict[str, Any]:
    """Of the process that ends a run.

    Args:
        command: as it could be typed again. resumed: whether others did a part before. shared: whether other processes do the
            work.
    """
    gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    cpu = f"CPU, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "command": command,
        "seconds": seconds,
        "resumed": resumed,
        "device": torch.cuda.get_device_name(device) if gpu else cpu,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if gpu and not shared else None,
        "peak_main_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "versions": {name: found for name in PACKAGES if (found := version_of(name))} | {"python": platform.python_version()},
        "warnings": list(warnings),
    }


def command_of(name: str, settings: Mapping[str, Any], usual: Mapping[str, Any], whole_paths: bool = True) -> str:
    """A command that gives a run's settings: `vptq NAME` with flags for what is not as usual, or a file for what has no flag.

    Args:
        settings, usual: flat. whole_paths: else of paths the last part, for others to read.
    """
    words = ["vptq", name]
    for key, value in settings.items():
        if value == usual.get(key) or value is None:
            continue
        if isinstance(value, Mapping):
            words += ["--config", f"{key}.yaml"]
            continue
        values = value if isinstance(value, list | tuple) else [value]
        short = key in PATHS and not whole_paths
        words += [f"--{key}", *(_last_part(str(one)) if short else str(one) for one in values)]
    return shlex.join(words)


def _last_part(word: str) -> str:
    return word if word in HUB_NAMES or not Path(word).is_absolute() else Path(word).name


def version_of(package: str) -> str:
    """Of an installed package; empty for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
