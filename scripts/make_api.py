"""Write docs/api.md from the docstrings of what `import vptq` gives: python scripts/make_api.py [--check]."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

import vptq

TARGET = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# API

What `import vptq` gives, by its docstrings (`python scripts/make_api.py` writes this page). Everything else may change.
"""


def main() -> int:
    page = render()
    if "--check" in sys.argv:
        return int(TARGET.read_text(encoding="utf-8") != page)
    TARGET.write_text(page, encoding="utf-8")
    return 0


def render() -> str:
    """The page."""
    names = [name for name in vptq.__all__ if name != "__version__"]
    return HEAD + "".join(entry(name, getattr(vptq, name)) for name in sorted(names, key=str.lower))


def entry(name: str, thing: object) -> str:
    """One name: how it is called, what it says, and of a class what its methods or fields say."""
    lines = [f"\n## `{name}`\n"]
    if dataclasses.is_dataclass(thing):
        lines += [inspect.getdoc(thing) or "", "", *fields_of(thing)]
    elif inspect.isclass(thing):
        own = {key: value for key, value in vars(thing).items() if not key.startswith("_") and inspect.isfunction(value)}
        lines += [
            text(inspect.getdoc(thing)),
            *(f"\n- `{key}{signature(value)}`: {first(value)}" for key, value in own.items()),
        ]
    else:
        lines += [f"```python\n{name}{signature(thing)}\n```\n", text(inspect.getdoc(thing))]
    return "\n".join(lines).rstrip() + "\n"


def fields_of(thing: type) -> list[str]:
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(thing):
        if "help" in field.metadata:
            told = field.metadata["help"].replace("|", "\\|")
            rows.append(f"| `{field.name}` | `{field.default!r}` | {told} |")
    return rows


def signature(function: object) -> str:
    return str(inspect.signature(function)).replace("'", "")


def first(function: object) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]


def text(doc: str | None) -> str:
    """A docstring as it stands, its sections kept in form."""
    return f"```text\n{doc or ''}\n```"


if __name__ == "__main__":
    sys.exit(main())
