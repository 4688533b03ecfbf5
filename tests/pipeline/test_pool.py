"""Workers that die, run out of memory, fail or never start."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from vptq.errors import RunError, UsageError
from vptq.pipeline import pool as pools
from vptq.pipeline.pool import MOST_TRIES, LostWork, WorkerPool
from vptq.pipeline.processes import ProcessCrew


def start(number, setup):
    os.environ["WORKER"] = str(number)
    return do, None


def warm(number):
    pass


def warm_and_die(number):
    os._exit(7)


def start_and_die(number, setup):
    os._exit(7)


class Listed:
    """Works that don't depend on each other."""

    def __init__(self, works, stop_after=None):
        self.works, self.left, self.answers, self.parts = list(works), len(works), [], []
        self.stop_after = stop_after

    def take(self, worker, alive):
        return self.works.pop(0) if self.works else None

    def retried(self, work, worker):
        pass

    def done(self, work, answer):
        self.left -= 1
        self.answers.append(answer)
        if len(self.answers) == self.stop_after:
            raise KeyboardInterrupt

    def advanced(self, work, part):
        self.parts.append((work[1], part))

    @property
    def finished(self):
        return not self.left


def run(pool, works):
    listed = Listed(works)
    pool.run(listed)
    return listed.answers


def do(given, progress):
    """work: (what, number, a file); what is done only until the file is there, or always, without one."""
    what, number, marker = given.work
    if what != "full" and (marker is None or not Path(marker).exists()):
        if marker is not None:
            Path(marker).touch()
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            os._exit(3)
        if what == "memory":
            raise MemoryError("no room")
        if what == "user":
            raise UsageError("the user's fault", where=["here"], hint="mend it")
        if what == "bug":
            raise ZeroDivisionError("ours")
        if what == "slow":
            time.sleep(30)
        if what == "parts":
            for _ in range(4):
                progress(0.25)
                time.sleep(0.3)
    answer = number, int(os.environ["WORKER"]), given.short_of_memory
    return functools.partial(end_later, what, answer, marker)


def end_later(what, answer, marker):
    """What is done beside the next work."""
    if what == "write":
        time.sleep(1)
    if what == "full" and not marker.exists():
        marker.touch()
        raise OSError("no space")
    return answer


@pytest.fixture
def pool():
    notes = []
    found = WorkerPool(2, ProcessCrew(warm, start), notes.append)
    found.crew.set_out("setup")
    found.notes = notes
    yield found
    found.close()
    assert not found.crew._processes


def test_all_is_done_by_all(pool):
    for works in ([("sum", n, None) for n in range(20)], [], [("sum", 0, None)]):
        assert sorted(number for number, _, _ in run(pool, works)) == list(range(len(works)))
    assert not pool.notes and len(pool.crew._processes) == 2


@pytest.mark.parametrize("what", ["die", "exit"])
def test_what_a_dead_worker_was_at_is_done_again(pool, what, tmp_path):
    works = [(what if n == 3 else "sum", n, tmp_path / "marker" if n == 3 else None) for n in range(6)]
    assert sorted(number for number, _, _ in run(pool, works)) == list(range(6))
    (note,) = pool.notes
    assert ("was killed (SIGKILL), as happens when memory runs out" if what == "die" else "ended with code 3") in note


def test_memory_that_ran_out_is_counted_and_the_worker_lives(pool, tmp_path):
    found = run(pool, [("memory", 5, tmp_path / "marker")])
    assert [(number, short) for number, _, short in found] == [(5, 1)]
    assert "ran out of memory: no room" in pool.notes[0] and len(pool.notes) == 1


def test_parts_are_told_on_the_way(pool):
    listed = Listed([("parts", 0, None)])
    pool.run(listed)
    assert len(listed.parts) >= 2 and sum(part for _, part in listed.parts) <= 1


def test_files_are_written_while_the_next_work_is_done(tmp_path):
    pool = WorkerPool(1, ProcessCrew(warm, start))
    pool.crew.set_out("setup")
    run(pool, [("sum", 0, None)])
    started = time.monotonic()
    found = run(pool, [("write", 1, None), ("parts", 2, None), ("sum", 3, None)])
    assert [number for number, _, _ in found] == [1, 2, 3], "in the order in which they were given"
    assert time.monotonic() - started < 1.9
    with pytest.raises(RunError, match="OSError: no space"):
        run(pool, [("full", 4, tmp_path / "marker"), ("sum", 5, None)])
    pool.close()


