"""`vptq eval-tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vptq.cli.options import add_result_flags, make_parser, normalise_flags, positive
from vptq.cli.show import check_target, table, write_json

DEFAULT_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
EXAMPLES = """\
  vptq eval-tasks --model_name outputs/.../packed_model
  vptq eval-tasks --model_name ./my-llama --tasks lambada_openai mmlu --num_fewshot 5 --json tasks.json"""


def run(argv: Sequence[str]) -> int:
    """Run tasks as the words ask; returns the exit code."""
    text = "Zero-shot (or few-shot) tasks through lm-eval: an original, a dequantized or a packed model."
    parser = make_parser("eval-tasks", text, EXAMPLES)
    parser.add_argument("--model_name", default=None, metavar="STR", help="model folder or hub name (default: the demo model)")
    parser.add_argument(
        "--tasks", nargs="+", default=list(DEFAULT_TASKS), metavar="STR", help=f"default: {' '.join(DEFAULT_TASKS)}"
    )
    parser.add_argument(
        "--include_path", default=None, metavar="DIR", help="folder with tasks of your own, as lm-eval takes them"
    )
    parser.add_argument("--num_fewshot", type=int, default=0, metavar="INT", help="examples before each question (default: 0)")
    parser.add_argument("--limit", type=positive, default=None, metavar="INT", help="most questions a task (default: all)")
    parser.add_argument("--batch_size", type=positive, default=8, metavar="INT", help="questions at a time (default: 8)")
    add_result_flags(parser)
    args = parser.parse_args(normalise_flags(argv))
    check_target(args.json)

    from vptq.pipeline.tasks import evaluate_tasks

    results = evaluate_tasks(
        args.model_name,
        args.tasks,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json != "-":
        print(_as_table(results))
    if args.json is not None:
        write_json({"model_name": args.model_name or "demo", "num_fewshot": args.num_fewshot, "results": results}, args.json)
    return 0


def _as_table(results: dict[str, dict[str, Any]]) -> str:
    rows = [("task", "metric", "value", "± error")]
    for task, figures in results.items():
        for metric, value in figures.items():
            if metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr")
            rows.append((task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    return table(rows, right=(2, 3))
