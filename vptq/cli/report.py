"""`vptq report`."""

from __future__ import annotations

from collections.abc import Sequence

from vptq.cli.options import make_parser, normalise_flags
from vptq.errors import UsageError

EXAMPLES = """\
  vptq report outputs/demo/v4_c256/2026-01-31-12-00-00      makes report.html there, and plots/ as PNG files"""


def run(argv: Sequence[str]) -> int:
    """Make a run folder's report; returns the exit code."""
    text = "Make the report of a run folder: one page that opens offline. Runs make it themselves when they end."
    parser = make_parser("report", text, EXAMPLES)
    parser.add_argument("path", nargs="?", metavar="RUN_FOLDER", help="folder of a finished `vptq quantize` or `finetune`")
    args = parser.parse_args(normalise_flags(argv))
    if getattr(args, "path", None) is None:
        raise UsageError("RUN_FOLDER is missing", hint="such as outputs/demo/v4_c256/2026-01-31-12-00-00")
    from vptq.models.remote import local_folder
    from vptq.pipeline.report import write_report

    print(write_report(local_folder(args.path)))
    return 0
