"""Every `vptq` command that README and the guides show runs: with a tiny model and little text in the places of theirs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from vptq.cli.main import main
from vptq.config import QuantConfig
from vptq.finetune_config import FinetuneConfig
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.run import quantize_model

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/guides.md", "docs/bits.md", "docs/finetuning.md", "docs/models.md", "docs/scaling.md")
MODELS = {"./my-llama", "./my-model", "./my-llama-2-7b", "/shared/llama-3-70b"}
TEXTS = {"my_text.txt", "my_other_text.txt", "/shared/c4.jsonl", "wikitext2", "c4"}
LITTLE = {
    "quantize": "--nsamples 2 --seq_len 16 --kiter 3 --eval_nsamples 1 --device cpu --output_dir OUT",
    "finetune": "--nsamples 4 --seq_len 16 --steps 1 --eval_nsamples 1 --device cpu --output_dir OUT",
    "eval-ppl": "--seq_len 16 --limit 1 --device cpu",
    "eval-kl": "--seq_len 16 --limit 1 --device cpu",
    "generate": "--max_new_tokens 2 --device cpu",
    "doctor": "--device cpu",
}
ELSEWHERE = ("ray", "64", "8")  # executors and GPUs that only a plan can have here


def commands():
    """Every command that is shown whole, with its page."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = []
        for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
            lines += re.sub(r"\\\n\s*", " ", block).splitlines()
        inline = re.findall(r"`(vptq \S+ [^`]*--(?:model_name|resume)[^`]+)`", text)
        lines += [line.replace("\n", " ") for line in inline]
        for line in lines:
            line = line.strip().removeprefix(".venv/bin/")
            if line.startswith("vptq ") and "..." not in line.replace("outputs/my-llama/...", "").replace(
                ".../packed_model", ""
            ):
                yield page, line.split("  #")[0]


ALL = sorted(set(commands()))


@pytest.fixture(scope="module")
def there(tiny_llama, text_file, tmp_path_factory):
    """What stands in the places of the pages' models, texts, runs and checkpoints."""
    out = tmp_path_factory.mktemp("docs")
    settings = {
        "model_name": str(tiny_llama), "output_dir": str(out / "quantized"), "vector_lens": [-1, 4], "num_centroids": [-1, 16],
        "kiter": 3, "dataset": str(text_file), "nsamples": 2, "seq_len": 16, "device": "cpu",
    }  # fmt: skip
    run = quantize_model(QuantConfig.from_flat(settings)).folder
    tuned = FinetuneConfig(
        mode="e2e", model_name=str(run / "packed_model"), original=str(tiny_llama), output_dir=str(out / "tuned"),
        dataset=(str(text_file),), nsamples=4, seq_len=16, steps=1, device="cpu",
    )  # fmt: skip
    return SimpleNamespace(model=tiny_llama, text=text_file, run=run, tuned=finetune_model(tuned).folder, out=out)


def in_place(word, there):
    """A word of a command, or what stands in its place here."""
    if word in MODELS:
        return str(there.model)
    if word in TEXTS:
        return str(there.text)
    if word.endswith("packed_model"):
        return str(there.run / "packed_model")
    if re.match(r"(outputs/my-llama/finetune|RUN_FOLDER_OF_FINETUNE)", word):
        return str(there.tuned)
    if word == "RUN_FOLDER" or re.match(r"outputs/my-llama/[^/]+/\S+", word):
        return str(there.run)
    return {"65536": "16", "4096": "16", "256": "4", "/shared/outputs": str(there.out)}.get(word, word)


def test_there_are_commands():
    assert len(ALL) > 20 and {page for page, _ in ALL} == set(PAGES)


@pytest.mark.ci
@pytest.mark.parametrize("page, line", ALL, ids=lambda value: re.sub(r"\W+", "-", value)[:60])
def test_it_runs(page, line, there, tmp_path, monkeypatch, capsys):
    hub = SimpleNamespace(
        create_repo=lambda repo, **_: SimpleNamespace(repo_id=repo), upload_folder=lambda **_: SimpleNamespace(commit_url="url")
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.chdir(ROOT)
    command, *words = shlex.split(line.removeprefix("vptq "))
    words = [in_place(word, there) for word in words if word != "--chat"]
    resumed = "--resume" in words
    if command == "quantize" and ("--config" in words or set(words) & set(ELSEWHERE) or "$" in line):
        if any(word == "run.yaml" for word in words):
            (tmp_path / "run.yaml").write_text(f"model_name: {there.model}\ndataset: {there.text}\nbits: 2\n")
            words = [str(tmp_path / "run.yaml") if word == "run.yaml" else word for word in words]
        words.append("--dry_run")
    elif command in LITTLE and not resumed:
        words += LITTLE[command].replace("OUT", str(tmp_path)).split()
    if command == "plan" and "--device" not in words:
        words += ["--device", "cpu"]
    try:
        code = main([command, *words])
    except SystemExit as ending:
        code = ending.code
    shown = capsys.readouterr()
    assert code == 0, f"{page}: {line}\n{shown.err}"
    assert shown.out
