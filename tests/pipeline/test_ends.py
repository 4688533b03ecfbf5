"""Head and embeddings quantized along: tied and untied, looked up, loaded, counted, resumed."""

import json

import pytest
import torch

from tests.conftest import make_tiny_llama
from tests.pipeline.test_run import Stop, config_of, packed_bytes
from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import load_quantized
from vptq.config import QuantConfig
from vptq.errors import CheckpointError, UsageError
from vptq.models.headers import read_headers
from vptq.nn.vquant_embedding import VQuantEmbedding
from vptq.pipeline.evaluate import evaluate_model
from vptq.pipeline.run import quantize_model


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("VPTQ_CACHE", str(tmp_path_factory.getbasetemp() / "codebooks"))


def logits_of(folder):
    import transformers

    import vptq  # noqa: F401 (registers with transformers)

    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize("asked", [{"embed_bits": 4}, {"head_bits": 6}, {"head_bits": 8, "embed_bits": 3}])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.ci
def test_every_road_gives_the_same_logits(asked, tied, tiny_llama, untied, text_file, tmp_path):
    if tied and len(asked) == 2:
        pytest.skip("one matrix has one size")
    model = tiny_llama if tied else untied
    result = quantize_model(config_of(model, text_file, tmp_path, save_model=True, **asked))
    packed = result.folder / "packed_model"
    loaded = load_quantized(packed, dtype=torch.float32)
    with torch.no_grad():
        ours = loaded(torch.arange(40)[None]).logits
    torch.testing.assert_close(ours, logits_of(packed), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, logits_of(result.folder / "model"), rtol=3e-2, atol=3e-2)
    assert isinstance(loaded.model.embed_tokens, VQuantEmbedding) == (tied or "embed_bits" in asked)
    names = read_headers(packed)
    assert ("model.embed_tokens.weight" in names) == (not tied and "embed_bits" not in asked)
    assert not (tied and any(name.startswith("lm_head") for name in names))
    figures = {f["name"] for f in result.figures}
    assert len(figures) == 14 + (1 if tied else len(asked))
    assert checkpoint_bits(packed).to_dict() == result.bits.to_dict()
    found = evaluate_model(str(packed), [str(text_file)], seq_len=64, limit=4, device="cpu")[0]
    whole = evaluate_model(str(result.folder / "model"), [str(text_file)], seq_len=64, limit=4, device="cpu")[0]
    assert found.perplexity == pytest.approx(whole.perplexity, rel=1e-2)


@pytest.mark.ci
def test_rows_are_as_exact_as_their_bits_and_smaller(tiny_llama, text_file, tmp_path):
    errors, sizes = [], []
    for bits in (2, 4, 8):
        result = quantize_model(config_of(tiny_llama, text_file, tmp_path / str(bits), embed_bits=bits))
        errors.append(next(f["error"] for f in result.figures if f["name"] == "model.embed_tokens"))
        sizes.append(checkpoint_bits(result.folder / "packed_model").file_bits)
    assert errors[0] > 4 * errors[1] > 64 * errors[2]
    assert sizes == sorted(sizes)


def test_tokens_are_looked_up_in_any_shape(tiny_llama, text_file, tmp_path):
    result = quantize_model(config_of(tiny_llama, text_file, tmp_path, embed_bits=3))
    embedding = load_quantized(result.folder / "packed_model", dtype=torch.float32).model.embed_tokens
    weight = embedding.dequantize()
    tokens = torch.tensor([[5, 4095, 5], [0, 1, 2]])
    torch.testing.assert_close(embedding(tokens), weight[tokens], rtol=1e-4, atol=1e-5)
    assert embedding(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 32)


def test_saved_again_it_stays_one_matrix(tiny_llama, text_file, tmp_path):
    result = quantize_model(config_of(tiny_llama, text_file, tmp_path / "a", embed_bits=4))
    load_quantized(result.folder / "packed_model").save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits_of(tmp_path / "again"), logits_of(result.folder / "packed_model"))


@pytest.mark.parametrize("after", [3, 14])
@pytest.mark.ci
def test_stopped_and_resumed_gives_the_same_bytes(after, untied, text_file, tmp_path):
    asked = {"embed_bits": 4, "head_bits": 4}
    whole = quantize_model(config_of(untied, text_file, tmp_path / "whole", **asked))
    stop = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(config_of(untied, text_file, tmp_path / "stopped", **asked), progress=stop)
    assert packed_bytes(quantize_model(QuantConfig(), resume=stop.folder).folder) == packed_bytes(whole.folder)


def test_head_is_measured_by_what_goes_into_it(untied, text_file, tmp_path):
    """tr(W H Wᵀ) with H taken from the whole model's last hidden states."""
    import transformers

    from vptq.data import calibration_sequences, load_tokenizer

    result = quantize_model(config_of(untied, text_file, tmp_path, head_bits=2))
    found = next(f for f in result.figures if f["name"] == "lm_head")
    tokens = calibration_sequences(str(text_file), load_tokenizer(untied), nsamples=4, seq_len=64, seed=0).tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    with torch.no_grad():
        inputs = model.model(tokens).last_hidden_state.flatten(0, 1)
        outputs = inputs @ model.lm_head.weight.T
    assert found["weight"] == pytest.approx(outputs.square().sum().item() / len(inputs), rel=1e-3)
    assert 0 < found["error"] < 0.12  # 4 dimensions at 2 bits leave 0.097 of a Gaussian


def test_two_sizes_for_one_matrix_are_refused(tiny_llama, text_file, tmp_path):
    with pytest.raises(UsageError, match="one matrix"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path, embed_bits=4, head_bits=8))
    with pytest.raises(UsageError, match="head_bits is 7"):
        quantize_model(config_of(tiny_llama, text_file, tmp_path, head_bits=7))


def test_head_that_names_no_embedding_is_refused(tiny_llama, text_file, tmp_path):
    result = quantize_model(config_of(tiny_llama, text_file, tmp_path, embed_bits=4))
    path = result.folder / "packed_model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_for_layers"]["lm_head"]["weight_of"] = "model.layers.0"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head"):
        load_quantized(result.folder / "packed_model")
