"""Whole runs on a tiny model: resume, Hessians kept, faults, workers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import make_tiny_llama
from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.errors import NumericalError, UsageError
from vptq.models.architecture import DEMO
from vptq.pipeline.evaluate import evaluate_model
from vptq.pipeline.job import Job
from vptq.pipeline.progress import Silent
from vptq.pipeline.run import quantize_model


def config_of(model, text, output, **changes) -> QuantConfig:
    linear = {"vector_lens": (-1, 4), "num_centroids": (-1, 16), "kiter": 5}
    calibration = {"dataset": str(text), "nsamples": 4, "seq_len": 64}
    top = {"model_name": str(model), "output_dir": str(output), "device": "cpu"}
    for name, value in changes.items():
        target = next(
            d for d, kind in ((linear, LinearConfig), (calibration, CalibrationConfig), (top, QuantConfig))
            if name in {f.name for f in dataclasses.fields(kind)}
        )  # fmt: skip
        target[name] = value
    return QuantConfig(**top, linear=LinearConfig(**linear), calibration=CalibrationConfig(**calibration))


class Stop(Silent):
    """Interrupts, as Ctrl-C does, once `after` linears are quantized."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.folder = None
        self.quantizing = False

    def run_folder(self, folder):
        self.folder = folder if "://" in folder else Path(folder)

    def phase(self, text):
        self.quantizing = text.endswith("quantizing")

    def advance(self, units):
        if self.quantizing:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def packed_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "packed_model").iterdir())}


@pytest.fixture(scope="module")
def whole(tiny_llama, text_file, tmp_path_factory):
    return quantize_model(config_of(tiny_llama, text_file, tmp_path_factory.mktemp("whole")))


def test_run_folder_has_its_form(whole, tiny_llama):
    assert whole.folder.parts[-3:-1] == (tiny_llama.name, "v4_c16")
    names = {p.name for p in whole.folder.iterdir()}
    made = {"linears.json", "run.json", "report.html", "plots"}
    assert names == {"job.json", "config.yaml", "logs", "packed_model", ".lock"} | made
    log = (whole.folder / "logs" / "0.log").read_text().splitlines()
    lines = [line for line in log if "proxy error" in line]
    assert len(lines) == 14
    (line,) = [line for line in lines if "model.layers.0.self_attn.q_proj" in line]
    for part in ("32x32", "bits", "k-means", "sweep", " s"):
        assert part in line


@pytest.mark.parametrize("after", [1, 7, 10])
@pytest.mark.ci
def test_stopped_and_resumed_gives_the_same_bytes(whole, tiny_llama, text_file, tmp_path, after):
    stop = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path), progress=stop)
    done = list((stop.folder / "work").iterdir())
    assert len(done) - after in (0, 1)  # one more may have been written while the last was told
    assert not (stop.folder / "packed_model").exists()
    result = quantize_model(QuantConfig(), resume=stop.folder)
    assert packed_bytes(result.folder) == packed_bytes(whole.folder)
    assert len([line for line in (stop.folder / "logs" / "0.log").read_text().splitlines() if "k-means" in line]) == 14


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_damaged_work_file_is_done_again(damage, whole, tiny_llama, text_file, tmp_path):
    stop = Stop(5)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path), progress=stop)
    damaged = sorted((stop.folder / "work").iterdir())[2]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:200] if damage == "cut" else content[:-50] + bytes(50))
    assert packed_bytes(quantize_model(QuantConfig(), resume=stop.folder).folder) == packed_bytes(whole.folder)


def test_resume_refuses_changed_settings_by_name(tiny_llama, text_file, tmp_path):
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path), progress=stop)
    given = {"num_centroids": [-1, 32], "kiter": 5}
    with pytest.raises(UsageError, match=r"num_centroids: the run was started with \[-1, 16\], not \[-1, 32\]"):
        quantize_model(QuantConfig.from_flat(given), resume=stop.folder, given=given)


