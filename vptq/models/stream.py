"""Weights from safetensors files, one tensor or one block at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vptq.errors import CheckpointError
from vptq.models.headers import TensorEntry, read_headers
from vptq.models.origins import Origin

FLOAT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class TensorSource(Protocol):
    """Anything that gives a model's tensors by the model's own parameter names."""

    def has(self, name: str) -> bool: ...

    def get(self, name: str) -> Tensor: ...


class FolderSource:
    """The tensors of a model folder. Names may differ from the model's by its base prefix, as older checkpoints' do.

    Args:
        origins: where parameters lie that are not simply the tensor of their name.
    """

    def __init__(self, folder: Path, base_prefix: str = "", origins: Mapping[str, Origin] | None = None) -> None:
        self.folder = folder
        self.entries = read_headers(folder)
        self.base_prefix = base_prefix
        self.origins = origins or {}
        self._threads = threading.local()

    def _opened(self, path: Path) -> Any:
        """A file of the folder, opened once a thread: to read a header takes longer than a small tensor."""
        files: dict[Path, Any] | None = getattr(self._threads, "files", None)
        if files is None:
            files = self._threads.files = {}
        if path not in files:
            files[path] = safe_open(path, framework="pt").__enter__()
        return files[path]

    def file_names(self, name: str) -> tuple[str, ...]:
        """The tensors in the files that the model's parameter `name` is made of; none if they lack one."""
        if name in self.origins:
            names = self.origins[name].names
            return names if all(one in self.entries for one in names) else ()
        found = self._direct(name)
        return () if found is None else (found,)

    def file_name(self, name: str) -> str | None:
        """The name in the file of the model's parameter `name`; None if the file lacks it, or it is no tensor of its own."""
        if name in self.origins and not self.origins[name].is_one_tensor:
            return None
        return next(iter(self.file_names(name)), None)

    def _direct(self, name: str) -> str | None:
        prefix = f"{self.base_prefix}." if self.base_prefix else ""
        candidates = [name]
        if prefix:
            candidates.append(name.removeprefix(prefix) if name.startswith(prefix) else prefix + name)
        return next((c for c in candidates if c in self.entries), None)

    def has(self, name: str) -> bool:
        return bool(self.file_names(name))

    def entry(self, name: str) -> TensorEntry:
        """What the files hold of the model's parameter `name`: the first tensor that it is made of."""
        found = self.file_names(name)
        if not found:
            raise CheckpointError(f"`{self.folder}` holds no tensor `{name}`", hint="get the model folder anew")
        return self.entries[found[0]]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the model's parameter `name` in the files; None where only reading it tells."""
        stored = self.entry(name).shape
        return self.origins[name].shape(stored) if name in self.origins else stored

    def get(self, name: str) -> Tensor:
        """The tensor of the model's parameter `name`, on the CPU, in its stored type."""
        self.entry(name)
        if name in self.origins:
            return self.origins[name].make(self.get_stored)
        return self.get_stored(self._direct(name) or name)

    def get_stored(self, name: str, index: int | None = None) -> Tensor:
        """The tensor that the file calls `name`, on the CPU, in its stored type, or one entry along its first dimension."""
        entry = self.entries[name]
        try:
            file = self._opened(entry.file)
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]
        except Exception as error:
            raise CheckpointError(
                f"`{entry.file}` can't be read", where=[name, str(error)], hint="get the file anew"
            ) from error


def load_module(
    module: nn.Module, prefix: str, source: TensorSource, device: torch.device, dtype: torch.dtype, skip: Iterable[str] = ()
) -> None:
    """Fill a module's parameters, in place, from `source` under `prefix`; float tensors become `dtype`.

    Only parameters that are on the meta device are filled; each keeps its shape (as config.json gives it). `skip`: full names
    to leave there.
    """
    skipped = set(skip)
    for name, parameter in list(module.named_parameters()):
        full = f"{prefix}.{name}" if prefix else name
        if not parameter.is_meta or full in skipped:
            continue
        tensor = source.get(full)
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"`{full}` is {tuple(tensor.shape)} in the file but {tuple(parameter.shape)} by config.json",
                hint="config.json and weights are not of one model",
            )
        tensor = tensor.to(device, non_blocking=True).to(dtype if tensor.is_floating_point() else tensor.dtype)
        _set_parameter(module, name, tensor)


def unload_module(module: nn.Module) -> None:
    """Back to the meta device, in place: the memory is free again."""
    for name, parameter in list(module.named_parameters()):
        _set_parameter(module, name, torch.empty_like(parameter, device="meta"))


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    owner.register_parameter(child, nn.Parameter(tensor, requires_grad=False))
