"""How the pipeline tells of its progress, without knowing who listens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as aligned columns; `right` names the columns set flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Progress(Protocol):
    """A listener. Work is counted in units that take about equal time, for the whole run at once."""

    def start(self, total: float, done: float) -> None: ...

    def run_folder(self, folder: str) -> None: ...

    def advance(self, units: float) -> None: ...

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """Nobody listens."""

    def start(self, total: float, done: float) -> None:
        pass

    def run_folder(self, folder: str) -> None:
        pass

    def advance(self, units: float) -> None:
        pass

    def phase(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass
