"""`vptq eval-kl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vptq.cli.options import add_result_flags, add_text_flags, make_parser, normalise_flags
from vptq.cli.show import Bar, check_target, table, write_json
from vptq.errors import UsageError

EXAMPLES = """\
  vptq eval-kl --model_name outputs/demo/.../packed_model                the demo model, offline
  vptq eval-kl --original ./my-llama --model_name outputs/.../packed_model --dataset wikitext2 --limit 20"""


def run(argv: Sequence[str]) -> int:
    """Compare two models as the words ask; returns the exit code."""
    text = "KL divergence of a quantized model's predictions from the original's, block by block."
    parser = make_parser("eval-kl", text, EXAMPLES)
    parser.add_argument("--model_name", default=None, metavar="STR", help="the quantized model: folder or hub name")
    parser.add_argument("--original", default=None, metavar="STR", help="what it was quantized from (default: the demo model)")
    add_text_flags(parser)
    parser.add_argument("--cache_dir", default=None, metavar="DIR", help="keeps what the original computes, for the next time")
    add_result_flags(parser)
    args = parser.parse_args(normalise_flags(argv))
    if args.model_name is None:
        raise UsageError("--model_name is missing", hint="give the quantized model, such as outputs/.../packed_model")
    check_target(args.json)

    from vptq.pipeline.compare import compare_models

    bar = Bar()
    try:
        results = compare_models(
            args.original,
            args.model_name,
            args.dataset,
            seq_len=args.seq_len,
            limit=args.limit,
            device=args.device,
            cache_dir=args.cache_dir,
            trust_remote_code=args.trust_remote_code,
            progress=bar,
        )
    finally:
        bar.finish()
    if args.json != "-":
        print(_as_table(results))
    if args.json is not None:
        figures = [result.to_dict() for result in results]
        write_json({"original": args.original or "demo", "model_name": args.model_name, "results": figures}, args.json)
    return 0


def _as_table(results: list[Any]) -> str:
    rows = [("dataset", "mean KL", "± error", "median", "90 %", "99 %", "same top-1", "context", "tokens")]
    for r in results:
        figures = (f"{value:.5f}" for value in (r.mean, r.standard_error, r.median, r.p90, r.p99))
        rows.append((r.dataset, *figures, f"{100 * r.same_top1:.2f} %", str(r.seq_len), f"{r.num_tokens:,}"))
    return table(rows, right=range(1, 9))