@pytest.mark.ci
def test_resume_keeps_where_the_work_was_done(tiny_llama, tmp_path):
    text = {"nsamples": 64, "seq_len": 128}  # of two runs: one worker alone does not finish it before the other has come
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            config_of(tiny_llama, DEMO / "calibration.txt", tmp_path, device="cpu", num_gpus=1, **text), progress=stop
        )
    job = json.loads((stop.folder / "job.json").read_text())
    job["settings"]["num_gpus"] = 2
    (stop.folder / "job.json").write_text(json.dumps(job))
    quantize_model(QuantConfig(), resume=stop.folder)
    assert (stop.folder / "logs" / "1.log").exists(), "two workers, as the run was started with"


def test_resume_refuses_a_changed_calibration_text(tiny_llama, text_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text, tmp_path / "out"), progress=stop)
    text.write_text(text_file.read_text().upper())
    with pytest.raises(UsageError, match="has changed since"):
        quantize_model(QuantConfig(), resume=stop.folder)


@pytest.mark.parametrize("num_gpus", [1, 2])
@pytest.mark.ci
def test_a_calibration_text_that_vanished_is_named_and_nothing_is_lost(num_gpus, whole, tiny_llama, text_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    stop = Stop(3)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text, tmp_path / "out", num_gpus=num_gpus), progress=stop)
    text.unlink()
    kept = sorted(path.name for path in (stop.folder / "work").iterdir())
    with pytest.raises(UsageError, match=r"text\.txt"):
        quantize_model(QuantConfig(), resume=stop.folder)
    assert sorted(path.name for path in (stop.folder / "work").iterdir()) == kept
    text.write_text(text_file.read_text())
    assert packed_bytes(quantize_model(QuantConfig(), resume=stop.folder).folder) == packed_bytes(whole.folder)


def test_resume_refuses_another_model(tiny_llama, text_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(model, text_file, tmp_path / "out"), progress=stop)
    shutil.rmtree(model)
    make_tiny_llama(model, seed=5)
    with pytest.raises(UsageError, match="is not the model"):
        quantize_model(QuantConfig(), resume=stop.folder)


def test_finished_run_resumes_to_nothing_new(whole):
    before = packed_bytes(whole.folder)
    again = quantize_model(QuantConfig(), resume=whole.folder)
    assert packed_bytes(again.folder) == before and again.figures == whole.figures


def test_second_process_in_one_run_folder_is_refused(tiny_llama, text_file, tmp_path):
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path), progress=stop)
    holder = Job.load(stop.folder)
    holder.lock()
    with pytest.raises(UsageError, match="another process works in"):
        quantize_model(QuantConfig(), resume=stop.folder)


def test_output_folder_that_is_a_file_is_refused(tiny_llama, text_file, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "out"))


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        quantize_model(QuantConfig(), resume=tmp_path)


@pytest.mark.ci
def test_kept_hessians_give_the_same_checkpoint_without_calibration(whole, tiny_llama, text_file, tmp_path, monkeypatch):
    store = str(tmp_path / "hessians")
    quantize_model(config_of(tiny_llama, text_file, tmp_path / "a", hessian_path=store))
    assert len(list((tmp_path / "hessians").iterdir())) == 8  # 2 blocks x qkv, o, up, down
    monkeypatch.setattr("vptq.pipeline.run.calibration_sequences", lambda *a, **k: pytest.fail("calibrated again"))
    second = quantize_model(config_of(tiny_llama, text_file, tmp_path / "b", hessian_path=store))
    assert packed_bytes(second.folder) == packed_bytes(whole.folder)


def test_missing_hessians_are_made_and_the_rest_reused(whole, tiny_llama, text_file, tmp_path):
    store = tmp_path / "hessians"
    quantize_model(config_of(tiny_llama, text_file, tmp_path / "a", hessian_path=str(store)))
    kept = (store / "0_o.safetensors").stat().st_mtime_ns
    (store / "1_down.safetensors").unlink()
    second = quantize_model(config_of(tiny_llama, text_file, tmp_path / "b", hessian_path=str(store)))
    assert packed_bytes(second.folder) == packed_bytes(whole.folder)
    assert (store / "0_o.safetensors").stat().st_mtime_ns == kept and (store / "1_down.safetensors").exists()


