"""How the pipeline tells of its progress, without knowing who listens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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
