"""Hessians on disk: our safetensors files, and folders of the published kind.

Ours: `{block}_{label}.safetensors` with one tensor `hessian` (in, in) float32 and, in its metadata, the linears it serves,
the tokens it was taken over, the text, and the model's fingerprint.
Published: `{block}_{qkv|o|up|down}.pt` with flatH (lower triangle, row by row), mu, n and ct; the second moment is
sym(flatH) + mu muᵀ.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vptq.calibration.hessian import Hessian
from vptq.errors import CheckpointError, UsageError
from vptq.models.files import save_tensors, writing_to
from vptq.models.headers import read_header

PUBLISHED_LABELS = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"),
    "o": ("o_proj", "out_proj", "dense"),
    "up": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"),
    "down": ("down_proj", "fc2", "dense_4h_to_h"),
}


def label_of(suffix: str) -> str:
    """Short name of the input of a linear: qkv, o, up, down where its name tells, else its own name."""
    last = suffix.rsplit(".", 1)[-1]
    plain = suffix.count(".") <= 1
    return next((label for label, names in PUBLISHED_LABELS.items() if last in names and plain), suffix.replace(".", "-"))


class HessianStore:
    """A folder of Hessians of one model.

    Args:
        folder: made by `prepare` if it does not exist.
        fingerprint: of the model at hand; our files say which model they are of.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    def prepare(self) -> None:
        """Make the folder, before the work. Raises UsageError where that can't be."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--hessian_path `{self.folder}` is a file, not a folder")
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, block: int, hessian: Hessian, provenance: dict[str, str]) -> None:
        """Write one Hessian, complete or not at all. provenance: dataset, nsamples, seq_len, seed."""
        metadata = {
            "format": "vptq-hessian-1",
            "fingerprint": self.fingerprint,
            "linears": json.dumps(hessian.linears),
            "num_tokens": str(hessian.num_tokens),
            **provenance,
        }
        label = label_of(hessian.linears[0])
        if (self.folder / f"{block}_{label}.safetensors").exists() and label not in self._labels_of(block, hessian.linears):
            label = hessian.linears[0].replace(".", "-")  # two inputs of one label: the first linear tells them apart
        save_tensors(self.folder / f"{block}_{label}.safetensors", {"hessian": hessian.matrix.cpu()}, metadata)

    def _labels_of(self, block: int, linears: tuple[str, ...]) -> set[str]:
        return {p.stem.split("_", 1)[1] for p, meta in self._own_files(block) if tuple(json.loads(meta["linears"])) == linears}

    def _own_files(self, block: int) -> list[tuple[Path, dict[str, str]]]:
        found = []
        for path in sorted(self.folder.glob(f"{block}_*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    found.append((path, file.metadata() or {}))
            except Exception as error:
                raise CheckpointError(
                    f"Hessian `{path}` is damaged", where=[str(error)], hint="delete it; it is made anew"
                ) from error
        return found

    def find(self, block: int, suffixes: list[str]) -> dict[str, Path]:
        """The file of each of a block's linears that has one."""
        found: dict[str, Path] = {}
        for path, metadata in self._own_files(block):
            if metadata.get("fingerprint") != self.fingerprint:
                raise UsageError(
                    f"the Hessians in `{self.folder}` are of another model",
                    where=[str(path)],
                    hint="give another --hessian_path",
                )
            for suffix in json.loads(metadata["linears"]):
                found[suffix] = path
        for suffix in suffixes:
            published = self.folder / f"{block}_{label_of(suffix)}.pt"
            if suffix not in found and published.exists():
                found[suffix] = published
        return found

    def load(self, path: Path, in_features: int) -> Tensor:
        """(in_features, in_features) float32 on the CPU. Raises for a damaged file or one of another size."""
        matrix = _load_published(path) if path.suffix == ".pt" else _load_own(path)
        self._refuse_other_size(path, matrix.shape[0], in_features)
        return matrix

    def check_size(self, path: Path, in_features: int) -> None:
        """Raise, without reading the matrix where the file tells its size, if it is of another model."""
        size = _published_size(path) if path.suffix == ".pt" else _own_size(path)
        self._refuse_other_size(path, size, in_features)

    def _refuse_other_size(self, path: Path, size: int, in_features: int) -> None:
        if size != in_features:
            raise UsageError(
                f"the Hessians in `{self.folder}` are of another model",
                where=[f"{path}: {size} inputs, the model's linear has in_features={in_features}"],
                hint="give another --hessian_path",
            )

    def provenance(self, path: Path) -> str:
        """What a file says of the text it was taken over, in one line."""
        if path.suffix == ".pt":
            return "published Hessians"
        with safe_open(path, framework="pt") as file:
            m = file.metadata()
        return f"{m.get('dataset')}, {m.get('nsamples')} x {m.get('seq_len')} tokens, seed {m.get('seed')}"


def _load_own(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("hessian")
    except Exception as error:
        raise CheckpointError(f"Hessian `{path}` is damaged", where=[str(error)], hint="delete it; it is made anew") from error


def _own_size(path: Path) -> int:
    entry = read_header(path).get("hessian")
    return entry.shape[0] if entry is not None and entry.shape else 0


def _published_size(path: Path) -> int:
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["n"])
    except Exception as error:
        raise _not_published(path, error) from error


def _not_published(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).split("\n")[0]
    return CheckpointError(f"`{path}` is no Hessian of the published kind (flatH, mu, n, ct)", where=[reason])


def _load_published(path: Path) -> Tensor:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        flat, mean, size = stored["flatH"].float(), stored["mu"].float(), int(stored["n"])
        matrix = torch.zeros(size, size)
        rows, columns = torch.tril_indices(size, size)
        matrix[rows, columns] = flat
        matrix[columns, rows] = flat
        return matrix + torch.outer(mean, mean)
    except Exception as error:
        raise _not_published(path, error) from error
