"""Which executor a run has."""

from __future__ import annotations

import torch

from vptq.config import QuantConfig
from vptq.errors import UsageError
from vptq.pipeline.workers import Executor, InProcess, start_processes


def make_executor(config: QuantConfig, device: torch.device) -> Executor:
    """This process where one worker is asked for, a process for each of several, or actors of a Ray cluster.

    Raises:
        UsageError: more GPUs than there are; on a CPU any number of workers is fine.
    """
    if device.type != "cuda":
        torch.set_num_threads(torch.get_num_threads())  # else MKL takes fewer where it sees fit, and sums differ
    if config.executor == "ray":
        from vptq.pipeline.ray import start_actors

        return start_actors(config.num_gpus, config.ray_address, config.device)
    check_gpus(config.num_gpus, device)
    return InProcess(device) if config.num_gpus == 1 else start_processes(device, config.num_gpus)


def check_gpus(count: int, device: torch.device) -> None:
    """Raise UsageError where this machine has fewer GPUs; CPUs do the work of any number."""
    available = torch.cuda.device_count() if device.type == "cuda" else count
    if count > available:
        raise UsageError(f"num_gpus is {count}, there are {available} GPUs", hint=f"set --num_gpus {available}")
