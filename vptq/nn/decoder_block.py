"""A decoder block of the Llama family for one token, in a few launches.

What lies between the products is done by them: a product norms or gates what it reads and adds its sum to the residual stream
(see kernels/given.py); rotary embedding, cache and attention are one kernel. Five launches, where the model's own code takes
some fifty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vptq.nn.kernels.attention import Heads, attend
from vptq.nn.kernels.fused import FusedLinear, few_rows, go_together
from vptq.nn.kernels.given import AS_IT_IS, GATED, NORMED, Given, gated, normed
from vptq.nn.kernels.packed import FLOATS
from vptq.nn.kernels.products import MOST_MATRICES
from vptq.nn.vquant_linear import VQuantLinear


@dataclass(frozen=True)
class Projection:
    """Linears with one input: packed ones that can be multiplied in one launch, or one in full.

    Attributes:
        forms: of packed linears; empty for one in full, whose weight, (out_features, in_features), is `weight`.
        biases: one for each linear.
    """

    forms: Sequence[FusedLinear]
    biases: Sequence[Tensor | None]
    weight: Tensor | None = None

    def __call__(self, x: Tensor, given: Given, residual: Tensor | None = None) -> list[Tensor]:
        """(1, in_features) -> (1, out_features) for each linear, plus residual."""
        if self.weight is None:
            return few_rows(x, self.forms, self.biases, given, residual)
        y = nn.functional.linear(_become(x, given), self.weight, self.biases[0])
        return [y if residual is None else y + residual]


def _become(x: Tensor, given: Given) -> Tensor:
    """What a product of packed linears does to x on the way, by torch."""
    if given.beside is None:
        return x
    if given.kind == GATED:
        return nn.functional.silu(x) * given.beside
    assert given.kind == NORMED
    return nn.functional.rms_norm(x, (x.shape[-1],), given.beside, given.epsilon)


class FusedBlock:
    """Stands for a decoder block's `forward` while one token of one text goes through it, its cache of fixed size.

    Args:
        layer: the block, as `fused_block` takes it. queries: projections of its input, in the order q, k, v; gates: of the
            second half's, gate and up.
        cache: keys and values, (1, groups, length, dim). position: of the token, one int64.
        arrived: see `attend`; blocks that run one after the other can share it.
    """

    def __init__(
        self, layer: Any, queries: Sequence[Projection], output: Projection, gates: Sequence[Projection], down: Projection,
        heads: Heads, cache: tuple[Tensor, Tensor], position: Tensor, arrived: Tensor,
    ) -> None:  # fmt: skip
        self._queries, self._output, self._gates, self._down = queries, output, gates, down
        self._norms = [(n.weight, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self._heads, self._position, self._arrived = heads, position, arrived
        self._cache = cache[0][0], cache[1][0]

    def __call__(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        """(1, 1, hidden) -> (1, 1, hidden), the block's own arguments; masks and caches that it is given are not looked at."""
        x = hidden_states.reshape(1, -1)
        cosine, sine = (t.reshape(-1) for t in position_embeddings)
        if len(cosine) != self._heads.dim or {cosine.dtype, x.dtype} != {self._cache[0].dtype}:
            raise ValueError("hidden states or rotary embeddings are of another kind than the kernels'")
        (first, epsilon), (second, second_epsilon) = self._norms
        q, k, v = _all_of(self._queries, x, normed(first, epsilon))
        mixed = attend(q, k, v, (cosine, sine), self._cache, self._position, self._heads, self._arrived)
        (x,) = self._output(mixed, AS_IT_IS, x)
        gate, up = _all_of(self._gates, x, normed(second, second_epsilon))
        (x,) = self._down(gate, gated(up), x)
        return x.view(hidden_states.shape)


def _all_of(projections: Sequence[Projection], x: Tensor, given: Given) -> list[Tensor]:
    return [y for projection in projections for y in projection(x, given)]


def fused_block(layer: Any, cache: tuple[Tensor, Tensor], position: Tensor, arrived: Tensor) -> FusedBlock | None:
    """For a decoder block of transformers whose modules are named and wired as Llama's; None where the kernels don't fit it.

    Whoever takes it makes sure that the model is wired so, and compares what both compute.

    Args:
        cache: keys and values, (1, groups, length, dim). position: (1,) int64. arrived: (groups,) int32, see `FusedBlock`.
    """
    attention, mlp = layer.self_attn, layer.mlp
    parts = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    keys = cache[0]
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    weights = [None if norm is None else norm.weight for norm in norms]
    heads = Heads(
        groups=keys.shape[1], each=attention.num_key_value_groups, dim=keys.shape[3], scale=float(attention.scaling),
        q_norm=weights[0], k_norm=weights[1], epsilon=0.0 if norms[0] is None else norms[0].variance_epsilon,
    )  # fmt: skip
    block_norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    types = {w.dtype for w in (*block_norms, *weights, *cache) if w is not None}
    if not heads.fit() or len(types) > 1 or keys.dtype not in FLOATS or len({w is None for w in weights}) > 1:
        return None
    if any(_is_watched(module) for module in layer.modules()):
        return None
    made = [_projections(part, keys.dtype) for part in parts]
    if not all(made):
        return None
    queries, (output,), gates, (down,) = made
    return FusedBlock(layer, queries, output, gates, down, heads, cache, position, arrived)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called, or does something else then (offloading, adapters)."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    ours = all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)  # that collects when asked to
    return not ours or hasattr(module, "_hf_hook") or "forward" in vars(module)


def _projections(linears: Sequence[nn.Module], dtype: torch.dtype) -> list[Projection]:
    """Neighbours that go together as one; empty where one of them is of a kind that is not known."""
    found: list[Projection] = []
    for linear in linears:
        bias: Tensor | None = getattr(linear, "bias", None)
        if bias is not None and bias.dtype != dtype:
            return []
        if type(linear) is nn.Linear and linear.weight.dtype == dtype:
            found.append(Projection([], [bias], linear.weight))
            continue
        form = linear.fused_form(dtype) if type(linear) is VQuantLinear else None
        if form is None:
            return []
        last = found[-1] if found else None
        if last and last.forms and len(last.forms) < MOST_MATRICES and go_together(last.forms[0], form):
            found[-1] = Projection([*last.forms, form], [*last.biases, bias])
        else:
            found.append(Projection([form], [bias]))
    return found
