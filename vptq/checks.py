"""Which settings of rotation, shared codebooks, trellis and refinement go together. Imports no torch."""

from __future__ import annotations

from typing import Any, get_args

from vptq.recipe import MAX_STATE_BITS, OFF, CodebookScope, CodebookSource, RotationKind, RotationSides, ScaleScope


class Checker:
    """Collects the messages of the conditions that do not hold."""

    def __init__(self, found: list[str]) -> None:
        self.found = found

    def __call__(self, holds: bool, message: str) -> None:
        if not holds:
            self.found.append(message)


def check_rotated(config: Any, check: Checker) -> None:
    """Rotation, shared codebooks, trellis and refinement. config: a `LinearConfig`."""
    for name, kind in (
        ("rotation", RotationKind),
        ("rotation_sides", RotationSides),
        ("codebook_scope", CodebookScope),
        ("codebook_source", CodebookSource),
        ("scale_scope", ScaleScope),
    ):
        value = getattr(config, name)
        check(value in get_args(kind), f"{name} is {value!r}, must be one of {', '.join(get_args(kind))}")
    check(config.rotation != "none" or config.rotation_sides == "both", "rotation_sides goes with rotation hadamard")
    check(config.refine_iters >= 0, f"refine_iters is {config.refine_iters}, must be 0 or more")
    check(1 <= config.beam <= 64, f"beam is {config.beam}, must be 1 to 64")
    check(config.beam == 1 or (config.has_residual and config.refine_iters > 0), "beam needs a residual stage and refine_iters")
    check(config.row_groups >= 1, f"row_groups is {config.row_groups}, must be 1 or more")
    check(
        config.codebook_scope != "linear" or (config.group_num == 1 and config.group_size == OFF),
        "codebook_scope linear is one codebook for a whole linear: leave out group_num and group_size",
    )
    if not config.is_shared:
        check(config.trellis_bits == OFF, "trellis_bits needs codebook_scope shared")
        check(config.row_groups == 1, "row_groups needs codebook_scope shared")
        check(config.scale_scope == "linear", "scale_scope needs codebook_scope shared (own codebooks carry their scale)")
        check(config.codebook_source == "gaussian", "codebook_source needs codebook_scope shared")
        return
    along_out = config.vector_quant_dim == "out"
    check(
        along_out or not (config.enable_perm or config.refine_iters or config.has_trellis or config.row_groups > 1),
        "codebook_scope shared with vector_quant_dim in takes no trellis_bits, row_groups, refine_iters or enable_perm",
    )
    check(not config.normalises, "codebook_scope shared has one scale a linear or row: leave out enable_norm")
    check(
        not config.has_outliers and config.group_num == 1 and config.group_size == OFF,
        "codebook_scope shared takes no outliers and no groups of columns",
    )
    if config.has_trellis:
        _check_trellis(config, check)


def _check_trellis(config: Any, check: Checker) -> None:
    state_bits = config.num_centroids[1].bit_length() - 1
    check(
        config.num_centroids[1] == 1 << state_bits and 4 <= state_bits <= MAX_STATE_BITS,
        f"a trellis needs num_centroids a power of two, 16 to {1 << MAX_STATE_BITS}, not {config.num_centroids[1]}",
    )
    check(
        1 <= config.trellis_bits < state_bits,
        f"trellis_bits is {config.trellis_bits}, must be 1 to {state_bits - 1}: fewer than the bits of an index",
    )
    check(not config.has_residual, "a trellis takes no residual stage")
    check(config.codebook_source == "gaussian", "a trellis needs codebook_source gaussian")
