"""`vptq doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vptq.cli.options import make_parser, normalise_flags
from vptq.cli.show import say, write_json
from vptq.pipeline.progress import table

EXAMPLES = """\
  vptq doctor                      what is installed, and whether it computes what it should
  vptq doctor --device cpu --json"""
PACKAGES = ("torch", "transformers", "safetensors", "triton", "accelerate", "datasets", "peft", "ray", "lm-eval", "matplotlib")
OPTIONAL = {
    "triton": "on a GPU: pip install triton",
    "datasets": "wikitext2 and c4 by name",
    "peft": "adapters: pip install 'vptq[lora]'",
    "ray": "many machines: pip install 'vptq[ray]'",
    "lm-eval": "eval-tasks: pip install 'vptq[eval]'",
    "matplotlib": "pictures in reports",
}


def run(argv: Sequence[str]) -> int:
    """Look at this machine; returns the exit code: 1 where something is wrong."""
    text = "Look at this machine: what is installed, how much memory there is, and whether kernels compute what they should."
    parser = make_parser("doctor", text, EXAMPLES)
    parser.add_argument("--device", default=None, metavar="STR", help="cuda, cuda:N or cpu (default: cuda where there is one)")
    parser.add_argument("--json", nargs="?", const="-", default=None, metavar="FILE", help="as JSON, to stdout or FILE")
    args = parser.parse_args(normalise_flags(argv))
    from vptq.models.device import resolve_device
    from vptq.pipeline.selftest import kernels_in_use, self_test

    device = resolve_device(args.device)
    rows = [*_machine(), *_packages(), ("work is done by", kernels_in_use(device), "")]
    if args.json != "-":
        print(table(rows))
        print()
    found, faults = [], 0
    for finding in self_test(device):
        found.append(finding)
        faults += bool(finding.fault)
        if args.json != "-":
            print(f"{'wrong' if finding.fault else 'right'}  {finding.name}  {finding.seconds:.1f} s  {finding.fault}".rstrip())
    if args.json is not None:
        checks = [{"name": one.name, "seconds": one.seconds, "fault": one.fault} for one in found]
        write_json({"machine": {row[0]: row[1] for row in rows}, "self_test": checks}, args.json)
    if faults:
        say(
            f"error: {faults} of {len(found)} checks failed on {device}\n\n"
            "hint: VPTQ_KERNELS=torch does without kernels; please report this with what is above"
        )
    return int(bool(faults))


def _machine() -> list[tuple[str, str, str]]:
    import torch

    from vptq.models.device import free_memory
    from vptq.pipeline.facts import version_of

    rows = [
        ("vptq", version_of("vptq"), ""),
        ("python", f"{platform.python_version()}, {sys.platform} {platform.machine()}", ""),
        ("processors", str(os.cpu_count()), ""),
        ("memory free", f"{free_memory(torch.device('cpu')) / 1e9:.1f} GB", ""),
        ("disk free here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB", ""),
    ]
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU: see nvidia-smi"
        return [*rows, ("GPU", "none", reason)]
    rows.append(("CUDA", str(torch.version.cuda), ""))
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free = free_memory(torch.device("cuda", number)) / 1e9
        old = "" if (about.major, about.minor) >= (8, 0) else "fused products want compute capability 8.0"
        name = f"{about.name}, {about.total_memory / 1e9:.1f} GB ({free:.1f} free), capability {about.major}.{about.minor}"
        rows.append((f"cuda:{number}", name, old))
    return rows


def _packages() -> list[tuple[str, str, str]]:
    from vptq.pipeline.facts import version_of

    found = {name: version_of(name) for name in PACKAGES}
    return [(name, has or "not installed", "" if has else OPTIONAL.get(name, "needed")) for name, has in found.items()]
