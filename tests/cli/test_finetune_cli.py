"""`vptq finetune`: flags, file, help, messages, exit codes."""

import dataclasses

import pytest

from tests.cli.test_cli import run
from tests.pipeline.test_run import config_of
from vptq.cli.options import field_types, merge_settings
from vptq.errors import UsageError
from vptq.finetune_config import FinetuneConfig
from vptq.pipeline.run import quantize_model


@pytest.fixture(scope="module")
def packed(tiny_llama, text_file, tmp_path_factory):
    return quantize_model(config_of(tiny_llama, text_file, tmp_path_factory.mktemp("packed"))).folder / "packed_model"


def words_of(packed, tiny_llama, text_file, tmp_path):
    words = f"--model_name {packed} --original {tiny_llama} --dataset {text_file} --output_dir {tmp_path} --nsamples 6"
    return [*words.split(), *["--seq-len", "64", "--steps", "4", "--batch_size", "2", "--device", "cpu", "--num_held_out", "2"]]


def test_every_field_is_a_flag_with_help():
    assert set(field_types((FinetuneConfig,))) == {f.name for f in dataclasses.fields(FinetuneConfig)}


def test_a_run_from_the_command_line(capsys, packed, tiny_llama, text_file, tmp_path):
    words = words_of(packed, tiny_llama, text_file, tmp_path)
    code, out, err = run(
        capsys, "finetune", *words, "--mode", "e2e", "--train", "norms", "scales", "--eval_dataset", str(text_file)
    )
    assert code == 0, err
    for part in ("bits per weight", "held-out loss", "before", "after", "perplexity, text.txt", "results"):
        assert part in out
    for part in ("run folder:", "tokens to train on", "2 sequences held out", "learning rate"):
        assert part in err
    (folder,) = (tmp_path / tiny_llama.name / "finetune_e2e").iterdir()
    code, again, _ = run(capsys, "finetune", "--resume", str(folder))
    assert code == 0 and "held-out loss" in again
    code, _, err = run(capsys, "finetune", "--resume", str(folder), "--steps", "9")
    assert code == 2 and "steps: the run was started with 4, not 9" in err
    code, _, err = run(capsys, "quantize", "--resume", str(folder))
    assert code == 2 and "is a run of `vptq finetune`" in err and "vptq finetune --resume" in err


@pytest.mark.parametrize(
    "words, what",
    [
        (["--model_name", "PACKED", "--stepss", "3"], "did you mean --steps"),
        (["--model_name", "PACKED", "--steps", "three"], "steps: 'three' is not a whole number"),
        ([], "model_name is missing"),
        (["--model_name", "ORIGINAL"], "not a packed VPTQ checkpoint"),
        (["--model_name", "PACKED", "--train", "weights"], "train names 'weights'"),
        (["--resume", "nowhere"], "is no run folder"),
    ],
)
def test_mistakes_are_told_without_a_stack(words, what, capsys, packed, tiny_llama):
    stand_ins = {"PACKED": str(packed), "ORIGINAL": str(tiny_llama)}
    code, _, err = run(capsys, "finetune", *[stand_ins.get(word, word) for word in words])
    assert code == 2 and what in err and "Traceback" not in err


def test_settings_from_a_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("mode: e2e\ntrain: [norms]\ndataset: self\nlearning_rate: 0.001\n")
    given = merge_settings({"steps": "7"}, str(path), (FinetuneConfig,))
    config = FinetuneConfig.from_flat(given)
    assert config.train == ("norms",) and config.dataset == ("self",) and config.steps == 7 and config.learning_rate == 0.001
    path.write_text("num_centroids: [-1, 256]\n")
    with pytest.raises(UsageError, match="unknown settings"):
        merge_settings({}, str(path), (FinetuneConfig,))


def test_help_shows_groups_and_examples(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "finetune", "--help")
    out = capsys.readouterr().out
    for part in ("what is trained", "end to end", "LoRA", "accelerate launch", "--gradient_checkpointing", "examples:"):
        assert part in out
