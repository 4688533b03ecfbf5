"""`vptq finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vptq.cli.options import add_fields, make_parser, merge_settings, normalise_flags
from vptq.cli.show import Bar, megabytes, say, table, with_error
from vptq.errors import INTERRUPTED_EXIT_CODE, VptqError
from vptq.finetune_config import SELF, FinetuneConfig
from vptq.models.remote import shown
from vptq.recipe import HUB_NAMES

if TYPE_CHECKING:
    from vptq.pipeline.tune_result import TuneResult

EXAMPLES = """\
  vptq finetune --model_name outputs/demo/.../packed_model                     the demo model, block by block, offline
  vptq finetune --mode block --original ./my-llama --model_name outputs/my-llama/.../packed_model --dataset my_text.txt
  vptq finetune --mode e2e --original ./my-llama --model_name .../packed_model --dataset self --eval
  accelerate launch --multi_gpu --num_processes 4 -m vptq finetune --mode e2e --original ./my-llama \\
      --model_name outputs/my-llama/.../packed_model
  vptq finetune --resume outputs/my-llama/finetune_e2e/2026-01-31-12-00-00"""


def run(argv: Sequence[str]) -> int:
    """Fine-tune as the words ask; returns the exit code."""
    text = "Fine-tune a packed checkpoint towards its original; the result is a packed checkpoint of the same form."
    parser = make_parser("finetune", text, EXAMPLES)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the names below; a flag wins over it")
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a run that was stopped")
    add_fields(parser, FinetuneConfig)
    flags = vars(parser.parse_args(normalise_flags(argv)))
    resume = flags.pop("resume", None)
    given = _absolute_paths(merge_settings(flags, flags.pop("config", None), (FinetuneConfig,)))
    config = FinetuneConfig.from_flat(given)
    if resume is None:
        config.validate()

    bar = Bar()
    try:
        from vptq.pipeline.finetune import finetune_model

        result = finetune_model(config, resume=resume, given=given, progress=bar)
    except KeyboardInterrupt:
        bar.finish()
        if bar.folder is None:
            raise
        say(f"stopped; what is done is kept. Go on with:\n  vptq finetune --resume {bar.folder}")
        return INTERRUPTED_EXIT_CODE
    except VptqError:
        bar.finish()
        if bar.folder is not None:
            say(f"what is done is kept; go on with:\n  vptq finetune --resume {bar.folder}")
        raise
    finally:
        bar.finish()
    if result is not None:
        print(summary(result))
    return 0


def _absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Paths that hold wherever the run is resumed from; names of the hub stay names."""

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(word) for word in value]
        is_path = value not in (*HUB_NAMES, SELF) and Path(value).expanduser().exists()
        return str(Path(value).expanduser().absolute()) if is_path else value

    found = dict(given)
    for name in ("model_name", "original", "dataset", "eval_dataset", "cache_dir"):
        if given.get(name) is not None:
            found[name] = absolute(given[name])
    return found


def summary(result: TuneResult) -> str:
    """The figures of a run, with what they rest on."""
    bits = result.bits
    rows = [
        (
            "bits per weight",
            f"{bits.stored_bits_per_weight:.3f} stored in the linears, {bits.file_bits_per_weight:.3f} in the whole file",
        ),
        ("size of all tensors", megabytes(bits)),
        (f"held-out {result.loss}", f"{result.held_out[0]:.5g} before, {result.held_out[1]:.5g} after"),
    ]
    for name, found in result.perplexities.items():
        label = name if "/" not in name else Path(name).name
        figures = [f"{which} {with_error(p.perplexity, p.standard_error)}" for which, p in found.items()]
        rows.append((f"perplexity, {label}", ", ".join(figures)))
        after = found["after"]
        rows.append(("", f"context {after.seq_len}, {after.num_tokens:,} tokens counted"))
    rows.append(("time", f"{result.seconds:.0f} s"))
    rows.append(("results", shown(result.folder)))
    return table(rows)
