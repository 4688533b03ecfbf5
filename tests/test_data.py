"""Text to token sequences."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from vptq.data import calibration_sequences, check_dataset, evaluation_stream, load_tokenizer
from vptq.errors import UsageError
from vptq.models.architecture import DEMO


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def sequences(path, tokenizer, **changes):
    return calibration_sequences(str(path), tokenizer, **{"nsamples": 4, "seq_len": 32, "seed": 0} | changes)


def test_sequences_are_windows_of_the_text_without_overlap(text_file, tokenizer):
    found = sequences(text_file, tokenizer)
    stream = evaluation_stream(str(text_file), tokenizer)
    windows = stream[: len(stream) // 32 * 32].view(-1, 32).tolist()
    places = [windows.index(row) for row in found.tokens.tolist()]
    assert found.tokens.shape == (4, 32) and places == sorted(set(places)) and found.num_text_tokens == len(stream)


def test_seed_chooses(text_file, tokenizer):
    a, b, c = (sequences(text_file, tokenizer, seed=s).tokens for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_text_jsonl_and_folder_give_the_same_tokens(tmp_path, tokenizer):
    documents = ["first document", "second one"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text(documents[0])
    (tmp_path / "a" / "y.jsonl").write_text(json.dumps({"text": documents[1], "id": 3}) + "\n\n")
    (tmp_path / "a" / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(d) for d in documents))
    joined = tokenizer("\n\n".join(documents))["input_ids"]
    assert evaluation_stream(str(tmp_path / "a"), tokenizer).tolist() == joined
    assert evaluation_stream(str(tmp_path / "b.jsonl"), tokenizer).tolist() == joined


def test_line_separators_inside_json_are_no_line_ends(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert tokenizer.decode(evaluation_stream(str(tmp_path / "x.jsonl"), tokenizer)) == "a\u2028b\u0085c"


def test_a_large_text_is_not_tokenized_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("vptq.data.CHOICE_TOKENS", 1)
    (tmp_path / "x.txt").write_text("some words of text " * 50_000)
    seen = []

    def counting(text):
        seen.append(len(text))
        return tokenizer(text)

    assert sequences(tmp_path / "x.txt", counting).tokens.shape == (4, 32)
    assert seen == [8 * 4 * 4 * 32]


def test_too_short_text_says_what_would_fit(text_file, tokenizer):
    with pytest.raises(UsageError, match=r"too short(.|\n)*set --nsamples \d+"):
        sequences(text_file, tokenizer, nsamples=10_000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "  \n", "is empty"),
        ("bad.jsonl", '{"text": "a"}\n{"no": 1}\n', "line 2 holds no document"),
        ("broken.jsonl", "{", "line 1 holds no document"),
    ],
)
def test_bad_text_is_named(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        evaluation_stream(str(tmp_path / name), tokenizer)


def test_binary_text_is_named(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read as UTF-8"):
        evaluation_stream(str(tmp_path / "x.txt"), tokenizer)


def test_unknown_names_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="neither a known name nor a path"):
        check_dataset("wikitext3")
    with pytest.raises(UsageError, match="holds no text"):
        check_dataset(str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets` that notes what is asked for."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": f"row {i} of the text"} for i in range(2000)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("name", "arguments", "split"),
    [("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test"), ("c4", ("allenai/c4",), "validation")],
)
def test_hub_names_ask_for_the_usual_splits(hub, tokenizer, name, arguments, split):
    evaluation_stream(name, tokenizer)
    assert hub[0][0] == arguments and hub[0][1]["split"] == split
    sequences(name, tokenizer)
    assert hub[1][1]["split"] == "train"


def test_c4_new_takes_the_first_1100_documents(hub, tokenizer):
    expected = tokenizer(" ".join(f"row {i} of the text" for i in range(1100)))["input_ids"]
    assert evaluation_stream("c4-new", tokenizer).tolist() == expected


@pytest.mark.parametrize("name", ["c4", "c4-new"])
def test_c4_is_cut_to_256_windows(hub, tokenizer, name):
    assert len(evaluation_stream(name, tokenizer, seq_len=8)) == 256 * 8


def test_unreachable_hub_is_a_message(monkeypatch, tokenizer):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UsageError, match=r"can't be had(.|\n)*no network(.|\n)*path of a text"):
        evaluation_stream("wikitext2", tokenizer)
