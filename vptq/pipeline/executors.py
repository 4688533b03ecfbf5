"""Which executor a run has."""

from __future__ import annotations

import torch

from vptq.config import QuantConfig
from vptq.errors import UsageError
from vptq.pipeline.workers import Executor, InProcess, Processes


def make_executor(config: QuantConfig, device: torch.device) -> Executor:
    """This process where one worker is asked for, a process for each of several, or actors of a Ray cluster.

    Raises:
        UsageError: more GPUs than there are; on a CPU any number of workers is fine.
    """
    if device.type != "cuda":
        torch.set_num_threads(torch.get_num_threads())  # else MKL takes fewer where it sees fit, and sums differ
    if config.executor == "ray":
        from vptq.pipeline.ray import RayCluster

        return RayCluster(config.num_gpus, config.ray_address, config.device)
    available = torch.cuda.device_count() if device.type == "cuda" else config.num_gpus
    if config.num_gpus > available:
        raise UsageError(f"num_gpus is {config.num_gpus}, there are {available} GPUs", hint=f"set --num_gpus {available}")
    return InProcess(device) if config.num_gpus == 1 else Processes(device, config.num_gpus)
