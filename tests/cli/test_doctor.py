"""`vptq doctor` and `vptq completion`."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch

from vptq.cli.commands import COMMANDS
from vptq.cli.completion import bash, flags_of
from vptq.cli.main import main
from vptq.pipeline import selftest


def test_a_sound_machine_passes(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("right  ") == 5 and "wrong" not in shown.out and not shown.err
    for word in ("python", "torch", "transformers", "memory free", "disk free here", "work is done by"):
        assert word in shown.out


def test_results_as_json_alone(capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["torch"] == torch.__version__ and [check["fault"] for check in found["self_test"]] == [""] * 5


def test_kernels_that_are_wrong_are_told(monkeypatch, capsys):
    real = selftest.VQuantLinear.forward
    monkeypatch.setattr(selftest.VQuantLinear, "forward", lambda self, x: real(self, x) * 1.1)
    monkeypatch.setattr(selftest, "unpack_bits", lambda words, bits, count: torch.zeros(5, count, dtype=torch.int64))
    assert main(["doctor", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert "wrong  vectors: product with packed weights" in shown.out and "off by" in shown.out
    assert "wrong  indices packed and unpacked" in shown.out and "3 of 5 checks failed" in shown.err


def test_a_check_that_breaks_is_a_fault(monkeypatch):
    def broken(*_args, **_named):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(selftest, "quantize_linear", broken)
    faults = [finding.fault for finding in selftest.self_test(torch.device("cpu"))]
    assert faults[0] == "" and set(faults[1:]) == {"RuntimeError: no kernel image"}


def test_a_device_that_is_not_there(capsys):
    assert main(["doctor", "--device", "cuda:99"]) == 2
    assert "is not there" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "words, wanted",
    [
        (["vptq", "qua"], {"quantize"}),
        (["vptq", "quantize", "--num_c"], {"--num_centroids"}),
        (["vptq", "inspect", "--ver"], {"--verify"}),
        (["vptq", "inspect", "outp"], set()),
        (["vptq", ""], set(COMMANDS)),
    ],
)
def test_bash_completes(words, wanted):
    script = bash({name: flags_of(module) for name, (module, _) in COMMANDS.items()})
    asked = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _vptq"
    asked += "; printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True)
    assert {line for line in done.stdout.splitlines() if line} == wanted


def test_other_shells(capsys):
    assert main(["completion", "zsh"]) == 0 and "bashcompinit" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "complete -c vptq -n '__fish_seen_subcommand_from quantize' -l vector_lens" in lines
    assert sum("__fish_use_subcommand" in line for line in lines) == len(COMMANDS)
    assert main(["completion", "tcsh"]) == 2 and "bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_helps(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    shown = capsys.readouterr()
    assert caught.value.code == 0 and "examples:" in shown.out and not shown.err