def test_lost_work_is_told_after_all_else_is_done(pool):
    listed = Listed([("die", 0, None), ("memory", 1, None), *(("sum", n, None) for n in range(2, 7))])
    with pytest.raises(LostWork) as error:
        pool.run(listed)
    assert sorted(answer[0] for answer in listed.answers) == list(range(2, 7))
    assert {lost.work[1]: len(lost.reasons) for lost in error.value.lost} == {0: MOST_TRIES, 1: MOST_TRIES}
    assert [number for number, _, _ in run(pool, [("sum", 9, None)])] == [9], "the pool still works"


@pytest.mark.parametrize(
    "what, kind, text", [("user", UsageError, "the user's fault"), ("bug", RunError, "ZeroDivisionError: ours")]
)
def test_faults_are_raised_here(pool, what, kind, text):
    with pytest.raises(kind, match=text) as error:
        run(pool, [(what, 0, None)])
    assert error.value.where and (what == "bug" or error.value.hint == "mend it")


@pytest.mark.parametrize("first, then", [(warm_and_die, start), (warm, start_and_die)])
@pytest.mark.ci
def test_workers_that_never_start_end_the_run(first, then):
    pool = WorkerPool(2, ProcessCrew(first, then))
    pool.begin()
    pool.crew.set_out("setup")
    with pytest.raises(RunError, match=r"don't start(.|\n)*ended with code 7"):
        run(pool, [("sum", 0, None)])
    pool.close()


def test_closing_does_not_wait(pool):
    with pytest.raises(KeyboardInterrupt):
        pool.run(Listed([("sum", 0, None), ("slow", 1, None)], stop_after=1))
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 10


def start_but_for_one(number, setup):
    if number == 1:
        os._exit(7)
    return start(number, setup)


def start_late(number, setup):
    if number == 1:
        time.sleep(60)
    return start(number, setup)


def start_wrongly(number, setup):
    raise UsageError("not on this machine")


@pytest.mark.parametrize(
    "begin, patience, told", [(start_but_for_one, 60.0, "ended with code 7"), (start_late, 2.0, "has not started")]
)
def test_workers_that_never_come_are_done_without(begin, patience, told, monkeypatch):
    monkeypatch.setattr(pools, "PATIENCE", patience)
    monkeypatch.setattr(pools, "LOOK_AGAIN", 0.5)
    notes = []
    pool = WorkerPool(2, ProcessCrew(warm, begin), notes.append)
    pool.crew.set_out("setup")
    walk = TwoShares()
    started = time.monotonic()
    pool.run(walk)
    pool.close()
    assert time.monotonic() - started < 20
    assert walk.finished and any(told in note for note in notes)


def test_patience_begins_when_workers_are_told_what_to_do(monkeypatch):
    """However long it takes until the run is planned."""
    monkeypatch.setattr(pools, "PATIENCE", 1.5)
    notes = []
    pool = WorkerPool(2, ProcessCrew(warm, start), notes.append)
    pool.begin()
    time.sleep(3)
    pool.crew.set_out("setup")
    run(pool, [("sum", n, None) for n in range(4)])
    pool.close()
    assert not notes


class Nobody:
    """A crew whose workers don't come, as on a cluster without room, until the third time that it is listened to."""

    def __init__(self):
        self.listened = 0

    def begin(self, number):
        pass

    def send(self, number, given):
        self.given = number

    def listen(self, seconds):
        self.listened += 1
        time.sleep(0.1 if self.listened < 4 else 0)
        said = {4: [(0, pools.STARTED, None)], 5: [(0, pools.DONE, "answer")]}
        return said.get(self.listened, [])

    def end(self):
        pass


def test_it_is_said_once_that_nobody_comes(monkeypatch):
    monkeypatch.setattr(pools, "PATIENCE", 0.15)
    notes = []
    pool = WorkerPool(1, Nobody(), notes.append)
    assert run(pool, [("sum", 0, None)]) == ["answer"]
    assert notes == ["no worker has started in 0 s: still waiting"]


def test_memory_is_known_by_what_libraries_say():
    for text in ("CUDA error: CUSOLVER_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory: you tried"):

        def fail(text=text):
            raise RuntimeError(text)

        assert pools.answer_of(fail) == (pools.NO_MEMORY, f"ran out of memory: RuntimeError: {text}")


class TwoShares(Listed):
    """One work for each worker, that another takes only if it is gone."""

    def __init__(self):
        super().__init__([("sum", 0, None), ("sum", 1, None)])

    def take(self, worker, alive):
        own = next((work for work in self.works if work[1] == worker or work[1] not in alive), None)
        if own is not None:
            self.works.remove(own)
        return own


def test_what_a_start_finds_wrong_is_said():
    pool = WorkerPool(2, ProcessCrew(warm, start_wrongly))
    pool.crew.set_out("setup")
    with pytest.raises(UsageError, match="not on this machine"):
        run(pool, [("sum", 0, None)])
    pool.close()
