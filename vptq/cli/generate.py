"""`vptq generate`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vptq.cli.options import add_result_flags, make_parser, normalise_flags, positive
from vptq.cli.show import check_target, write_json
from vptq.errors import UsageError

if TYPE_CHECKING:
    from vptq.pipeline.generate import Sampling, Writer, Written

EXAMPLES = """\
  vptq generate --prompt "The capital of France"                          the demo model, offline
  vptq generate --model outputs/.../packed_model --prompt "Why is the sky blue?" --chat
  vptq generate --model outputs/.../packed_model --chat                   a conversation; end it with Ctrl-D
  vptq generate --model ./my-llama --prompt - --temperature 0.7 --top_p 0.9 < prompt.txt"""


def run(argv: Sequence[str]) -> int:
    """Write as the words ask; returns the exit code."""
    text = "Let a model write on: an original, a dequantized or a packed one. Text goes to stdout, speed to stderr."
    parser = make_parser("generate", text, EXAMPLES)
    parser.add_argument("--model_name", default=None, metavar="STR", help="model folder or hub name (default: the demo model)")
    parser.add_argument("--prompt", default=None, metavar="STR", help="what to go on from; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", default=False, help="the prompt is a message, by the model's template")
    parser.add_argument(
        "--max_new_tokens", type=positive, default=256, metavar="INT", help="most tokens to write (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=_number(0, 100), default=0.0, metavar="FLOAT", help="0 for the likeliest token (default: 0)"
    )
    parser.add_argument(
        "--top_p", type=_number(0, 1), default=1.0, metavar="FLOAT", help="draw among the likeliest of this mass (default: 1)"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="INT", help="of the draws (default: 0)")
    parser.add_argument(
        "--cache_gb", type=_number(0, math.inf), default=0.0, metavar="FLOAT",
        help="dequantized weights kept, in GB: faster on a CPU, for more memory (default: 0; inf for all)",
    )  # fmt: skip
    parser.add_argument(
        "--compile",
        action="store_true",
        default=False,
        help="on a GPU: torch.compile first, a minute or so; for models without fused blocks, which are faster",
    )
    add_result_flags(parser)
    args = parser.parse_args(normalise_flags(argv))
    check_target(args.json)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if prompt is None and (not args.chat or args.json is not None):
        raise UsageError(
            "--prompt is missing", hint="give some text to go on from; a conversation (--chat without it) has no --json"
        )

    from vptq.pipeline.generate import Sampling, Writer

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    writer = Writer(
        args.model_name, device=args.device, cache_bytes=args.cache_gb * 1e9, compiled=args.compile,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if prompt is None:
        return _converse(writer, sampling)
    tokens = writer.encode_chat([{"role": "user", "content": prompt}]) if args.chat else writer.encode(prompt)
    written = writer.write(tokens, sampling, None if args.json == "-" else _show)
    if args.json != "-":
        print(flush=True)
    print(speed_line(written), file=sys.stderr)
    if args.json is not None:
        write_json({"model_name": args.model_name or "demo", "prompt": prompt} | written.to_dict(), args.json)
    return 0


def speed_line(written: Written) -> str:
    """One line on how fast it went."""
    speed = "" if math.isnan(written.tokens_per_second) else f", {written.tokens_per_second:.1f} tokens/s after the first"
    return (
        f"tokens of the prompt: {written.prompt_tokens}, first token after {written.prompt_seconds:.2f} s; "
        f"tokens written: {written.new_tokens}{speed}"
    )


def _converse(writer: Writer, sampling: Sampling) -> int:
    """Message by message, with all that was said before, until the input ends."""
    messages: list[dict[str, str]] = []
    writer.encode_chat([{"role": "user", "content": "?"}])  # says at once where there is no template
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not message.strip():
            continue
        messages.append({"role": "user", "content": message})
        written = writer.write(writer.encode_chat(messages), sampling, _show)
        print(flush=True)
        print(speed_line(written), file=sys.stderr)
        messages.append({"role": "assistant", "content": written.text})


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _seed(word: str) -> int:
    value = int(word)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and 2^63 - 1")
    return value


def _number(least: float, most: float):  # type: ignore[no-untyped-def]
    def number(word: str) -> float:
        value = float(word)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{word} is not between {least:g} and {most:g}")
        return value

    return number
