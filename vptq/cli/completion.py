"""`vptq completion`: what a shell needs to complete commands and flags."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Mapping, Sequence

from vptq.cli.commands import COMMANDS
from vptq.cli.options import make_parser
from vptq.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """\
  eval "$(vptq completion bash)"                                    in ~/.bashrc
  eval "$(vptq completion zsh)"                                     in ~/.zshrc, after compinit
  vptq completion fish > ~/.config/fish/completions/vptq.fish"""
BASH = """\
_vptq() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
        [[ $word == -* ]] || words=""
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _vptq vptq
"""


def run(argv: Sequence[str]) -> int:
    """Print a shell's script; returns the exit code."""
    parser = make_parser("completion", "Print what a shell needs to complete commands and flags of vptq.", EXAMPLES)
    parser.add_argument("shell", nargs="?", metavar="|".join(SHELLS), help="which shell")
    shell = getattr(parser.parse_args(list(argv)), "shell", None)
    if shell not in SHELLS:
        raise UsageError(f"shell is {shell!r}, must be one of {', '.join(SHELLS)}", hint='eval "$(vptq completion bash)"')
    flags = {name: flags_of(module) for name, (module, _) in COMMANDS.items()}
    print(fish(flags, {name: summary for name, (_, summary) in COMMANDS.items()}) if shell == "fish" else bash(flags, shell))
    return 0


def flags_of(module: str) -> list[str]:
    """The flags of a command, as its help names them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(module).run(["--help"])
    return list(dict.fromkeys(re.findall(r"^ +(?:-h, )?(--\w+)", shown.getvalue(), re.MULTILINE)))


def bash(flags: Mapping[str, Sequence[str]], shell: str = "bash") -> str:
    """For bash, and for zsh, which understands it with `bashcompinit`."""
    cases = "\n".join(f'            {name}) words="{" ".join(own)}" ;;' for name, own in flags.items())
    script = BASH.format(commands=" ".join(flags), cases=cases)
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script


def fish(flags: Mapping[str, Sequence[str]], summaries: Mapping[str, str]) -> str:
    """For fish."""
    lines = []
    for name, own in flags.items():
        summary = summaries[name].replace("'", "\\'")
        lines.append(f"complete -c vptq -n __fish_use_subcommand -a {name} -d '{summary}'")
        lines += [f"complete -c vptq -n '__fish_seen_subcommand_from {name}' -l {flag[2:]}" for flag in own]
    return "\n".join(lines)
