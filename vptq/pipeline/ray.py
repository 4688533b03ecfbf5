"""Workers as actors of a Ray cluster: Ray places them, one a GPU, and starts them anew, here or elsewhere, when one is lost."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import torch

from vptq.errors import UsageError
from vptq.pipeline.pool import DIED, FREE, STARTED, Try, answer_of
from vptq.pipeline.processes import WAITING, Do
from vptq.pipeline.worker import Setup
from vptq.pipeline.workers import Pooled, start_worker

WITHOUT_END = -1
SECONDS_TO_CONNECT = 10.0


def start_actors(count: int, address: str | None, device: str | None) -> Pooled:
    """An executor on a Ray cluster; actors are asked for once it is known what there is to do.

    Args:
        address: of the cluster, as `ray.init` takes it; None for RAY_ADDRESS, or else a cluster of this machine alone.
        device: "cuda" or "cpu"; None for the cluster's GPUs where it has any.
    Raises:
        UsageError: Ray is not installed, the cluster is not there or too small.
    """
    ray = _connect(address)
    kind = device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
    where = torch.device(kind.split(":")[0])
    try:
        _check_size(ray.cluster_resources(), count, where)
    except UsageError:
        ray.shutdown()
        raise
    return Pooled(count, where, _RayCrew(ray, where))


class _RayCrew:
    """A `pool.Crew` of actors."""

    def __init__(self, ray: Any, device: torch.device) -> None:
        self.ray, self.device = ray, device
        self.setup: Setup | None = None
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}  # what has not answered yet -> the worker's number

    def set_out(self, setup: Setup) -> None:
        """What all actors are given."""
        self.setup = setup

    def begin(self, number: int) -> None:
        """Ask for an actor; of one that died, to say when it is back, however long that takes."""
        if number not in self._actors:
            needs = {"num_gpus": 1} if self.device.type == "cuda" else {"num_cpus": 1}
            patient = {"env_vars": {WAITING: "PASSIVE"}}
            kind = self.ray.remote(_Actor).options(
                max_restarts=WITHOUT_END, max_task_retries=WITHOUT_END, runtime_env=patient, **needs
            )
            self._actors[number] = kind.remote(self.device.type, self.setup, number)
        self._asked[self._actors[number].begin.remote()] = number

    def send(self, number: int, given: Try) -> None:
        """Give it something to do, once: whether it is tried again is the pool's business."""
        self._asked[self._actors[number].do.options(max_task_retries=0).remote(given)] = number

    def listen(self, seconds: float | None) -> list[tuple[int, int, Any]]:
        """What actors said; waits for something, no longer than so many seconds if given."""
        found, _ = self.ray.wait(list(self._asked), num_returns=1, timeout=seconds)
        if not found:
            return []
        (answered,) = found
        number = self._asked.pop(answered)
        try:
            said, value = self.ray.get(answered)
        except self.ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [""])[-1][:200]
            return [(number, DIED, f"worker {number} was lost ({type(error).__name__}: {reason})")]
        return [(number, said, value)] + ([] if said == STARTED else [(number, FREE, None)])

    def end(self) -> None:
        """End all, whatever they are at, and give the cluster's resources back."""
        for actor in self._actors.values():
            self.ray.kill(actor)
        self._actors.clear()
        self._asked.clear()
        self.ray.shutdown()


class _Actor:
    """A worker, somewhere in the cluster."""

    def __init__(self, device: str, setup: Setup, number: int) -> None:
        self.device, self.setup, self.number = device, setup, number
        self._do: Do | None = None

    def begin(self) -> tuple[int, Any]:
        """Make ready to work."""

        def make() -> str | None:
            # Ray shows an actor its own GPU alone
            device = torch.device(self.device, 0) if self.device == "cuda" else torch.device("cpu")
            self._do, note = start_worker(device, self.setup, self.number)
            return note

        said, value = answer_of(make)
        return (STARTED, value) if self._do is not None else (said, value)

    def do(self, given: Try) -> tuple[int, Any]:
        """What came of a work."""
        do = self._do
        assert do is not None
        return answer_of(lambda: do(given, lambda part: None)())


def _connect(address: str | None) -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError("--executor ray needs Ray", hint="pip install 'vptq[ray]', on every machine of the cluster") from None
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _see_that_it_listens(address)
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from error
    return ray


def _see_that_it_listens(address: str) -> None:
    """Ray itself tries for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
        except OSError as error:
            raise _no_cluster(f"{host}:{port}", error) from error


def _no_cluster(address: str | None, error: Exception) -> UsageError:
    if not address:
        return UsageError(
            "Ray can't be started on this machine", where=str(error).strip().splitlines()[:2], hint="see its logs"
        )
    return UsageError(
        f"there is no Ray cluster at `{address}`",
        where=str(error).strip().splitlines()[:2],
        hint="start it with `ray start --head`, and give its address with --ray_address, or `auto` on one of its machines",
    )


def _check_size(resources: dict[str, float], count: int, device: torch.device) -> None:
    kind = "GPU" if device.type == "cuda" else "CPU"
    there = int(resources.get(kind, 0))
    if there < count:
        raise UsageError(f"num_gpus is {count}, the Ray cluster has {there} {kind}s", hint=f"set --num_gpus {max(there, 1)}")
