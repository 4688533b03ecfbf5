"""What every run's folder has: what was asked, what is done, how to go on; one writer at a time; logs.

job.json       settings, the model's fingerprint, what open settings came to, whether the run is finished
config.yaml    the resolved settings, for `--config`
logs/run.log   what was told; logs/0.log: one line a linear (one file a worker)
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from vptq.errors import CheckpointError, RunError, UsageError
from vptq.models.files import save_json, whole_file, writing_to
from vptq.models.lock import LOCK, FolderLock, lock_folder
from vptq.models.remote import exists, fetch, fetch_all, local_folder, mirror_of, publish, shown

if TYPE_CHECKING:
    from typing_extensions import Self

JOB_VERSION = 1
SCRATCH = "scratch"


class RunFolder:
    """The folder of one run of a command.

    Args:
        folder: where. config: the settings. fingerprint: of the model's tensors. facts: what open settings came to.
    """

    command: ClassVar[str]  # of `vptq` that makes such runs
    config_class: ClassVar[Any]
    free_on_resume: ClassVar[Collection[str]]  # settings that say where and with how many hands, not what comes out

    def __init__(self, folder: Path, config: Any, fingerprint: str, facts: dict[str, Any]) -> None:
        self.folder, self.config, self.fingerprint, self.facts = folder, config, fingerprint, facts
        self.work = folder / "work"
        self.logs = folder / "logs"
        self._lock: FolderLock | None = None

    @classmethod
    def make(cls, parent: Path, config: Any, fingerprint: str, facts: dict[str, Any], resolved: Mapping[str, Any]) -> Self:
        """A new run folder, named by the time, under `parent`. resolved: settings as `config.yaml` tells them."""
        with writing_to(parent):
            name = time.strftime("%Y-%m-%d-%H-%M-%S")
            if mirror_of(parent) is not None:
                name += f"-{uuid.uuid4().hex[:4]}"  # no other machine starts there in the same second
            folder = _fresh_folder(parent, name)
        job = cls(folder, config, fingerprint, facts)
        with writing_to(folder):
            job.work.mkdir()
            job.logs.mkdir()
            with whole_file(folder / "config.yaml") as partial:
                partial.write_text(yaml.safe_dump(dict(resolved), sort_keys=False), encoding="utf-8")
        job.save(finished=False)
        return job

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """The run of an existing folder, or URL, to go on with. Raises CheckpointError where there is none."""
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
    def at(cls, folder: Path) -> Self:
        """The run of a folder that is here."""
        path = fetch(folder / "job.json")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["version"] != JOB_VERSION:
                raise CheckpointError(f"`{shown(folder)}` was made by another version of vptq", hint="start a new run")
            command = stored.get("command", "quantize")
            if command != cls.command:
                raise CheckpointError(
                    f"`{shown(folder)}` is a run of `vptq {command}`", hint=f"vptq {command} --resume {shown(folder)}"
                )
            return cls(folder, cls.config_class.from_flat(stored["settings"]), stored["fingerprint"], stored["facts"])
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
            "command": self.command,
            "settings": self.config.to_flat(),
            "fingerprint": self.fingerprint,
            "facts": self.facts,
            "finished": finished,
        }
        save_json(self.folder / "job.json", state)

    def check_facts(self, facts: dict[str, Any]) -> None:
        """Raise UsageError if a resumed run would see other tokens than it did before."""
        if "tokens" in self.facts and facts.get("tokens", self.facts["tokens"]) != self.facts["tokens"]:
            raise UsageError(
                f"text `{facts['dataset']}` has changed since `{self.shown}` was started",
                hint="put the old text back, or start a new run",
            )

    @property
    def finished(self) -> bool:
        return bool(json.loads((self.folder / "job.json").read_text(encoding="utf-8"))["finished"])

    def perplexities(self) -> dict[str, Any]:
        """What a finished run measured: `ppl_results.json`, empty if it measured nothing."""
        path = self.folder / "ppl_results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

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

    def check_resume(self, given: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings. given: what the user set this time, by flag name.

        Raises:
            UsageError: names every setting that differs.
        """
        stored = self.config.to_flat()
        changed = [
            f"{name}: the run was started with {stored[name]}, not {value}"
            for name, value in given.items()
            if name in stored and name not in self.free_on_resume and stored[name] != value
        ]
        if changed:
            raise UsageError(
                f"a resumed run keeps its settings; `{self.shown}` was started with others",
                where=changed,
                hint="leave these flags out to go on, or start a new run without --resume",
            )


def model_folder_name(model_name: str | None) -> str:
    """What a model's runs are kept under."""
    if model_name is None:
        return "demo"
    path = Path(model_name).expanduser()
    last = path.resolve().name if path.is_dir() else model_name.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.+-]", "_", last) if last.strip(".") else "model"


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
