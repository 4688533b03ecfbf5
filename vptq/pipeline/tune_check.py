"""Whether blocks that have come closer to their originals, each for itself, make a better model together.

They need not: a block's squared error counts all directions of its output alike, what follows does not. So the values that
were found are held against those of before, and against parts of the way, by KL(original ‖ packed) on the held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from vptq.checkpoint.reader import DequantizedSource, packed_tensors
from vptq.errors import NumericalError
from vptq.evaluation.divergence import compare, last_states
from vptq.models.architecture import Skeleton, load_skeleton
from vptq.models.device import forced_dtype
from vptq.models.runner import BlockRunner
from vptq.models.stream import TensorSource
from vptq.pipeline.tune_models import Pair


class Changed:
    """A model's tensors where some have other values.

    Args:
        base: gives all others. values: by full name.
    """

    def __init__(self, base: TensorSource, values: Mapping[str, Tensor]) -> None:
        self.base, self.values = base, values

    def has(self, name: str) -> bool:
        return name in self.values or self.base.has(name)

    def get(self, name: str) -> Tensor:
        return self.values[name] if name in self.values else self.base.get(name)


def best_part(
    pair: Pair,
    changed: Mapping[str, Tensor],
    held_out: Tensor,
    told: Callable[[], None],
    before: Mapping[str, Tensor],
    parts: Sequence[float],
) -> tuple[dict[str, Tensor], dict[float, float]]:
    """The values on the way from before to `changed` that give the best model, and the mean KL at each part of the way.

    Args:
        changed: by full name, in the type they are stored in. held_out: (num_sequences, seq_len) int64.
        told: called after each part. before: where the way begins; what it lacks is as in the checkpoint. parts: of the way, 0
            among them.
    """
    windows = held_out.contiguous()
    original = BlockRunner(pair.original, pair.original.source(), pair.device, pair.dtype)
    wanted = last_states(original, windows)
    found: dict[float, float] = {}
    best: dict[str, Tensor] = {}
    for part in parts:
        values = _on_the_way(pair, before, changed, part)
        try:
            found[part] = _divergence_of(pair, original, wanted, windows, values)
        except NumericalError:  # too far
            if part == 0:
                raise
            found[part] = math.inf
        if min(found, key=lambda part: found[part]) == part:
            best = values
        told()
    original.unload()
    return best, found


def _divergence_of(pair: Pair, original: BlockRunner, wanted: Tensor, windows: Tensor, values: Mapping[str, Tensor]) -> float:
    skeleton = load_skeleton(pair.packed.folder, pair.trust_remote_code, forced_dtype(pair.device))
    runner = BlockRunner(skeleton, _source(pair, skeleton, values), pair.device, pair.dtype)
    return compare((original, wanted), (runner, last_states(runner, windows)), windows, "held out").mean


def _source(pair: Pair, skeleton: Skeleton, values: Mapping[str, Tensor]) -> DequantizedSource:
    """The packed checkpoint with these values, dequantized."""
    base, layers = Changed(pair.packed_source, values), pair.layers
    return DequantizedSource(base, layers, lambda name: packed_tensors(base, name, layers[name]), skeleton.dtype, pair.device)


def _on_the_way(pair: Pair, before: Mapping[str, Tensor], changed: Mapping[str, Tensor], part: float) -> dict[str, Tensor]:
    if part == 0:
        return dict(before)
    values = {}
    for name, tensor in changed.items():
        start = (before[name] if name in before else pair.packed_source.get(name)).float()
        values[name] = (start + part * (tensor.float() - start)).to(tensor.dtype)
    return dict(before) | values
