"""Unpacked weights in place of packed ones: the same products and the same gradients."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.nn.test_fused import SETTINGS, random_module
from tests.nn.test_vquant_linear import module_of, packed
from vptq.finetune import unpacked as unpacking
from vptq.finetune.unpacked import Unpacked, bytes_unpacked, fits

SHAPE = (76, 60)


def learning(module):
    """Let all floats of a module learn."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    return module


def gradients(module):
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.replace(" ", "-"))
def test_gradients_are_those_of_packed_products(setting, generator, device):
    module = learning(random_module(setting, SHAPE, torch.float32, device, generator, bias=True))
    batches = [torch.randn(3, SHAPE[1], generator=generator).to(device).requires_grad_() for _ in range(3)]
    for x in batches:
        module(x).square().sum().backward()
    expected, inputs = gradients(module), [x.grad for x in batches]
    for x in batches:
        x.grad = None
    with Unpacked(module, torch.float32).learning():
        for x in batches:
            module(x).square().sum().backward()
    found = gradients(module)
    assert set(found) == set(expected) == {name for name, p in module.named_parameters() if p.is_floating_point()}
    for one, other in [
        *((found[name], expected[name]) for name in expected),
        *zip((x.grad for x in batches), inputs, strict=True),
    ]:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("setting", ["outliers", "rotated", "trellis 2"])
def test_products_are_those_of_the_packed_weight(setting, generator, device):
    module = random_module(setting, SHAPE, torch.float32, device, generator)
    x = torch.randn(20, SHAPE[1], generator=generator).to(device)
    with Unpacked(module, torch.float32).looking(), torch.no_grad():
        assert module.stand_in is not None
        found = module(x)
    assert module.stand_in is None
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-4)


def test_each_step_sees_the_values_of_its_time(generator):
    _, layer, tensors = packed("residual", generator, dtype=torch.float32)
    module = learning(module_of(layer, tensors, dtype=torch.float32))
    unpacked, x = Unpacked(module, torch.float32), torch.randn(5, 48, generator=generator)
    with unpacked.looking(), torch.no_grad():
        before = module(x)
    with torch.no_grad():
        module.weight_scale.mul_(2)
    with unpacked.learning():
        after = module(x)
        after.sum().backward()
    torch.testing.assert_close(after, module(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before)


def test_what_does_not_learn_is_unpacked_once_and_hands_gradients_on(generator, monkeypatch):
    _, layer, tensors = packed("residual", generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    calls = []
    real = type(module).unpacked_weight
    monkeypatch.setattr(type(module), "unpacked_weight", lambda self: calls.append(1) or real(self))
    unpacked, x = Unpacked(module, torch.float32), torch.randn(5, 48, generator=generator).requires_grad_()
    for _ in range(3):
        with unpacked.learning():
            module(x).sum().backward()
    assert len(calls) == 1 and x.grad is not None
    assert all(p.grad is None for p in module.parameters())


def test_a_shared_codebook_gets_the_gradients_of_all(generator):
    _, layer, tensors = packed("out", generator, dtype=torch.float32)
    lent = {name: tensor for name, tensor in tensors.items() if not name.startswith("centroids")}
    owner = module_of(layer, tensors, dtype=torch.float32)
    sharer = module_of(dataclasses.replace(layer, codebook_of="0"), lent, dtype=torch.float32)
    sharer.share_codebook(owner)
    owner.centroids.weight.requires_grad_()
    both, x = nn.ModuleList([owner, sharer]), torch.randn(5, 48, generator=generator)
    (owner(x).square() + sharer(2 * x).square()).sum().backward()
    expected = owner.centroids.weight.grad.clone()
    owner.centroids.weight.grad = None
    with Unpacked(both, torch.float32).learning():
        (owner(x).square() + sharer(2 * x).square()).sum().backward()
    torch.testing.assert_close(owner.centroids.weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_short_floats_are_added_up_in_float32(generator):
    """Many small ones, which bfloat16 would lose beside the first."""
    _, layer, tensors = packed("residual", generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    module.weight_bias.requires_grad_()
    with Unpacked(module, torch.bfloat16).learning():
        for size in (1.0, *[1 / 512] * 512):
            module(torch.full((1, 48), size, dtype=torch.bfloat16)).sum().backward()
    torch.testing.assert_close(module.weight_bias.grad, torch.full((48,), 60.0))


def test_a_step_that_fails_leaves_the_linears_packed(generator):
    _, layer, tensors = packed("residual", generator, dtype=torch.float32)
    module = learning(module_of(layer, tensors, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="stop"), Unpacked(module, torch.float32).learning():
        module(torch.ones(2, 48)).sum().backward()
        raise RuntimeError("stop")
    assert module.stand_in is None and module.weight_scale.grad is None


def test_memory_decides(generator, monkeypatch):
    _, layer, tensors = packed("residual", generator)
    module = module_of(layer, tensors)
    assert bytes_unpacked(module, torch.bfloat16) == 30 * 48 * 6
    for room, expected in ((30 * 48 * 6 / 0.4 + 1, True), (30 * 48 * 6 / 0.4 - 1, False)):
        monkeypatch.setattr(unpacking, "free_memory", lambda device, room=room: room)
        assert fits(module, torch.bfloat16, torch.device("cpu")) is expected


def test_nothing_keeps_the_weights_after_a_training(generator):
    """torch keeps hooks of tensors, and all that they belong to, for ever."""
    _, layer, tensors = packed("residual", generator, dtype=torch.float32)
    module = learning(module_of(layer, tensors, dtype=torch.float32))
    unpacked = Unpacked(module, torch.float32)
    with unpacked.learning():
        module(torch.ones(2, 48)).sum().backward()
    weight = weakref.ref(unpacked._stands[0]._weight)
    assert weight() is not None
    del unpacked
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("setting", ["trellis 2", "residual", "outliers"])
def test_step_after_step_gradients_are_those_of_the_weights_as_they_are_by_then(setting, generator, device):
    """On a GPU the work of a step is recorded at the third, and played again from then on."""
    module = learning(random_module(setting, SHAPE, torch.float32, device, generator))
    unpacked = Unpacked(module, torch.float32)
    x = torch.randn(5, SHAPE[1], generator=generator).to(device)
    for _ in range(6):
        module(x).square().sum().backward()
        expected = gradients(module)
        with unpacked.learning():
            module(x).square().sum().backward()
        found = {name: gradient.clone() for name, gradient in gradients(module).items()}
        assert set(found) == set(expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in found:
                    parameter.sub_(0.1 * found[name] / found[name].abs().max().clamp_min(1e-9))
    assert unpacked.fault is None
    if device.type == "cuda":
        assert unpacked._give._graph is not None and unpacked._refresh._graph is not None


def test_a_step_of_other_work_is_not_played_again(generator, monkeypatch):
    """Where a learner has a gradient already, as from embeddings that share its codebook, what was recorded would lose it."""
    module = learning(random_module("trellis 2", SHAPE, torch.float32, torch.device("cpu"), generator))
    unpacked, played = Unpacked(module, torch.float32), []
    give = unpacked._give
    monkeypatch.setattr(unpacked, "_give", lambda: played.append(True) or give())
    x = torch.randn(5, SHAPE[1], generator=generator)
    with unpacked.learning():
        module(x).square().sum().backward()
    first = gradients(module)
    assert played == [True]
    name = next(name for name in first if "centroids" in name)
    module.get_parameter(name).grad = torch.ones_like(first[name])
    with unpacked.learning():
        module(x).square().sum().backward()
    assert played == [True]
    torch.testing.assert_close(gradients(module)[name], first[name] + 1)
