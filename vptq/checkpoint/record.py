"""What a packed checkpoint tells of itself beside its configuration: `vptq.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "vptq.json"  # beside the weights: checksums of the files, and what each linear lost
HASH_BYTES = 1 << 24


def make_record(folder: Path, errors: Mapping[str, float]) -> dict[str, Any]:
    """Checksums of the weights that are in a folder, and what each linear lost.

    errors: proxy errors, tr(E H Eᵀ)/tr(W H Wᵀ), by linear; empty where they are not known.
    """
    files = {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}
    return {"files": files, "proxy_error": dict(sorted(errors.items()))}


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint tells of itself beside its configuration; empty where another tool made it, or it is damaged."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(HASH_BYTES):
            digest.update(part)
    return digest.hexdigest()
