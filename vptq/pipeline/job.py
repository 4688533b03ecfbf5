"""A run's folder: what was asked, what is done, how to go on.

job.json       settings, the model's fingerprint, what open settings came to, whether the run is finished
config.yaml    the resolved settings, for `--config`
work/          one safetensors file a finished linear: its packed tensors, figures and a checksum in the metadata
fisher/        with --hessian fisher, token weights of the loss, one file a run of sequences
scratch/       what workers hand over while the run is on; not needed to go on
logs/run.log   what was told; logs/0.log: one line a linear (one file a worker)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from vptq.config import QuantConfig
from vptq.errors import CheckpointError, RunError, UsageError
from vptq.models.files import save_json, save_tensors, whole_file, writing_to
from vptq.models.lock import LOCK, FolderLock, lock_folder
from vptq.models.remote import exists, fetch, fetch_all, local_folder, mirror_of, publish, remove, remove_empty, shown
from vptq.recipe import VECTOR_SETTINGS

JOB_VERSION = 1
CHECKSUM = "sha256"
SCRATCH = "scratch"
# What may differ on resume: where and with how many hands the work is done, not what comes out.
FREE_ON_RESUME = {"output_dir", "num_gpus", "device", "executor", "ray_address", "trust_remote_code"}


class Job:
    """One run folder."""

    def __init__(self, folder: Path, config: QuantConfig, fingerprint: str, facts: dict[str, Any]) -> None:
        self.folder, self.config, self.fingerprint, self.facts = folder, config, fingerprint, facts
        self.work = folder / "work"
        self.logs = folder / "logs"
        self.codebooks = folder / "codebooks"
        self.scratch = folder / SCRATCH
        self._lock: FolderLock | None = None

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
        parent = local_folder(config.output_dir) / _model_folder_name(config.model_name) / setting
        with writing_to(parent):
            name = time.strftime("%Y-%m-%d-%H-%M-%S")
            if mirror_of(parent) is not None:
                name += f"-{uuid.uuid4().hex[:4]}"  # no other machine starts there in the same second
            folder = _fresh_folder(parent, name)
        job = cls(folder, config, fingerprint, facts)
        with writing_to(folder):
            job.work.mkdir()
            job.logs.mkdir()
            chosen = VECTOR_SETTINGS if config.bits is not None else ()  # by --bits, which refuses to be told
            resolved = {k: v for k, v in config.to_flat().items() if k not in chosen} | {
                name: facts[name] for name in ("dataset", "seq_len")
            }
            with whole_file(folder / "config.yaml") as partial:
                partial.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        job.save(finished=False)
        return job

    @classmethod
    def load(cls, name: str | Path) -> Job:
        """The job of an existing run folder, or URL, to go on with. Raises CheckpointError where there is none."""
        folder = local_folder(str(name))
        if mirror_of(folder) is None or not exists(folder / "job.json"):
            return cls.at(folder)
        lock = lock_folder(folder)  # before what is here is replaced by what is there
        try:
            fetch_all(folder, but=(SCRATCH, LOCK))
            job = cls.at(folder)
        except BaseException:
            lock.release()
            raise
        job._lock = lock
        return job

    @classmethod
    def at(cls, folder: Path) -> Job:
        """The job of a run folder that is here."""
        path = fetch(folder / "job.json")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["version"] != JOB_VERSION:
                raise CheckpointError(f"`{shown(folder)}` was made by another version of vptq", hint="start a new run")
            return cls(folder, QuantConfig.from_flat(stored["settings"]), stored["fingerprint"], stored["facts"])
        except FileNotFoundError:
            raise CheckpointError(
                f"`{shown(folder)}` is no run folder: it holds no job.json",
                hint="give the folder named when the run started, OUTPUT_DIR/MODEL_NAME/SETTING/TIME",
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"`{shown(path)}` is damaged", where=[str(error)], hint="start a new run") from error

    @property
    def shown(self) -> str:
        """The run folder as the user knows it."""
        return shown(self.folder)

    def lock(self) -> None:
        """Keep other processes out of the run folder for as long as this one lives.

        Raises:
            UsageError: another process works in it.
        """
        if self._lock is None:
            with writing_to(self.folder):
                self._lock = lock_folder(self.folder)

    def unlock(self) -> None:
        """Let others in again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_lock(self) -> None:
        """Raise RunError if another process has taken the run folder over while this one was cut off."""
        if self._lock is not None and self._lock.is_lost:
            raise RunError(f"another process has taken over `{self.shown}`", hint="that one goes on with the run")

    def save(self, finished: bool) -> None:
        state = {
            "version": JOB_VERSION,
            "settings": self.config.to_flat(),
            "fingerprint": self.fingerprint,
            "facts": self.facts,
            "finished": finished,
        }
        save_json(self.folder / "job.json", state)

    def check_facts(self, facts: dict[str, Any]) -> None:
        """Raise UsageError if a resumed run would calibrate on other tokens than it did before."""
        if "tokens" in self.facts and facts.get("tokens", self.facts["tokens"]) != self.facts["tokens"]:
            raise UsageError(
                f"calibration text `{facts['dataset']}` has changed since `{self.shown}` was started",
                hint="put the old text back, or start a new run",
            )

    @property
    def finished(self) -> bool:
        return bool(json.loads((self.folder / "job.json").read_text(encoding="utf-8"))["finished"])

    def result_figures(self) -> list[dict[str, Any]]:
        """The figures of every linear of a finished run."""
        return json.loads((self.folder / "linears.json").read_text(encoding="utf-8"))

    def perplexities(self) -> dict[str, Any]:
        """What a finished run measured: `ppl_results.json`, empty if it measured nothing."""
        path = self.folder / "ppl_results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

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

    def log(self, line: str, worker: int | None = None) -> None:
        """Add a line to a worker's log, or to that of the run: each file has one writer."""
        path = self.logs / f"{'run' if worker is None else worker}.log"
        with writing_to(self.logs):
            self.logs.mkdir(exist_ok=True)
            fetch(path)  # another machine may have begun it
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        with contextlib.suppress(UsageError):  # said when it matters
            publish(path)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes: a machine that crashes can leave a file of the right length, of zeros."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_resume(job: Job, given: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings. given: what the user set this time, by flag name.

    Raises:
        UsageError: names every setting that differs.
    """
    stored = job.config.to_flat()
    changed = [
        f"{name}: the run was started with {stored[name]}, not {value}"
        for name, value in given.items()
        if name in stored and name not in FREE_ON_RESUME and stored[name] != value
    ]
    if changed:
        raise UsageError(
            f"a resumed run keeps its settings; `{job.shown}` was started with others",
            where=changed,
            hint="leave these flags out to go on, or start a new run without --resume",
        )


def _model_folder_name(model_name: str | None) -> str:
    if model_name is None:
        return "demo"
    path = Path(model_name).expanduser()
    last = path.resolve().name if path.is_dir() else model_name.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.+-]", "_", last) or "model"


def _fresh_folder(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1000):
        folder = parent / (name if attempt == 0 else f"{name}-{attempt}")
        if exists(folder / "job.json"):
            continue
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UsageError(f"no free name for a run folder in `{parent}`", hint="give another --output_dir")
