"""`--bits`: how sensitive each linear is, and which rung of the ladder each one gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vptq.bits import linear_bits
from vptq.config import LinearConfig
from vptq.errors import CheckpointError, UsageError
from vptq.geometry import plan_geometry
from vptq.models.architecture import LinearInfo
from vptq.pipeline.codebooks import codebook_name, shipped_error
from vptq.recipe import LADDER

UNITS = 1 << 16  # that the budget is cut into
MANY = 1000  # linears, from which on the units would be too coarse
TEMPER = 0.5  # power of a linear's sensitivity a weight: what is measured is less certain the further it is from the mean
RANGE = 1.0  # bits that a linear may be above or below the target
SLACK = 1.002  # of the bits asked for: scales and codebooks come on top of whole rungs
FORMAT = "vptq-sensitivity-1"


@dataclass(frozen=True)
class Allocation:
    """What each linear gets.

    Attributes:
        settings: by linear name. bits: stored bits a weight over all linears. loss: predicted rise of the loss, in nats.
    """

    settings: Mapping[str, LinearConfig]
    bits: float
    loss: float


def rungs(base: LinearConfig) -> list[LinearConfig]:
    """The settings that a linear can get, from few bits to many."""
    return [replace(base, vector_lens=(-1, v), trellis_bits=bits) for v, bits in sorted(LADDER, key=lambda r: r[1] / r[0])]


def nearest_rung(base: LinearConfig, bits: float) -> LinearConfig:
    """The rung nearest to a number of bits a weight."""
    return min(rungs(base), key=lambda config: abs(_rate(config) - bits))


def allocate(
    linears: Sequence[LinearInfo], sensitivity: Mapping[str, float], base: LinearConfig, target: float, float_bits: int
) -> Allocation:
    """The choice of rungs with the least predicted loss at `target` stored bits a weight: a knapsack, solved by tables.

    Args:
        sensitivity: by name, the rise of the loss for a quantizer with mean squared error one on a unit Gaussian.
    Raises:
        UsageError: fewer bits than the lowest rung takes.
    """
    ladder = [config for config in rungs(base) if abs(_rate(config) - target) <= RANGE]
    errors = [shipped_error(config) for config in ladder]
    usable = [(config, error) for config, error in zip(ladder, errors, strict=True) if error is not None]
    tempered = _tempered(linears, sensitivity)
    bits: list[list[int]] = []
    losses, choices = [], []
    for info in linears:
        tried = [(config, error, _stored(info, config, float_bits)) for config, error in usable]
        fitting = [(config, error, stored) for config, error, stored in tried if stored is not None]
        choices.append([config for config, _, _ in fitting])
        bits.append([stored for _, _, stored in fitting])
        losses.append([tempered[info.name] * error for _, error, _ in fitting])
    weights = sum(info.out_features * info.in_features for info in linears)
    budget, least = target * SLACK * weights, sum(min(own) for own in bits)
    if least > budget:
        raise UsageError(
            f"bits is {target:g}, but the lowest setting of every linear takes {least / weights:.3f} bits a weight",
            hint=f"set --bits {np.ceil(least / weights * 100) / 100:g} or more",
        )
    room, stored = budget, np.inf
    while stored > budget and room >= least:  # codebooks come on top, and which ones shows only then
        chosen = (_knapsack if len(bits) <= MANY else _by_price)(bits, losses, room)
        settings = {info.name: own[c] for info, own, c in zip(linears, choices, chosen, strict=True)}
        books = {codebook_name(config): config for config in settings.values()}
        stored = sum(own[c] for own, c in zip(bits, chosen, strict=True))
        stored += sum(config.num_centroids[1] * config.vector_len * float_bits for config in books.values())
        room -= max(stored - budget, 1)
    measured = {codebook_name(config): error for config, error in usable}
    loss = sum(sensitivity[name] * measured[codebook_name(config)] for name, config in settings.items())
    return Allocation(settings, stored / weights, loss)


def _tempered(linears: Sequence[LinearInfo], sensitivity: Mapping[str, float]) -> dict[str, float]:
    """Sensitivities nearer to what their linears' sizes alone would give them."""
    sizes = {info.name: info.out_features * info.in_features for info in linears}
    return {name: size * (max(sensitivity[name], 0.0) / size) ** TEMPER for name, size in sizes.items()}


def _stored(info: LinearInfo, config: LinearConfig, float_bits: int) -> int | None:
    """Stored bits of a linear, without the codebook that all share; None where the setting does not fit its shape."""
    geometry, _ = plan_geometry(info.out_features, info.in_features, config)
    return None if geometry is None else linear_bits(info.name, config, geometry, float_bits, codebook_of="another").stored


def _knapsack(bits: list[list[int]], losses: list[list[float]], budget: float) -> list[int]:
    """One choice a linear with the least sum of losses whose bits stay within the budget."""
    for tightness in (1.0, 0.999, 0.998, 0.995, 0.99):  # bits are rounded to units: rarely the sum comes out too large
        unit = budget * tightness / UNITS
        chosen = _solve([np.rint(np.array(own) / unit).astype(int) for own in bits], losses)
        if chosen is not None and sum(own[c] for own, c in zip(bits, chosen, strict=True)) <= budget:
            return chosen
    return _by_price(bits, losses, budget)


