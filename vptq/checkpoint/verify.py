"""What can be wrong with a packed checkpoint, found out: files, shapes, indices, numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vptq.checkpoint.reader import check_packed, packed_tensors, read_layers
from vptq.checkpoint.record import file_hash, read_record
from vptq.errors import CheckpointError, VptqError
from vptq.models.architecture import check_weights, load_skeleton
from vptq.models.headers import read_headers
from vptq.nn.ranges import index_faults


def verify(folder: Path, trust_remote_code: bool = False, told: Callable[[str], None] = lambda what: None) -> Iterator[str]:
    """Everything that is wrong with a packed checkpoint, as it is found.

    Args:
        told: hears what is looked at.
    """
    told("files")
    try:
        entries = read_headers(folder)
        layers = read_layers(folder, trust_remote_code)
        skeleton = load_skeleton(folder, trust_remote_code)
    except VptqError as error:
        yield str(error)
        return
    yield from _changed_files(folder, told)
    source = skeleton.source()
    for check in (lambda: check_weights(skeleton, source, quantized=layers), lambda: check_packed(source, layers)):
        try:
            check()
        except CheckpointError as error:
            yield str(error)
            return  # what follows reads these tensors
    for linear, layer in layers.items():
        if not layer.weight_of:
            told(linear)
            yield from (f"{linear}: {fault}" for fault in index_faults(packed_tensors(source, linear, layer), layer))
    for name in entries:
        told(name)
        tensor = source.get_stored(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            yield f"{name}: not all of its numbers are finite"


def _changed_files(folder: Path, told: Callable[[str], None]) -> Iterator[str]:
    stated = read_record(folder).get("files")
    for name, digest in (stated if isinstance(stated, dict) else {}).items():
        path = folder / Path(str(name)).name
        told(path.name)
        if not path.is_file():
            yield f"{path.name}: missing"
        elif file_hash(path) != digest:
            yield f"{path.name}: not the file that was written (SHA-256 differs)"
