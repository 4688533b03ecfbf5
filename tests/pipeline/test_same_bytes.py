"""One, two and three workers: the same bytes."""

import pytest

from tests.pipeline.test_run import packed_bytes
from vptq.config import QuantConfig
from vptq.models.architecture import DEMO
from vptq.pipeline.run import quantize_model

PLAIN = {"vector_lens": (-1, 4), "num_centroids": (-1, 64), "kiter": 2}
WHOLE = PLAIN | {"hessian": "fisher", "sequential": True, "rotation": "hadamard", "codebook_scope": "shared"}


def run(folder, num_gpus, settings, model=None, progress=None):
    """Three runs of sequences, so that three workers have one each."""
    common = {"output_dir": str(folder), "num_gpus": num_gpus, "device": "cpu", "nsamples": 96, "seq_len": 128}
    texts = {"dataset": str(DEMO / "calibration.txt"), "eval_dataset": str(DEMO / "evaluation.txt"), "eval_nsamples": 1}
    return quantize_model(
        QuantConfig.from_flat(common | texts | settings | {"model_name": model and str(model)}), progress=progress
    )


@pytest.mark.parametrize("settings, demo", [(PLAIN, True), (WHOLE, False)], ids=["plain", "everything"])
@pytest.mark.ci
def test_the_number_of_workers_does_not_show(settings, demo, demo_run, tiny_llama, tmp_path):
    model = None if demo else tiny_llama
    whole = demo_run if demo else run(tmp_path / "1", 1, settings, model)
    for count in (2, 3) if demo else (3,):
        found = run(tmp_path / str(count), count, settings, model)
        assert packed_bytes(found.folder) == packed_bytes(whole.folder)
        for one, other in zip(whole.figures, found.figures, strict=True):
            assert one | {"seconds": 0} == other | {"seconds": 0}
        assert all((found.folder / "logs" / f"{worker}.log").exists() for worker in range(count))
