"""The command line as its users meet it: words in, exit code and text out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vptq.cli.main import main
from vptq.cli.options import field_types, merge_settings, normalise_flags, with_defaults
from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.finetune_config import FinetuneConfig
from vptq.models.headers import read_headers

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = ["--vector_lens", "-1", "4", "--num_centroids", "-1", "16", "--kiter", "3", "--nsamples", "4", "--seq_len", "64"]


def run(capsys, *words):
    code = main([str(w) for w in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def quantize(capsys, tiny_llama, text_file, tmp_path, *words):
    base = ["quantize", "--model_name", tiny_llama, "--dataset", text_file, "--output_dir", tmp_path / "out", *SMALL]
    return run(capsys, *base, *words)


# -- bits ---------------------------------------------------------------------------------------------------------------


def bits_json(capsys, *words):
    code, out, _ = run(capsys, "bits", *words, "--json")
    assert code == 0
    return json.loads(out)


V8_65536_256 = ["--vector_lens", "-1", "8", "--num_centroids", "-1", "65536", "--num_res_centroids", "-1", "256"]


def test_bits_of_the_worked_examples_to_the_digit(capsys):
    small = ["--vector_lens", "-1", "8", "--num_centroids", "-1", "16", "--num_res_centroids", "-1", "4"]
    assert bits_json(capsys, "--shape", "16x16", *small)["ideal_bits_per_weight"] == 10.75
    assert bits_json(capsys, "--model_name", "llama-2-7b", *V8_65536_256)["ideal_bits_per_weight"] == 3.291288860103627
    assert round(bits_json(capsys, "--model_name", "opt-125m", *V8_65536_256)["ideal_bits_per_weight"], 4) == 10.1389


def test_bits_of_a_run_that_chooses_by_measuring_are_not_guessed(capsys):
    code, out, err = run(capsys, "bits", "--config", next(p for p in CONFIGS if p.stem == "bits_2.5"))
    assert code == 2 and not out and "shows when it is measured" in err


def test_bits_items_add_up(capsys):
    words = ["--vector_lens", "4", "6", "--num_centroids", "4096", "4096", "--npercent", "1", "--group_num", "16"]
    found = bits_json(capsys, "--model_name", "llama-3-8b", *words)
    items = dict(found["total_bits"])
    total = items.pop("file")
    assert sum(items.values()) == total
    quantized = total - items["not_quantized"]
    assert found["stored_bits_per_weight"] == pytest.approx(quantized / found["quantized_weights"])
    assert found["ideal_bits_per_weight"] == pytest.approx(2.24, abs=0.03)
    assert found["ideal_bits_per_weight"] < found["stored_bits_per_weight"] < found["file_bits_per_weight"]


def test_bits_by_hand_for_one_padded_matrix(capsys):
    """10x6, v = 4, k = 8, 2 outlier columns of v = 2, k = 4: 3 rows of vectors of 3 bits, 4 columns a row."""
    words = ["--vector_lens", "2", "4", "--num_centroids", "4", "8", "--npercent", "30", "--bitwidth", "8", "--bsize", "4"]
    items = bits_json(capsys, "--shape", "10x6", *words)["total_bits"]
    assert items["indices"] == 3 * 4 * 3 and items["outlier_indices"] == 5 * 2 * 2
    assert items["codebooks"] == 8 * 4 * 8 and items["outlier_codebooks"] == 4 * 2 * 8
    assert items["codebook_scales"] == (2 + 1) * 16 and items["perm"] == 6 * 16 and items["scale_and_offset"] == 2 * 6 * 16
    words_padding = 3 * 32 - 36
    outlier_padding = 10 * 16 - 20
    assert items["padding"] == words_padding + outlier_padding


def test_bits_table_is_for_people(capsys):
    code, out, err = run(capsys, "bits", "--model_name", "smollm2-135m", *V8_65536_256)
    assert code == 0 and err == ""
    for word in ("codebooks", "perm", "ideal", "stored", "file", "MB"):
        assert word in out


def test_bits_of_the_demo_needs_no_flags(capsys):
    code, out, _ = run(capsys, "bits")
    assert code == 0 and "42 linears, 3,538,944 weights" in out and "2.194444 bits" in out


def test_bits_of_a_saved_checkpoint_is_what_is_there(capsys, tiny_llama, text_file, tmp_path):
    code, _, _ = quantize(capsys, tiny_llama, text_file, tmp_path)
    assert code == 0
    packed = next((tmp_path / "out").rglob("packed_model"))
    found = bits_json(capsys, "--model_name", packed)
    assert found["total_bits"]["file"] == sum(entry.num_bytes for entry in read_headers(packed).values()) * 8
    planned = bits_json(capsys, "--model_name", tiny_llama, *SMALL[:6])
    assert found == planned
    assert found["stored_bits_per_weight"] == planned["stored_bits_per_weight"]
    assert found["ideal_bits_per_weight"] == planned["ideal_bits_per_weight"]
    code, _, err = run(capsys, "bits", "--model_name", packed, "--num_centroids", "-1", "32")
    assert code == 2 and "settings of its own" in err


# -- quantize and eval-ppl ----------------------------------------------------------------------------------------------


def test_quantize_reports_what_it_rests_on(capsys, tiny_llama, text_file, tmp_path):
    code, out, err = quantize(capsys, tiny_llama, text_file, tmp_path, "--eval_dataset", text_file, "--save_model")
    assert code == 0
    for part in ("ideal", "stored", "whole file", "proxy error", "original", "quantized", "context 64", "tokens counted"):
        assert part in out, part
    assert "run folder:" in err and "Traceback" not in err
    assert {p.name for p in next((tmp_path / "out").rglob("job.json")).parent.iterdir()} >= {"model", "packed_model"}


def test_eval_ppl_table_and_json(capsys, tiny_llama, text_file, tmp_path):
    words = [
        "eval-ppl",
        "--model_name",
        tiny_llama,
        "--dataset",
        text_file,
        "--seq-len",
        "64",
        "--stride",
        "32",
        "--limit",
        "3",
    ]
    code, out, _ = run(capsys, *words, "--json", tmp_path / "r.json")
    assert code == 0 and "±" in out and "64" in out
    result = json.loads((tmp_path / "r.json").read_text())["results"][0]
    assert result["num_tokens"] == 3 * 32 and result["seq_len"] == 64 and result["stride"] == 32 and result["num_windows"] == 3
    code, out, _ = run(capsys, *words, "--json", "-")
    assert json.loads(out)["results"][0] == result


def test_flag_wins_over_file_over_default(capsys, tiny_llama, text_file, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("vector_lens: [-1, 2]\nnum_centroids: [-1, 8]\nkiter: 2\nnsamples: 2\nseq_len: 32\n")
    words = ["quantize", "--model_name", tiny_llama, "--dataset", text_file, "--output_dir", tmp_path / "out"]
    code, _, _ = run(capsys, *words, "--config", file, "--num_centroids", "-1", "4")
    assert code == 0
    kept = yaml.safe_load(next((tmp_path / "out").rglob("config.yaml")).read_text())
    assert kept["vector_lens"] == [-1, 2] and kept["num_centroids"] == [-1, 4] and kept["percdamp"] == 0.01


def test_resume_through_the_command_line(capsys, tiny_llama, text_file, tmp_path, monkeypatch):
    import vptq.pipeline.worker as workers

    real, calls = workers.quantize_batch, []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(workers, "quantize_batch", interrupt)
    code, _, err = quantize(capsys, tiny_llama, text_file, tmp_path)
    assert code == 130 and "vptq quantize --resume" in err
    folder = err.split("--resume ")[1].split()[0]
    monkeypatch.setattr(workers, "quantize_batch", real)
    code, _, err = run(capsys, "quantize", "--resume", folder, "--kiter", "9")
    assert code == 2 and "kiter: the run was started with 3, not 9" in err
    code, out, _ = run(capsys, "quantize", "--resume", folder)
    assert code == 0 and folder in out


# -- flags --------------------------------------------------------------------------------------------------------------


def test_every_flag_is_a_field_and_every_field_a_flag(capsys):
    code = subprocess.run([sys.executable, "-m", "vptq.cli.main", "quantize", "--help"], capture_output=True, text=True)
    fields = {f.name for kind in (QuantConfig, CalibrationConfig, LinearConfig) for f in dataclasses.fields(kind)}
    fields -= {"linear", "calibration"}  # parts; their fields are there
    assert set(field_types()) == fields
    shown = {word.strip("-,[]") for word in code.stdout.split() if word.startswith("--")}
    assert fields - {"per_linear"} <= shown  # that is for files


def test_help_is_quick():
    started = time.perf_counter()
    for command in ("quantize", "eval-ppl", "bits"):
        subprocess.run([sys.executable, "-m", "vptq.cli.main", command, "--help"], capture_output=True, check=True)
    assert (time.perf_counter() - started) / 3 < 1


def test_dashes_and_old_spellings():
    words = ["--vector-lens", "-1", "8", "--num_red_centroids=x", "--model", "m"]
    assert normalise_flags(words) == ["--vector_lens", "-1", "8", "--num_res_centroids=x", "--model_name", "m"]


@pytest.mark.parametrize(("word", "value"), [(None, True), ("True", True), ("true", True), ("False", False), ("0", False)])
def test_booleans_bare_and_with_a_word(word, value):
    from vptq.cli.options import add_fields, make_parser

    parser = make_parser("x", "", "")
    add_fields(parser, LinearConfig)
    flags = vars(parser.parse_args(["--enable_norm"] + ([word] if word else [])))
    assert merge_settings(flags, None) == {"enable_norm": value}


def test_enable_transpose_repeats_the_direction():
    assert merge_settings({"enable_transpose": "True"}, None) == {"vector_quant_dim": "out"}
    assert merge_settings({"enable_transpose": "False"}, None) == {"vector_quant_dim": "in"}


BAD_WORDS = {
    "unknown flag": (["quantize", "--vector_len", "-1", "8"], "did you mean --vector_lens?"),
    "unknown command": (["quantise"], "commands: quantize"),
    "contradiction": (["quantize", "--vector_quant_dim", "in", "--enable_transpose", "True"], "enable_transpose"),
    "not a number": (["quantize", "--npercent", "many"], "'many' is not a number"),
    "not a boolean": (["quantize", "--enable_norm", "perhaps"], "not True or False"),
    "one of a pair": (["quantize", "--vector_lens", "8"], "vector_lens"),
    "no power of two": (["quantize", "--num_centroids", "-1", "1000"], "1000 is not a power of two"),
    "several at once": (["quantize", "--kiter", "0", "--bitwidth", "40"], "2 settings do not fit"),
    "inverse alone": (["quantize", "--inv_hessian_path", "x"], "--hessian_path"),
    "bad config": (["quantize", "--config", "/nowhere.yaml"], "can't be read"),
    "outliers without percent": (["quantize", "--vector_lens", "4", "8", "--num_centroids", "16", "16"], "npercent is 0"),
    "direction": (["quantize", "--vector_quant_dim", "sideways"], "must be one of out, in"),
    "bad shape": (["bits", "--shape", "16"], "is not OUTxIN"),
    "shape that does not fit": (["bits", "--shape", "16x10", "--group_num", "3"], "group_num=3"),
    "two questions": (["bits", "--shape", "1x1", "--model_name", "opt-125m"], "two questions"),
    "unknown model": (["bits", "--model_name", "gpt-9"], "table of shapes"),
    "missing model": (["eval-ppl", "--model_name", "./nowhere", "--dataset", "wikitext2"], "does not exist"),
    "zero context": (["eval-ppl", "--seq_len", "0"], "1 or more"),
    "long context": (["eval-ppl", "--seq_len", "9999"], "at most 512"),
    "json nowhere": (["eval-ppl", "--json", "/nowhere/x.json"], "can't be written"),
    "too many groups": (["quantize", "--group_num", "5000"], "more than the 256 columns"),
    "file for a model": (["quantize", "--model_name", __file__], "is a file, not a model folder"),
    "out of range once": (["quantize", "--num_centroids", "-1", "100000000"], "num_centroids: main is 100000000"),
    "zero stride": (["eval-ppl", "--stride", "0"], "argument --stride"),
    "no run folder": (["quantize", "--resume", "/nowhere"], "no run folder"),
}


@pytest.mark.parametrize("case", BAD_WORDS, ids=lambda c: c.replace(" ", "-"))
def test_bad_input_is_one_message_and_exit_code_2(capsys, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, part = BAD_WORDS[case]
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and err.startswith("error: ") and part in err
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_unknown_yaml_names_are_all_listed(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("vektor_lens: [1, 2]\nkitter: 3\n")
    code, _, err = run(capsys, "quantize", "--config", tmp_path / "c.yaml")
    assert code == 2 and "vektor_lens" in err and "kitter" in err


def test_internal_fault_exits_1_without_a_traceback(capsys, monkeypatch):
    monkeypatch.setattr("vptq.cli.bits.matrix_bits", lambda *_: 1 / 0)
    code, _, err = run(capsys, "bits", "--shape", "8x8")
    assert code == 1 and "ZeroDivisionError" in err and "Traceback" not in err
    code, _, err = run(capsys, "bits", "--shape", "8x8", "--traceback")
    assert code == 1 and "Traceback" in err


# -- configs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_in_the_repository_are_valid(path):
    if path.stem.startswith("finetune"):
        given = merge_settings({}, str(path), (FinetuneConfig,))
        assert not FinetuneConfig.from_flat(given).faults()
    else:
        QuantConfig.from_flat(with_defaults(merge_settings({}, str(path)))).validate()


def test_bits_take_the_recipe_and_refuse_vectors_of_their_own(capsys, tiny_llama, text_file, tmp_path):
    code, _, err = quantize(capsys, tiny_llama, text_file, tmp_path, "--bits", "2.5")
    assert code == 2 and "bits chooses the settings of vectors" in err and "vector_lens" in err
    assert (
        with_defaults({"bits": 3})["trellis_bits"] == 2 and with_defaults({"bits": 3, "hessian": "input"})["hessian"] == "input"
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--trellis_bits", "2"], "trellis_bits needs codebook_scope shared"),
        (["--codebook_scope", "shared", "--enable_norm"], "leave out enable_norm"),
        (["--codebook_scope", "shared", "--npercent", "1", "--group_num", "2"], "takes no outliers"),
        (["--codebook_scope", "shared", "--trellis_bits", "4"], "fewer than the bits of an index"),
        (["--rotation_sides", "in"], "rotation_sides goes with rotation hadamard"),
        (["--beam", "4"], "beam needs a residual stage"),
        (["--drift_frac", "0.5"], "drift_frac goes with sequential"),
        (["--hessian", "fisher", "--hessian_path", "h"], "hessian_path keeps Hessians of the inputs alone"),
        (["--rotation", "spin"], "rotation is 'spin', must be one of none, hadamard"),
        (["--fold"], "fold goes with rotation hadamard"),
        (["--embed_bits", "7"], "embed_bits is 7"),
        (["--sensitivity_path", "s.json"], "sensitivity_path goes with bits"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(capsys, tiny_llama, text_file, tmp_path, words, said):
    code, _, err = quantize(capsys, tiny_llama, text_file, tmp_path, *words)
    assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_eval_kl_compares_and_names_what_is_missing(capsys, tiny_llama, text_file, tmp_path):
    words = ["--original", tiny_llama, "--model_name", tiny_llama, "--dataset", text_file, "--seq_len", "64", "--limit", "2"]
    code, out, _ = run(capsys, "eval-kl", *words, "--cache_dir", tmp_path, "--device", "cpu")
    assert code == 0 and "mean KL" in out and "100.00 %" in out
    code, out, _ = run(capsys, "eval-kl", *words, "--cache_dir", tmp_path, "--device", "cpu", "--json", "-")
    assert json.loads(out)["results"][0]["same_top1"] == 1
    code, _, err = run(capsys, "eval-kl", "--original", tiny_llama)
    assert code == 2 and "--model_name is missing" in err


def test_table_8_gives_the_bits_in_its_name(capsys):
    for path in CONFIGS:
        if not path.stem.startswith("table8_"):
            continue
        model, bits = path.stem.removeprefix("table8_").rsplit("_", 1)
        found = bits_json(capsys, "--model_name", model, "--config", path)["ideal_bits_per_weight"]
        assert found == pytest.approx(float(bits.removesuffix("bit")), abs=0.025), path.stem


@pytest.mark.parametrize("example", ["example_3bit", pytest.param("example_2.24bit", marks=pytest.mark.slow)])
@pytest.mark.ci
def test_published_examples_run_on_the_demo_model(capsys, example, tmp_path):
    path = next(p for p in CONFIGS if p.stem == example)
    words = ["quantize", "--config", path, "--output_dir", tmp_path, "--nsamples", "8", "--kiter", "2", "--eval_nsamples", "4"]
    code, out, err = run(capsys, *words)
    assert code == 0 and "of them are never used" in err
    assert "perplexity" in out