def _by_price(bits: list[list[int]], losses: list[list[float]], budget: float) -> list[int]:
    """The same for thousands of linears, each a small part of the budget: all pay one price for a bit, and what is left over
    goes where it gains most."""
    sizes, costs = [np.array(own, dtype=float) for own in bits], [np.array(own) for own in losses]

    def at(price: float) -> list[int]:
        return [int(np.argmin(cost + price * size)) for size, cost in zip(sizes, costs, strict=True)]

    def total(chosen: list[int]) -> float:
        return sum(own[c] for own, c in zip(bits, chosen, strict=True))

    dear = max(float(cost.max()) for cost in costs) / min(float(size.min()) for size in sizes) + 1e-30
    while total(at(dear)) > budget and dear < 1e30:
        dear *= 4
    cheap, best = 0.0, at(dear)
    if total(best) > budget:  # what saves no loss at all costs bits at any price
        best = [int(np.argmin(size)) for size in sizes]
    for _ in range(100):
        price = (cheap + dear) / 2
        tried = at(price)
        if total(tried) <= budget:
            dear, best = price, tried
        else:
            cheap = price
    return _filled(best, sizes, costs, budget - total(best))


def _filled(chosen: list[int], sizes: list[np.ndarray], costs: list[np.ndarray], left: float) -> list[int]:
    """Better choices of single linears, the most gain a bit first, as long as bits are left."""
    gains = []
    for number, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        now = chosen[number]
        for other in range(len(size)):
            more, less = size[other] - size[now], cost[now] - cost[other]
            if more > 0 and less > 0:
                gains.append((less / more, number, other, more))
    done: set[int] = set()
    for _, number, other, more in sorted(gains, reverse=True):
        if number not in done and more <= left:
            chosen[number] = other
            left -= more
            done.add(number)
    return chosen


def _solve(units: list[np.ndarray], losses: list[list[float]]) -> list[int] | None:
    best = np.zeros(UNITS + 1)
    picks = []
    for sizes, costs in zip(units, losses, strict=True):
        reached = np.full(UNITS + 1, np.inf)
        pick = np.zeros(UNITS + 1, dtype=np.int8)
        for number, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            if size > UNITS:
                continue
            tried = np.full(UNITS + 1, np.inf)
            tried[size:] = best[: UNITS + 1 - size] + cost
            better = tried < reached
            reached[better], pick[better] = tried[better], number
        best = reached
        picks.append(pick)
    if not np.isfinite(best[UNITS]):
        return None
    room, chosen = UNITS, []
    for sizes, pick in zip(reversed(units), reversed(picks), strict=True):
        chosen.append(int(pick[room]))
        room -= int(sizes[chosen[-1]])
    return chosen[::-1]


def allocation_table(allocation: Allocation, linears: Sequence[LinearInfo]) -> list[tuple[str, str, str]]:
    """Rows for people: kind of linear, mean bits, how many linears at which bits."""
    kinds: dict[str, list[LinearInfo]] = {}
    for info in linears:
        kinds.setdefault(info.kind, []).append(info)
    rows = []
    for suffix, infos in kinds.items():
        each = [_rate(allocation.settings[info.name]) for info in infos]
        counts = "  ".join(f"{each.count(rate)} at {rate:g}" for rate in sorted(set(each)))
        rows.append((suffix, f"{sum(each) / len(each):.3f}", counts))
    return rows


def _rate(config: LinearConfig) -> float:
    return config.trellis_bits / config.vector_len


def to_json(
    sensitivity: Mapping[str, float], fingerprint: str, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What --sensitivity_path keeps. settings: what the figures depend on; facts: the text, for the reader."""
    found = {"format": FORMAT, "fingerprint": fingerprint, "settings": dict(settings), "calibration": dict(facts)}
    return found | {"sensitivity": dict(sensitivity)}


def read_sensitivity(path: Path, fingerprint: str, settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Sensitivities kept by an earlier run. Raises for a damaged file, one of another model, or of other settings."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise KeyError("format")
        found = {name: float(value) for name, value in stored["sensitivity"].items()}
        stored["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"sensitivities in `{path}` can't be read", where=[repr(error)], hint="delete it; they are measured anew"
        ) from error
    if stored.get("fingerprint") != fingerprint or not set(names) <= set(found):
        raise UsageError(f"the sensitivities in `{path}` are of another model", hint="give another --sensitivity_path")
    differ = [
        f"{k}: measured with {stored['settings'].get(k)}, not {v}"
        for k, v in settings.items()
        if stored["settings"].get(k) != v
    ]
    if differ:
        raise UsageError(
            f"the sensitivities in `{path}` were measured with other settings",
            where=differ,
            hint="give another --sensitivity_path",
        )
    return found