def test_published_hessians_quantize(tiny_llama, tmp_path, generator):
    from tests.calibration.test_hessian import published

    sizes = {"qkv": 32, "o": 32, "up": 32, "down": 48}
    for block in range(2):
        for label, size in sizes.items():
            x = torch.randn(200, size, generator=generator)
            published(tmp_path / "h", f"{block}_{label}.pt", x.T @ x / 200, x.mean(0))
    config = config_of(tiny_llama, "nowhere.txt", tmp_path / "out", hessian_path=str(tmp_path / "h"), dataset="c4")
    assert (quantize_model(config).folder / "packed_model").exists()


def test_one_missing_published_hessian_leaves_the_others_alone(tiny_llama, text_file, tmp_path, generator):
    from tests.calibration.test_hessian import published

    for block in range(2):
        for label, size in {"qkv": 32, "up": 32, "down": 48}.items():
            x = torch.randn(200, size, generator=generator)
            published(tmp_path / "h", f"{block}_{label}.pt", x.T @ x / 200, x.mean(0))
    config = config_of(tiny_llama, text_file, tmp_path / "a", hessian_path=str(tmp_path / "h"))
    first = quantize_model(config)
    assert sorted(p.name for p in (tmp_path / "h").glob("*.safetensors")) == ["0_o.safetensors", "1_o.safetensors"]
    second = quantize_model(dataclasses.replace(config, output_dir=str(tmp_path / "b")))
    assert packed_bytes(second.folder) == packed_bytes(first.folder)


def test_hessians_of_another_model_stop_the_run_before_it_starts(tiny_llama, text_file, tmp_path, generator):
    from tests.calibration.test_hessian import published

    published(tmp_path / "h", "0_down.pt", torch.eye(99), torch.zeros(99))
    with pytest.raises(UsageError, match=r"another model(.|\n)*99 inputs"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "out", hessian_path=str(tmp_path / "h")))
    assert not (tmp_path / "out").exists()


@pytest.mark.ci
def test_workers_give_the_same_bytes_and_a_log_each(whole, tiny_llama, text_file, tmp_path):
    result = quantize_model(config_of(tiny_llama, text_file, tmp_path, num_gpus=2, device="cpu"))
    assert packed_bytes(result.folder) == packed_bytes(whole.folder)
    logs = [path.read_text() for path in (result.folder / "logs").glob("[01].log")]  # one that came late may have had no work
    assert sum(log.count("proxy error") for log in logs) == 14
    assert not (result.folder / "scratch").exists()


def test_fault_in_a_worker_keeps_its_message(tiny_llama, text_file, tmp_path):
    model = broken_weight(tiny_llama, tmp_path)
    with pytest.raises(NumericalError, match=r"non-finite weights(.|\n)*layers\.1\.mlp\.down_proj"):
        quantize_model(config_of(model, text_file, tmp_path / "out", num_gpus=2, device="cpu"))


def broken_weight(tiny_llama, tmp_path):
    model = tmp_path / "broken"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_non_finite_weight_is_named(tiny_llama, text_file, tmp_path):
    with pytest.raises(NumericalError, match=r"non-finite weights(.|\n)*layers\.1\.mlp\.down_proj"):
        quantize_model(config_of(broken_weight(tiny_llama, tmp_path), text_file, tmp_path / "out"))


