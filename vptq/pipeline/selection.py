"""Which linears are quantized, and how each: globs over their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from vptq.config import LinearConfig, QuantConfig
from vptq.errors import UsageError
from vptq.fields import typed
from vptq.models.architecture import LinearInfo, Skeleton


def select_linears(config: QuantConfig, skeleton: Skeleton) -> list[tuple[LinearInfo, LinearConfig]]:
    """The linears to quantize, in module order, each with its settings.

    Routers, whose few outputs choose experts, stay as they are unless `include` names them.

    Raises:
        UsageError: a glob that matches no linear, or none is left.
    """
    linears = skeleton.linears()
    names = [linear.name for linear in linears]
    per_linear = config.per_linear or {}
    _check_globs([*(config.include or ()), *(config.skip or ()), *per_linear], names)
    found = []
    for linear in linears:
        included = _matches(linear.name, config.include or ()) if config.include else not skeleton.is_router(linear)
        if included and not _matches(linear.name, config.skip or ()):
            found.append((linear, _own_config(linear.name, config.linear, per_linear)))
    if not found:
        raise UsageError("no linear is left to quantize", hint="let --skip name fewer, or --include more")
    return found


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _own_config(name: str, base: LinearConfig, per_linear: Mapping[str, Mapping[str, Any]]) -> LinearConfig:
    """Settings of one linear: of the globs that match it the last that names a setting counts."""
    for glob, values in per_linear.items():
        if fnmatchcase(name, glob):
            base = replace(base, **typed(values))
    return base


def _check_globs(globs: list[str], names: list[str]) -> None:
    useless = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    if useless:
        kinds = {name.rpartition(".")[2] for name in names}
        close = [
            match for glob in useless for match in difflib.get_close_matches(glob.rpartition(".")[2].strip("*"), kinds, n=1)
        ]
        hint = f"did you mean *{close[0]}?" if close else f"names are such as {names[0]}; * stands for any letters"
        raise UsageError("these match no linear of the model", where=useless, hint=hint)
