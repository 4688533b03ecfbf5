"""Sensitivities and the knapsack."""

import itertools

import numpy as np
import pytest

from vptq.config import QuantConfig
from vptq.errors import CheckpointError, UsageError
from vptq.models.architecture import LinearInfo
from vptq.pipeline.allocation import _knapsack, allocate, allocation_table, nearest_rung, read_sensitivity, rungs, to_json
from vptq.recipe import RECIPE

BASE = QuantConfig.from_flat(dict(RECIPE)).linear


def infos(count=12):
    sizes = [(256, 512), (512, 256), (256, 256)]
    return [LinearInfo(f"b.{i}.x{i % 3}", i, f"x{i % 3}", *sizes[i % 3], False) for i in range(count)]


def test_knapsack_finds_the_best_of_all_choices(generator):
    import torch

    for _ in range(10):
        bits = [sorted(row) for row in torch.randint(100, 900, (5, 3), generator=generator).tolist()]
        losses = [sorted(row, reverse=True) for row in torch.rand(5, 3, generator=generator).tolist()]
        budget = 2500
        found = _knapsack(bits, losses, budget)
        total = sum(own[c] for own, c in zip(bits, found, strict=True))
        possible = [
            sum(own[c] for own, c in zip(losses, pick, strict=True))
            for pick in itertools.product(range(3), repeat=5)
            if sum(own[c] for own, c in zip(bits, pick, strict=True)) <= budget
        ]
        if possible:
            assert total <= budget
            assert sum(own[c] for own, c in zip(losses, found, strict=True)) == pytest.approx(min(possible), abs=0.02)


@pytest.mark.parametrize("target", [1.2, 2, 2.5, 3, 4.25, 6])
def test_bits_are_met_and_sensitive_linears_get_more(target):
    linears = infos(30)
    sensitivity = {info.name: 10.0 if info.suffix == "x0" else 0.1 for info in linears}
    found = allocate(linears, sensitivity, BASE, target, 16)
    assert 0.985 * target < found.bits < 1.01 * target  # the tables counted: they weigh in linears as small as these
    rate = {name: config.trellis_bits / config.vector_len for name, config in found.settings.items()}
    mean = [sum(r for n, r in rate.items() if n.endswith(kind)) / 10 for kind in ("x0", "x1", "x2")]
    assert mean[0] > max(mean[1:])
    assert sum(len(row) == 3 for row in allocation_table(found, linears)) == 3


def test_equal_linears_share_equally():
    linears = infos(9)
    found = allocate(linears, {info.name: float(info.out_features * info.in_features) for info in linears}, BASE, 3.1, 16)
    assert {config.trellis_bits / config.vector_len for config in found.settings.values()} <= {2.5, 3, 3.5}


def test_too_few_bits_are_refused():
    with pytest.raises(UsageError, match=r"bits is 0\.5"):
        allocate(infos(), {info.name: 1.0 for info in infos()}, BASE, 0.5, 16)


def test_ladder_rises_and_nearest_rung():
    rates = [config.trellis_bits / config.vector_len for config in rungs(BASE)]
    assert rates == sorted(rates) and rates[0] == 1 and rates[-1] == 8
    assert nearest_rung(BASE, 2.4).trellis_bits == 5 and nearest_rung(BASE, 2.4).vector_len == 2


def test_sensitivities_are_kept_and_belong_to_one_model(tmp_path):
    import json

    path = tmp_path / "s.json"
    path.write_text(json.dumps(to_json({"a": 1.5}, "model-1", {"hessian": "fisher"}, {"seq_len": 64})))
    same = {"hessian": "fisher"}
    assert read_sensitivity(path, "model-1", same, ["a"]) == {"a": 1.5}
    with pytest.raises(UsageError, match=r"other settings(.|\n)*measured with fisher, not input"):
        read_sensitivity(path, "model-1", {"hessian": "input"}, ["a"])
    with pytest.raises(UsageError, match="another model"):
        read_sensitivity(path, "model-2", same, ["a"])
    with pytest.raises(UsageError, match="another model"):
        read_sensitivity(path, "model-1", same, ["a", "b"])
    for damage in ("{", '{"format": "x"}', "[]"):
        path.write_text(damage)
        with pytest.raises(CheckpointError, match="can't be read"):
            read_sensitivity(path, "model-1", same, ["a"])


def test_thousands_of_linears_share_the_budget():
    """One price for all comes as near as the exact choice, and never over; units of the exact one would be too coarse."""
    from vptq.pipeline.allocation import _by_price, _knapsack

    generator = np.random.default_rng(0)
    sizes = generator.choice([1000, 1500], 60)
    bits = [[int(size * rate) for rate in (1, 1.5, 2, 2.5, 3, 4)] for size in sizes]
    losses = [[float(weight * 4.0**-rate) for rate in (1, 1.5, 2, 2.5, 3, 4)] for weight in generator.lognormal(size=60)]
    total = lambda values, chosen: sum(own[c] for own, c in zip(values, chosen, strict=True))  # noqa: E731
    for rate in (1.01, 1.3, 2, 2.25, 3.9):
        budget = rate * sizes.sum()
        exact, priced = _knapsack(bits, losses, budget), _by_price(bits, losses, budget)
        assert total(bits, priced) <= budget
        assert total(losses, priced) <= 1.02 * total(losses, exact)
    many = [bits[n % 60] for n in range(20_000)], [losses[n % 60] for n in range(20_000)]
    budget = 2.0 * sum(own[0] for own in many[0])
    chosen = _by_price(*many, budget)
    assert 0.999 * budget < total(many[0], chosen) <= budget and len(set(chosen)) > 3
    assert _by_price([[10, 20]] * 3, [[0.0, 0.0]] * 3, 30) == [0, 0, 0], "no more bits than are there, though nothing gains"
