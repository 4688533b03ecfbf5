"""What a user sees when something is wrong: what, where, how to mend."""

from __future__ import annotations

from collections.abc import Iterable

MAX_PLACES_SHOWN = 12
INTERRUPTED_EXIT_CODE = 130  # after Ctrl-C, as shells have it
# What libraries say that raise no error of a kind of its own
NO_MEMORY_SIGNS = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine, as far as the error tells; never for a fault told already."""
    if isinstance(error, VptqError):
        return False
    return isinstance(error, MemoryError) or any(sign in f"{type(error).__name__}: {error}" for sign in NO_MEMORY_SIGNS)


class VptqError(Exception):
    """A fault with its places and its cure.

    Args:
        what: one sentence, no full stop.
        where: the places concerned (linear names, files, flags), one line each.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, where: Iterable[str] = (), hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = tuple(where)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what, *(f"  {place}" for place in self.where[:MAX_PLACES_SHOWN])]
        if len(self.where) > MAX_PLACES_SHOWN:
            lines.append(f"  ... and {len(self.where) - MAX_PLACES_SHOWN} more")
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(lines)


class UsageError(VptqError):
    """Bad input: flags, settings, files or data that the user gave. Exit code 2."""

    exit_code = 2


class CheckpointError(UsageError):
    """A model folder, checkpoint or work file that is missing, damaged or of another version."""


class NumericalError(UsageError):
    """Non-finite or unusable numbers in the user's weights, activations or Hessians."""


class RunError(VptqError):
    """Something failed in the middle of a run that was started with good input. Exit code 1."""
