"""The folder of a `quantize` run, beside what every run's folder has (see `run_folder`).

work/          one safetensors file a finished linear: its packed tensors, figures and a checksum in the metadata
fisher/        with --hessian fisher, token weights of the loss, one file a run of sequences
scratch/       what workers hand over while the run is on; not needed to go on
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vptq.config import QuantConfig
from vptq.errors import CheckpointError
from vptq.models.files import save_tensors, writing_to
from vptq.models.remote import fetch, local_folder, remove, remove_empty
from vptq.pipeline.run_folder import SCRATCH, RunFolder, model_folder_name
from vptq.recipe import VECTOR_SETTINGS

CHECKSUM = "sha256"


class Job(RunFolder):
    """One run folder."""

    command = "quantize"
    config_class = QuantConfig
    free_on_resume = frozenset({"output_dir", "num_gpus", "device", "executor", "ray_address", "trust_remote_code"})

    def __init__(self, folder: Path, config: QuantConfig, fingerprint: str, facts: dict[str, Any]) -> None:
        super().__init__(folder, config, fingerprint, facts)
        self.codebooks = folder / "codebooks"
        self.scratch = folder / SCRATCH

    @classmethod
    def create(cls, config: QuantConfig, fingerprint: str, facts: dict[str, Any]) -> Job:
        """A new run folder: OUTPUT_DIR/MODEL_NAME/v{main}_c{centroids}/{start time}.

        facts: what open settings came to: `dataset`, `seq_len`, and a hash of the calibration `tokens` if there are any.
        """
        linear = config.linear
        residual = f"+{linear.num_res_centroids[1]}" if linear.has_residual else ""
        trellis = f"_b{linear.trellis_bits}" if linear.has_trellis else ""
        setting = f"v{linear.vector_len}_c{linear.num_centroids[1]}{residual}{trellis}"
        if config.bits is not None:
            setting = f"{config.bits:g}bits"
        parent = local_folder(config.output_dir) / model_folder_name(config.model_name) / setting
        chosen = VECTOR_SETTINGS if config.bits is not None else ()  # by --bits, which refuses to be told
        resolved = {k: v for k, v in config.to_flat().items() if k not in chosen} | {
            name: facts[name] for name in ("dataset", "seq_len")
        }
        return cls.make(parent, config, fingerprint, facts, resolved)

    def result_figures(self) -> list[dict[str, Any]]:
        """The figures of every linear of a finished run."""
        return json.loads((self.folder / "linears.json").read_text(encoding="utf-8"))

    def work_file(self, linear: str) -> Path:
        return self.work / f"{linear}.safetensors"

    def save_linear(self, linear: str, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        metadata = {"figures": json.dumps(figures), CHECKSUM: _checksum(tensors)}
        save_tensors(self.work_file(linear), dict(tensors), metadata)

    def figures(self, linear: str) -> dict[str, Any] | None:
        """The figures of a finished linear; None if it is not finished or its file is damaged, by its checksum."""
        try:
            tensors, metadata = self._read(linear)
            return json.loads(metadata["figures"]) if metadata[CHECKSUM] == _checksum(tensors) else None
        except Exception:
            return None

    def _read(self, linear: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a work file."""
        with safe_open(fetch(self.work_file(linear)), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)

    def tensors(self, linear: str) -> dict[str, Tensor]:
        """The packed tensors of a finished linear."""
        try:
            return self._read(linear)[0]
        except Exception as error:
            raise CheckpointError(
                f"`{self.work_file(linear)}` can't be read",
                where=[str(error)],
                hint=f"delete it and go on with `vptq quantize --resume {self.shown}`",
            ) from error

    def token_weights_file(self, run: int) -> Path:
        """The file of the loss's token weights of a run of sequences."""
        return self.folder / "fisher" / f"{run}.safetensors"

    def has_token_weights(self, run: int) -> bool:
        """Whether it is there, and whole."""
        try:
            with safe_open(fetch(self.token_weights_file(run)), framework="pt") as file:
                return bool(file.keys())
        except Exception:
            return False

    def token_weights(self, run: int, linear: str) -> Tensor:
        """Of a linear, by its full name: (row_groups, tokens of the run) float32."""
        with safe_open(fetch(self.token_weights_file(run)), framework="pt") as file:
            return file.get_tensor(linear)

    def drop_token_weights(self) -> None:
        """Free the disk of them."""
        remove(self.token_weights_file(0).parent)

    def make_scratch(self) -> Path:
        """A new folder for what workers hand over: a run that has lost its lease must not touch its successor's."""
        own = self.scratch / uuid.uuid4().hex[:8]
        with writing_to(own):
            own.mkdir(parents=True)
        return own

    def drop_scratch(self, own: Path | None = None) -> None:
        """Forget what workers handed over: all of it, or what is in one folder."""
        remove(own or self.scratch)
        if own is not None:
            remove_empty(self.scratch)

    def drop_work(self) -> None:
        """Free the disk of what the packed checkpoint holds as well."""
        for folder in (self.work, self.codebooks):
            remove(folder)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes: a machine that crashes can leave a file of the right length, of zeros."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
