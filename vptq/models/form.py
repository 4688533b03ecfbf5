"""One form for all models: every weight that multiplies is an `nn.Linear`'s, whatever transformers or the files make of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from vptq.models.experts import Fusing, Piece, split_experts
from vptq.models.origins import Origin, find_origins
from vptq.models.stream import FolderSource


@dataclass(frozen=True)
class Form:
    """In what the modules of a skeleton differ from its files, and from transformers' own modules.

    Attributes:
        origins: where parameters lie in the files that are not simply the tensor of their name.
        transposed: weights that transformers' own module holds transposed. pieces: of experts that it holds fused.
    """

    origins: Mapping[str, Origin] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    pieces: tuple[Piece, ...] = ()

    def without(self, holders: Collection[str]) -> Form:
        """The same, but for experts in these modules, by full name, which stay apart."""
        return replace(self, pieces=tuple(piece for piece in self.pieces if piece.whole.rpartition(".")[0] not in holders))

    def as_own(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the skeleton as transformers' own modules hold them, by their names there.

        Of experts that are fused there all must come, or none.
        """
        fusing = Fusing(self.pieces)
        for name, tensor in tensors:
            if fusing.takes(name):
                yield from fusing.add(name, tensor)
            else:
                yield name, tensor.T.contiguous() if name in self.transposed else tensor

    def as_filed(self, source: FolderSource, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the skeleton as the files of a model folder hold them, by their names there.

        Of what is one tensor there all must come, or none.
        """
        together = tuple(piece for piece in self.pieces if source.file_name(piece.name) is None)
        for name, tensor in replace(self, pieces=together).as_own(tensors):
            yield source.file_name(name) or name, tensor


def parents(name: str) -> Iterator[str]:
    """The modules that a tensor or a module is part of, by their full names, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def unify(model: nn.Module, names: Mapping[str, tuple[int, ...]], wanted: Callable[[str], bool] = lambda name: True) -> Form:
    """Give a model, in place, linears where it has something else; parameters may be on the meta device.

    Args:
        names: of the tensors in the files, with their shapes. wanted: which modules, by full name.
    Raises:
        UsageError: experts of a form that is not known.
    """
    origins = find_origins(model, names)
    pieces = split_experts(model, wanted)
    counts = {piece.whole: piece.expert + 1 for piece in pieces}  # the last expert's counts
    own = {name: origin for name, origin in origins.items() if name not in counts}
    for piece in pieces:
        stacks = origins[piece.whole].stacks if piece.whole in origins else ()
        complete = all(len(stack) == counts[piece.whole] for stack in stacks)  # else some are packed
        if complete and piece.name not in names:
            own[piece.name] = piece.origin(origins)
    transposed = frozenset(_turn_conv1d(model, wanted))
    for name in transposed:
        own[name] = replace(own.get(name, Origin((_stored(name, names, model),))), transposed=True)
    return Form(own, transposed, tuple(pieces))


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' Conv1D: a linear whose weight, (in_features, out_features), is transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.ndim == 2


def _turn_conv1d(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Linears in place of transformers' Conv1D; full names of their weights."""
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        if is_conv1d(module) and wanted(name):
            in_features, out_features = module.weight.shape
            linear = nn.Linear(in_features, out_features, device="meta", dtype=module.weight.dtype).requires_grad_(False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
            yield f"{name}.weight"


def _stored(name: str, names: Collection[str], model: Any) -> str:
    """What the files call a parameter: its name, or that without the base model's prefix."""
    short = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    return name if name in names or short not in names else short
