"""Write model folders: sharded safetensors with index, config, generation config, tokenizer; whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from vptq.layer_config import LayerConfig, quantization_config
from vptq.models.files import save_json, save_tensors, writing_to
from vptq.models.headers import INDEX_NAME, SINGLE_NAME, read_config
from vptq.models.remote import PARTIAL, publish_folder
from vptq.models.stream import FolderSource

CONFIG_NAME = "config.json"  # a folder that has it is whole
MAX_SHARD_BYTES = 1 << 30  # a shard is in main memory twice while it is written
COPIED_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*.tiktoken",
    "LICENSE*",
)


class CheckpointWriter:
    """A model folder in the making. It takes its name when the `with` block ends without a fault.

    Args:
        folder: the final folder. An older one of that name is replaced.
        max_shard_bytes: tensors go into one more file past this size.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.partial = folder.with_name(f"{folder.name}{PARTIAL}")
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        shutil.rmtree(self.partial, ignore_errors=True)
        with writing_to(self.partial):
            self.partial.mkdir(parents=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; written once a shard is full."""
        size = tensor.numel() * tensor.element_size()
        pending = sum(t.numel() * t.element_size() for t in self._pending.values())
        if self._pending and pending + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._total_bytes += size

    def add_json(self, name: str, value: Any) -> None:
        save_json(self.partial / name, value)

    def copy_files(self, source: Path, with_code: bool) -> None:
        """Tokenizer, generation config and the like, as they are; a model's own Python files where its config names them."""
        for pattern in (*COPIED_PATTERNS, *(["*.py"] if with_code else [])):
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    with writing_to(self.partial / path.name):
                        shutil.copyfile(path, self.partial / path.name)

    def _flush(self) -> None:
        save_tensors(self._shard_path(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._pending = {}

    def _shard_path(self, number: int) -> Path:
        return self.partial / f"shard-{number}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        self._flush()
        self._name_shards()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.partial, self.folder)
        publish_folder(self.folder, last=CONFIG_NAME)

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            os.replace(self._shard_path(0), self.partial / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._shard_path(number), self.partial / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        save_json(self.partial / INDEX_NAME, index)


def is_whole(folder: Path) -> bool:
    """Whether a model folder is there that was written to its end."""
    return (folder / CONFIG_NAME).exists()


def write_packed(
    folder: Path,
    source: FolderSource,
    parameters: Collection[str],
    layers: Mapping[str, LayerConfig],
    packed: Iterator[tuple[str, dict[str, Tensor]]],
) -> None:
    """A packed checkpoint: everything of the original but the quantized weights, and the packed tensors instead.

    Args:
        parameters: the model's own parameter names, which the tensors are written under.
        packed: (linear name, its stored tensors) for every name in `layers`.
    """
    tensors = ((f"{linear}.{key}", tensor) for linear, stored in packed for key, tensor in stored.items())
    config = read_config(source.folder) | {"quantization_config": quantization_config(dict(layers))}
    if any(layer.weight_of for layer in layers.values()):
        config["tie_word_embeddings"] = False  # the packed head finds its embeddings by itself
    _write_model(folder, source, parameters, list(layers), tensors, config)


def write_dequantized(
    folder: Path,
    source: FolderSource,
    parameters: Collection[str],
    linears: Collection[str],
    weights: Iterator[tuple[str, Tensor]],
) -> None:
    """A checkpoint of the original's form with other weights.

    Args:
        parameters: as for `write_packed`. weights: (linear name, weight in the model's type) for every name in `linears`.
    """
    tensors = ((f"{linear}.weight", weight) for linear, weight in weights)
    _write_model(folder, source, parameters, linears, tensors, read_config(source.folder))


def write_changed(
    folder: Path,
    source: FolderSource,
    parameters: Collection[str],
    layers: Mapping[str, LayerConfig],
    changed: Mapping[str, Tensor],
) -> None:
    """A packed checkpoint with other values of some tensors, or with more of them.

    Args:
        source: the packed checkpoint. parameters: names of the packed model's parameters, which `changed` uses.
        layers: its quantized linears, as they are now. changed: tensors on any device, in the type they are stored in.
    """
    own_names = {source.file_name(name): name for name in parameters}
    left = dict(changed)
    with CheckpointWriter(folder) as writer:
        for name in source.entries:
            tensor = left.pop(own_names.get(name, name), None)
            writer.add(name, source.get_stored(name) if tensor is None else tensor.cpu())
        for name, tensor in left.items():
            writer.add(name, tensor.cpu())
        config = read_config(source.folder)
        writer.add_json("config.json", config | {"quantization_config": quantization_config(dict(layers))})
        writer.copy_files(source.folder, with_code="auto_map" in config)


def write_unpacked(
    folder: Path, source: FolderSource, layers: Mapping[str, LayerConfig], weights: Iterator[tuple[str, Tensor]]
) -> None:
    """A checkpoint of the original's form from a packed one, `source`.

    Args:
        layers: its quantized linears. weights: (linear name, weight in the model's type) for those that store one.
    """
    config = {key: value for key, value in read_config(source.folder).items() if key != "quantization_config"}
    if any(layer.weight_of for layer in layers.values()):
        config["tie_word_embeddings"] = True  # as it was before the head was packed as the embeddings
    with CheckpointWriter(folder) as writer:
        for name in source.entries:
            linear = next((parent for parent in _parents(name) if parent in layers), None)
            if linear is None or name == f"{linear}.bias":
                writer.add(name, source.get_stored(name))
        for name, weight in weights:
            writer.add(f"{name}.weight", weight)
        writer.add_json("config.json", config)
        writer.copy_files(source.folder, with_code="auto_map" in config)


def _parents(name: str) -> Iterator[str]:
    """Modules that a tensor may belong to, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _write_model(
    folder: Path,
    source: FolderSource,
    parameters: Collection[str],
    linears: Collection[str],
    tensors: Iterator[tuple[str, Tensor]],
    config: dict[str, Any],
) -> None:
    own_names = {source.file_name(name): name for name in parameters}
    replaced = {source.file_name(f"{linear}.weight") for linear in linears}
    with CheckpointWriter(folder) as writer:
        for name in source.entries:
            if name not in replaced:
                own = own_names.get(name)
                writer.add(own or name, source.get(own).cpu() if own else source.get_stored(name))
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.add_json("config.json", config)
        writer.copy_files(source.folder, with_code="auto_map" in config)
