"""Bring packed columns into the order of the inputs, so that no call has to bring x into theirs."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from vptq.layer_config import LayerConfig
from vptq.nn.packing import from_uint16_bits, pack_bits, to_uint16_bits, unpack_bits

AT_ONCE = 1 << 20  # indices that are unpacked
_FOLDING = threading.Lock()


def can_fold_order(config: LayerConfig) -> bool:
    """Whether the columns of a linear can change places: all in one group, none an outlier, each with vectors of its own."""
    return config.enable_perm and not config.outlier_size and config.group_num == 1 and config.vector_quant_dim == "out"


@torch.no_grad()
def fold_order(tensors: Mapping[str, Tensor], config: LayerConfig) -> None:
    """Pack the indices of a linear anew in the order of its inputs, in place; perm says so then. The weight stays the same.

    tensors: as `LayerConfig.tensor_shapes` names them; `can_fold_order` says for which.
    """
    with _FOLDING:
        _fold(tensors["perm"].data, tensors["indices"].data, config)


def _fold(perm: Tensor, indices: Tensor, config: LayerConfig) -> None:
    place = torch.argsort(from_uint16_bits(perm))  # of each input among the stored columns
    still = torch.arange(len(place), device=place.device)
    if torch.equal(place, still):
        return
    if config.trellis_bits:
        folded = indices.index_select(2, place)
    else:
        bits, columns = config.main_bits + config.residual_bits, config.group_size
        parts = indices[0].split(max(1, AT_ONCE // columns))
        folded = torch.cat([pack_bits(unpack_bits(rows, bits, columns).index_select(1, place), bits) for rows in parts])[None]
    new_perm = to_uint16_bits(still)
    indices.copy_(folded)  # both at the end: what fails before leaves all as it was
    perm.copy_(new_perm)