def test_non_finite_activation_is_named(tiny_llama, text_file, tmp_path):
    model = tmp_path / "broken"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"non-finite activations(.|\n)*layers\.1\.self_attn\.q_proj"):
        quantize_model(config_of(model, text_file, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_num": 5}, r"do not fit 14 linears(.|\n)*layers\.0\.self_attn\.q_proj \(32x32\)(.|\n)*more"),
        ({"num_centroids": (-1, 48)}, "48 is not a power of two"),
        ({"seq_len": 4096}, "at most 128 tokens"),
        ({"nsamples": 100000}, "too short"),
        ({"dataset": "no-such-thing"}, "neither a known name nor a path"),
        ({"model_name": "./nowhere"}, "does not exist"),
        ({"device": "cuda:77"}, "is not there"),
        ({"device": "toaster"}, "no device"),
        ({"vector_lens": (4, 4)}, "npercent is 0"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tiny_llama, text_file, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_packed_model_is_not_quantized_again(whole, text_file, tmp_path):
    with pytest.raises(UsageError, match="quantized already"):
        quantize_model(config_of(whole.folder / "packed_model", text_file, tmp_path / "out"))


def test_full_disk_is_told_before_the_work(tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(UsageError, match="disk is full"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up_leaves_a_resumable_run(whole, tiny_llama, text_file, tmp_path, monkeypatch):
    import vptq.models.files as files

    real, calls = files.save_file, []

    def save_file_until_full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    progress = Stop(-1)
    monkeypatch.setattr(files, "save_file", save_file_until_full)
    with pytest.raises(UsageError, match=r"disk is full(.|\n)*--resume"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path), progress=progress)
    assert 3 <= len(list((progress.folder / "work").iterdir())) < 14
    monkeypatch.setattr(files, "save_file", real)
    assert packed_bytes(quantize_model(QuantConfig(), resume=progress.folder).folder) == packed_bytes(whole.folder)


def test_packed_dequantized_and_streamed_perplexity_agree(tiny_llama, text_file, tmp_path):
    config = dataclasses.replace(
        config_of(tiny_llama, text_file, tmp_path), save_model=True, eval_dataset=str(text_file), eval_nsamples=5
    )
    result = quantize_model(config)
    results = json.loads((result.folder / "ppl_results.json").read_text())["ctx_64"][str(text_file)]
    figures = {
        where: evaluate_model(str(folder), [str(text_file)], seq_len=64, limit=5)[0].perplexity
        for where, folder in (("packed", result.folder / "packed_model"), ("model", result.folder / "model"))
    }
    assert figures["packed"] == pytest.approx(figures["model"], rel=1e-4)
    assert results["quantized"]["perplexity"] == pytest.approx(figures["packed"], rel=1e-4)
    original = evaluate_model(str(tiny_llama), [str(text_file)], seq_len=64, limit=5)[0].perplexity
    same = original if not torch.cuda.is_available() else pytest.approx(original, rel=1e-4)  # products on a GPU vary
    assert results["original"]["perplexity"] == same
    assert result.perplexities[0][1].num_tokens == 5 * 63


def test_one_block_of_weights_at_a_time(tiny_llama, text_file, tmp_path, monkeypatch):
    """While a run is on, at most one block is off the meta device."""
    from vptq.models.runner import BlockRunner

    most = []
    real = BlockRunner.run_block_

    def counting(self, block, states, progress=None):
        loaded = [i for i, b in enumerate(self.skeleton.blocks) if not all(p.is_meta for p in b.parameters())]
        most.append(len(loaded))
        return real(self, block, states, progress)

    monkeypatch.setattr(BlockRunner, "run_block_", counting)
    quantize_model(dataclasses.replace(config_of(tiny_llama, text_file, tmp_path), eval_dataset=str(text_file)))
    assert most and max(most) == 1


def test_resolved_settings_are_kept(whole):
    assert Job.load(whole.folder).config.linear.num_centroids == (-1, 16)
    kept = yaml.safe_load((whole.folder / "config.yaml").read_text())
    assert kept["num_centroids"] == [-1, 16] and kept["seq_len"] == 64


def test_open_settings_are_resolved(tiny_llama, text_file, tmp_path):
    result = quantize_model(config_of(tiny_llama, text_file, tmp_path, seq_len=None, nsamples=2))
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["seq_len"] == 128
    assert "calibration: 2 sequences of 128 tokens" in (result.folder / "logs" / "run.log").read_text()


@pytest.mark.gpu
def test_gpu_run_equals_the_cpu_run_in_quality(whole, tiny_llama, text_file, tmp_path):
    found = quantize_model(config_of(tiny_llama, text_file, tmp_path, device="cuda"))
    for cpu, gpu in zip(whole.figures, found.figures, strict=True):
        assert gpu["error"] == pytest.approx(cpu["error"], rel=0.2)
    again = quantize_model(config_of(tiny_llama, text_file, tmp_path / "again", device="cuda"))
    assert packed_bytes(again.folder) == packed_bytes(found.folder)


def test_what_was_computed_is_written_though_the_listener_stops(tiny_llama, text_file, tmp_path):
    """The interrupt comes while the first linear is told of: the second is done by then, and must not be lost."""
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path), progress=stop)
    assert len(list((stop.folder / "work").iterdir())) == 2


def test_a_run_that_can_not_begin_lets_go_of_its_lock(tiny_llama, text_file, tmp_path):
    stop = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path), progress=stop)
    errors = []
    for _ in range(2):
        with pytest.raises(UsageError) as caught:
            quantize_model(QuantConfig(), resume=stop.folder, given={"device": "cuda:99"})
        errors.append(caught)  # kept, as a notebook keeps the last one
    assert all("cuda:99" in str(caught.value) for caught in errors)


