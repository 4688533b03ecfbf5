"""What is said of a run before it is begun."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tests.pipeline.test_run import config_of
from vptq.cli.main import main
from vptq.config import QuantConfig
from vptq.errors import UsageError
from vptq.pipeline import forecast as forecasts
from vptq.pipeline import rates
from vptq.pipeline.cost import linear_units
from vptq.pipeline.estimate import Estimate
from vptq.pipeline.forecast import forecast
from vptq.pipeline.rates import Rates
from vptq.pipeline.run import quantize_model

H200 = Rates("one H200", "cuda", 5e5, 0.01, 3.5e5, 3.5e5, 1e9, 10.0)
LARGE = {"vector_lens": (-1, 8), "num_centroids": (-1, 65536)}


def of_shapes(name, workers, **settings):
    return forecast(
        QuantConfig.from_flat({"model_name": name, "device": "cpu"} | LARGE | settings), workers=workers, rates=H200
    )


def test_it_says_the_bits_and_files_that_come_out(tiny_llama, text_file, tmp_path):
    config = config_of(tiny_llama, text_file, tmp_path / "out")
    seen = forecast(config)
    assert not seen.faults and not (tmp_path / "out").exists()
    result = quantize_model(config)
    assert seen.plan.bits.stored_bits_per_weight == result.bits.stored_bits_per_weight
    assert seen.plan.bits.file_bits == result.bits.file_bits
    (estimate,) = seen.estimates
    assert estimate.workers == 1 and estimate.gpu_bytes == 0 and estimate.scratch_bytes == 0
    assert estimate.disk_bytes == pytest.approx(sum(b.stored for b in result.bits.linears) // 8 + result.bits.file_bits // 8)


def test_more_workers_are_faster_until_there_is_nothing_more_to_share():
    found = of_shapes("llama-3-70b", (1, 2, 8, 64)).estimates
    assert [estimate.workers for estimate in found] == [1, 2, 8, 64]
    one, two, eight, many = found
    assert 1.9 < one.seconds / two.seconds <= 2.0 and 6.5 < one.seconds / eight.seconds < 8
    assert eight.seconds > many.seconds > one.worker_seconds / 64
    assert one.worker_seconds == pytest.approx(many.worker_seconds) and one.busy > eight.busy > many.busy
    assert one.scratch_bytes == 0 < two.scratch_bytes < eight.scratch_bytes < many.scratch_bytes
    assert two.main_bytes < 5e9, "the first process holds neither weights nor Hessians"


def test_memory_of_a_gpu_is_what_was_measured():
    """8192 x 28672, float16, v = 6, k = 4096, on an H200: 20.8 GB beside 3.3 of the Hessian and 0.5 of the weight."""
    (found,) = of_shapes("llama-3-70b", (512,)).estimates
    states = 128 * 2048 // 16 * 8192 * 2
    assert found.gpu_bytes - states == pytest.approx(24.55e9, rel=0.03)


def test_a_sample_counts_the_iterations_that_it_took(tiny_llama, text_file, tmp_path, monkeypatch):
    plan = forecast(config_of(tiny_llama, text_file, tmp_path / "out"), rates=H200).plan
    linear = plan.linears[0]
    report = SimpleNamespace(kmeans_iterations=(2, 4))
    monkeypatch.setattr(rates, "quantize_linears", lambda *given, **settings: [(None, report)])
    units, _ = rates._sample_seconds(linear, torch.device("cpu"), 1e9)
    assert units == linear_units(linear, 3) < linear_units(linear)


def test_sequential_calibration_leaves_less_to_share():
    plain, sequential = (of_shapes("llama-2-7b", (8,), sequential=s).estimates[0] for s in (False, True))
    assert sequential.seconds > 1.3 * plain.seconds and sequential.scratch_bytes < plain.scratch_bytes


def test_a_model_that_is_not_here_is_told_by_its_shapes():
    seen = of_shapes("llama-3.1-405b", (512,))
    assert not seen.faults and len(seen.plan.linears) == 126 * 7
    assert "only shapes were looked at" in seen.notes[0]
    weights = sum(linear.bits.num_weights for linear in seen.plan.linears) + seen.plan.bits.other_bits / 16
    assert weights == pytest.approx(405.9e9, rel=0.001)


def test_all_faults_come_at_once(tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of(
        tiny_llama, tmp_path / "no-text", tmp_path / "file", group_num=5, eval_dataset=str(tmp_path / "none"), device="cuda:77"
    )
    seen = forecast(config)
    told = "\n".join(map(str, seen.faults))
    for part in ("no-text", "none", "cuda:77", "do not fit 14 linears", "`%s` can't be written" % (tmp_path / "file")):
        assert part in told
    assert len(seen.faults) == 5 and not seen.estimates


def test_the_command_prints_tables_and_keeps_rates(tiny_llama, text_file, tmp_path, capsys):
    words = ["plan", "--model_name", str(tiny_llama), "--dataset", str(text_file), "--device", "cpu", "--nsamples", "4"]
    words += ["--vector_lens", "-1", "4", "--num_centroids", "-1", "16", "--output_dir", str(tmp_path / "out"), "--kiter", "2"]
    assert main([*words, "--save_rates", str(tmp_path / "rates.json")]) == 0
    text = capsys.readouterr().out
    assert "mlp.down_proj     0-1     32x48" in text and "bits per weight ideal" in text and "estimated from rates of" in text
    kept = Rates.load(tmp_path / "rates.json")
    assert kept.device == "cpu" and kept.linear_units > 0 and kept.disk_bytes > 0
    assert main([*words, "--rates", str(tmp_path / "rates.json"), "--gpus", "1", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [e["workers"] for e in found["estimates"]] == [1, 4] and len(found["linears"]) == 14 and not found["faults"]
    assert set(found["estimates"][0]) == {f.name for f in dataclasses.fields(Estimate)}
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_why_it_would_be_refused(tiny_llama, tmp_path, capsys):
    words = ["quantize", "--dry_run", "--model_name", str(tiny_llama), "--dataset", "nowhere", "--device", "cpu"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--seq_len", "64"]) == 2
    text = capsys.readouterr().out
    assert "this run would be refused" in text and "nowhere" in text
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_the_weights(capsys, tmp_path):
    words = ["quantize", "--dry_run", "--model_name", "llama-2-7b", "--device", "cpu", "--dataset", "c4"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 2
    assert "llama-2-7b" in capsys.readouterr().out


def test_files_that_hold_no_rates_are_named(tmp_path):
    (tmp_path / "rates.json").write_text('{"speed": 3}')
    with pytest.raises(UsageError, match=r"rates\.json` holds no rates"):
        Rates.load(tmp_path / "rates.json")


def test_workers_on_the_cores_of_one_machine_share_them(tiny_llama, text_file, tmp_path):
    rates = dataclasses.replace(
        H200, device="cpu", linear_units=50.0, forward_units=100.0, hessian_units=100.0, start_seconds=0
    )
    config = config_of(tiny_llama, text_file, tmp_path, kiter=100)
    one, two = forecast(config, workers=(1, 2), rates=rates).estimates
    assert two.seconds > 0.95 * one.seconds


@pytest.mark.parametrize("behind", ["", "file://"])
def test_sums_behind_a_url_need_no_room_here(behind, tiny_llama, text_file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(forecasts, "refuse_full_disk", lambda folder, needed: asked.append(needed))
    config = config_of(tiny_llama, text_file, f"{behind}{tmp_path / 'out'}", num_gpus=2)
    (estimate,) = forecast(config, rates=H200).estimates
    assert estimate.scratch_bytes > 0
    assert asked == [estimate.disk_bytes + (0 if behind else estimate.scratch_bytes)]
