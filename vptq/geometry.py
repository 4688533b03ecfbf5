"""How a weight matrix is cut: outlier columns, groups, vectors, and the sizes of what is stored. Imports no torch.

The order of the columns is the permuted one: outliers first, then `group_num` equal runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vptq.config import LinearConfig

WORD_BITS = 32
RING_UNIT = 32
LONGEST_RING = 256
SMALLEST_ROW_GROUP = 64


def index_bits(num_centroids: int) -> int:
    """Bits one index takes; 0 for a stage that is off."""
    return max(num_centroids - 1, 0).bit_length() if num_centroids > 0 else 0


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from a weight's shape and its settings.

    Attributes (those that don't speak for themselves):
        row_groups: runs of output rows with a rotation, a scale and a metric of their own.
        ring_len: vectors of one ring of a trellis, along the outputs; 0 without a trellis.
    """

    out_features: int
    in_features: int
    vector_quant_dim: str
    vector_len: int
    outlier_vector_len: int
    outlier_size: int
    group_num: int
    group_size: int
    row_groups: int = 1
    ring_len: int = 0

    def vector_grid(self, columns: int, vector_len: int) -> tuple[int, int]:
        """(rows, columns) of the vectors that cover `columns` whole input columns."""
        if self.vector_quant_dim == "out":
            rows = math.ceil(self.out_features / vector_len)
            return (math.ceil(rows / self.ring_len) * self.ring_len if self.ring_len else rows), columns
        return self.out_features, math.ceil(columns / vector_len)

    @property
    def group_grid(self) -> tuple[int, int]:
        return self.vector_grid(self.group_size, self.vector_len)

    @property
    def outlier_grid(self) -> tuple[int, int]:
        return self.vector_grid(self.outlier_size, self.outlier_vector_len)

    @property
    def num_vectors(self) -> int:
        """Main vectors, all groups."""
        return self.group_num * math.prod(self.group_grid)

    @property
    def num_outlier_vectors(self) -> int:
        return math.prod(self.outlier_grid) if self.outlier_size else 0

    @property
    def num_rings(self) -> int:
        """Rings of a trellis in one column."""
        return self.group_grid[0] // self.ring_len

    def of_row_group(self) -> Geometry:
        """The geometry of one group of rows taken for itself."""
        return replace(self, out_features=self.out_features // self.row_groups, row_groups=1)

    def packed_words(self, bits_per_value: int) -> int:
        """int32 words of one vector row of one group."""
        return math.ceil(self.group_grid[1] * bits_per_value / WORD_BITS)

    def group_columns(self, group: int) -> tuple[int, int]:
        """First and past-the-last permuted column of a group."""
        start = self.outlier_size + group * self.group_size
        return start, start + self.group_size


def plan_geometry(out_features: int, in_features: int, config: LinearConfig) -> tuple[Geometry | None, list[str]]:
    """The geometry of a linear under `config`, or None and what does not fit."""
    wanted = math.ceil(config.npercent * in_features / 100) if config.has_outliers else 0
    if config.group_size > 0:
        return _from_group_size(out_features, in_features, wanted, config)
    outlier_size, group_num = wanted, config.group_num
    if group_num > in_features - wanted:
        return None, [f"group_num={group_num} is more than the {in_features - wanted} columns there are"]
    remainder = (in_features - wanted) % group_num
    if remainder and not config.has_outliers:
        return None, [
            f"in_features={in_features} is not a multiple of group_num={group_num}, and without outliers "
            f"the last {remainder} columns can be stored nowhere"
        ]
    outlier_size += remainder
    return _checked(out_features, in_features, outlier_size, group_num, (in_features - outlier_size) // group_num, config)


def _from_group_size(
    out_features: int, in_features: int, outliers: int, config: LinearConfig
) -> tuple[Geometry | None, list[str]]:
    group_num, remainder = divmod(in_features - outliers, config.group_size)
    if remainder and not config.has_outliers:
        return None, [f"in_features={in_features} is not a multiple of group_size={config.group_size}"]
    if config.group_num not in (1, group_num):
        return None, [f"group_size={config.group_size} gives {group_num} groups, but group_num={config.group_num}"]
    return _checked(out_features, in_features, outliers + remainder, group_num, config.group_size, config)


def _checked(
    out_features: int, in_features: int, outlier_size: int, group_num: int, group_size: int, config: LinearConfig
) -> tuple[Geometry | None, list[str]]:
    faults = []
    if group_num < 1 or group_size < 1:
        faults.append(f"in_features={in_features} leaves no column for {config.group_num} groups")
    if config.enable_perm and not (config.absorb_perm or config.is_shared) and in_features > 65536:
        faults.append(f"in_features={in_features} is over 65536, more than a stored perm can name; set enable_perm False")
    if config.has_trellis and out_features % config.vector_len:
        faults.append(f"out_features={out_features} is not a multiple of vector_len={config.vector_len}, as a trellis needs")
    if faults:
        return None, faults
    row_groups = _row_groups(out_features, config)
    rows = out_features // row_groups // config.vector_len
    return (
        Geometry(
            out_features=out_features,
            in_features=in_features,
            vector_quant_dim=config.vector_quant_dim,
            vector_len=config.vector_len,
            outlier_vector_len=config.vector_lens[0] if outlier_size else 0,
            outlier_size=outlier_size,
            group_num=group_num,
            group_size=group_size,
            row_groups=row_groups,
            ring_len=_ring_length(rows) if config.has_trellis else 0,
        ),
        [],
    )


def _row_groups(out_features: int, config: LinearConfig) -> int:
    """The most groups, up to those asked for, that are whole, leave no padding between them, and are not too small.

    For a trellis of any vector length up to that of the ladder the same, so that every rung has the same groups.
    """
    lengths = {1, 2, config.vector_len} if config.has_trellis else {config.vector_len}
    for groups in range(config.row_groups, 1, -1):
        rows, rest = divmod(out_features, groups)
        if not rest and rows >= SMALLEST_ROW_GROUP and all(_fits(rows, v, config.has_trellis) for v in lengths):
            return groups
    return 1


def _fits(rows: int, vector_len: int, trellis: bool) -> bool:
    """Whether rows are whole vectors, and with a trellis whole rings, without padding."""
    vectors, rest = divmod(rows, vector_len)
    return not rest and not (trellis and vectors % _ring_length(vectors))


def _ring_length(rows: int) -> int:
    """Vectors a ring: a multiple of 32, so that its bits fill whole words; 128 to 256 where that is, with least padding."""
    most, least = max(1, math.ceil(rows / RING_UNIT)), max(1, math.ceil(rows / LONGEST_RING))
    lengths = {math.ceil(rows / rings / RING_UNIT) * RING_UNIT for rings in range(least, min(2 * least, most) + 1)}
    return min(lengths, key=lambda length: (math.ceil(rows / length) * length, -length))


def geometry_warnings(geometry: Geometry, config: LinearConfig) -> list[str]:
    """What works but wastes something."""
    if config.is_shared:  # a codebook serves all linears, whatever one of them uses of it
        return []
    group = math.prod(geometry.group_grid)
    stages = [
        ("a group has", group, config.num_centroids[1], config.vector_len, "centroids", geometry.group_num),
        ("a group has", group, config.num_res_centroids[1], config.vector_len, "residual centroids", geometry.group_num),
        ("the outliers have", geometry.num_outlier_vectors, config.num_centroids[0], config.vector_lens[0], "centroids", 1),
    ]
    weights = geometry.out_features * geometry.in_features
    return [
        f"{who} {vectors} vectors but {k} {what}: {k - vectors} of them are never used "
        f"({(k - vectors) * vector_len * config.bitwidth * books / weights:.2f} bits a weight)"
        for who, vectors, k, vector_len, what, books in stages
        if 0 < vectors < k
    ]
