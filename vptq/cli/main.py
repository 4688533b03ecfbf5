"""`vptq`: finds the command, and turns faults into messages."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from vptq.cli.commands import COMMANDS
from vptq.errors import INTERRUPTED_EXIT_CODE, UsageError, VptqError, is_out_of_memory


def usage() -> str:
    """What `vptq --help` shows."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return (
        "usage: vptq COMMAND [flags]\n\nVector post-training quantization of Hugging Face causal language models.\n\n"
        "commands:\n"
        + "\n".join(lines)
        + "\n\nvptq COMMAND --help tells more; vptq --version; --traceback shows the stack of a fault"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a fault in a run, 2 for bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_stack = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        return _dispatch(words)
    except VptqError as error:
        if show_stack:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if show_stack:
            traceback.print_exc()
        print(f"error: {_describe(error)}\n\nhint: {_cure(error)}", file=sys.stderr)
        return 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from vptq import __version__

        print(f"vptq {__version__}")
        return 0
    command = words[0].replace("_", "-")
    if command not in COMMANDS:
        raise UsageError(f"unknown command `{words[0]}`", hint=f"commands: {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[command][0])
    return module.run(words[1:])


def _describe(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cure(error: Exception) -> str:
    if is_out_of_memory(error):
        return "memory ran out: lower --nsamples or --seq_len, or use another --device"
    return "this is a fault of vptq, not yours: run again with --traceback and report it"


if __name__ == "__main__":
    sys.exit(main())
