"""Token weights from the loss, weighted Hessians, drift."""

import pytest
import torch
from torch import nn

from tests.calibration.test_hessian import collected
from vptq.calibration.fisher import token_weights
from vptq.calibration.hessian import BlockHessians, HessianAccumulator
from vptq.calibration.runs import mean_of
from vptq.errors import NumericalError
from vptq.models.architecture import load_skeleton
from vptq.models.runner import BlockRunner
from vptq.pipeline.hessians import sources_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 4096, (5, 24), generator=torch.Generator().manual_seed(3))


def whole_model_gradients(folder, tokens):
    """Gradients of the summed loss at every linear's output, by the whole model and autograd alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:

            def keep(_module, _inputs, output, name=name):
                output.retain_grad()
                outputs[name] = output

            module.register_forward_hook(keep)
    logits = model(tokens).logits[:, :-1]
    nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="sum").backward()
    return {name: output.grad.reshape(-1, output.shape[-1]) for name, output in outputs.items()}


@pytest.mark.parametrize("kept_bytes", [1, 1 << 30])
def test_token_weights_are_the_squared_gradients_of_the_loss(tiny_llama, tokens, kept_bytes, monkeypatch):
    """Block by block, all batches at once or a batch at a time."""
    monkeypatch.setattr("vptq.calibration.fisher.KEPT_BYTES", kept_bytes)
    skeleton = load_skeleton(tiny_llama)
    runner = BlockRunner(skeleton, skeleton.source(), torch.device("cpu"), torch.float32)
    groups = {info.name: 2 for info in skeleton.linears()}
    parts = []
    found = token_weights(runner, list(tokens.split(2)), groups, parts.append)
    expected = whole_model_gradients(tiny_llama, tokens)
    assert set(found) == set(expected) and sum(parts) == pytest.approx(1)
    for name, gradient in expected.items():
        squares = gradient.square().view(len(gradient), 2, -1).mean(2).T
        torch.testing.assert_close(found[name], squares, rtol=2e-3, atol=1e-9)
        assert squares.max() > 0


def test_non_finite_gradients_name_the_linears(tiny_llama, tokens, monkeypatch):
    skeleton = load_skeleton(tiny_llama)
    runner = BlockRunner(skeleton, skeleton.source(), torch.device("cpu"), torch.float32)
    monkeypatch.setattr(runner, "loss_gradient", lambda hidden, _tokens: torch.full_like(hidden, torch.inf))
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj"):
        token_weights(runner, [tokens[:1]], {"model.layers.0.self_attn.q_proj": 1})


def test_weighted_second_moment_in_float64(generator, device):
    x = torch.randn(3, 40, 8, generator=generator).to(device)
    weights = torch.rand(2, 120, generator=generator) ** 4 * 100
    accumulator = HessianAccumulator(8, x.device, groups=2)
    for number, batch in enumerate(x):
        accumulator.add(batch, weights[:, 40 * number : 40 * number + 40])
    rows = x.reshape(-1, 8).double().cpu()
    hessian, _ = mean_of(accumulator.take())
    for group in range(2):
        expected = (rows * weights[group, :, None].double()).T @ rows / 120
        torch.testing.assert_close(hessian[group].double().cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weighted_moment_of_large_activations_on_tensor_cores(dtype, generator):
    """Weights of very different size times activations of very different size: nothing overflows, little is lost."""
    x = (torch.randn(3000, 32, generator=generator) * torch.logspace(0, 3.5, 32)).to("cuda", dtype)
    weights = (torch.rand(1, 3000, generator=generator) ** 8 * 1e6).to("cuda")
    accumulator = HessianAccumulator(32, x.device, groups=1)
    accumulator.add(x, weights)
    rows = x.double()
    expected = (rows * weights[0, :, None].double()).T @ rows / 3000
    scale = expected.diagonal().sqrt()
    error = (mean_of(accumulator.take())[0][0].double() - expected).abs() / (scale[:, None] * scale)
    assert error.max() < 1e-3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.o(self.q(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("away, weighted", [(1.0, True), (1e-3, True), (1.0, False)])
def test_drift_of_16_bit_activations(device, dtype, away, weighted, generator):
    inputs = torch.randn(512, 32, generator=generator).to(dtype)
    originals = (inputs.float() + away * torch.randn(512, 32, generator=generator)).to(dtype)
    weights = torch.rand(2, 512, generator=generator) if weighted else None
    accumulator = HessianAccumulator(32, device, 2 if weighted else 0, drifts=True)
    for part in (slice(0, 300), slice(300, 512)):
        own = None if weights is None else weights[:, part]
        accumulator.add(inputs[part].to(device), own, originals[part].to(device))
    scale = torch.ones(1, 512) if weights is None else weights
    shift = originals.double() - inputs.double()
    expected = torch.stack([(shift * row[:, None]).T @ inputs.double() / 512 for row in scale.double()])
    found = mean_of(accumulator.take())[1].cpu().double().view_as(expected)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_no_tokens_change_nothing():
    accumulator = HessianAccumulator(4, torch.device("cpu"), 1, drifts=True)
    accumulator.add(torch.empty(0, 4, dtype=torch.float16), torch.empty(1, 0), torch.empty(0, 4, dtype=torch.float16))
    found = accumulator.take()
    assert found.num_tokens == 0 and not found.total.any() and not found.drift.any()


def test_paired_runs_take_down_the_drift(generator):
    block, watcher = Block(), BlockHessians("blocks.0", paired=True)
    original, drifted = torch.randn(2, 3, 5, 4, generator=generator)
    with watcher.watching(block), torch.no_grad():
        for one, other in zip(original, drifted, strict=True):
            block(one[None])
            block(other[None])
    found = collected(watcher)
    a, b = original.reshape(-1, 4), drifted.reshape(-1, 4)
    torch.testing.assert_close(found["q",][0], b.T @ b / 15)
    torch.testing.assert_close(found["q",][1], (a - b).T @ b / 15)
    with torch.no_grad():
        a, b = block.q(a), block.q(b)
    torch.testing.assert_close(found["o",][1], (a - b).T @ b / 15)


def test_weighted_linears_each_have_their_own(generator):
    block = Block()
    weights = {"q": torch.rand(1, 10, generator=generator), "o": torch.rand(3, 10, generator=generator)}
    watcher = BlockHessians("blocks.0", weights)
    x = torch.randn(2, 1, 5, 4, generator=generator)
    with watcher.watching(block), torch.no_grad():
        for batch in x:
            block(batch)
    found = {linears: hessian for linears, (hessian, _, _) in collected(watcher).items()}
    rows = x.reshape(-1, 4)
    torch.testing.assert_close(found["q",][0], (rows * weights["q"][0, :, None]).T @ rows / 10)
    assert found["o",].shape == (3, 4, 4)


class Experts(nn.Module):
    """Sends tokens with a positive first element to one linear, the others to another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.all = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        rows = x.reshape(-1, 4)
        self.a(rows[rows[:, 0] > 0])
        self.b(rows[rows[:, 0] <= 0])
        return self.all(x)


