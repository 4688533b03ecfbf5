"""The words and limits of settings, and the recipe behind `--bits`. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

VectorQuantDim = Literal["out", "in"]
KMeansMode = Literal["hessian", "uniform"]
RotationKind = Literal["none", "hadamard"]
RotationSides = Literal["both", "in", "out"]
CodebookScope = Literal["group", "linear", "shared"]
CodebookSource = Literal["gaussian", "model"]
ScaleScope = Literal["linear", "row"]
HessianKind = Literal["input", "fisher"]
ExecutorKind = Literal["local", "ray"]
FinetuneMode = Literal["block", "e2e", "lora"]
AfterKind = Literal["block", "e2e"]  # of fine-tuning, right after a model is quantized
AddedKind = Literal["row_scales", "column_scales", "biases", "codebooks"]  # tensors that linears get to learn with
BlockPassKind = Literal["outputs", "predictions"]
TeacherKind = Literal["cached", "live"]
TrainableKind = Literal["codebooks", "scales", "offsets", "norms", "head", "indices"]
OFF = -1
MAX_CENTROIDS = 65536
MAX_VECTOR_LEN = 32
FLOAT_BITWIDTH = 16
MAX_STATE_BITS = 16
DRIFT_FRAC = 0.25
DEFAULT_SEQ_LEN = 2048
LADDER = (*((1, bits) for bits in range(1, 9)), (2, 3), (2, 5), (2, 7))  # (vector_len, trellis_bits): what --bits chooses from
RECIPE: dict[str, Any] = {  # what --bits is, where no flag says otherwise
    "rotation": "hadamard",
    "codebook_scope": "shared",
    "vector_lens": [-1, 1],
    "num_centroids": [-1, 4096],
    "trellis_bits": 2,
    "hessian": "fisher",
    "sequential": True,
}
VECTOR_SETTINGS = ("vector_lens", "num_centroids", "num_res_centroids", "trellis_bits", "codebook_scope")  # that --bits chooses
# (vector_len, num_centroids) of a head's or embedding's rows, by bits a weight
ROWS = {2: (4, 256), 3: (4, 4096), 4: (2, 256), 5: (1, 32), 6: (1, 64), 8: (1, 256)}
HUB_NAMES = ("wikitext2", "c4", "c4-new")  # datasets known by name
