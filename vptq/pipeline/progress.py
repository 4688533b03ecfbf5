"""How the pipeline tells of its progress, without knowing who listens."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """A listener. Work is counted in units that take about equal time, for the whole run at once."""

    def start(self, total: float, done: float) -> None: ...

    def run_folder(self, folder: Path) -> None: ...

    def advance(self, units: float) -> None: ...

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """Nobody listens."""

    def start(self, total: float, done: float) -> None:
        pass

    def run_folder(self, folder: Path) -> None:
        pass

    def advance(self, units: float) -> None:
        pass

    def phase(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass
