"""The model card of a packed checkpoint: README.md as the hub shows it, made of what the run folder holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vptq.bits import ModelBits, checkpoint_bits
from vptq.config import QuantConfig
from vptq.finetune_config import FinetuneConfig
from vptq.models.files import save_json, whole_file
from vptq.models.headers import is_hub_name, read_config
from vptq.pipeline.facts import FILE, command_of
from vptq.pipeline.report import read_run, report_on

CARD = "README.md"
UNTOLD = {  # settings of one machine, which change nothing in what comes out
    "output_dir", "device", "num_gpus", "executor", "ray_address", "cache_dir", "micro_batch_size", "save_model",
    "save_packed_model", "hessian_path", "sensitivity_path",
}  # fmt: skip
INHERITED = ("license", "license_name", "license_link", "language")
HEAD = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


def describe_run(
    folder: Path, facts: Mapping[str, Any], original: Path, base_model: str | None, note: Callable[[str], None]
) -> None:
    """What a run leaves beside its results when it ends: facts, report, and the card of its checkpoint, if it has one.

    Args: as for `write_card`. facts: of `run_facts`. note: hears of a report that can't be made.
    """
    save_json(folder / FILE, facts)
    report_on(folder, note)
    if (folder / "packed_model").exists():
        write_card(folder, original, base_model)


def write_card(folder: Path, original: Path, base_model: str | None) -> Path:
    """Write the card of a run's `packed_model`; its path.

    Args:
        folder: of the run. original: the folder of the model that was quantized, whose licence and languages are taken over.
        base_model: what the user called that model; goes into the metadata where it is a name on the hub.
    """
    packed = folder / "packed_model"
    run = read_run(folder)
    bits = checkpoint_bits(packed)
    name = Path(base_model).name if base_model else "vptq's demo model"
    hub = base_model if base_model and is_hub_name(base_model) and not Path(base_model).exists() else None
    parts = [
        _metadata(hub, original, packed, bits),
        f"# {name}, {bits.stored_bits_per_weight:.2f} bits a weight\n",
        f"{f'[{hub}](https://huggingface.co/{hub})' if hub else name}, quantized by vector post-training quantization (VPTQ, "
        "arXiv:2409.17066) with `vptq`.\n",
        _figures(bits, run.results),
        _loading(hub, packed),
        _command(run.job),
    ]
    with whole_file(packed / CARD) as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")
    return packed / CARD


def _metadata(hub: str | None, original: Path, packed: Path, bits: ModelBits) -> str:
    near = max(1, round(bits.stored_bits_per_weight))
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if _sees(packed) else "text-generation",
        "tags": ["vptq", "vector-quantization", "post-training-quantization", f"{near}-bit"],
    }
    if hub:
        found |= {"base_model": hub, "base_model_relation": "quantized"}
    inherited = _front_matter(original / CARD)
    found |= {key: inherited[key] for key in INHERITED if key in inherited}
    return f"---\n{yaml.safe_dump(found, sort_keys=True, allow_unicode=True)}---\n"


def _front_matter(path: Path) -> Mapping[str, Any]:
    """The metadata of another card; empty where there is none that is understood."""
    try:
        match = HEAD.match(path.read_text(encoding="utf-8"))
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _figures(bits: ModelBits, results: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines.append(f"| bits a weight, codebooks counted | {bits.stored_bits_per_weight:.3f} in the linears, "
                 f"{bits.file_bits_per_weight:.3f} over all tensors |")  # fmt: skip
    lines.append(f"| size of all tensors | {bits.file_bits / 8e6:,.1f} MB |")
    for key, texts in results.items():
        for name, of in texts.items() if key.startswith("ctx_") else ():
            shown = ", ".join(f"{which} {figure['perplexity']:.2f}" for which, figure in of.items())
            lines.append(f"| perplexity, {Path(name).name}, context {key[4:]} | {shown} |")
    return "## Figures\n\n" + "\n".join(lines) + "\n"


def _sees(packed: Path) -> bool:
    """Whether the model reads images too."""
    return "vision_config" in read_config(packed)


def _loading(hub: str | None, packed: Path) -> str:
    kind, reader = ("ImageTextToText", "Processor") if _sees(packed) else ("CausalLM", "Tokenizer")
    where = "ORG/NAME" if hub else f"./{packed.name}"
    return f"""## Load it

```python
import vptq  # pip install vptq; lets transformers read packed checkpoints
from transformers import AutoModelFor{kind}, Auto{reader}

model = AutoModelFor{kind}.from_pretrained("{where}", device_map="auto")
{reader.lower()} = Auto{reader}.from_pretrained("{where}")
```

or `vptq generate --model_name {where} --prompt "Once upon a time"`.
`vptq inspect {where} --verify` tells whether all files are whole.
"""


def _command(job: Mapping[str, Any]) -> str:
    command = str(job.get("command", "quantize"))
    usual = FinetuneConfig().to_flat() if command == "finetune" else QuantConfig().to_flat()
    settings = {key: value for key, value in (job.get("settings") or {}).items() if key not in UNTOLD}
    files = {key: value for key, value in settings.items() if isinstance(value, Mapping) and value}
    told = "".join(f"\n`{key}.yaml`:\n\n```yaml\n{yaml.safe_dump({key: value})}```\n" for key, value in files.items())
    return f"## How it was made\n\n```\n{command_of(command, settings, usual, whole_paths=False)}\n```\n{told}"
