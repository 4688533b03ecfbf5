"""`vptq bits`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vptq.bits import ModelBits, checkpoint_bits, matrix_bits, model_bits
from vptq.cli.options import add_fields, make_parser, merge_settings, normalise_flags, with_defaults
from vptq.cli.show import bits_table, write_json
from vptq.config import LinearConfig, QuantConfig
from vptq.errors import UsageError
from vptq.layouts import quantization_entry
from vptq.models.headers import read_config
from vptq.models.shapes import KNOWN_MODELS, ModelShapes, can_derive, config_folder, known_shapes, shapes_from_config

EXAMPLES = """\
  vptq bits --shape 16x16 --vector_lens -1 8 --num_centroids -1 16 --num_res_centroids -1 4
  vptq bits --model_name llama-2-7b --vector_lens -1 8 --num_centroids -1 65536 --num_res_centroids -1 256
  vptq bits --model_name outputs/.../packed_model --json"""


def run(argv: Sequence[str]) -> int:
    """Count bits as the words ask; returns the exit code."""
    parser = make_parser("bits", "Bits per weight, codebooks counted. Reads no weights.", EXAMPLES)
    parser.add_argument("--shape", metavar="OUTxIN", help="one matrix, such as 4096x4096")
    parser.add_argument(
        "--model_name",
        metavar="STR",
        help=f"a model folder, a packed checkpoint, a hub name, or one of {', '.join(KNOWN_MODELS)} (default: the demo)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the names below; a flag wins over it")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON for programs, to stdout or FILE")
    add_fields(parser, LinearConfig)
    flags = vars(parser.parse_args(normalise_flags(argv)))
    shape, model_name, target = flags.pop("shape", None), flags.pop("model_name", None), flags.pop("json", None)
    given = merge_settings(flags, flags.pop("config", None))
    model_name = given.pop("model_name", None) if model_name is None else model_name
    if shape is not None and model_name is not None:
        raise UsageError("--shape and --model_name are two questions", hint="give one of them")
    if given.get("bits") is not None:
        raise UsageError(
            f"a run with bits {given['bits']:g} stores so many a weight; what each linear gets shows when it is measured",
            hint="count the checkpoint: vptq bits --model_name .../packed_model",
        )
    demo = shape is None and model_name is None
    bits = _count(shape, model_name, with_defaults(given) if demo else given)
    if target is not None:
        write_json(bits.to_dict(), target)
    if target != "-":
        print(bits_table(bits))
    return 0


def _count(shape: str | None, model_name: str | None, given: dict[str, Any]) -> ModelBits:
    config = QuantConfig.from_flat(given)
    config.validate()
    if shape is not None:
        match = re.fullmatch(r"(\d+)[xX×](\d+)", shape)
        if not match or "0" in match.groups():
            raise UsageError(f"shape `{shape}` is not OUTxIN", hint="such as --shape 4096x11008")
        return matrix_bits(int(match[1]), int(match[2]), config.linear)
    if model_name is not None and model_name.lower() in KNOWN_MODELS and not Path(model_name).is_dir():
        return model_bits(known_shapes(model_name), config.linear)
    folder = config_folder(model_name)
    model_config = read_config(folder)
    if quantization_entry(model_config):
        vector_settings = sorted(set(given) & {f for f in LinearConfig.__dataclass_fields__})
        if vector_settings:
            raise UsageError(
                f"`{folder}` is a saved checkpoint and has settings of its own",
                where=vector_settings,
                hint="leave these flags out",
            )
        if not Path(model_name or "").expanduser().is_dir():
            raise UsageError(
                f"`{model_name}` is a packed checkpoint on the hub; its files are needed to count them",
                hint=f"hf download {model_name} --local-dir FOLDER, then vptq bits --model_name FOLDER",
            )
        return checkpoint_bits(folder)
    return model_bits(_shapes(folder, model_config), config.linear)


def _shapes(folder: Path, model_config: dict[str, Any]) -> ModelShapes:
    if can_derive(model_config):
        return shapes_from_config(model_config)
    from vptq.models.architecture import skeleton_shapes

    return skeleton_shapes(folder)
