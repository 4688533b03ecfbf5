"""Which linears are quantized together."""

from __future__ import annotations

import pytest
import torch

from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.models.architecture import load_skeleton
from vptq.pipeline.plan import make_plan
from vptq.pipeline.task import LinearTask, make_batches
from vptq.quantize import linear


@pytest.fixture
def tasks(tiny_llama, text_file):
    setting = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 16))
    config = QuantConfig(model_name=str(tiny_llama), linear=setting, calibration=CalibrationConfig(dataset=str(text_file)))
    skeleton = load_skeleton(tiny_llama, False, None)
    plan = make_plan(config, skeleton, skeleton.source())
    return [LinearTask(own, torch.float16) for own in plan.of_block(0)]


def names(batches):
    return [[t.plan.info.suffix.rsplit(".", 1)[-1].removesuffix("_proj") for t in batch] for batch in batches]


def test_linears_of_one_shape_fill_a_gpu_together(tasks, kernel_device, monkeypatch):
    assert names(make_batches(tasks, kernel_device)) == [["q", "o"], ["k", "v"], ["gate", "up"], ["down"]]
    monkeypatch.setattr(linear, "BATCH_VECTORS", 300)  # k and v have 128 vectors each, q and o 256, gate and up 384
    assert names(make_batches(tasks, kernel_device)) == [["q"], ["o"], ["k", "v"], ["gate"], ["up"], ["down"]]


def test_a_cpu_takes_one_at_a_time(tasks):
    assert all(len(batch) == 1 for batch in make_batches(tasks, torch.device("cpu")))