def test_experts_that_see_other_tokens_in_another_run_count_them_alike(generator):
    block = Experts()
    original, drifted = torch.randn(2, 1, 9, 4, generator=generator)
    weights = {name: torch.rand(1, 9, generator=generator) for name in ("a", "b", "all")}
    watcher = BlockHessians("blocks.0", weights, paired=True)
    with watcher.watching(block), torch.no_grad():
        block(original)
        block(drifted)
    found = collected(watcher)
    chosen = drifted.reshape(-1, 4)[drifted.reshape(-1, 4)[:, 0] > 0]
    torch.testing.assert_close(found["a",][0][0], chosen.T @ chosen / len(chosen))
    assert found["a",][1].eq(0).all() and not found["all",][1].eq(0).all()


def test_experts_that_some_runs_never_reach(generator):
    """One watcher over three runs, and one for each share of them: the same bits for every linear."""
    x = torch.randn(3, 1, 9, 4, generator=generator)
    x[0, ..., 0], x[1, ..., 0] = x[0, ..., 0].abs(), -x[1, ..., 0].abs()  # the first run goes to `a` alone, the second to `b`
    block = Experts()

    def watched(runs):
        watcher = BlockHessians("blocks.0", first_run=runs.start)
        with watcher.watching(block), torch.no_grad():
            for run in runs:
                block(x[run])
                watcher.end_run()
        return watcher.collect()

    whole = sources_of({range(0, 3): watched(range(0, 3))}, 1.0)
    shared = sources_of({runs: watched(runs) for runs in (range(0, 1), range(1, 2), range(2, 3))}, 1.0)
    assert set(whole) == set(shared) == {"a", "b", "all"}
    for name, source in whole.items():
        one, other = source.load(CPU), shared[name].load(CPU)
        assert torch.equal(one.hessian, other.hessian) and one.num_tokens == other.num_tokens > 0
    rows = x.reshape(-1, 4)
    chosen = rows[rows[:, 0] > 0]
    torch.testing.assert_close(shared["a"].load(CPU).hessian, chosen.T @ chosen / len(chosen))
