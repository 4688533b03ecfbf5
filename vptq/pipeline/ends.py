"""Head and embeddings: quantized row by row, so that one token's row can be looked up without the others.

Vectors run along a row, rotated on the input side alone, with a Gaussian codebook and a scale for each row. Where the head
is the embeddings, one matrix stays one.
"""

from __future__ import annotations

from dataclasses import dataclass

from vptq.config import LinearConfig, QuantConfig
from vptq.errors import UsageError
from vptq.models.architecture import LinearInfo, Skeleton
from vptq.recipe import OFF, ROWS


@dataclass(frozen=True)
class End:
    """A head or an embedding to quantize. weight_of: the embedding that this head is; empty for a matrix of its own."""

    info: LinearInfo
    config: LinearConfig
    weight_of: str = ""


def choose_ends(config: QuantConfig, skeleton: Skeleton) -> list[End]:
    """What `--head_bits` and `--embed_bits` ask for, embeddings first.

    Raises:
        UsageError: a model without the usual head or embeddings, or two sizes for one matrix.
    """
    asked = {"embedding": config.embed_bits, "head": config.head_bits}
    if all(bits is None for bits in asked.values()):
        return []
    infos = {which: skeleton.end(which) for which in ("embedding", "head")}
    missing = [which for which, bits in asked.items() if infos[which] is None and (bits is not None or skeleton.is_tied)]
    if missing:
        raise UsageError(
            f"this model has no plain {' and '.join(missing)} to quantize", hint="leave out --head_bits and --embed_bits"
        )
    embedding, head = infos["embedding"], infos["head"]
    if skeleton.is_tied and embedding is not None and head is not None:
        sizes = {bits for bits in asked.values() if bits is not None}
        if len(sizes) > 1:
            raise UsageError(
                "head and embeddings of this model are one matrix", hint="set --head_bits or --embed_bits, or both alike"
            )
        setting = row_setting(sizes.pop(), config.linear.rotation_seed)
        return [End(embedding, setting), End(head, setting, weight_of=embedding.name)]
    found = []
    for which, info in infos.items():
        bits = asked[which]
        if bits is not None and info is not None:
            found.append(End(info, row_setting(bits, config.linear.rotation_seed)))
    return found


def row_setting(bits: int, seed: int) -> LinearConfig:
    """How rows are quantized at a number of bits a weight."""
    vector_len, num_centroids = ROWS[bits]
    return LinearConfig(
        vector_lens=(OFF, vector_len),
        num_centroids=(OFF, num_centroids),
        vector_quant_dim="in",
        rotation="hadamard",
        rotation_sides="in",
        rotation_seed=seed,
        codebook_scope="shared",
        scale_scope="row",
        enable_perm=False,
    )
