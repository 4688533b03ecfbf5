"""What several tests of runs compare with."""

import pytest

from tests.conftest import make_tiny_llama
from vptq.finetune_config import FinetuneConfig

ROTATED = {"rotation": "hadamard", "codebook_scope": "shared", "num_centroids": (-1, 16), "vector_lens": (-1, 1)}


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The demo model by one process."""
    from tests.pipeline.test_same_bytes import PLAIN, run

    return run(tmp_path_factory.mktemp("demo"), 1, PLAIN)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    from vptq.config import CalibrationConfig, LinearConfig, QuantConfig
    from vptq.pipeline.run import quantize_model

    linear = LinearConfig(vector_lens=(-1, 4), num_centroids=(-1, 256), kiter=10)
    output = tmp_path_factory.mktemp("demo")
    config = QuantConfig(
        output_dir=str(output), device="cpu", linear=linear, calibration=CalibrationConfig(nsamples=16, seq_len=128)
    )
    return quantize_model(config).folder / "packed_model"


@pytest.fixture(scope="session")
def originals(tiny_llama, tmp_path_factory):
    """By kind: head and embeddings tied, and not, so that rotations fold."""
    folder = tmp_path_factory.mktemp("untied")
    return {"plain": tiny_llama, "trellis": tiny_llama, "folded": make_tiny_llama(folder / "m", tie_word_embeddings=False)}


@pytest.fixture(scope="session")
def checkpoints(originals, text_file, tmp_path_factory):
    from tests.pipeline.test_run import config_of
    from vptq.pipeline.run import quantize_model

    out = tmp_path_factory.mktemp("packed")
    trellis = ROTATED | {"trellis_bits": 2}
    settings = {"plain": {}, "trellis": trellis, "folded": trellis}
    return {
        kind: quantize_model(config_of(originals[kind], text_file, out / kind, **s)).folder / "packed_model"
        for kind, s in settings.items()
    }


@pytest.fixture
def wishes(originals, checkpoints, text_file, tmp_path):
    """Makes a FinetuneConfig for one kind of checkpoint."""

    def make(kind="plain", **changes):
        settings = {
            "model_name": str(checkpoints[kind]), "original": str(originals[kind]), "output_dir": str(tmp_path),
            "dataset": (str(text_file),), "nsamples": 10, "num_held_out": 2, "seq_len": 64, "steps": 6, "eval_every": 2,
            "batch_size": 4, "micro_batch_size": 2, "device": "cpu", "eval_dataset": (str(text_file),), "eval_nsamples": 4,
        }  # fmt: skip
        return FinetuneConfig(**settings | changes)

    return make
