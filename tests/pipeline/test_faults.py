"""Workers and whole runs killed at random moments: what comes out is the same, to the byte."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.pipeline.test_run import config_of, packed_bytes
from vptq.errors import RunError
from vptq.pipeline import workers
from vptq.pipeline.progress import Silent
from vptq.pipeline.run import quantize_model
from vptq.pipeline.works import linears_of

SEED = int(os.environ.get("VPTQ_TEST_SEED", time.time_ns() % 10**6))


def numbered(ordinary):
    """Ten moments, but for `-m slow` only the first ones."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n >= ordinary else []) for n in range(10)]


@pytest.fixture
def moment(number):
    """Of a run, from 0 to 1. What is random comes from a seed that a failure shows: VPTQ_TEST_SEED takes it again."""
    print(f"VPTQ_TEST_SEED={SEED}")  # noqa: T201
    return random.Random(f"{SEED} {number}").random()


@pytest.fixture(scope="module")
def timed_run(tiny_llama, text_file, tmp_path_factory):
    """A run by two workers that nobody disturbs: its folder, and its seconds once all is warm."""
    for name in ("first", "second"):
        started = time.monotonic()
        result = quantize_model(config_of(tiny_llama, text_file, tmp_path_factory.mktemp(name), num_gpus=2, kiter=30))
    return result.folder, time.monotonic() - started


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("number", numbered(2))
def test_a_killed_worker_costs_only_what_it_was_at(moment, timed_run, tiny_llama, text_file, tmp_path):
    folder, seconds = timed_run

    def kill():
        time.sleep(moment * seconds)
        for child in multiprocessing.active_children()[:1]:
            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    result = quantize_model(config_of(tiny_llama, text_file, tmp_path, num_gpus=2, kiter=30))
    killer.join()
    assert packed_bytes(result.folder) == packed_bytes(folder)


def test_all_workers_killed_at_work(timed_run, tiny_llama, text_file, tmp_path):
    class KillAll(Notes):
        quantized = 0

        def phase(self, text):
            self.quantizing = text.endswith("quantizing")

        def advance(self, units):
            self.quantized += self.quantizing
            if self.quantizing and self.quantized == 4:
                for child in multiprocessing.active_children():
                    child.kill()

    told = KillAll()
    result = quantize_model(config_of(tiny_llama, text_file, tmp_path, num_gpus=2, kiter=30), progress=told)
    assert sum("was killed (SIGKILL)" in note for note in told.notes) == 2
    assert "was killed" in (result.folder / "logs" / "0.log").read_text()
    assert packed_bytes(result.folder) == packed_bytes(timed_run[0])


@pytest.mark.parametrize("number", numbered(1))
def test_a_killed_run_is_resumed_to_the_same_bytes(moment, timed_run, tiny_llama, text_file, tmp_path):
    """Killed twice, the second time when it is resumed."""
    folder, seconds = timed_run
    command = [
        sys.executable, "-m", "vptq", "quantize", "--model_name", str(tiny_llama), "--dataset", str(text_file),
        "--output_dir", str(tmp_path), "--vector_lens", "-1", "4", "--num_centroids", "-1", "16", "--kiter", "30",
        "--nsamples", "4", "--seq_len", "64", "--num_gpus", "2", "--device", "cpu",
    ]  # fmt: skip
    run = None
    for share in (moment, moment / 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(share * (seconds + 3))  # and what Python takes to start
        process.send_signal(signal.SIGKILL)
        process.wait()
        run = next(iter(tmp_path.glob("*/*/*/job.json")), None)
        if run is not None:
            command = [sys.executable, "-m", "vptq", "quantize", "--resume", str(run.parent), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    run = next(iter(tmp_path.glob("*/*/*/job.json")))
    assert packed_bytes(run.parent) == packed_bytes(folder)


def test_lost_linears_are_named_and_the_others_kept(tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_start_process", start_to_die)
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.down_proj: worker . was killed(.|\n)*--resume") as error:
        quantize_model(config_of(tiny_llama, text_file, tmp_path, num_gpus=2))
    assert len(error.value.where) == 2, "one of each block"
    (work,) = tmp_path.glob("*/*/*/work")
    assert len(list(work.glob("*.safetensors"))) == 12, "all others"
    monkeypatch.undo()
    assert quantize_model(config_of(tiny_llama, text_file, tmp_path), resume=work.parent).folder == work.parent


def start_to_die(*given):
    do, note = workers._start_process(*given)

    def die_at_down_proj(given, progress):
        if any("down_proj" in name for name in linears_of(given.work)):
            os.kill(os.getpid(), signal.SIGKILL)
        return do(given, progress)

    return die_at_down_proj, note
