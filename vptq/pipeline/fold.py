"""Rotations folded into neighbours: what goes into attention and MLP, and what comes out, need no transform at run time.

The residual stream is rotated as a whole (SliceGPT, arXiv:2401.15024; QuaRot, arXiv:2404.00456): embeddings E become E Rᵀ,
weights that read it W diag(γ) Rᵀ, weights that write it R W, the head W diag(γ) Rᵀ, and the norms' γ one. RMS norms do not
see a rotation, so the model computes what it did. The quantizer then finds the inputs of q, k, v, gate and up and the
outputs of o and down rotated already. A head tied to the embeddings can't be folded: γ parts the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vptq.config import LinearConfig, QuantConfig
from vptq.errors import UsageError
from vptq.layer_config import LayerConfig
from vptq.models.architecture import LLAMA_FAMILY, Skeleton, tied_names
from vptq.models.prefetch import PrefetchingFolder
from vptq.quantize.rotation import Rotation
from vptq.recipe import RotationSides

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Fold:
    """What becomes of the parameters of a model whose residual stream is rotated.

    Attributes:
        rotation: of the residual stream.
        readers: weight -> the norm whose γ it takes in. writers: weights and biases. norms: that become one.
        embedding: name of the embeddings' weight.
        sides: linear -> the side that is rotated by the fold, "in" or "out".
    """

    rotation: Rotation
    embedding: str
    readers: Mapping[str, str] = field(default_factory=dict)
    writers: frozenset[str] = frozenset()
    norms: frozenset[str] = frozenset()
    sides: Mapping[str, str] = field(default_factory=dict)

    def apply(self, name: str, tensor: Tensor, get: Callable[[str], Tensor]) -> Tensor:
        """The folded parameter, in its stored type. get: gives the original of another one."""
        wide = tensor.float()
        if name in self.norms:
            return tensor.new_ones(tensor.shape)
        if name in self.readers:
            wide = self.rotation.apply(wide * get(self.readers[name]).float())
        elif name == self.embedding:
            wide = self.rotation.apply(wide)
        elif name in self.writers:
            wide = self.rotation.apply(wide.T).T if wide.ndim == 2 else self.rotation.apply(wide)
        else:
            return tensor
        return wide.to(tensor.dtype).contiguous()

    def remaining(self, name: str, config: LinearConfig) -> LinearConfig:
        """The settings of a linear, less the side that the fold rotates."""
        side = self.sides.get(name)
        if side is None or config.rotation == "none":
            return config
        other: RotationSides = "out" if side == "in" else "in"
        if config.rotation_sides in ("both", other):
            return replace(config, rotation_sides=other)
        return replace(config, rotation="none", rotation_sides="both")


class FoldedFolder(PrefetchingFolder):
    """A model folder whose parameters come folded, on `device`, where that is done."""

    def __init__(self, skeleton: Skeleton, *, pin: bool = False, fold: Fold, device: torch.device) -> None:
        super().__init__(skeleton.folder, skeleton.source_prefix, skeleton.form.origins, pin=pin)
        self.fold, self.device = fold, device

    def get(self, name: str) -> Tensor:
        """The folded parameter `name`, in its stored type."""
        return self.fold.apply(name, self._fetch(name), self._fetch)

    def _fetch(self, name: str) -> Tensor:
        return super().get(name).to(self.device, non_blocking=True)


def open_folder(skeleton: Skeleton, fold: Fold | None, device: torch.device) -> PrefetchingFolder:
    """The tensors of a skeleton's folder for work on `device`, folded where there is a fold."""
    pin = device.type == "cuda"
    if fold is None:
        return PrefetchingFolder(skeleton.folder, skeleton.source_prefix, skeleton.form.origins, pin=pin)
    return FoldedFolder(skeleton, pin=pin, fold=fold, device=device)


def choose_fold(config: QuantConfig, skeleton: Skeleton) -> Fold | None:
    """The fold that the settings ask for. Raises UsageError where one is asked for that can't be."""
    if config.fold is False or config.linear.rotation == "none" or config.calibration.hessian_path is not None:
        return None
    found: Fold | str = make_fold(skeleton, config.linear.rotation_seed)
    own = [name for values in (config.per_linear or {}).values() for name in values if name.startswith("rotation")]
    if own or (config.linear.rotation_sides != "both" and (config.include or config.skip)):
        found = "linears are rotated each in its own way"  # and a checkpoint would not tell that it is folded
    if isinstance(found, Fold):
        return found
    if config.fold:
        raise UsageError("this model's rotations can't be folded", where=[found], hint="leave out --fold")
    return None


def find_fold(skeleton: Skeleton, layers: Mapping[str, LayerConfig]) -> Fold | None:
    """The fold that a packed checkpoint was made with: its linears are not rotated on the sides that a fold has rotated.

    Args:
        skeleton: of the original. layers: the checkpoint's quantized linears.
    """
    seeds = {layer.rotation_seed for layer in layers.values() if layer.rotation != "none"}
    found = make_fold(skeleton, seeds.pop()) if len(seeds) == 1 else ""
    if not isinstance(found, Fold):
        return None
    return None if any(_turns(layer, found, name) for name, layer in layers.items()) else found


def _turns(layer: LayerConfig, fold: Fold, name: str) -> bool:
    """Whether a rotated linear turns, when it runs, a side that the fold rotates."""
    return name in fold.sides and layer.rotation != "none" and layer.rotation_sides in ("both", fold.sides[name])


def make_fold(skeleton: Skeleton, seed: int) -> Fold | str:
    """The fold of a model, or why there is none."""
    config = skeleton.model.config
    if config.model_type not in LLAMA_FAMILY:
        return f"models of type {config.model_type} are not folded, only {', '.join(LLAMA_FAMILY)}"
    if getattr(config, "tie_word_embeddings", False) or tied_names(skeleton.model):
        return "head and embeddings are tied"
    base = skeleton.blocks_name.rpartition(".")[0]
    rotation = Rotation(config.hidden_size, seed, "in")
    readers = {"lm_head.weight": f"{base}.norm.weight"}
    norms, writers, sides = {f"{base}.norm.weight"}, set(), {}
    for block in range(len(skeleton.blocks)):
        prefix = skeleton.block_name(block)
        for norm, linears in READERS.items():
            norms.add(f"{prefix}.{norm}.weight")
            for suffix in linears:
                readers[f"{prefix}.{suffix}.weight"] = f"{prefix}.{norm}.weight"
                sides[f"{prefix}.{suffix}"] = "in"
        for suffix in WRITERS:
            writers |= {f"{prefix}.{suffix}.weight", f"{prefix}.{suffix}.bias"}
            sides[f"{prefix}.{suffix}"] = "out"
    fold = Fold(rotation, f"{base}.embed_tokens.weight", readers, frozenset(writers), frozenset(norms), sides)
    names = {name for name, _ in skeleton.model.named_parameters()}
    missing = sorted((set(readers) | norms | {fold.embedding}) - names)
    return f"it has no parameter `{missing[0]}`" if missing else fold
