"""`vptq inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vptq.bits import LinearBits, ModelBits, checkpoint_bits
from vptq.cli.options import make_parser, normalise_flags
from vptq.cli.show import Bar, bits_table, check_target, say, write_json
from vptq.errors import CheckpointError, UsageError
from vptq.layer_config import LayerConfig
from vptq.pipeline.progress import table

EXAMPLES = """\
  vptq inspect outputs/.../packed_model             settings, bits and error of every linear
  vptq inspect outputs/.../packed_model --verify    is the folder whole, and are all numbers what they should be?
  vptq inspect outputs/.../packed_model --json"""


def run(argv: Sequence[str]) -> int:
    """Show a checkpoint, or look for faults in it; returns the exit code: 1 where there are some."""
    text = "What a packed checkpoint holds. Reads no weights, but with --verify."
    parser = make_parser("inspect", text, EXAMPLES)
    parser.add_argument("path", nargs="?", metavar="PATH", help="packed checkpoint: folder or hub name, or a run folder")
    parser.add_argument("--model_name", default=None, metavar="STR", help="the same")
    parser.add_argument(
        "--verify",
        action="store_true",
        default=False,
        help="read everything: files by their checksums, shapes, ranges of indices, finite numbers",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", default=None, metavar="FILE", help="JSON for programs, to stdout or FILE"
    )
    parser.add_argument("--trust_remote_code", action="store_true", default=False, help="let the model folder's own code run")
    args = parser.parse_args(normalise_flags(argv))
    folder = _folder(getattr(args, "path", None) or args.model_name)
    check_target(args.json)
    if args.verify:
        return _verify(folder, args.trust_remote_code, args.json)
    from vptq.checkpoint.reader import read_layers

    layers, errors = read_layers(folder, args.trust_remote_code), _errors(folder)
    bits = checkpoint_bits(folder, layers)
    if args.json is not None:
        found = {"linears": [_entry(own, layers[own.name], errors) for own in bits.linears], "bits": bits.to_dict()}
        write_json(found, args.json)
    if args.json != "-":
        print(_linears_table(bits, layers, errors))
        print(f"\n{bits_table(bits)}")
        if not errors:
            say("no proxy errors: only `vptq quantize` writes them, and fine-tuning makes them void")
    return 0


def _folder(given: str | None) -> Path:
    from vptq.models.architecture import resolve_folder

    if given is None:
        raise UsageError("PATH is missing: the checkpoint to look at", hint="such as outputs/.../packed_model")
    path = Path(given).expanduser()
    inner = path / "packed_model"
    return inner if (inner / "config.json").exists() else resolve_folder(given)


def _errors(folder: Path) -> dict[str, float]:
    from vptq.checkpoint.record import read_record

    found = read_record(folder).get("proxy_error")
    numbers = found.items() if isinstance(found, dict) else ()
    return {name: float(value) for name, value in numbers if isinstance(value, int | float)}


def _verify(folder: Path, trust_remote_code: bool, target: str | None) -> int:
    from vptq.checkpoint.reader import is_packed
    from vptq.checkpoint.record import read_record
    from vptq.checkpoint.verify import verify

    if not is_packed(folder):
        raise CheckpointError(f"`{folder}` is not a packed VPTQ checkpoint", hint="give a packed_model folder")
    bar = Bar()
    bar.start(1.0, 0.0)
    faults = list(verify(folder, trust_remote_code, told=bar.phase))
    bar.finish()
    if not read_record(folder):
        say("no checksums: another tool wrote this checkpoint")
    if target is not None:
        write_json({"folder": str(folder), "faults": faults}, target)
    if target != "-":
        print("\n".join(faults) if faults else "all is well")
    if faults:
        say(f"error: {len(faults)} fault{'s' if len(faults) > 1 else ''} in `{folder}`\n\nhint: get it anew")
    return int(bool(faults))


def _linears_table(bits: ModelBits, layers: dict[str, LayerConfig], errors: dict[str, float]) -> str:
    rows = [("linear", "shape", "settings", "stored bits", "proxy error")]
    for own in bits.linears:
        layer = layers[own.name]
        error = f"{errors[own.name]:.5f}" if own.name in errors else ""
        shape, stored = f"{layer.out_features}x{layer.in_features}", _bits(own)
        rows.append((own.name, shape, settings(layer), "" if stored is None else f"{stored:.4f}", error))
    return table(rows, right=(3, 4))


def _bits(own: LinearBits) -> float | None:
    return own.stored / own.num_weights if own.num_weights else None


def _entry(own: LinearBits, layer: LayerConfig, errors: dict[str, float]) -> dict[str, Any]:
    stored = {"stored_bits_per_weight": _bits(own), "proxy_error": errors.get(own.name), "bits": dict(own.items)}
    return {"name": own.name, "settings": layer.to_dict()} | stored


def settings(layer: LayerConfig) -> str:
    """The settings of a linear in a few words, where they say more than nothing."""
    if layer.weight_of:
        return f"is {layer.weight_of}"
    parts = [f"v={layer.vector_lens[1]} k={layer.num_centroids[1]}"]
    if layer.num_res_centroids[1] > 0:
        parts.append(f"k_res={layer.num_res_centroids[1]}")
    if layer.trellis_bits:
        parts.append(f"trellis {layer.trellis_bits} bits a vector")
    if layer.outlier_size:
        parts.append(f"{layer.outlier_size} outliers v={layer.vector_lens[0]} k={layer.num_centroids[0]}")
    if layer.group_num > 1:
        parts.append(f"{layer.group_num} groups")
    if layer.vector_quant_dim == "in":
        parts.append("along inputs")
    if layer.bitwidth < 16:
        parts.append(f"codebook {layer.bitwidth} bits")
    if layer.rotation != "none":
        parts.append("rotated" + ("" if layer.rotation_sides == "both" else f" ({layer.rotation_sides})"))
    if not layer.stores_codebook:
        parts.append("shared codebook")
    parts += [
        word for word, on in (("norm", layer.enable_norm), ("perm", layer.enable_perm), ("added bias", layer.added_bias)) if on
    ]
    return ", ".join(parts)
