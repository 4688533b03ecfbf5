"""States on their way through original and quantized blocks, and what is measured of them."""

import pytest
import torch

from vptq.data import calibration_sequences, load_tokenizer
from vptq.models.architecture import load_skeleton
from vptq.models.prefetch import PrefetchingFolder
from vptq.pipeline.calibrate import Calibrator, relative_weights
from vptq.pipeline.measure import measure_sensitivity
from vptq.pipeline.plan import make_plan
from vptq.quantize.problem import LinearInput, rotated
from vptq.quantize.sensitivity import unit_error

CPU = torch.device("cpu")


@pytest.fixture
def parts(tiny_llama, text_file):
    skeleton = load_skeleton(tiny_llama)
    source = PrefetchingFolder(tiny_llama, skeleton.source_prefix)
    tokens = calibration_sequences(str(text_file), load_tokenizer(tiny_llama), nsamples=4, seq_len=32, seed=0)
    return skeleton, source, tokens


class Damaged:
    """Stands for a quantized model: weights of the first block are halved."""

    def __init__(self, source):
        self.source = source

    def has(self, name):
        return self.source.has(name)

    def get(self, name):
        tensor = self.source.get(name)
        return tensor * 0.5 if "layers.0" in name and "proj" in name else tensor


def inputs_of_second_block(folder, tokens, damaged):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if damaged:
        with torch.no_grad():
            for name, parameter in model.model.layers[0].named_parameters():
                if "proj" in name:
                    parameter.mul_(0.5)
    with torch.no_grad():
        states = model.model(tokens, output_hidden_states=True).hidden_states[1]
        return model.model.layers[1].input_layernorm(states).flatten(0, 1)


def test_later_blocks_see_what_the_quantized_ones_put_out(parts, tiny_llama):
    skeleton, source, tokens = parts
    calibrator = Calibrator(skeleton, source, CPU, torch.float32, tokens, quantized=Damaged(source))
    calibrator.block(0, True, False, lambda: None)
    calibrator.follow(0)
    found = {suffix: h for h in calibrator.block(1, True, True, lambda: None) for suffix in h.linears}["self_attn.q_proj"]
    original = inputs_of_second_block(tiny_llama, tokens.tokens, damaged=False)
    drifted = inputs_of_second_block(tiny_llama, tokens.tokens, damaged=True)
    torch.testing.assert_close(found.matrix, drifted.T @ drifted / len(drifted), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.drift, (original - drifted).T @ drifted / len(drifted), rtol=1e-3, atol=1e-3)


def test_first_block_drifts_nowhere(parts):
    skeleton, source, tokens = parts
    calibrator = Calibrator(skeleton, source, CPU, torch.float32, tokens, quantized=Damaged(source))
    assert all(hessian.drift is None for hessian in calibrator.block(0, True, False, lambda: None))


def test_sensitivity_is_half_the_weighted_error_of_a_unit_quantizer(parts, tiny_llama, text_file):
    from tests.pipeline.test_run import config_of

    skeleton, source, tokens = parts
    config = config_of(tiny_llama, text_file, "unused", rotation="hadamard", codebook_scope="shared")
    plan = make_plan(config, skeleton, source)
    means = {linear.name: 3.0 for linear in plan.linears}
    seen = []
    found = measure_sensitivity(Calibrator(skeleton, source, CPU, torch.float32, tokens), plan, means, source, CPU, seen.append)
    assert len(found) == 14 and set(seen) == {0, 1}
    calibrator = Calibrator(skeleton, source, CPU, torch.float32, tokens)
    moments = {s: h.matrix for h in calibrator.block(0, True, True, lambda: None) for s in h.linears}
    for linear in plan.of_block(0):
        given = LinearInput(linear.name, source.get(f"{linear.name}.weight"), moments[linear.info.suffix])
        expected = 1.5 * unit_error(*rotated(given, linear.config), linear.config.percdamp)
        assert found[linear.name] == pytest.approx(expected, rel=1e-4)


def test_relative_weights_have_mean_one_and_merge_groups(generator):
    weights = torch.rand(4, 50, generator=generator) * 7
    for groups in (1, 2, 4):
        found, mean = relative_weights(weights, groups)
        assert found.shape == (groups, 50) and mean == pytest.approx(weights.mean().item(), rel=1e-5)
        assert found.mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(relative_weights(weights, 2)[0][0] * weights.mean(), weights[:2].mean(0))
    assert relative_weights(torch.zeros(1, 5), 1)[0].eq(1).all()
