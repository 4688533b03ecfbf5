"""Fields of settings, and what the command line and files need to know of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any


def option(default: Any, group: str, help: str, metavar: str | None = None) -> Any:
    """A config field that the command line offers as a flag of the same name."""
    return field(default=default, metadata={"group": group, "help": help, "metavar": metavar})


def file_option(help: str) -> Any:
    """A config field that only a YAML file can set."""
    return field(default=None, metadata={"help": help, "file_only": True})


def typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as dataclasses hold them: tuples for the lists of YAML and JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