@pytest.mark.parametrize("num_gpus", [1, 2])
@pytest.mark.ci
def test_a_run_behind_a_url(num_gpus, whole, tiny_llama, text_file, tmp_path):
    """Stopped, resumed from the URL by a process that has nothing of it, finished."""
    url = f"local://{tmp_path}/there"
    stop = Stop(5)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, url, num_gpus=num_gpus), progress=stop)
    assert stop.folder.startswith(url)
    there = tmp_path / "there" / stop.folder.removeprefix(url + "/")
    assert len(list((there / "work").iterdir())) >= 5 and not (there / "packed_model").exists()
    with pytest.raises(UsageError, match="no run folder"):
        quantize_model(QuantConfig(), resume=url + "/nothing")
    result = quantize_model(QuantConfig(), resume=stop.folder)
    assert packed_bytes(there) == packed_bytes(result.folder) == packed_bytes(whole.folder)
    made = {"linears.json", "run.json", "report.html", "plots"}
    assert {p.name for p in there.iterdir()} == {"job.json", "config.yaml", "logs", "packed_model"} | made
    assert json.loads((there / "job.json").read_text())["finished"]
    logs = "".join(path.read_text() for path in (there / "logs").iterdir())
    assert logs.count("proxy error") == 14


@pytest.mark.ci
def test_a_url_is_given_back_whatever_is_refused(whole, tiny_llama, text_file, tmp_path):
    stop = Stop(5)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, f"local://{tmp_path}/there"), progress=stop)
    for _ in range(2):
        with pytest.raises(UsageError, match="kiter: the run was started with 5, not 9"):
            quantize_model(QuantConfig(), resume=stop.folder, given={"kiter": 9})
    for _ in range(2):  # the second time it is finished already
        assert packed_bytes(quantize_model(QuantConfig(), resume=stop.folder).folder) == packed_bytes(whole.folder)


def test_a_checkpoint_half_of_which_is_behind_the_url_is_not_taken_for_whole(
    whole, tiny_llama, text_file, tmp_path, monkeypatch
):
    from vptq.models import remote

    real, seen = remote.publish, []

    def publish(path, content=None):
        seen.append(path)
        if "packed_model" in path.parts and path.name == "tokenizer.json":
            raise UsageError("the network is gone")
        real(path, content)

    told = Stop(-1)
    monkeypatch.setattr(remote, "publish", publish)
    with pytest.raises(UsageError, match="network is gone"):
        quantize_model(config_of(tiny_llama, text_file, f"local://{tmp_path}/there"), progress=told)
    monkeypatch.undo()
    there = tmp_path / "there" / told.folder.removeprefix(f"local://{tmp_path}/there/")
    assert (there / "packed_model" / "model.safetensors").exists() and not (there / "packed_model" / "config.json").exists()
    quantize_model(QuantConfig(), resume=told.folder)
    assert packed_bytes(there) == packed_bytes(whole.folder)


@pytest.mark.parametrize(
    "name, folder", [("..", None), ("a/..", "model"), ("/", "model"), ("org/na:me", "na_me"), ("a/b/", "b")]
)
def test_no_name_of_a_model_leads_out_of_the_output_folder(name, folder):
    from vptq.pipeline.run_folder import model_folder_name

    found = model_folder_name(name)
    assert found == (folder or found) and found not in ("", ".", "..") and "/" not in found
