"""Whole runs on the rotated road: what is written loads everywhere, resumes to the same bytes, and is what was measured."""

import dataclasses
import json

import pytest
import torch

from tests.pipeline.test_run import Stop, config_of, packed_bytes
from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import load_quantized
from vptq.cli.options import merge_settings, with_defaults
from vptq.config import QuantConfig
from vptq.errors import UsageError
from vptq.pipeline.compare import compare_models
from vptq.pipeline.run import quantize_model
from vptq.recipe import RECIPE

SHARED = {"rotation": "hadamard", "codebook_scope": "shared"}
CASES = {
    "vectors": SHARED,
    "rotated, own": {"rotation": "hadamard"},
    "own, fisher, sequential": {"hessian": "fisher", "sequential": True},
    "residual": SHARED | {"num_res_centroids": (-1, 8), "refine_iters": 1, "beam": 2},
    "8-bit codebook": SHARED | {"bitwidth": 8},
    "own weights": SHARED | {"codebook_source": "model", "row_groups": 2},
    "trellis, fisher": SHARED
    | {"vector_lens": (-1, 1), "num_centroids": (-1, 64), "trellis_bits": 2, "hessian": "fisher", "scale_scope": "row"},
    "sequential": SHARED | {"sequential": True},
}


@pytest.fixture(autouse=True)
def small_tables(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("VPTQ_CACHE", str(tmp_path_factory.getbasetemp() / "codebooks"))
    monkeypatch.setattr("vptq.quantize.gaussian.TRELLIS_SEQUENCES", 64)
    monkeypatch.setattr("vptq.quantize.gaussian.TRELLIS_ITERATIONS", 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ci
def test_every_road_gives_the_same_logits(case, tiny_llama, text_file, tmp_path):
    import transformers

    import vptq  # noqa: F401 (registers with transformers)

    result = quantize_model(config_of(tiny_llama, text_file, tmp_path, save_model=True, **CASES[case]))
    tokens = torch.arange(40)[None]
    packed, plain = result.folder / "packed_model", result.folder / "model"
    with torch.no_grad():
        ours = load_quantized(packed, dtype=torch.float32)(tokens).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)(tokens).logits
        dequantized = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, dequantized, rtol=3e-2, atol=3e-2)  # `model/` is rounded to float16 once more
    assert checkpoint_bits(packed).to_dict() == result.bits.to_dict()
    stored = checkpoint_bits(packed).stored_bits_per_weight
    planned = sum(figures["bits"] * figures["shape"][0] * figures["shape"][1] for figures in result.figures)
    assert stored == pytest.approx(planned / sum(f["shape"][0] * f["shape"][1] for f in result.figures))


def test_saved_again_it_keeps_the_shared_codebook(tiny_llama, text_file, tmp_path):
    import transformers

    result = quantize_model(config_of(tiny_llama, text_file, tmp_path / "a", **SHARED))
    model = load_quantized(result.folder / "packed_model", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("case", ["trellis, fisher", "sequential"])
@pytest.mark.ci
def test_stopped_and_resumed_gives_the_same_bytes(case, tiny_llama, text_file, tmp_path):
    whole = quantize_model(config_of(tiny_llama, text_file, tmp_path / "whole", **CASES[case]))
    stop = Stop(9)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "stopped", **CASES[case]), progress=stop)
    result = quantize_model(QuantConfig(), resume=stop.folder)
    assert packed_bytes(result.folder) == packed_bytes(whole.folder)
    assert not (result.folder / "fisher.safetensors").exists()


@pytest.mark.ci
def test_workers_give_the_same_bytes(tiny_llama, text_file, tmp_path):
    settings = CASES["trellis, fisher"] | {"sequential": True}
    one = quantize_model(config_of(tiny_llama, text_file, tmp_path / "one", **settings))
    two = quantize_model(config_of(tiny_llama, text_file, tmp_path / "two", num_gpus=2, **settings))
    assert packed_bytes(one.folder) == packed_bytes(two.folder)


