"""`vptq quantize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vptq.cli.finetune import summary as tuning_summary
from vptq.cli.options import add_fields, make_parser, merge_settings, normalise_flags, with_defaults
from vptq.cli.plan import show_forecast
from vptq.cli.show import Bar, megabytes, say, table, with_error
from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.errors import INTERRUPTED_EXIT_CODE, UsageError, VptqError
from vptq.models.remote import shown
from vptq.recipe import HUB_NAMES

if TYPE_CHECKING:
    from vptq.pipeline.outcome import RunResult

EXAMPLES = """\
  vptq quantize                                    the demo model in the package, offline
  vptq quantize --model_name ./my-llama --dataset my_text.txt --bits 3 --eval_dataset wikitext2
  vptq quantize --model_name ./my-llama --dataset my_text.txt --vector_lens -1 8 --num_centroids -1 65536 \\
      --num_res_centroids -1 256 --eval_dataset wikitext2
  vptq quantize --model_name ./my-llama --config configs/table8_llama-2-7b_2.02bit.yaml
  vptq quantize --resume outputs/my-llama/v8_c65536/2026-01-31-12-00-00"""


def run(argv: Sequence[str]) -> int:
    """Quantize as the words ask; returns the exit code."""
    parser = make_parser(
        "quantize", "Quantize a model: calibration, codebooks, second-order sweep, checkpoint, perplexity.", EXAMPLES
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the names below; a flag wins over it")
    parser.add_argument(
        "--dry_run", action="store_true", default=False, help="only say what the run would do and take, as `vptq plan` does"
    )
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a run that was stopped")
    add_fields(parser, QuantConfig, CalibrationConfig, LinearConfig)
    old = parser.add_argument_group("for scripts written for the reference")
    old.add_argument(
        "--enable_transpose", nargs="?", const="True", metavar="BOOL", help="True: vector_quant_dim out; False: in"
    )
    old.add_argument("--inv_hessian_path", metavar="STR", help="not needed beside --hessian_path: the inverse is computed")
    flags = vars(parser.parse_args(normalise_flags(argv)))

    resume, dry_run = flags.pop("resume", None), flags.pop("dry_run")
    inverse = flags.pop("inv_hessian_path", None)
    given = _absolute_paths(merge_settings(flags, flags.pop("config", None)))
    _check_inverse(inverse, given)
    settings = given if resume is not None else with_defaults(given)
    config = QuantConfig.from_flat(settings)
    if dry_run:
        if resume is not None:
            raise UsageError("--dry_run is for a new run", hint="leave out --resume")
        return show_forecast(config, weights_needed=True)

    bar = Bar()
    try:
        from vptq.pipeline.quantize_tuned import quantize_and_tune

        result, tuned = quantize_and_tune(config, resume=resume, given=given, progress=bar)
    except KeyboardInterrupt:
        bar.finish()
        if bar.folder is None:
            raise
        say(f"stopped; what is done is kept. Go on with:\n  vptq quantize --resume {bar.folder}")
        return INTERRUPTED_EXIT_CODE
    except VptqError:
        bar.finish()
        if bar.folder is not None:
            say(f"what is done is kept in {bar.folder}")
        raise
    finally:
        bar.finish()
    print(summary(result))
    if tuned is not None:
        print(f"\nfine-tuned ({tuned.folder.parent.name.removeprefix('finetune_')})\n{tuning_summary(tuned)}")
    return 0


def _absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Paths that hold wherever the run is resumed from; names of the hub stay names."""
    found = dict(given)
    for name in ("model_name", "dataset", "eval_dataset", "hessian_path", "sensitivity_path"):
        value = given.get(name)
        if (
            value is not None
            and value not in HUB_NAMES
            and (name in ("hessian_path", "sensitivity_path") or Path(value).expanduser().exists())
        ):
            found[name] = str(Path(value).expanduser().absolute())
    return found


def _check_inverse(inverse: str | None, given: dict[str, Any]) -> None:
    """The reference reads inverse Hessians from files; here they follow from the Hessians and the normalised metric."""
    if inverse is None:
        return
    if "hessian_path" not in given:
        raise UsageError(
            "--inv_hessian_path alone is not enough: the inverse is computed from the Hessian, under the normalised metric",
            hint="give the Hessians with --hessian_path, or leave both out and let them be calibrated",
        )
    say("note: --inv_hessian_path is not read: the inverse is computed from the Hessians of --hessian_path")


def summary(result: RunResult) -> str:
    """The figures of a run, with what they rest on."""
    bits = result.bits
    rows = [
        (
            "bits per weight",
            f"{bits.ideal_bits_per_weight:.3f} ideal, {bits.stored_bits_per_weight:.3f} stored in the linears, "
            f"{bits.file_bits_per_weight:.3f} in the whole file",
        ),
        ("size of all tensors", megabytes(bits)),
        ("mean proxy error", _mean_errors(result.figures)),
    ]
    if any(figures["kmeans_iterations"] for figures in result.figures):
        rows.append(("k-means iterations", _iterations(result.figures)))
    for name, before, after in result.perplexities:
        label = name if "/" not in name else Path(name).name
        rows.append(
            (
                f"perplexity, {label}",
                f"original {with_error(before.perplexity, before.standard_error)}, "
                f"quantized {with_error(after.perplexity, after.standard_error)}",
            )
        )
        rows.append(("", f"context {after.seq_len}, {after.num_tokens:,} tokens counted"))
    rows.append(("time", f"{result.seconds:.0f} s"))
    rows.append(("results", shown(result.folder)))
    return table(rows)


def _iterations(figures: Sequence[Mapping[str, Any]]) -> str:
    """How long the codebooks' k-means ran before --ktol or --kiter stopped it."""
    counts = [count for linear in figures for count in linear["kmeans_iterations"]]
    return f"{min(counts)} to {max(counts)} a codebook, mean {sum(counts) / len(counts):.0f}"


def _mean_errors(figures: Sequence[dict[str, Any]]) -> str:
    names = {"error_kmeans": "k-means", "error_sweep": "sweep", "error_residual": "residual", "error_refined": "refined"}
    found = {name: [f[key] for f in figures if f.get(key) is not None] for key, name in names.items()}
    return ", ".join(f"{name} {sum(errors) / len(errors):.5f}" for name, errors in found.items() if errors)
