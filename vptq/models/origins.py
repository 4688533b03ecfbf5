"""Where the parameters of a model lie in its files: transformers 5 names, fuses and splits some in another way than files do.

Its own table of these changes is asked, and applied to one parameter at a time, so that a model need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vptq.errors import CheckpointError

# steps of a fusing of experts that keep each expert's tensors apart: stacked by expert, then one below the other
STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class Origin:
    """How a parameter is made of tensors of the files.

    Attributes:
        names: of the tensors, as the files call them. expert: the entry along the first dimension that it is, if it is one.
        transposed: whether rows and columns change places, after that. rows: the part of the rows that it is, after that.
        convert: makes the whole of several tensors, before all that. turned: whether the matrices of a parameter that holds all
            experts are stored transposed.
        stacks: for a parameter that holds all experts, names of each expert's own tensor, part by part: [part][expert].
    """

    names: tuple[str, ...]
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    convert: Callable[[Callable[[str], Tensor]], Tensor] | None = None
    stacks: tuple[tuple[str, ...], ...] = ()
    turned: bool = False

    @property
    def is_one_tensor(self) -> bool:
        """Whether it is a whole tensor of the files, perhaps transposed."""
        return len(self.names) == 1 and self.expert is None and self.rows is None and self.convert is None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Its shape, where the tensor's in the file is `stored`; None where that does not tell."""
        if self.convert is not None:
            return None
        if self.expert is not None:
            stored = stored[1:]
        if self.transposed:
            stored = stored[::-1]
        return stored if self.rows is None else (self.rows[1] - self.rows[0], *stored[1:])

    def make(self, get: Callable[[str, int | None], Tensor]) -> Tensor:
        """The parameter, on the CPU. get: gives a tensor of the files, or one entry along its first dimension."""
        if self.convert is not None:
            whole = self.convert(lambda name: get(name, None))
            found = whole if self.expert is None else whole[self.expert]
        else:
            found = get(self.names[0], self.expert)
        if self.transposed:
            found = found.T
        return (found if self.rows is None else found[slice(*self.rows)]).contiguous()


def find_origins(model: Any, names: Mapping[str, tuple[int, ...]]) -> dict[str, Origin]:
    """The parameters that are not simply the tensor of their name.

    Args:
        model: as transformers builds it. names: of the tensors in the files, with their shapes.
    """
    table = _table(model)
    if table is None:
        return {}
    own = dict.fromkeys(model.state_dict(), True)
    collected: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=table.order):
        target, pattern = table.rename(name, own)
        if target not in own and name in own:
            target, pattern = name, None
        if target in own and not (pattern is None and target == name):
            collected.setdefault(target, []).append((name, pattern))
    found: dict[str, Origin] = {}
    for target, parts in collected.items():
        if target in names and target in (name for name, _ in parts):
            found |= table.turned(target, parts[0][1], names)  # else the files hold it as it is
        elif target in names:
            continue
        elif parts[0][1] is None:
            found[target] = Origin((parts[0][0],))
        else:
            found |= table.converted(target, [(name, str(pattern)) for name, pattern in parts])
    return found


class _Table:
    """transformers' changes of names and forms for one model."""

    def __init__(self, model: Any) -> None:
        from transformers import conversion_mapping, core_model_loading  # noqa: PLC0415 (slow import)

        self.model: Any = model
        self._last: tuple[str, Tensor] | None = None  # what was converted last
        self.loading: Any = core_model_loading
        changes = conversion_mapping.get_model_conversion_mapping(model)
        self.renamings = [change for change in changes if isinstance(change, core_model_loading.WeightRenaming)]
        self.converters = [change for change in changes if isinstance(change, core_model_loading.WeightConverter)]
        self.by_pattern = {pattern: one for one in self.converters for pattern in one.source_patterns}
        self.order: Callable[[str], Any] = core_model_loading.dot_natural_key

    def rename(self, name: str, own: dict[str, bool]) -> tuple[str, str | None]:
        """The parameter that a tensor belongs to, and the pattern of the change of form that it goes through."""
        return self.loading.rename_source_key(name, self.renamings, self.converters, self.model.base_model_prefix, own)

    def turned(self, target: str, pattern: str | None, names: Mapping[str, tuple[int, ...]]) -> dict[str, Origin]:
        """A parameter of the same name in the files, if these hold its matrices transposed: by the shape, else by the table."""
        steps = [] if pattern is None else self.by_pattern[pattern].operations
        if [type(step).__name__ for step in steps] != ["Transpose"]:
            return {}
        own = tuple(self.model.get_parameter(target).shape)
        if names[target] == own and not (own[-1] == own[-2] and not getattr(steps[0], "check_dims", False)):
            return {}
        return {target: Origin((target,), turned=True)}

    def converted(self, target: str, parts: list[tuple[str, str]]) -> dict[str, Origin]:
        converter = self.by_pattern[parts[0][1]]
        names = tuple(name for name, _ in parts)
        stacks: tuple[tuple[str, ...], ...] = ()
        if [type(step).__name__ for step in converter.operations] in STACKING:
            by_part = [tuple(n for n, pattern in parts if pattern == one) for one in converter.source_patterns]
            stacks = tuple(own for own in by_part if own)

        targets = [target.replace(converter.target_patterns[0], other) for other in converter.target_patterns]
        return {one: Origin(names, convert=self._conversion(one, target, parts), stacks=stacks) for one in targets}

    def _conversion(self, wanted: str, target: str, parts: list[tuple[str, str]]) -> Callable[..., Tensor]:
        def convert(get: Callable[[str], Tensor]) -> Tensor:
            from copy import deepcopy  # noqa: PLC0415

            if self._last is not None and self._last[0] == wanted:  # each expert of it is asked for
                return self._last[1]
            converter: Any = deepcopy(self.by_pattern[parts[0][1]])
            for name, pattern in parts:
                converter.add_tensor(target, name, pattern, get(name))
            try:
                made = converter.convert(target, model=self.model, config=self.model.config)
                value = made[wanted]
            except Exception as error:
                raise CheckpointError(
                    f"`{wanted}` can't be made of what the files hold", where=[*(n for n, _ in parts[:4]), str(error)]
                ) from error
            self._last = wanted, value[0] if isinstance(value, list) else value
            return self._last[1]

        return convert


def _table(model: Any) -> _Table | None:
    """None where this transformers has no such table (4.x: modules are named as files name them) or none that is known here."""
    try:
        return _Table(model)
    except (ImportError, AttributeError, TypeError):
        return None


def of_expert(whole: Origin, part: int, expert: int, *, transposed: bool, rows: tuple[int, int] | None) -> Origin:
    """The origin of one expert's matrix, from that of the parameter that holds all.

    Args:
        part: of the parameter's stacked parts (0 gate, 1 up). transposed, rows: of the expert's part in the parameter.
    """
    if len(whole.stacks) > 1:
        return Origin((whole.stacks[part][expert],))
    if whole.stacks:
        return Origin((whole.stacks[0][expert],), transposed=transposed, rows=rows)
    return replace(whole, expert=expert, transposed=transposed != whole.turned, turned=False, rows=rows)
