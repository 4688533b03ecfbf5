"""The captured step: the tokens that the model's own greedy choice gives, again and again from one cache."""

import pytest
import torch

from tests.conftest import make_tiny_llama
from vptq.checkpoint.reader import load_whole
from vptq.pipeline.decode import StaticDecoder, choose, make_decoder


def written(decoder, tokens, count):
    decoder.start(tokens)
    found = []
    for _ in range(count):
        found.append(int(decoder.token))
        decoder.step()
    return found


def expected(model, tokens, count):
    text = tokens.to(model.device)
    with torch.no_grad():
        for _ in range(count):
            text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return text[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_writes_the_likeliest_tokens_text_after_text(packed, tiny_llama, device, request):
    folder = request.getfixturevalue("packed_llama") if packed else tiny_llama
    model = load_whole(str(folder), str(device))
    model = model.float() if device.type == "cpu" else model
    decoder = StaticDecoder(model, 20)
    assert decoder.length == 256 and decoder.fits(256, 0.0, 1.0) and not decoder.fits(257, 0.0, 1.0)
    generator = torch.Generator().manual_seed(3)
    for count in (1, 7, 5):
        tokens = torch.randint(1, 4096, (1, count), generator=generator)
        assert written(decoder, tokens, 9) == expected(model, tokens, 9)


@pytest.fixture(scope="module")
def packed_llama(tiny_llama, text_file, tmp_path_factory):
    from tests.pipeline.test_run import config_of
    from vptq.pipeline.run import quantize_model

    return quantize_model(config_of(tiny_llama, text_file, tmp_path_factory.mktemp("out"))).folder / "packed_model"


def test_a_text_does_not_run_over_its_end(tiny_llama):
    decoder = StaticDecoder(load_whole(str(tiny_llama), "cpu").float(), 100, graph=False)
    with pytest.raises(ValueError, match="256 tokens"):
        decoder.start(torch.ones(1, 257, dtype=torch.int64))
    decoder.start(torch.ones(1, 255, dtype=torch.int64))
    decoder.step()
    with pytest.raises(ValueError, match="256 tokens"):
        decoder.step()


def test_draws_have_the_odds_of_the_logits(device):
    logits = torch.tensor([3.0, 1.0, 2.0, -4.0]).to(device)
    torch.manual_seed(0)
    draws = choose(logits.expand(20_000, 4), temperature=0.7)[:, 0].bincount(minlength=4) / 20_000
    torch.testing.assert_close(draws.cpu(), torch.softmax(logits.cpu() / 0.7, 0), atol=0.015, rtol=0)
    kept = choose(logits.expand(20_000, 4), temperature=0.7, top_p=0.85)[:, 0].bincount(minlength=4) / 20_000
    odds = torch.softmax(logits.cpu() / 0.7, 0)[[0, 2]]  # 0.77, then 0.18: the second is the one that reaches 0.85
    torch.testing.assert_close(kept.cpu()[[0, 2]], odds / odds.sum(), atol=0.015, rtol=0)
    assert kept[1] == kept[3] == 0
    assert (choose(logits.expand(50, 4), temperature=0.7, top_p=0.0) == 0).all()
    assert (choose(logits[None]) == 0).all() and (choose(logits[None], 1e-6) == 0).all()


def check_stand_in(model, monkeypatch):
    """Fused blocks are taken where they agree with the model's own, and its own are back afterwards."""
    decoder = StaticDecoder(model, 20, graph=False)
    with torch.no_grad():
        decoder._logits(model, decoder.token, decoder.position)
        assert len(decoder._agreeing_blocks()) == model.config.num_hidden_layers
        assert not any("forward" in vars(layer) for layer in model.model.layers)
        decoder.blocks = blocks = decoder._agreeing_blocks()
        called = []
        monkeypatch.setattr(type(blocks[0]), "__call__", lambda self, x, **_: called.append(self) or x)
        decoder.start(torch.ones(1, 3, dtype=torch.int64))
        decoder.step()
        assert called == blocks, "each once, in the step and not for the prompt"
        with pytest.warns(UserWarning, match="without fused blocks: they don't compute"):
            assert not decoder._agreeing_blocks()
        monkeypatch.setattr(type(blocks[0]), "__call__", lambda self, x, **_: x.no_such_thing)
        with pytest.warns(UserWarning, match="without fused blocks: .*no_such_thing"):
            assert not decoder._agreeing_blocks()
        assert not any("forward" in vars(layer) for layer in model.model.layers)
        monkeypatch.setattr(model.config, "hidden_act", "gelu")
        assert not decoder._fused_blocks()


def test_fused_blocks_stand_in_for_the_models_own(tmp_path, emulated, monkeypatch):
    from vptq.pipeline import decode

    monkeypatch.setattr(decode, "kernels_run", lambda device: True)
    model = load_whole(str(make_tiny_llama(tmp_path / "m", dtype=torch.bfloat16, head_dim=32)), "cpu")
    check_stand_in(model.bfloat16(), monkeypatch)


@pytest.mark.gpu
def test_fused_blocks_stand_in_on_a_gpu(tmp_path, monkeypatch):
    model = load_whole(str(make_tiny_llama(tmp_path / "m", head_dim=32)), "cuda")
    assert len(StaticDecoder(model, 20).blocks) == 2 and not StaticDecoder(model, 20, fused=False).blocks
    check_stand_in(model, monkeypatch)


def test_a_model_that_keeps_a_window_has_no_decoder(tmp_path):
    model = load_whole(str(make_tiny_llama(tmp_path / "m")), "cpu")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    model.config.sliding_window = 16
    with pytest.warns(UserWarning, match="token by token"):
        assert make_decoder(model, 64, 0.0, 1.0) is None


def test_a_model_without_keys_and_values_has_no_decoder():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4))
    with pytest.warns(UserWarning, match="token by token"):
        assert make_decoder(model, 64, 0.0, 1.0) is None


@pytest.mark.gpu
def test_draws_follow_the_seed_through_a_captured_step(tiny_llama):
    from vptq.pipeline.generate import Sampling, Writer

    writer = Writer(str(tiny_llama), device="cuda")
    tokens = writer.encode("the")
    draw = lambda seed: writer.write(tokens, Sampling(12, temperature=1.5, top_p=0.95, seed=seed)).text  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    assert writer._decoder is not None
