"""A run on a Ray cluster of two nodes, one of which goes away."""

import contextlib
import time

import pytest

from tests.pipeline.test_run import config_of, packed_bytes
from tests.pipeline.test_same_bytes import PLAIN, run
from vptq.errors import UsageError
from vptq.pipeline.progress import Silent
from vptq.pipeline.run import quantize_model

pytest.importorskip("ray")

SEES_SOON = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 2}


@contextlib.contextmanager
def cluster_of(cpus, monkeypatch):
    """A cluster on this machine; gives it and its second node."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    head = {"num_cpus": cpus[0], "object_store_memory": 100 << 20, "_system_config": SEES_SOON}
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield found, found.add_node(num_cpus=cpus[1], object_store_memory=100 << 20)
    finally:
        ray.shutdown()
        found.shutdown()


class RemoveNode(Silent):
    """Takes a node away in the middle of a run."""

    def __init__(self, cluster, node, after):
        self.cluster, self.node, self.left, self.notes = cluster, node, after, []
        self.quantizing = False

    def phase(self, text):
        self.quantizing = text.endswith("quantizing")

    def advance(self, units):
        self.left -= self.quantizing
        if self.left == 0 and self.node is not None:
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = None

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize(
    "cpus",
    [pytest.param((1, 1), id="no room for another"), pytest.param((2, 1), id="room for another", marks=pytest.mark.slow)],
)
@pytest.mark.ci
def test_a_node_that_goes_away_costs_only_what_it_was_at(cpus, demo_run, tmp_path, monkeypatch):
    with cluster_of(cpus, monkeypatch) as (cluster, node):
        monkeypatch.chdir(tmp_path)  # where actors are not
        place = {"executor": "ray", "ray_address": cluster.address}
        told = RemoveNode(cluster, node, 6)
        found = run("out", 2, PLAIN | place, progress=told)
    assert told.node is None and any("was lost" in note for note in told.notes)
    assert packed_bytes(found.folder) == packed_bytes(demo_run.folder)
    starts = (found.folder / "logs" / "1.log").read_text().count("worker 1 on cpu")
    assert starts == (2 if cpus == (2, 1) else 1), "Ray starts it anew where there is room"
    assert not any("before it could work" in note for note in told.notes)
    assert (found.folder / "logs" / "1.log").exists() and not (found.folder / "scratch").exists()


@pytest.mark.ci
def test_a_cluster_that_is_too_small_or_not_there_is_refused(tiny_llama, text_file, tmp_path, monkeypatch):
    given = {"executor": "ray", "num_gpus": 3, "device": "cpu"}
    with cluster_of((1, 1), monkeypatch) as (cluster, _), pytest.raises(UsageError, match="has 2 CPUs"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "out", ray_address=cluster.address, **given))
    assert not (tmp_path / "out").exists()


def test_without_ray_it_says_what_to_install(tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'vptq\[ray\]'"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "out", executor="ray"))


def test_a_cluster_that_does_not_answer_is_said_at_once(tiny_llama, text_file, tmp_path):
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"no Ray cluster at `127\.0\.0\.1:1`"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "out", executor="ray", ray_address="127.0.0.1:1"))
    assert time.monotonic() - started < 15
