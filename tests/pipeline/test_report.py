"""The page of a run folder: what it tells, and that it needs nothing beside itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from vptq.cli.main import main
from vptq.config import QuantConfig
from vptq.finetune_config import FinetuneConfig
from vptq.pipeline.finetune import finetune_model
from vptq.pipeline.report import write_report
from vptq.pipeline.run import quantize_model
from vptq.pipeline.task import codebook_use

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def run_folder(tiny_llama, text_file, tmp_path_factory):
    settings = {
        "model_name": str(tiny_llama), "output_dir": str(tmp_path_factory.mktemp("out")), "vector_lens": [-1, 4],
        "num_centroids": [-1, 16], "num_res_centroids": [-1, 4], "kiter": 5, "dataset": str(text_file), "nsamples": 4,
        "seq_len": 32, "device": "cpu", "eval_dataset": str(text_file), "eval_nsamples": 2,
    }  # fmt: skip
    return quantize_model(QuantConfig.from_flat(settings)).folder


class Words(HTMLParser):
    """What is read, and every tag with what it has."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags = [], []
        self.feed(page)

    def handle_data(self, data):
        self.text.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_it_tells_what_the_run_found(run_folder):
    page = Words((run_folder / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    figures = json.loads((run_folder / "linears.json").read_text())
    results = json.loads((run_folder / "ppl_results.json").read_text())
    (measured,) = results["ctx_32"].values()
    assert f"{measured['quantized']['perplexity']:.3f}" in text and f"{measured['original']['perplexity']:.3f}" in text
    assert f"{results['bits']['stored_bits_per_weight']:.3f}" in text
    for one in figures:
        assert one["name"] in text and f"{one['error']:.5f}" in text and f"{one['codebook_use']:.1%}" in text
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        assert kind in text
    assert "+ residual" in text and "nearest centroid" in text and "Allocation" not in text
    assert "vptq quantize --model_name" in text and "num_res_centroids" in text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 7 + 3


def test_it_needs_nothing_beside_itself(run_folder):
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"')]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(script|link|iframe)", page) and "@import" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "#777777" not in page and "#9a9a9b" not in page, "text and grid take the page's colours"


def test_plots_are_pictures_too(run_folder):
    names = {path.name for path in (run_folder / "plots").iterdir()}
    assert {"bits.png", "codebooks.png", "time.png", "error-00.png", "error-06.png"} <= names
    assert (run_folder / "plots/bits.png").read_bytes().startswith(b"\x89PNG")


def test_names_cannot_put_in_markup(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    linears = json.loads((folder / "linears.json").read_text())
    linears[0]["name"] = "model.layers.0.<script>alert(1)</script>"
    (folder / "linears.json").write_text(json.dumps(linears))
    job = json.loads((folder / "job.json").read_text())
    job["settings"]["dataset"] = "<img src=x onerror=alert(1)>"
    (folder / "job.json").write_text(json.dumps(job))
    tags = Words(write_report(folder).read_text(encoding="utf-8")).tags
    assert not [tag for tag, attributes in tags if tag in ("script", "img") or "onerror" in attributes]


def test_an_allocation_is_shown(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    job = json.loads((folder / "job.json").read_text())
    job["settings"]["bits"] = 3.0
    (folder / "job.json").write_text(json.dumps(job))
    assert main(["report", str(folder)]) == 0
    assert "Allocation" in (folder / "report.html").read_text(encoding="utf-8")


def test_fine_tuning_has_one(run_folder, tiny_llama, text_file, tmp_path):
    config = FinetuneConfig(
        mode="e2e", model_name=str(run_folder / "packed_model"), original=str(tiny_llama), output_dir=str(tmp_path),
        dataset=(str(text_file),), nsamples=4, seq_len=32, steps=1, device="cpu", eval_dataset=(str(text_file),),
    )  # fmt: skip
    page = Words((finetune_model(config).folder / "report.html").read_text(encoding="utf-8"))
    assert "fine-tuned" in " ".join(page.text) and "before" in page.text and "after" in page.text
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("words, message", [([], "RUN_FOLDER is missing"), (["EMPTY"], "no folder of a finished run")])
def test_bad_input_is_told(words, message, tmp_path, capsys):
    assert main(["report", *(str(tmp_path) if word == "EMPTY" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_fault_in_the_report_takes_nothing_down(run_folder, tiny_llama, text_file, tmp_path, monkeypatch):
    def fail(*_args):
        raise RuntimeError("no picture today")

    monkeypatch.setattr("vptq.pipeline.report.write_report", fail)
    notes = []
    from vptq.pipeline.report import report_on

    report_on(run_folder, notes.append)
    assert notes == ["warning: no report was made: no picture today"]


def test_use_of_a_codebook():
    import torch

    assert codebook_use(torch.arange(16).repeat(3)[None], 16) == pytest.approx(1.0)
    assert codebook_use(torch.zeros(1, 50), 16) == 0.0
    assert codebook_use(torch.stack([torch.arange(4).repeat(4), torch.zeros(16, dtype=torch.int64)]), 4) == pytest.approx(0.5)
    assert codebook_use(torch.zeros(1, 5), 1) == 1.0


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it(width, run_folder, tmp_path):
    """Nothing is wider than the page, by what the browser says."""
    probe = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join()</script>"
    page = (run_folder / "report.html").read_text(encoding="utf-8").replace("</body>", f"{probe}</body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --window-size={width},900 --user-data-dir={tmp_path}/user --dump-dom"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120, check=True
    )
    shown, needed = map(int, re.search(r"<title>(\d+),(\d+)</title>", done.stdout).groups())
    assert needed <= shown
