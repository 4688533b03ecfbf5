"""Write model folders: sharded safetensors with index, config, generation config, tokenizer; whole or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from vptq.checkpoint.record import RECORD, make_record
from vptq.layer_config import LayerConfig, quantization_config
from vptq.layouts import without_quantization
from vptq.models.files import save_json, save_tensors, writing_to
from vptq.models.form import Form, parents
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
    "NOTICE*",
    "USE_POLICY*",
    "*processor_config.json",
)


class CheckpointWriter:
    """A model folder in the making. It takes its name when the `with` block ends without a fault.

    Args:
        folder: the final folder. An older one of that name is replaced.
        max_shard_bytes: tensors go into one more file past this size.
        errors: None, or what goes into the record of a packed checkpoint: proxy errors by linear, as far as they are known.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES, errors: Mapping[str, float] | None = None) -> None:
        self.errors = errors
        self.folder = folder
        self.partial = folder.with_name(f"{folder.name}{PARTIAL}")
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
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
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
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
        self._pending, self._pending_bytes = {}, 0

    def _shard_path(self, number: int) -> Path:
        return self.partial / f"shard-{number}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        self._flush()
        self._name_shards()
        if self.errors is not None:
            self.add_json(RECORD, make_record(self.partial, self.errors))
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
    form: Form,
    parameters: Collection[str],
    layers: Mapping[str, LayerConfig],
    packed: Iterable[tuple[str, dict[str, Tensor]]],
    errors: Mapping[str, float],
) -> None:
    """A packed checkpoint: everything of the original but the quantized weights, and the packed tensors instead.

    Args:
        form: in what the model's modules and files differ. parameters: the model's own parameter names, which the tensors are
            written under. packed: (linear name, its stored tensors) for every name in `layers`. errors: proxy errors by linear.
    """
    replaced = {f"{linear}.weight" for linear in layers}
    kept = [name for name in parameters if name not in replaced and source.has(name)]
    used = {one for name in (*kept, *replaced) for one in source.file_names(name)}
    holders = {parent for name in layers for parent in parents(name)}
    tensors = itertools.chain(
        form.without(holders).as_own((name, source.get(name).cpu()) for name in kept),
        ((name, source.get_stored(name)) for name in source.entries if name not in used),
        ((f"{linear}.{key}", tensor) for linear, stored in packed for key, tensor in stored.items()),
    )
    config = without_quantization(read_config(source.folder)) | {"quantization_config": quantization_config(dict(layers))}
    if any(layer.weight_of for layer in layers.values()):
        config["tie_word_embeddings"] = False  # the packed head finds its embeddings by itself
    _write_model(folder, source, tensors, config, errors)


def write_dequantized(
    folder: Path,
    source: FolderSource,
    form: Form,
    parameters: Collection[str],
    linears: Collection[str],
    weights: Iterable[tuple[str, Tensor]],
) -> None:
    """A checkpoint of the original's form with other weights: tensors have the names that they have in its files.

    Args:
        form, parameters: as for `write_packed`. weights: (linear name, weight in the model's type) for every name in `linears`.
    """
    replaced = {f"{linear}.weight" for linear in linears}
    own = {source.file_name(name): name for name in parameters if name not in replaced}
    old = {one for name in replaced for one in source.file_names(name)}
    mates = (name for name in parameters if name not in replaced and old.intersection(source.file_names(name)))
    changed = itertools.chain(
        ((name, source.get(name).cpu()) for name in mates),  # that are stored in one tensor with what is quantized
        ((f"{linear}.weight", weight) for linear, weight in weights),
    )

    def unchanged() -> Iterator[tuple[str, Tensor]]:
        for name in source.entries:
            if name not in old:
                tensor = source.get(own[name]).cpu() if name in own else source.get_stored(name)
                yield name, tensor.T.contiguous() if own.get(name) in form.transposed else tensor

    _write_model(folder, source, itertools.chain(unchanged(), form.as_filed(source, changed)), read_config(source.folder))


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
    with CheckpointWriter(folder, errors={}) as writer:
        for name in source.entries:
            tensor = left.pop(own_names.get(name, name), None)
            writer.add(name, source.get_stored(name) if tensor is None else tensor.cpu())
        for name, tensor in left.items():
            writer.add(name, tensor.cpu())
        config = without_quantization(read_config(source.folder))
        writer.add_json("config.json", config | {"quantization_config": quantization_config(dict(layers))})
        writer.copy_files(source.folder, with_code="auto_map" in config)


def write_unpacked(
    folder: Path, source: FolderSource, form: Form, layers: Mapping[str, LayerConfig], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """A checkpoint of the original's form from a packed one, `source`: tensors have the names of transformers' own modules.

    Args:
        form: of the packed model. layers: its quantized linears. weights: (linear name, weight in the model's type) for those
            that store one.
    """
    config = without_quantization(read_config(source.folder))
    if any(layer.weight_of for layer in layers.values()):
        config["tie_word_embeddings"] = True  # as it was before the head was packed as the embeddings
    fused = {piece.name for piece in form.pieces}
    kept: list[str] = []
    split: list[str] = []
    for name in source.entries:
        linear = next((parent for parent in parents(name) if parent in layers), None)
        if linear is None or name == f"{linear}.bias":
            (split if name in fused else kept).append(name)
    changed = itertools.chain(
        ((name, source.get_stored(name)) for name in split), ((f"{name}.weight", weight) for name, weight in weights)
    )
    tensors = itertools.chain(((name, source.get_stored(name)) for name in kept), form.as_own(changed))
    _write_model(folder, source, tensors, config)


def _write_model(
    folder: Path,
    source: FolderSource,
    tensors: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    errors: Mapping[str, float] | None = None,
) -> None:
    with CheckpointWriter(folder, errors=errors) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.add_json("config.json", config)
        writer.copy_files(source.folder, with_code="auto_map" in config)
