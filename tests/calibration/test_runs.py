"""Sums whose bits do not depend on who summed what."""

import weakref

import pytest
import torch

from vptq.calibration.runs import MOST_RUNS, InputSums, Subtree, TreeSum, mean_of, share_runs, split_runs, sum_subtrees


def leaves(count, generator, empty=()):
    """Sums of very different size: their order shows in the last bits."""
    size = torch.logspace(-3, 3, count)
    return [
        None if run in empty else InputSums(torch.randn(3, 3, generator=generator) * size[run], torch.ones(3, 3) * run, 5)
        for run in range(count)
    ]


def copied(sums):
    return None if sums is None else InputSums(sums.total.clone(), sums.drift.clone(), sums.num_tokens)


def summed(parts, runs):
    tree = TreeSum()
    for run in runs:
        tree.add(Subtree(0, run, copied(parts[run])))
    return tree.subtrees


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13, 16])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 20])
def test_every_way_to_share_gives_the_same_bits(count, workers, generator):
    parts = leaves(count, generator, empty=(2, 3, 6))
    whole = sum_subtrees(summed(parts, range(count)))
    shares = share_runs(count, workers)
    assert len(shares) == workers and [run for share in shares for run in share] == list(range(count))
    found = sum_subtrees([subtree for share in reversed(shares) for subtree in summed(parts, share)])
    assert torch.equal(found.total, whole.total) and torch.equal(found.drift, whole.drift)
    assert found.num_tokens == whole.num_tokens == 5 * len([part for part in parts if part is not None])
    expected = sum(part.total.double() for part in parts if part is not None)
    torch.testing.assert_close(whole.total.double(), expected, rtol=1e-5, atol=1e-3)


def test_order_would_show(generator):
    """That the test above can fail: one after the other gives other bits than the tree."""
    parts = leaves(16, generator)
    one_by_one = torch.stack([part.total for part in parts]).cumsum(0)[-1]
    assert not torch.equal(one_by_one, sum_subtrees(summed(parts, range(16))).total)


def test_few_subtrees_are_handed_over():
    for workers in (2, 3, 4, 8):
        shares = share_runs(MOST_RUNS, workers)
        assert max(map(len, shares)) - min(map(len, shares)) <= max(2, MOST_RUNS // workers // 2)
        assert all(len(summed([None] * MOST_RUNS, share)) <= 4 for share in shares)


def test_runs_are_nearly_equal():
    for batches in (1, 5, 16, 17, 128):
        runs = split_runs(batches)
        assert [batch for run in runs for batch in run] == list(range(batches)) and len(runs) == min(batches, MOST_RUNS)
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_few_sums_are_held_at_a_time(generator):
    """They are whole matrices on a GPU: what is not yet needed is not loaded."""
    alive = weakref.WeakSet()

    def load(part):
        found = InputSums(part.total.clone(), None, part.num_tokens)
        alive.add(found.total)
        most.append(len(alive))
        return found

    most = []
    parts = leaves(MOST_RUNS, generator)
    leaf_by_leaf = [Subtree(0, run, part) for run, part in enumerate(parts)]
    found = sum_subtrees(reversed(leaf_by_leaf), load)
    assert torch.equal(found.total, sum_subtrees(summed(parts, range(MOST_RUNS))).total)
    assert max(most) <= 5 and len(most) == MOST_RUNS


def test_nothing_but_empty_runs():
    assert sum_subtrees([Subtree(1, 0, None), Subtree(0, 2, None)]) is None


def test_the_mean_takes_the_upper_triangle_alone():
    total = torch.tensor([[2.0, 4.0], [99.0, 6.0]])
    mean, drift = mean_of(InputSums(total, None, 2))
    assert drift is None and mean.tolist() == [[1.0, 2.0], [2.0, 3.0]]
    assert mean_of(InputSums(total[None].repeat(3, 1, 1), None, 2))[0].shape == (3, 2, 2)
