"""Writing: the tokens that the model's own greedy choice gives, text as it comes, faults told."""

import json
import math

import pytest
import torch

from tests.pipeline.test_run import config_of
from vptq.checkpoint.reader import load_whole
from vptq.cli.main import main
from vptq.errors import UsageError
from vptq.pipeline.generate import Sampling, Writer
from vptq.pipeline.run import quantize_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def packed(tiny_llama, text_file, tmp_path_factory):
    return quantize_model(config_of(tiny_llama, text_file, tmp_path_factory.mktemp("out"))).folder / "packed_model"


@pytest.mark.parametrize("which", ["original", "packed", "packed, cached"])
def test_writes_the_likeliest_tokens_and_shows_all_of_them(which, tiny_llama, packed):
    folder = tiny_llama if which == "original" else packed
    cached = which.endswith("cached")
    writer = Writer(str(folder), device="cpu", cache_bytes=1e9 if cached else 0)
    tokens = writer.encode("def main(self):")
    shown = []
    written = writer.write(tokens, Sampling(max_new_tokens=9), shown.append)
    assert "".join(shown) == written.text
    assert written.prompt_tokens == tokens.shape[1] and 1 <= written.new_tokens <= 9
    model, expected = load_whole(str(folder), "cpu", cache_weights=cached), tokens
    with torch.no_grad():
        for _ in range(written.new_tokens):
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert written.text == writer.tokenizer.decode(expected[0, tokens.shape[1] :], skip_special_tokens=True)
    assert written.prompt_seconds > 0 and (written.new_tokens == 1 or written.tokens_per_second > 0)


def test_draws_follow_the_seed(tiny_llama):
    writer = Writer(str(tiny_llama), device="cpu")
    tokens = writer.encode("the")
    draw = lambda seed: writer.write(tokens, Sampling(12, temperature=1.5, top_p=0.95, seed=seed)).text  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_stops_where_the_context_ends(tiny_llama):
    writer = Writer(str(tiny_llama), device="cpu")
    tokens = torch.randint(1, 4096, (1, 125), generator=torch.Generator().manual_seed(0))
    assert writer.write(tokens, Sampling(50)).new_tokens <= 3
    with pytest.raises(UsageError, match="128, its answer included"):
        writer.encode("word " * 200)
    with pytest.raises(UsageError, match="empty"):
        writer.encode("")


def test_chat_goes_through_the_template(tiny_llama):
    writer = Writer(str(tiny_llama), device="cpu")
    with pytest.raises(UsageError, match="no chat template"):
        writer.encode_chat([{"role": "user", "content": "hello"}])
    writer.tokenizer.chat_template = TEMPLATE
    tokens = writer.encode_chat([{"role": "user", "content": "hello"}])
    assert writer.tokenizer.decode(tokens[0]) == "<user> hello <assistant>"


def test_half_a_character_is_not_shown(tiny_llama):
    from vptq.pipeline.generate import _Stream

    class Tokenizer:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode(errors="replace")

    shown = []
    stream = _Stream(Tokenizer(), shown.append)
    for value in [torch.zeros(1, 4), *(torch.tensor([b]) for b in "aé\n!".encode())]:
        stream.put(value)
    stream.end()
    assert shown == ["a", "é", "\n", "!"] and stream.text == "aé\n!" and stream.count == 5


def test_command_writes_text_to_stdout_and_speed_to_stderr(packed, tmp_path, capsys):
    words = ["generate", "--model", str(packed), "--prompt", "import os", "--max_new_tokens", "5", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "g.json")]) == 0
    out, err = capsys.readouterr()
    figures = json.loads((tmp_path / "g.json").read_text())
    assert out == figures["text"] + "\n" and "tokens of the prompt" in err
    assert main([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == figures["text"]


def test_command_converses_until_the_input_ends(tiny_llama, tmp_path, capsys, monkeypatch):
    import shutil

    folder = shutil.copytree(tiny_llama, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    lines = ["hello", "", "again"]

    def answer(_prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", answer)
    seen = []
    real = Writer.encode_chat
    monkeypatch.setattr(Writer, "encode_chat", lambda self, messages: seen.append(len(messages)) or real(self, messages))
    assert main(["generate", "--model", str(folder), "--chat", "--max_new_tokens", "2", "--device", "cpu"]) == 0
    assert seen == [1, 1, 3]  # a trial, one message, and then all that was said


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--prompt is missing"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a", "--top_p", "2"], "not between 0 and 1"),
        (["--prompt", "a", "--temperature", "-1"], "not between"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "2^63"),
        (["--chat", "--json", "-"], "has no --json"),
        (["--model", "no-such-model", "--prompt", "a"], "no-such-model"),
    ],
)
def test_faults_are_told(words, message, capsys):
    assert main(["generate", *words, "--device", "cpu"]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_speed_of_a_single_token_is_not_a_number(tiny_llama):
    writer = Writer(str(tiny_llama), device="cpu")
    written = writer.write(writer.encode("the"), Sampling(1))
    assert math.isnan(written.tokens_per_second) and written.to_dict()["tokens_per_second"] is None
