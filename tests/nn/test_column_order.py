"""Columns in the order of the inputs: the same weight, and nothing left to do."""

import pytest
import torch

from tests.nn.test_fused import SETTINGS, random_module
from vptq.nn import column_order
from vptq.nn.column_order import can_fold_order, fold_order
from vptq.nn.packing import from_uint16_bits

FOLDED = ["v2k8", "v6k4096", "v8k65536", "residual", "residual of 32 bits", "codebook in 8 bits"]
LEFT = ["groups", "outliers", "inputs", "no scale, no order", "trellis 2"]


@pytest.mark.parametrize("setting", FOLDED)
def test_the_weight_stays_and_the_order_goes(setting, generator, monkeypatch):
    monkeypatch.setattr(column_order, "AT_ONCE", 1000)
    module = random_module(setting, (100, 204), torch.float32, torch.device("cpu"), generator)
    before = module.dequantize()
    tensors = module.stored_tensors()
    assert can_fold_order(module.layer_config)
    assert not torch.equal(from_uint16_bits(tensors["perm"]), torch.arange(204))
    fold_order(tensors, module.layer_config)
    assert torch.equal(from_uint16_bits(module.perm.data), torch.arange(204))
    assert torch.equal(module.dequantize(), before)
    indices = module.indices.clone()
    fold_order(tensors, module.layer_config)
    assert torch.equal(module.indices, indices)


@pytest.mark.parametrize("setting", LEFT)
def test_what_can_not_change_places_is_left(setting, generator):
    assert setting in SETTINGS
    module = random_module(setting, (384, 256), torch.float32, torch.device("cpu"), generator)
    assert not can_fold_order(module.layer_config)


def test_what_fails_half_way_leaves_all_as_it_was(generator, monkeypatch):
    monkeypatch.setattr(column_order, "AT_ONCE", 1000)
    module = random_module("v6k4096", (100, 204), torch.float32, torch.device("cpu"), generator)
    before, calls = module.dequantize(), []
    real = column_order.pack_bits

    def fail(*given):
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError
        return real(*given)

    monkeypatch.setattr(column_order, "pack_bits", fail)
    with pytest.raises(MemoryError):
        fold_order(module.stored_tensors(), module.layer_config)
    assert len(calls) == 2 and torch.equal(module.dequantize(), before)
