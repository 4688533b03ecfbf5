"""States on their way through original and quantized blocks, and what is measured of them."""

import pytest
import torch

from vptq.data import calibration_sequences, load_tokenizer
from vptq.errors import RunError
from vptq.models.architecture import load_skeleton
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.runner import BlockRunner
from vptq.pipeline.calibrate import CalibrationText, Calibrator, relative_weights
from vptq.pipeline.hessians import files_of, sources_of, store_sums
from vptq.pipeline.measure import measure_linear
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


def calibrator_of(parts, runs=None, quantized=None, spare=False):
    skeleton, source, tokens = parts
    text = CalibrationText(tokens.tokens)
    runner = BlockRunner(skeleton, source, CPU, torch.float32, spare)
    return Calibrator(runner, text, runs or range(len(text.runs)), quantized)


def moments_of(*sums):
    """By linear, from the sums of shares of the runs in their order."""
    shares, first = {}, 0
    for part in sums:
        trees = next(iter(part.subtrees.values()))
        end = trees[-1].first + (1 << trees[-1].level)
        shares[range(first, end)], first = part, end
    return {suffix: source.load(CPU) for suffix, source in sources_of(shares, 1.0).items()}


@pytest.fixture
def small_batches(monkeypatch):
    """One sequence a batch, so that there are several runs."""
    monkeypatch.setattr("vptq.evaluation.perplexity.BATCH_TOKENS", 32)


def test_later_blocks_see_what_the_quantized_ones_put_out(parts, tiny_llama):
    _, source, tokens = parts
    calibrator = calibrator_of(parts, quantized=Damaged(source))
    calibrator.block(0, wanted=True)
    found = moments_of(calibrator.block(1, wanted=True, last=True))["self_attn.q_proj"]
    original = inputs_of_second_block(tiny_llama, tokens.tokens, damaged=False)
    drifted = inputs_of_second_block(tiny_llama, tokens.tokens, damaged=True)
    torch.testing.assert_close(found.hessian, drifted.T @ drifted / len(drifted), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.drift, (original - drifted).T @ drifted / len(drifted), rtol=1e-3, atol=1e-3)


def test_first_block_drifts_nowhere(parts):
    calibrator = calibrator_of(parts, quantized=Damaged(parts[1]))
    assert all(moments.drift is None for moments in moments_of(calibrator.block(0, wanted=True)).values())


@pytest.mark.parametrize("sequential", [False, True])
def test_shares_sum_up_to_the_same_bits(sequential, parts, small_batches):
    """Whoever carried which runs, and where the states had to be brought anew."""
    quantized = Damaged(parts[1]) if sequential else None

    def both_blocks(runs, forgets=False):
        calibrator = calibrator_of(parts, runs, quantized)
        first = calibrator.block(0, wanted=True)
        return first, (calibrator_of(parts, runs, quantized) if forgets else calibrator).block(1, wanted=True, last=True)

    whole = both_blocks(range(4))
    for shares in ([range(0, 2), range(2, 4)], [range(0, 1), range(1, 4)], [range(0, 1), range(1, 2), range(2, 4)]):
        found = [both_blocks(runs, forgets=runs.start == 1) for runs in shares]
        for block in range(2):
            expected, together = moments_of(whole[block]), moments_of(*[sums[block] for sums in found])
            assert expected.keys() == together.keys() and len(expected) == 7
            for suffix, moments in expected.items():
                assert torch.equal(moments.hessian, together[suffix].hessian) and together[suffix].num_tokens == 128
                if sequential and block:
                    assert torch.equal(moments.drift, together[suffix].drift)


def test_states_that_failed_half_way_are_not_used(parts, small_batches):
    expected = moments_of(calibrator_of(parts).block(0, wanted=True))
    calibrator = calibrator_of(parts)
    calibrator.runner.load_block(0)

    def stop(part):
        raise MemoryError

    with pytest.raises(MemoryError):
        calibrator.block(0, wanted=True, progress=stop)
    found = moments_of(calibrator.block(0, wanted=True))
    assert torch.equal(found["mlp.down_proj"].hessian, expected["mlp.down_proj"].hessian)


def test_sums_in_files_are_those_in_memory(parts, small_batches, tmp_path, monkeypatch):
    monkeypatch.setattr("vptq.pipeline.hessians.ROWS_AT_ONCE", 7)  # in strips of rows that don't come out even
    calibrator = calibrator_of(parts, range(0, 3), Damaged(parts[1]))
    calibrator.block(0, wanted=True)
    sums = calibrator.block(1, wanted=True, last=True)
    stored = store_sums(sums, tmp_path, "here")
    kept = sources_of({range(0, 3): stored}, 1.0)
    assert len(files_of(kept)) == len(list(tmp_path.iterdir())) == 8, "two subtrees of four inputs"
    for suffix, expected in sources_of({range(0, 3): sums}, 1.0).items():
        one, other = expected.load(CPU), kept[suffix].load(CPU)
        assert torch.equal(one.hessian, other.hessian) and torch.equal(one.drift, other.drift)
        assert torch.equal(one.hessian, expected.load(CPU).hessian), "nothing is used up"
    path = files_of(kept)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="cut short"):
        [source.load(CPU) for source in kept.values()]


def test_sensitivity_is_half_the_weighted_error_of_a_unit_quantizer(parts, tiny_llama, text_file):
    from tests.pipeline.test_run import config_of

    skeleton, source, _ = parts
    config = config_of(tiny_llama, text_file, "unused", rotation="hadamard", codebook_scope="shared")
    plan = make_plan(config, skeleton, source)
    moments = moments_of(calibrator_of(parts).block(0, wanted=True, last=True))
    for linear in plan.of_block(0):
        weight, hessian = source.get(f"{linear.name}.weight"), moments[linear.info.suffix].hessian
        expected = 1.5 * unit_error(*rotated(LinearInput(linear.name, weight, hessian), linear.config), linear.config.percdamp)
        assert measure_linear(linear, weight, hessian, 3.0) == pytest.approx(expected, rel=1e-4)


def test_relative_weights_have_mean_one(generator):
    parts = [torch.rand(4, 50, generator=generator) * 7, torch.rand(4, 20, generator=generator)]
    mean = torch.cat(parts, 1).mean().item()
    found = relative_weights(parts, mean)
    assert found.shape == (4, 70) and found.mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(found[:, 50:] * mean, parts[1])
    assert relative_weights([torch.zeros(1, 5)], 0.0).eq(1).all()
