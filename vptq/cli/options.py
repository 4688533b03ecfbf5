"""Flags <-> config fields: one flag a field, of the same name; dashes for underscores; flag over file over default."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.errors import UsageError
from vptq.recipe import DEFAULT_SEQ_LEN, RECIPE, VECTOR_SETTINGS

QUANTIZING = (QuantConfig, CalibrationConfig, LinearConfig)
ALIASES = {"num_red_centroids": "num_res_centroids", "model": "model_name"}
FORMS = "numbers as 8, pairs as -1 8 (in YAML [-1, 8]), booleans as True or False"
TRUE_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
DEMO_DEFAULTS = {"vector_lens": [-1, 4], "num_centroids": [-1, 256]}
GROUP_TITLES = {
    "model": "model",
    "calibration": "calibration",
    "vectors": "vectors and codebooks (pairs are: outlier, main; -1 is off; the demo model's default is -1 4, -1 256)",
    "rotation": "rotation and a shared codebook",
    "algorithm": "algorithm",
    "results": "results",
    "devices": "devices",
    "tuning": "what is trained",
    "text": "text",
    "training": "training",
    "distillation": "end to end",
    "lora": "LoRA",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose faults are `UsageError`s."""

    def error(self, message: str) -> NoReturn:
        hint = f"see `{self.prog} --help`"
        if message.startswith("unrecognized arguments:"):
            unknown = [word for word in message.split(":", 1)[1].split() if word.startswith("--")]
            known = [option for action in self._actions for option in action.option_strings]
            close = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1, cutoff=0.75)]
            if close:
                hint = f"did you mean {', '.join(close)}?"
            raise UsageError(f"unknown flag{'s' if len(unknown) > 1 else ''} {message.split(':', 1)[1].strip()}", hint=hint)
        raise UsageError(message, hint=hint)


def make_parser(command: str, description: str, examples: str) -> Parser:
    """A parser that leaves out what was not given, with examples at the end of its help."""
    return Parser(
        prog=f"vptq {command}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )


def normalise_flags(argv: Iterable[str]) -> list[str]:
    """`--vector-lens` -> `--vector_lens`, aliases -> names; values are left alone."""
    words = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            flag = flag.replace("-", "_")
            word = f"--{ALIASES.get(flag, flag)}{equals}{value}"
        words.append(word)
    return words


def add_fields(parser: argparse.ArgumentParser, *kinds: type) -> None:
    """A flag for every option field of some config classes, under its group's heading."""
    groups: dict[str, Any] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if "help" not in f.metadata or f.metadata.get("file_only"):
                continue
            group = f.metadata["group"]
            if group not in groups:
                groups[group] = parser.add_argument_group(GROUP_TITLES[group])
            groups[group].add_argument(f"--{f.name}", **_argument(f, hints[f.name]))


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """What a model is evaluated on, and in what windows."""
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=None,
        metavar="STR",
        help="wikitext2, c4, c4-new, or text or jsonl files or folders (default: wikitext2; demo model: its held-out text)",
    )
    parser.add_argument(
        "--seq_len",
        type=positive,
        default=None,
        metavar="INT",
        help=f"context: tokens a window (default: {DEFAULT_SEQ_LEN}, or the model's if shorter)",
    )
    parser.add_argument("--limit", type=positive, default=None, metavar="INT", help="most windows (default: all)")


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """Where an evaluation runs, and where its figures go."""
    parser.add_argument("--device", default=None, metavar="STR", help="cuda, cuda:N or cpu (default: cuda where there is one)")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the figures as JSON (- for stdout)")
    parser.add_argument("--trust_remote_code", action="store_true", default=False, help="let the model folder's own code run")


def _argument(f: dataclasses.Field, hint: Any) -> dict[str, Any]:
    default = f.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    text = f.metadata["help"] + ("" if default is None else f" (default: {shown})")
    keywords: dict[str, Any] = {"help": text.replace("%", "%%")}
    if _is_pair(hint):
        return keywords | {"nargs": 2, "metavar": tuple(f.metadata["metavar"].split())}
    if _is_list(hint):
        return keywords | {"nargs": "+", "metavar": f.metadata["metavar"] or "STR"}
    if _base_type(hint) is bool:
        return keywords | {"nargs": "?", "const": "True", "metavar": "BOOL"}
    if get_origin(_base_type(hint)) is Literal:
        return keywords | {"metavar": "|".join(get_args(_base_type(hint)))}
    return keywords | {"metavar": _base_type(hint).__name__.upper()}


def field_types(kinds: Sequence[type] = QUANTIZING) -> dict[str, Any]:
    """Type of every setting by its flag name, for some config classes."""
    found: dict[str, Any] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        found |= {f.name: hints[f.name] for f in dataclasses.fields(kind) if "help" in f.metadata}
    return found


def parse_values(raw: Mapping[str, Any], origin: str, kinds: Sequence[type] = QUANTIZING) -> dict[str, Any]:
    """Typed values from words or YAML values; all that do not parse are named at once. origin: for the message."""
    hints, values, faults = field_types(kinds), {}, []
    for name, value in raw.items():
        try:
            values[name] = _convert(value, hints[name])
        except (ValueError, TypeError):
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            faults.append(f"{name}: {shown!r} is not {_describe(hints[name])}")
    if faults:
        what = faults[0] if len(faults) == 1 else f"{len(faults)} values in {origin} are of the wrong kind"
        several = len(faults) > 1
        raise UsageError(what if several else f"{what} (in {origin})", where=faults if several else (), hint=FORMS)
    return values


