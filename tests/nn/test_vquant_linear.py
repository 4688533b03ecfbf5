"""Packed linears: the same weight however it is read, and no memory blow-up."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import problem
from tests.quantize.test_linear import CASES, settings
from vptq.checkpoint.names import check_tensors, to_tensors
from vptq.errors import CheckpointError, VptqError
from vptq.layer_config import PLAIN_KEYS, LayerConfig
from vptq.nn.reference import dequantize_packed
from vptq.nn.vquant_linear import VQuantLinear, cache_weights
from vptq.quantize.linear import quantize_linear

ALL_CASES = pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))


def packed(case: str, generator, dtype=torch.float16, bias=False):
    config = settings(**CASES[case])
    quantized, _ = quantize_linear(*problem(30, 48, generator), config, storage_dtype=dtype)
    layer = LayerConfig.of(config, quantized.geometry, bias)
    return quantized, layer, to_tensors(quantized, layer, dtype)


def module_of(layer, tensors, device="cpu", dtype=torch.float16):
    module = VQuantLinear(**layer.to_dict(), device=device, dtype=dtype)
    module.load_state_dict(tensors, strict=True)
    return module


@ALL_CASES
def test_file_tensors_give_the_quantized_weight_back(generator, case):
    quantized, layer, tensors = packed(case, generator)
    assert torch.equal(dequantize_packed(tensors, layer, torch.float32), quantized.dequantize())


@ALL_CASES
def test_chunks_do_not_matter(generator, case, monkeypatch):
    _, layer, tensors = packed(case, generator)
    whole = dequantize_packed(tensors, layer, torch.float32)
    monkeypatch.setattr("vptq.nn.vectors.CHUNK_WEIGHTS", 100)
    assert torch.equal(dequantize_packed(tensors, layer, torch.float32), whole)


@ALL_CASES
def test_stored_tensors_are_as_announced(generator, case):
    _, layer, tensors = packed(case, generator)
    expected = layer.tensor_shapes()
    assert set(tensors) == set(expected)
    kinds = {torch.int32: "int32", torch.int16: "int16", torch.float16: "float"}
    assert {k: (tuple(t.shape), kinds[t.dtype]) for k, t in tensors.items()} == expected


@ALL_CASES
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (4, 5)], ids=str)
def test_module_equals_linear_with_the_dequantized_weight(generator, case, shape, device):
    quantized, layer, tensors = packed(case, generator, dtype=torch.float32)
    module = module_of(layer, tensors, device, torch.float32)
    x = torch.randn(*shape, 48, generator=generator)
    expected = x @ quantized.dequantize().T
    torch.testing.assert_close(module(x.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)


@ALL_CASES
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_is_no_more_than_that_of_torch_in_the_same_type(generator, case, count, dtype, device):
    quantized, layer, tensors = packed(case, generator, dtype=dtype)
    module = module_of(layer, tensors, device, dtype)
    x = torch.randn(count, 48, generator=generator).to(dtype)
    weight = quantized.dequantize()
    exact = x.double() @ weight.double().T
    theirs = (torch.nn.functional.linear(x.to(device), weight.to(device, dtype)).cpu().double() - exact).norm()
    assert (module(x.to(device)).cpu().double() - exact).norm() <= 2 * theirs


@ALL_CASES
@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.ci
def test_compiled_and_exported_alike(generator, case, count):
    _, layer, tensors = packed(case, generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    x = torch.randn(count, 48, generator=generator)
    expected = module(x)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)


@ALL_CASES
@pytest.mark.parametrize("count", [1, 20])
def test_gradients_reach_inputs_codebooks_scales_and_offsets(generator, case, count, device):
    _, layer, tensors = packed(case, generator, dtype=torch.float32)
    module = module_of(layer, tensors, device, torch.float32)
    learning = [p.requires_grad_() for p in module.parameters() if p.is_floating_point()]
    x = torch.randn(count, 48, generator=generator).to(device).requires_grad_()
    slope = torch.randn(count, 30, generator=generator).to(device)
    found = torch.autograd.grad((module(x) * slope).sum(), [x, *learning])
    step = 1e-2
    for own, leaf in zip(found, [x, *learning], strict=True):
        way = torch.randn(leaf.shape, generator=generator).to(device)
        with torch.no_grad():
            kept = leaf.clone()
            values = []
            for sign in (1, -1):
                leaf.copy_(kept + sign * step * way)
                values.append(((module(x) * slope).sum()).double())
            leaf.copy_(kept)
        assert (values[0] - values[1]).item() / (2 * step) == pytest.approx((own * way).sum().item(), rel=1e-2, abs=1e-2)


@ALL_CASES
def test_exports_for_any_number_of_rows(generator, case):
    _, layer, tensors = packed(case, generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(module, (torch.randn(8, 48, generator=generator),), dynamic_shapes={"x": {0: rows}})
    for count in (2, 12, 13, 33):
        x = torch.randn(count, 48, generator=generator)
        torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-4, atol=1e-4)


def test_trains_after_it_has_served(generator):
    _, layer, tensors = packed("out", generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    for cached in (False, True):
        module.set_cache(cached)
        with torch.inference_mode():
            module(torch.randn(1, 48, generator=generator))
        x = torch.randn(2, 48, generator=generator, requires_grad=True)
        module(x).sum().backward()
        assert torch.allclose(x.grad[0], module.dequantize().sum(0), atol=1e-4)


def test_a_cached_weight_is_not_used_while_codebooks_learn(generator):
    _, layer, tensors = packed("out", generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    module.set_cache(True)
    x = torch.randn(20, 48, generator=generator)
    before = module(x)
    module.centroids.weight.requires_grad_()
    assert module(x).requires_grad and module(x).requires_grad
    with torch.no_grad():
        module.centroids.weight.mul_(2)
    module.centroids.weight.requires_grad_(False)
    assert not torch.allclose(module(x), before), "a codebook that was written to"


def test_offloaded_tensors_are_told(generator):
    _, layer, tensors = packed("out", generator)
    for count in (1, 20):
        module = module_of(layer, tensors)
        module.centroids.to("meta")
        with pytest.raises(VptqError, match="offloaded"):
            module(torch.randn(count, 48, generator=generator))


def test_autocast_decides_the_type(generator):
    _, layer, tensors = packed("out", generator)
    module = module_of(layer, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert {module(torch.randn(count, 48)).dtype for count in (1, 20)} == {torch.bfloat16}


def test_copies_and_pickles_carry_nothing_that_is_kept(generator):
    _, layer, tensors = packed("out", generator)
    module = module_of(layer, tensors)
    size = len(pickle.dumps(module))
    module(torch.randn(1, 48, generator=generator))
    assert module._prepared and len(pickle.dumps(module)) == size
    assert not copy.deepcopy(module)._prepared
    assert not module.to("meta")._prepared, "what it leaves behind is not held"


def test_cached_weights_stay_within_the_limit(generator):
    _, layer, tensors = packed("out", generator)
    model = torch.nn.Sequential(*(module_of(layer, tensors) for _ in range(3)))
    each = 30 * 48 * 4
    assert cache_weights(model, limit=2 * each) == 2 * each
    for module in model:
        module(torch.randn(1, 48, generator=generator))
    assert [bool(module._cached) for module in model] == [True, True, False]
    assert cache_weights(model, False) == 0 and all(not module._cached for module in model)
    assert cache_weights(model) == 3 * each


def test_works_when_made_in_inference_mode(generator):
    _, layer, tensors = packed("out", generator)
    x = torch.randn(1, 48, generator=generator)
    with torch.inference_mode():
        module = module_of(layer, tensors)
        found = module(x)
    torch.testing.assert_close(found, module_of(layer, tensors)(x))


def test_changed_tensors_are_seen(generator):
    _, layer, tensors = packed("out", generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    x = torch.randn(1, 48, generator=generator)
    before = module(x)
    module.load_state_dict(tensors | {"centroids.weight": 2 * tensors["centroids.weight"]})
    assert not torch.allclose(module(x), before)
    assert torch.allclose(module(x), x @ module.dequantize().T, atol=1e-4)


def test_bias_is_added(generator):
    _, layer, tensors = packed("out", generator, bias=True)
    bias = torch.randn(30, generator=generator).half()
    module = module_of(layer, tensors | {"bias": bias})
    x = torch.zeros(1, 48)
    assert torch.allclose(module(x)[0], bias.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_is_rounded_to_the_stored_type(generator, dtype):
    quantized, layer, tensors = packed("residual", generator, dtype)
    module = module_of(layer, tensors, dtype=dtype)
    assert torch.equal(module.dequantize(torch.float32), quantized.dequantize().to(dtype).float())


def test_cache_keeps_the_weight_and_drops_it(generator):
    _, layer, tensors = packed("out", generator)
    module = module_of(layer, tensors)
    x = torch.randn(2, 48, generator=generator)
    fresh = module(x)
    assert not module._cached
    cache_weights(torch.nn.Sequential(module), True)
    torch.testing.assert_close(module(x), fresh, rtol=1e-3, atol=1e-2)
    assert bool(module._cached)
    half = module(x.half())  # a cached weight of another type is not used
    torch.testing.assert_close(half, module_of(layer, tensors)(x.half()), rtol=1e-2, atol=1e-2)
    cache_weights(torch.nn.Sequential(module), False)
    assert not module._cached
    assert set(module.state_dict()) == set(tensors), "the cache is not part of the checkpoint"


def test_gradient_reaches_the_input(generator):
    _, layer, tensors = packed("out", generator, dtype=torch.float32)
    module = module_of(layer, tensors, dtype=torch.float32)
    x = torch.randn(2, 48, generator=generator, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad[0], module.dequantize().sum(0), atol=1e-4)


def test_dequantize_unpacks_a_few_rows_at_a_time(monkeypatch):
    """The whole matrix of indices would be 512x512; no unpacked piece may come near."""
    import vptq.nn.vectors as vectors

    layer = LayerConfig.of(settings(), plan(2048, 512), bias=False)
    tensors = {k: torch.zeros(s, dtype={"int32": torch.int32, "int16": torch.int16}.get(kind, torch.float16))
               for k, (s, kind) in layer.tensor_shapes().items()}  # fmt: skip
    sizes = []
    real = vectors.unpack_bits
    monkeypatch.setattr(vectors, "unpack_bits", lambda *a: sizes.append(real(*a).numel()) or real(*a))
    monkeypatch.setattr(vectors, "CHUNK_WEIGHTS", 1 << 16)
    dequantize_packed(tensors, layer, torch.float16)
    assert max(sizes) <= (1 << 16) // 4 and sum(sizes) == 512 * 512


def plan(out_features, in_features):
    from vptq.geometry import plan_geometry

    return plan_geometry(out_features, in_features, settings())[0]


def test_plain_case_has_exactly_the_thirteen_keys(generator):
    for case in ("out", "residual", "outliers groups", "no norm", "no perm"):
        _, layer, tensors = packed(case, generator)
        assert tuple(layer.to_dict()) == PLAIN_KEYS
        assert layer.enable_norm and {"weight_scale", "weight_bias"} <= set(tensors), "every loader wants a scale"


def test_extensions_say_what_they_are(generator):
    _, layer, _ = packed("8 bits", generator)
    assert layer.to_dict()["bitwidth"] == 8 and not layer.is_plain
    assert LayerConfig.from_dict("x", layer.to_dict()) == layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 47}, "47 columns, in_features is 48"),
        ({"is_indice_packed": False}, "unpacked indices"),
        ({"num_centroids": [-1, 1 << 40]}, "settings that can.t be"),
        ({"num_centroids": [-1, 1 << 20], "num_res_centroids": [-1, 1 << 20]}, "does not fit 32"),
        ({"num_centroids": None}, "lacks settings"),
    ],
)
def test_damaged_settings_are_refused(generator, change, message):
    _, layer, _ = packed("out", generator)
    entry = {k: v for k, v in (layer.to_dict() | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        LayerConfig.from_dict("x", entry)


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_damaged_tensors_are_refused(generator, fault):
    _, layer, tensors = packed("out", generator)
    if fault == "missing":
        del tensors["perm"]
    elif fault == "shape":
        tensors["perm"] = tensors["perm"][:-1]
    else:
        tensors["indices"] = tensors["indices"].float()
    with pytest.raises(CheckpointError, match=r"blk\.q\.(perm|indices)"):
        check_tensors({key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}, layer, "blk.q")


def test_golden_file_still_opens():
    """A linear with residual, outliers, groups and padding, and its weight, frozen when the format was made."""
    path = Path(__file__).parents[1] / "data" / "golden_linear.safetensors"
    with safe_open(path, framework="pt") as file:
        layer = LayerConfig.from_dict("golden", json.loads(file.metadata()["layer_config"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    expected = tensors.pop("expected_weight")
    assert torch.equal(dequantize_packed(tensors, layer, torch.float32), expected)


def test_reading_other_weights_drops_what_was_kept(generator):
    from tests.nn.test_fused import random_module

    first, second = (random_module("residual", (40, 64), torch.float32, torch.device("cpu"), generator) for _ in range(2))
    x = torch.randn(2, 64, generator=generator)
    first(x)
    assert first._prepared
    first.load_state_dict(second.state_dict())
    assert not first._prepared and torch.equal(first(x), second(x))
