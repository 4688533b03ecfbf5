"""What must hold on a real model. Slow: VPTQ_TEST_MODEL and VPTQ_TEST_TEXT name a model folder and a calibration text.

VPTQ_TEST_MODEL=./smollm2-135m VPTQ_TEST_TEXT=c4_sample.txt python -m pytest -m slow
"""

from __future__ import annotations

import os

import pytest

from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
from vptq.pipeline.evaluate import evaluate_model
from vptq.pipeline.run import quantize_model

MODEL, TEXT = os.environ.get("VPTQ_TEST_MODEL"), os.environ.get("VPTQ_TEST_TEXT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL and TEXT), reason="VPTQ_TEST_MODEL and VPTQ_TEST_TEXT name no model and text"),
]


def run(output, **linear):
    settings = {"vector_lens": (-1, 4), "num_centroids": (-1, 256), "kiter": 30} | linear
    return quantize_model(
        QuantConfig(
            model_name=MODEL,
            output_dir=str(output),
            save_model=True,
            linear=LinearConfig(**settings),
            calibration=CalibrationConfig(dataset=TEXT, nsamples=16, seq_len=1024),
        )
    )


@pytest.fixture(scope="module")
def with_residual(tmp_path_factory):
    return run(tmp_path_factory.mktemp("residual"), num_res_centroids=(-1, 256))


def share(conditions) -> float:
    conditions = list(conditions)
    return sum(conditions) / len(conditions)


def test_sweep_and_residual_lower_the_error_of_nine_linears_in_ten(with_residual):
    assert share(f["error_sweep"] < f["error_kmeans"] for f in with_residual.figures) > 0.9
    assert share(f["error_residual"] < f["error_sweep"] for f in with_residual.figures) > 0.9


def test_normalising_beats_not_normalising_in_nine_linears_of_ten(with_residual, tmp_path):
    plain = run(tmp_path, enable_norm=False)
    pairs = zip(with_residual.figures, plain.figures, strict=True)
    assert share(a["error_sweep"] < b["error_sweep"] for a, b in pairs) > 0.9


def test_packed_and_dequantized_perplexity_agree_to_four_digits(with_residual):
    found = [
        evaluate_model(str(with_residual.folder / which), [TEXT], seq_len=1024, limit=4)[0].perplexity
        for which in ("packed_model", "model")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.gpu
def test_kernels_quantize_as_well_as_their_twins(tmp_path, monkeypatch):
    """One linear moves by some percent either way, as with another seed; their mean must not."""
    means = {}
    for kernels in ("triton", "torch"):
        monkeypatch.setenv("VPTQ_KERNELS", kernels)
        figures = run(tmp_path / kernels).figures
        for key in ("error_kmeans", "error_sweep"):
            means[kernels, key] = sum(f[key] for f in figures) / len(figures)
    for key in ("error_kmeans", "error_sweep"):
        assert means["triton", key] == pytest.approx(means["torch", key], rel=5e-3)