def _convert(value: Any, hint: Any) -> Any:
    if value is None:
        if type(None) in get_args(hint):
            return None
        raise ValueError
    if _is_pair(hint):
        if isinstance(value, str) or len(value) != 2:
            raise ValueError
        return [_convert(v, int) for v in value]
    if _is_list(hint):
        return [_convert(v, str) for v in ([value] if isinstance(value, str) else value)]
    base = _base_type(hint)
    if get_origin(base) is dict:
        return _convert_nested(value)
    if get_origin(base) is Literal:
        return str(value)  # the config checks the choice
    if base is bool:
        return value if isinstance(value, bool) else _to_bool(value)
    if base is int:
        if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
            raise ValueError
        return int(value)
    if base is float:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    if not isinstance(value, str):
        raise ValueError
    return value


def _convert_nested(value: Any) -> dict[str, dict[str, Any]]:
    """Settings under globs; their values are those of flags, or as they are where no flag has the name: that is told later."""
    if not isinstance(value, dict) or not all(isinstance(own, dict) for own in value.values()):
        raise ValueError
    hints = field_types((LinearConfig,))
    return {
        str(glob): {str(n): _convert(v, hints[n]) if n in hints else v for n, v in own.items()} for glob, own in value.items()
    }


def _to_bool(value: Any) -> bool:
    if str(value).lower() not in TRUE_WORDS:
        raise ValueError
    return TRUE_WORDS[str(value).lower()]


def _is_pair(hint: Any) -> bool:
    return get_origin(hint) is tuple and not _is_list(hint)


def _is_list(hint: Any) -> bool:
    """Whether it is a tuple of any length, or that or None."""
    return any(get_origin(part) is tuple and get_args(part)[-1] is Ellipsis for part in (hint, *get_args(hint)))


def _base_type(hint: Any) -> type:
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None))
    return hint


def _describe(hint: Any) -> str:
    if _is_pair(hint):
        return "two whole numbers"
    if _is_list(hint):
        return "one or more words"
    if get_origin(_base_type(hint)) is dict:
        return "settings under globs"
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return names.get(_base_type(hint), "a valid value")


def positive(word: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of 1 or more")
    return int(word)


def read_yaml(path: Path, kinds: Sequence[type] = QUANTIZING) -> dict[str, Any]:
    """Settings of a YAML file, of some config classes. Raises UsageError with path and reason."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"config file `{path}` can't be read", where=[str(error)], hint="give a YAML file such as those in configs/"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config file `{path}` is no valid YAML", where=str(error).splitlines()) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"config file `{path}` must hold `name: value` lines")
    settings = {ALIASES.get(str(k).replace("-", "_"), str(k).replace("-", "_")): v for k, v in loaded.items()}
    known = field_types(kinds)
    unknown = sorted(set(settings) - set(known) - ({"enable_transpose"} if kinds == QUANTIZING else set()))
    if unknown:
        close = [m for name in unknown for m in difflib.get_close_matches(name, known, n=1, cutoff=0.75)]
        hint = f"did you mean {', '.join(close)}?" if close else "the names are those of the flags, see --help"
        raise UsageError(f"unknown settings in `{path}`", where=unknown, hint=hint)
    return settings


def with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """What was set, on top of the recipe of --bits if that was.

    The demo model is too small for 65536 centroids: without any vector setting it gets 256 of length 4 (2 bits).
    """
    if given.get("bits") is not None:
        chosen = sorted(set(VECTOR_SETTINGS) & set(given))
        if chosen:
            raise UsageError("bits chooses the settings of vectors", where=chosen, hint="leave these out, or leave out bits")
        return RECIPE | given
    if given.get("model_name") is None and not {"vector_lens", "num_centroids", "num_res_centroids"} & set(given):
        return DEMO_DEFAULTS | given
    return given


def merge_settings(flags: Mapping[str, Any], config_file: str | None, kinds: Sequence[type] = QUANTIZING) -> dict[str, Any]:
    """What the user set: flags over file. `--enable_transpose` is folded into `vector_quant_dim`."""
    merged: dict[str, Any] = {}
    if config_file is not None:
        path = Path(config_file).expanduser()
        merged |= _typed(read_yaml(path, kinds), f"`{path}`", kinds)
    return merged | _typed(flags, "the flags", kinds)


def _typed(raw: Mapping[str, Any], origin: str, kinds: Sequence[type]) -> dict[str, Any]:
    transpose = raw.get("enable_transpose")
    values = parse_values({k: v for k, v in raw.items() if k != "enable_transpose"}, origin, kinds)
    if transpose is None:
        return values
    try:
        implied = "out" if _convert(transpose, bool) else "in"
    except ValueError:
        raise UsageError(f"enable_transpose: {transpose!r} is not True or False") from None
    if values.get("vector_quant_dim", implied) != implied:
        raise UsageError(
            f"enable_transpose {transpose} means vector_quant_dim {implied}, but it is {values['vector_quant_dim']}",
            hint="leave --enable_transpose out: --vector_quant_dim says it all",
        )
    return values | {"vector_quant_dim": implied}
