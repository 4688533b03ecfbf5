"""What is in safetensors files, without reading the tensors. Imports no torch.

A safetensors file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vptq.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20
SAMPLE_BYTES = 4096
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its shape, safetensors dtype name, bytes on disk, the file, and where in it the bytes start."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    file: Path
    offset: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one file. Raises CheckpointError where the file is missing, cut short or no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("the header's length does not fit the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(name, entry, path, 8 + length, size) for name, entry in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` is no readable safetensors file", where=[str(error)], hint="get the file anew"
        ) from error
    return entries


def _entry(name: str, stated: dict, path: Path, first: int, size: int) -> TensorEntry:
    """One entry of a header, whose data begins at byte `first`. Raises ValueError and others where it can't be true."""
    start, end = stated["data_offsets"]
    shape, dtype = tuple(stated["shape"]), stated["dtype"]
    if not all(isinstance(number, int) and number >= 0 for number in (start, end, *shape)) or not isinstance(dtype, str):
        raise ValueError(f"`{name}` has no shape, type and place that can be")
    if not start <= end <= size - first:
        raise ValueError(f"`{name}` lies past the end of the file: it is cut short")
    if dtype in DTYPE_BITS and math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - start):
        raise ValueError(f"`{name}` has {end - start} bytes, not those of its shape")
    return TensorEntry(shape, dtype, end - start, path, first + start)


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """Tensors of a model folder, one file or several with an index."""
    index = folder / INDEX_NAME
    if index.exists():
        try:
            names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            strange = [name for name in names.values() if not isinstance(name, str) or Path(name).name != name or name == ".."]
            if strange:
                raise ValueError(f"{strange[0]!r} is no file of the folder")
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise CheckpointError(f"`{index}` is damaged", where=[str(error)], hint="get the file anew") from error
        found: dict[str, TensorEntry] = {}
        for name in sorted(set(names.values())):
            found |= read_header(folder / name)
        absent = sorted(set(names) - set(found))
        if absent:
            raise CheckpointError(f"`{index}` names tensors that no file holds", where=absent, hint="get the folder anew")
        return found
    single = folder / SINGLE_NAME
    if single.exists():
        return read_header(single)
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(others) == 1:
        return read_header(folder / others[0])
    if list(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"`{folder}` holds pickled weights (pytorch_model.bin), which are not read",
            hint="write it as safetensors: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_folder)",
        )
    raise CheckpointError(
        f"`{folder}` holds no safetensors weights",
        hint="give a model folder as transformers saves it; pickled weights (pytorch_model.bin) must be converted first",
    )


def read_config(folder: Path) -> dict:
    """The folder's config.json. Raises CheckpointError where it is missing or damaged."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"model folder `{folder}` does not exist", hint="give a folder with config.json, or a hub name")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise CheckpointError(f"`{folder}` holds no config.json", hint="give a model folder as transformers saves it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` is damaged", where=[str(error)], hint="get the file anew") from error
    return config


def fingerprint(entries: Mapping[str, TensorEntry]) -> str:
    """Which model this is: a hash of every tensor's name, shape, type, and its first and last bytes."""
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.shape} {entry.dtype}\n".encode())
        with entry.file.open("rb") as file:
            for start in (0, max(0, entry.num_bytes - SAMPLE_BYTES)):
                file.seek(entry.offset + start)
                digest.update(file.read(min(SAMPLE_BYTES, entry.num_bytes - start)))
    return digest.hexdigest()


def is_hub_name(model_name: str) -> bool:
    """Whether something that is no path here could be ORG/NAME or NAME on the hub."""
    return model_name.count("/") <= 1 and not model_name.startswith((".", "/", "~"))


def folder_bytes(folder: Path) -> int:
    """Bytes of every file in a folder."""
    return sum(os.path.getsize(p) for p in folder.rglob("*") if p.is_file())
