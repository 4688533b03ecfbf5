"""`vptq eval-ppl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vptq.cli.options import add_result_flags, add_text_flags, make_parser, normalise_flags, positive
from vptq.cli.show import Bar, check_target, table, with_error, write_json

EXAMPLES = """\
  vptq eval-ppl                                    the demo model on its held-out text, offline
  vptq eval-ppl --model_name ./my-llama --dataset wikitext2 c4-new --seq_len 4096
  vptq eval-ppl --model_name outputs/.../packed_model --dataset my_text.txt --json result.json"""


def run(argv: Sequence[str]) -> int:
    """Measure perplexity as the words ask; returns the exit code."""
    parser = make_parser("eval-ppl", "Perplexity of an original, a dequantized or a packed model, block by block.", EXAMPLES)
    parser.add_argument("--model_name", default=None, metavar="STR", help="model folder or hub name (default: the demo model)")
    add_text_flags(parser)
    parser.add_argument(
        "--stride",
        type=positive,
        default=None,
        metavar="INT",
        help="tokens between two windows; under --seq_len, only a window's last STRIDE tokens count (default: seq_len)",
    )
    add_result_flags(parser)
    args = parser.parse_args(normalise_flags(argv))
    check_target(args.json)

    from vptq.pipeline.evaluate import evaluate_model

    bar = Bar()
    try:
        results = evaluate_model(
            args.model_name,
            args.dataset,
            seq_len=args.seq_len,
            stride=args.stride,
            limit=args.limit,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            progress=bar,
        )
    finally:
        bar.finish()
    if args.json != "-":
        print(_as_table(results))
    if args.json is not None:
        write_json(_as_json(args.model_name, results), args.json)
    return 0


def _as_json(model_name: str | None, results: list[Any]) -> dict[str, Any]:
    return {"model_name": model_name or "demo", "results": [result.to_dict() for result in results]}


def _as_table(results: list[Any]) -> str:
    rows = [("dataset", "perplexity", "context", "stride", "windows", "tokens counted")]
    for r in results:
        figures = (str(r.seq_len), str(r.stride), str(r.num_windows), f"{r.num_tokens:,}")
        rows.append((r.dataset, with_error(r.perplexity, r.standard_error), *figures))
    return table(rows, right=(1, 2, 3, 4, 5))
