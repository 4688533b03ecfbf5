"""`finetune --mode block`: passes over the blocks, one block's weights in memory at a time; each is held against the whole."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from vptq.finetune_config import FinetuneConfig
from vptq.pipeline.block_pass import BlockPass, History, PassSettings, Told
from vptq.pipeline.output_pass import OutputPass
from vptq.pipeline.prediction_pass import PredictionPass
from vptq.pipeline.tune_check import best_part
from vptq.pipeline.tune_job import TuneJob
from vptq.pipeline.tune_models import Pair
from vptq.recipe import BlockPassKind

PASSES: dict[str, type[BlockPass]] = {"outputs": OutputPass, "predictions": PredictionPass}
BEST_PART = 0.75  # of the way that damping aims at
LEAST_PART = 0.125  # that tells anything of it
EASED = 0.25  # what damping is multiplied by where no block could learn anything with it


class BlockTuning:
    """All blocks of a model.

    Args:
        pair: original and packed model. config: resolved. tokens: (num_sequences, seq_len) int64, the held-out ones last.
        told: hears what is under way, and how much is done. note: of what people should know.
    """

    def __init__(
        self, pair: Pair, config: FinetuneConfig, tokens: Tensor, job: TuneJob, told: Told, note: Callable[[str], None]
    ) -> None:
        size, held_out = config.at_once, config.num_held_out or 0
        train, rest = tokens[: len(tokens) - held_out].split(size), tokens[len(tokens) - held_out :].split(size)
        self.settings = PassSettings(pair, config, [*train, *rest], len(rest), job, told, note)
        self.held_out = (math.nan, math.nan)  # KL of the whole model, before and after
        self.damping = 1.0

    def units(self) -> float:
        """What `told` is told in all."""
        return sum(self._units_of(kind) for kind in self.settings.config.passes)

    def _units_of(self, kind: BlockPassKind) -> float:
        return PASSES[kind].units(self.settings) + len(PASSES[kind].parts) * self._check_units()

    def run(self) -> tuple[dict[str, Tensor], dict[str, History]]:
        """Every pass; what has changed, by full name as it is stored, and the history of each block in each pass."""
        values: dict[str, Tensor] = {}
        histories: dict[str, History] = {}
        for number, kind in enumerate(self.settings.config.passes, 1):
            values, found = self._one(kind, f"{number} {kind}", values)
            histories |= found
        return values, histories

    def _one(self, kind: BlockPassKind, name: str, before: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, History]]:
        """One pass, or what a stopped run found in it."""
        job, kept = self.settings.job, self.settings.job.load_tensors(name)
        if kept is not None:
            self.held_out, self.damping = tuple(kept[1]["held_out"]), kept[1]["damping"]
            self.settings.told(name, self._units_of(kind))
            return kept[0], kept[1]["histories"]
        one = PASSES[kind](self.settings, name, before, self.damping)
        changed, found = one.run()
        values, part = self._checked(one, changed)
        if kind == "predictions":
            self.damping *= _factor(part) if any(map(_gained, found.values())) else EASED
        histories = {f"{name}: {block}": history for block, history in found.items()}
        numbers = {"held_out": self.held_out, "damping": self.damping, "histories": histories}
        job.save_tensors(name, values, numbers)
        return values, histories

    def _checked(self, one: BlockPass, changed: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """The values, or those on the way to them, that make the best model as a whole, and the part of the way."""
        settings, name = self.settings, one.name

        def told() -> None:
            settings.told("the model as a whole", self._check_units())

        values, found = best_part(settings.pair, changed, settings.held_out, told, one.start, one.parts)
        part = min(found, key=lambda key: found[key])
        first = found[0.0] if math.isnan(self.held_out[0]) else self.held_out[0]
        self.held_out = first, found[part]
        settings.note(f"{name}: KL from the original on the held-out text {found[0.0]:.4f} -> {found[part]:.4f}")
        if part < 1:
            less = f"{part:.0%} of the way is kept" if part else "all is left as it was before it"
            settings.note(f"{name}: with all that blocks learned the model is worse (KL {found[1.0]:.4f}): {less}")
        return values, part

    def _check_units(self) -> float:
        return float(self.settings.num_blocks * self.settings.held_out.numel())


def _factor(part: float) -> float:
    """What damping is multiplied by where so much of the way was best. A root: going too far is only partly a lack of it."""
    return math.sqrt(BEST_PART / max(part, LEAST_PART))


def _gained(history: History) -> bool:
    """Whether a block came to anything better than it was."""
    looks = [entry["held_out"] for entry in history if "held_out" in entry]
    return bool(looks) and min(looks) < looks[0]