@pytest.fixture
def small_ladder(monkeypatch):
    """256 states in place of 4096: a laptop's tables, with the figures that go with them."""
    monkeypatch.setattr("vptq.config.RECIPE", RECIPE | {"num_centroids": [-1, 256]})
    monkeypatch.setattr("vptq.pipeline.allocation.shipped_error", lambda c: 1.2 * 4 ** -(c.trellis_bits / c.vector_len))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in (RECIPE | {"num_centroids": (-1, 256)}).items()}


@pytest.mark.ci
def test_bits_are_met_resumed_and_reused(tiny_llama, text_file, tmp_path, small_ladder):
    kept = tmp_path / "not there yet" / "sensitivity.json"
    settings = small_ladder | {"bits": 4.0, "sensitivity_path": str(kept)}
    whole = quantize_model(config_of(tiny_llama, text_file, tmp_path / "whole", **settings))
    assert whole.folder.parent.name == "4bits"
    again = with_defaults(merge_settings({}, str(whole.folder / "config.yaml")))
    assert QuantConfig.from_flat(again | {"num_centroids": [-1, 256]}).faults() == []
    chosen = json.loads((whole.folder / "allocation.json").read_text())
    assert len(chosen["settings"]) == 14 and len({tuple(v) for v in chosen["settings"].values()}) > 1
    stored = json.loads(kept.read_text())["sensitivity"]
    assert len(stored) == 14 and min(stored.values()) > 0
    stop = Stop(9)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(tiny_llama, text_file, tmp_path / "stopped", **settings), progress=stop)
    result = quantize_model(QuantConfig(), resume=stop.folder)
    assert packed_bytes(result.folder) == packed_bytes(whole.folder)


def test_bits_refuses_settings_of_its_own(tiny_llama, text_file, tmp_path):
    config = config_of(tiny_llama, text_file, tmp_path, bits=2.5)
    with pytest.raises(UsageError, match="leave out vector_lens"):
        quantize_model(config)
    with pytest.raises(UsageError, match="bits is 9"):
        quantize_model(dataclasses.replace(config, bits=9.0))


def test_divergence_of_a_model_from_itself_is_nothing(tiny_llama, text_file, tmp_path):
    found = compare_models(
        str(tiny_llama), str(tiny_llama), [str(text_file)], seq_len=64, limit=3, cache_dir=str(tmp_path), device="cpu"
    )[0]
    assert found.mean == pytest.approx(0, abs=1e-6) and found.same_top1 == 1 and found.num_tokens == 3 * 63


def test_divergence_equals_the_whole_models_and_the_cache_serves(tiny_llama, text_file, tmp_path, monkeypatch):
    import transformers

    from vptq.data import evaluation_stream, load_tokenizer

    result = quantize_model(config_of(tiny_llama, text_file, tmp_path / "run", save_model=True, **SHARED))
    given = {"seq_len": 64, "limit": 2, "cache_dir": str(tmp_path / "cache"), "device": "cpu"}
    found = compare_models(str(tiny_llama), str(result.folder / "packed_model"), [str(text_file)], **given)[0]
    tokens = evaluation_stream(str(text_file), load_tokenizer(tiny_llama))[:128].view(2, 64)
    with torch.no_grad():
        p, q = (
            torch.log_softmax(
                transformers.AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32)(tokens).logits[:, :-1], -1
            )
            for m in (tiny_llama, result.folder / "model")
        )
    divergences = (p.exp() * (p - q)).sum(-1)
    assert found.mean == pytest.approx(divergences.mean().item(), rel=0.02)
    assert found.median == pytest.approx(divergences.median().item(), rel=0.05)
    assert found.same_top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item(), abs=0.02)
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # damaged: made anew
    again = compare_models(str(tiny_llama), str(result.folder / "packed_model"), [str(text_file)], **given)[0]
    assert again == found


def test_divergence_refuses_another_vocabulary(tiny_llama, text_file, tmp_path):
    from tests.conftest import make_tiny_llama

    other = make_tiny_llama(tmp_path / "other", vocab_size=4100)
    with pytest.raises(UsageError, match="different vocabularies"):
        compare_models(str(tiny_llama), str(other), [str(text_file)], seq_len=64, device="cpu")
