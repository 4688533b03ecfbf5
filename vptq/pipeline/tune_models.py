"""The two models of a fine-tuning: the original, and the packed one that learns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vptq.checkpoint.reader import is_packed, load_quantized, open_packed, refuse_packed
from vptq.errors import UsageError
from vptq.finetune.trainable import find_trainables
from vptq.layer_config import LayerConfig
from vptq.models.architecture import Skeleton, check_weights, load_skeleton
from vptq.models.device import forced_dtype
from vptq.models.runner import BlockRunner
from vptq.models.stream import FolderSource, load_module
from vptq.nn.vquant_linear import VQuantLinear
from vptq.pipeline.compare import check_alike
from vptq.pipeline.fold import find_fold, open_folder
from vptq.recipe import FinetuneMode, TrainableKind


@dataclass(frozen=True)
class Pair:
    """An original and a packed checkpoint of it, neither read yet.

    Attributes:
        layers: the packed one's quantized linears. device: where both run. dtype: float type that the original runs in, and
            in which hidden states are kept. compute: of the packed one's products.
    """

    original: Skeleton
    packed: Skeleton
    packed_source: FolderSource
    layers: dict[str, LayerConfig]
    device: torch.device
    dtype: torch.dtype
    compute: torch.dtype
    trust_remote_code: bool = False

    @classmethod
    def open(cls, original: Path, packed: Path, device: torch.device, bf16: bool, trust_remote_code: bool) -> Pair:
        """Of two folders. Raises UsageError where they are no original and packed checkpoint of one model."""
        if not is_packed(packed):
            raise UsageError(
                f"`{packed}` is not a packed VPTQ checkpoint",
                hint="fine-tuning needs one: `vptq quantize` writes packed_model/",
            )
        refuse_packed(original)
        first = load_skeleton(original, trust_remote_code, forced_dtype(device))
        check_weights(first, first.source())
        second, source, layers = open_packed(packed, forced_dtype(device), trust_remote_code)
        check_alike(first, second)
        if len(first.blocks) != len(second.blocks) or first.hidden_size != second.hidden_size:
            raise UsageError(
                f"`{packed}` was not quantized from `{original}`",
                where=[f"{len(second.blocks)} blocks of {second.hidden_size}, {len(first.blocks)} of {first.hidden_size}"],
                hint="--original must be the model that was quantized",
            )
        short = device.type == "cuda" and bf16 and torch.cuda.is_bf16_supported()
        compute = torch.bfloat16 if short else torch.float32
        dtype = forced_dtype(device) or first.dtype
        return cls(first, second, source, layers, device, dtype, compute, trust_remote_code)

    @property
    def num_parameters(self) -> int:
        """Of the original."""
        return sum(parameter.numel() for parameter in self.original.model.parameters())

    @property
    def lent(self) -> set[str]:
        """Linears whose codebooks others use too."""
        return {name for layer in self.layers.values() for name in (layer.codebook_of, layer.weight_of) if name}

    def check_kinds(self, mode: FinetuneMode, kinds: Collection[TrainableKind]) -> None:
        """Raise UsageError where nothing of these kinds is there for a mode to train."""
        head = self.packed.model.get_output_embeddings() if mode == "e2e" else None
        parts = [(self.packed.model, "")] if mode == "e2e" else [
            (block, self.packed.block_name(number)) for number, block in enumerate(self.packed.blocks)
        ]  # fmt: skip
        lent = self.lent if mode == "block" else ()
        if not any(True for part, prefix in parts for _ in find_trainables(part, kinds, head=head, prefix=prefix, lent=lent)):
            shared = "; codebooks that linears share learn with --mode e2e" if mode == "block" and "codebooks" in kinds else ""
            raise UsageError(
                f"nothing of this model is of a kind that is to be trained: {', '.join(sorted(kinds)) or 'none is named'}",
                hint=f"--train codebooks scales offsets norms head{shared}",
            )

    def original_runner(self, like_packed: bool = False) -> BlockRunner:
        """The original, block by block. like_packed: with its hidden states rotated where the packed one's are."""
        source = self.original.source()
        fold = find_fold(self.original, self.layers) if like_packed else None
        folded = source if fold is None else open_folder(self.original, fold, self.device)
        return BlockRunner(self.original, folded, self.device, self.dtype)

    def packed_runner(self, spare: bool = False) -> BlockRunner:
        """The packed one, block by block; its blocks hold packed tensors. spare: hidden states stay off a GPU."""
        return BlockRunner(self.packed, self.packed_source, self.device, self.dtype, spare)

    def load_packed_block(self, block: int) -> nn.Module:
        """A packed block, its floats in float32, with the codebooks that others lend it."""
        name, module = self.packed.block_name(block), self.packed.blocks[block]
        for linear in module.modules():
            if isinstance(linear, VQuantLinear) and linear.layer_config.codebook_of:
                self._load_codebook(linear.layer_config)
        load_module(module, name, self.packed_source, self.device, torch.float32)
        return module

    def _load_codebook(self, layer: LayerConfig) -> None:
        owner = self.packed.model.get_submodule(layer.codebook_of)
        skip = {f"{layer.codebook_of}.{name}" for name, _ in owner.named_parameters()}
        skip -= {f"{layer.codebook_of}.{name}" for name in layer.codebook_shapes()}
        load_module(owner, layer.codebook_of, self.packed_source, self.device, torch.float32, skip=skip)

    def load_student(self) -> nn.Module:
        """The whole packed model in memory, its floats in float32."""
        folder = self.packed.folder
        return load_quantized(folder, self.device, dtype=torch.float32, trust_remote_code=self.trust_remote_code)
