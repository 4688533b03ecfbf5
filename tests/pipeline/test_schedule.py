"""What is handed out when, and to whom."""

import pytest

from vptq.calibration.hessian import BlockSums
from vptq.pipeline.schedule import BlockWalk, InOrder, Stage, Watch
from vptq.pipeline.stages import blocks_ahead
from vptq.pipeline.works import Calibrate, MeasureLinears

SUMS = BlockSums({"q": []}, {"q": "q"})
ALL = (0, 1)


class Told:
    def __init__(self):
        self.units, self.phases, self.done, self.closed = 0.0, [], [], []

    def advance(self, units):
        self.units += units

    def watch(self):
        return Watch(self.phases.append, self.advance)


def walk(told, blocks=3, shares=(range(0, 1), range(1, 2)), linears=2, ahead=1, uncalibrated=()):
    def stage(block):
        def works(hessians):
            assert ("q" in hessians) == (block not in uncalibrated)
            return [(MeasureLinears((f"{block}.{n}",), {}, None), 1.0) for n in range(linears)]

        calibrate = () if block in uncalibrated else tuple(Calibrate(block, runs) for runs in shares)
        close = lambda hessians: told.closed.append(block)  # noqa: E731
        return Stage(calibrate, 2.0, bool(calibrate), works, (f"c{block}", f"q{block}"), close)

    stages = [stage(block) for block in range(blocks)]
    return BlockWalk(stages, ahead, 1.0, told.watch(), lambda work, answer: told.done.append(work.linears[0]))


def name(work):
    if work is None:
        return None
    return f"c{work.block}.{work.runs.start}" if isinstance(work, Calibrate) else work.linears[0]


def finish(found, work):
    found.done(work, SUMS if isinstance(work, Calibrate) else None)


def test_one_worker_does_block_after_block():
    told = Told()
    found, order = walk(told, shares=(range(0, 2),), ahead=0), []
    while not found.finished:
        work = found.take(0, [0])
        order.append(name(work))
        finish(found, work)
    assert order == ["c0.0", "0.0", "0.1", "c1.0", "1.0", "1.1", "c2.0", "2.0", "2.1"]
    assert told.closed == [0, 1, 2] and told.units == pytest.approx(3 * 4)
    assert told.phases[:4] == ["c0", "c0", "q0", "q0"] and told.done == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]


def test_blocks_are_calibrated_ahead_so_that_nobody_waits():
    found = walk(Told())
    out = {worker: found.take(worker, ALL) for worker in ALL}
    assert [name(work) for work in out.values()] == ["c0.0", "c0.1"]
    finish(found, out[0])
    ahead = found.take(0, ALL)
    assert name(ahead) == "c1.0", "its own share of the next block, while the other is at this one"
    finish(found, ahead)
    assert found.take(0, ALL) is None, "no further ahead, and no linear has its Hessian"
    finish(found, out[1])
    first = found.take(0, ALL)
    assert name(first) == "0.0"
    ahead = found.take(1, ALL)
    assert name(ahead) == "c1.1"
    finish(found, ahead)
    second = found.take(1, ALL)
    assert name(second) == "0.1"
    finish(found, second)
    assert name(found.take(1, ALL)) == "1.0", "the next block's, while the other is at this one's last"


def test_without_running_ahead_a_block_waits_for_the_one_before():
    found = walk(Told(), ahead=0, linears=1)
    for worker in ALL:
        finish(found, found.take(worker, ALL))
    last = found.take(0, ALL)
    assert name(last) == "0.0" and found.take(1, ALL) is None
    finish(found, last)
    assert name(found.take(1, ALL)) == "c1.1"


def test_the_share_of_a_dead_worker_is_taken_over_and_given_back():
    found = walk(Told(), ahead=5, linears=1)
    first, other = found.take(0, ALL), found.take(1, ALL)
    finish(found, first)
    finish(found, other)
    assert name(found.take(1, [1])) == "c1.1"
    assert name(found.take(1, [1])) == "c1.0", "worker 0 is gone"
    assert name(found.take(0, ALL)) == "0.0", "both shares are out"
    assert name(found.take(2, (0, 1, 2))) is None


def test_a_worker_that_came_back_takes_one_of_two_shares():
    found = walk(Told(), ahead=5)
    for worker in ALL:
        finish(found, found.take(worker, ALL))
    both = [found.take(1, [1]), found.take(1, [1])]
    for work in both:
        finish(found, work)
    assert name(found.take(0, ALL)) == "c2.0"
    assert name(found.take(1, ALL)) == "c2.1"


def test_a_share_that_is_tried_again_stays_with_who_does_it():
    found = walk(Told(), ahead=5)
    lost, other = found.take(0, ALL), found.take(1, ALL)
    finish(found, other)
    found.retried(lost, 1)
    finish(found, lost)
    assert {name(found.take(1, ALL)), name(found.take(1, ALL))} == {"c1.0", "c1.1"}


def test_blocks_whose_hessians_are_kept_need_no_text():
    told = Told()
    found = walk(told, blocks=2, uncalibrated=(0, 1), ahead=0)
    order = []
    while not found.finished:
        work = found.take(0, [0])
        order.append(name(work))
        finish(found, work)
    assert order == ["0.0", "0.1", "1.0", "1.1"]


def test_parts_and_the_rest_are_told_once():
    told = Told()
    found = walk(told, blocks=1, linears=0)
    work = found.take(0, ALL)
    found.advanced(work, 0.5)
    found.advanced(work, 0.25)
    assert told.units == pytest.approx(0.75)
    found.advanced(work, 0.75)  # tried again from the start
    finish(found, work)
    assert told.units == pytest.approx(1)


def test_works_in_order():
    told, answers = Told(), []
    works = [Calibrate(0, range(0, 1)), Calibrate(0, range(1, 2))]
    found = InOrder(works, [1.0, 3.0], "weighing", told.watch(), lambda work, answer: answers.append(answer))
    assert found.take(0, ALL) is works[0] and found.following is works[1] and found.take(1, ALL) is works[1]
    assert found.take(0, ALL) is None and not found.finished
    for answer, work in enumerate(works):
        found.done(work, answer)
    assert found.finished and answers == [0, 1] and told.units == 4


def test_more_workers_run_further_ahead():
    assert [blocks_ahead(count, False) for count in (1, 2, 4, 8, 64)] == [0, 1, 2, 4, 32]
    assert blocks_ahead(8, True) == 0
