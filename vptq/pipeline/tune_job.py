"""The folder of a `finetune` run, beside what every run's folder has (see `run_folder`).

work/text.safetensors          the tokens that are trained on
work/indices/                  the given checkpoint with new indices, if they are asked for and better
work/start/                    the checkpoint that training starts from, where it is not the given one
work/NAME.safetensors          what has been trained: a finished block, or the state of a training under way
curves.json, curves.png        losses
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vptq.errors import CheckpointError
from vptq.finetune_config import FinetuneConfig
from vptq.models.files import save_tensors
from vptq.models.remote import fetch, local_folder, remove
from vptq.pipeline.run_folder import RunFolder, model_folder_name

NUMBERS = "numbers"
TEXT = "text"


class TuneJob(RunFolder):
    """One run folder."""

    command = "finetune"
    config_class = FinetuneConfig
    free_on_resume = frozenset(
        {
            "output_dir",
            "device",
            "trust_remote_code",
            "micro_batch_size",
            "gradient_checkpointing",
            "teacher",
            "cache_dir",
            "unpack",
        }
    )

    @classmethod
    def create(cls, config: FinetuneConfig, fingerprint: str, facts: dict[str, Any], folder: Path | None = None) -> TuneJob:
        """A new run folder: OUTPUT_DIR/MODEL_NAME/finetune_{mode}/{start time}; MODEL_NAME is the original's.

        folder: under which the time stands, in place of these.
        """
        usual = local_folder(config.output_dir) / model_folder_name(config.original) / f"finetune_{config.mode}"
        return cls.make(folder or usual, config, fingerprint, facts, config.to_flat())

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], numbers: Any = None) -> None:
        """Keep tensors, and what JSON takes, under a name; whole or not at all."""
        metadata = {NUMBERS: json.dumps(numbers)}
        save_tensors(self.work / f"{name}.safetensors", {key: tensor.cpu() for key, tensor in tensors.items()}, metadata)

    def load_tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What is kept under a name; None where there is nothing that can be read."""
        path = fetch(self.work / f"{name}.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                return tensors, json.loads((file.metadata() or {})[NUMBERS])
        except Exception:
            return None

    def tokens(self) -> Tensor:
        """The tokens that the run was started with: (num_sequences, seq_len) int64."""
        found = self.load_tensors(TEXT)
        if found is None:
            raise CheckpointError(f"`{self.work / TEXT}.safetensors` can't be read", hint="start a new run")
        return found[0][TEXT]

    def drop_work(self) -> None:
        """Free the disk of what the result holds as well."""
        remove(self.work)
