"""What a run leaves: the packed checkpoint, the dequantized one, and the quantized weights as something can read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vptq.checkpoint.reader import DequantizedSource, packed_tensors
from vptq.checkpoint.writer import is_whole, write_dequantized, write_packed
from vptq.config import QuantConfig
from vptq.models.architecture import Skeleton
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.remote import fetch
from vptq.models.stream import FolderSource
from vptq.nn.reference import dequantize_packed
from vptq.pipeline.job import Job
from vptq.pipeline.plan import RunPlan
from vptq.pipeline.progress import Progress


class Results:
    """The finished linears of a run, wherever they lie."""

    def __init__(self, job: Job, skeleton: Skeleton, source: PrefetchingFolder, device: torch.device, plan: RunPlan) -> None:
        self.job, self.skeleton, self.original, self.device = job, skeleton, source, device
        self.layers = {linear.name: linear.layer for linear in plan.everything}
        self.stored = [name for name, layer in self.layers.items() if not layer.weight_of]

    def source(self) -> DequantizedSource:
        """The model's tensors, quantized linears dequantized."""
        return DequantizedSource(self.original, self.layers, self.packed, self.skeleton.dtype, self.device)

    def packed(self, name: str) -> dict[str, Tensor]:
        """A finished linear's tensors, from its work file, or from the packed checkpoint once that has taken its place."""
        layer = self.layers[name]
        if fetch(self.job.work_file(name)).exists():
            shared = {} if layer.stores_codebook else self.job.tensors(layer.codebook_of)
            return self.job.tensors(name) | {key: shared[key] for key in shared if key in layer.codebook_shapes()}
        return packed_tensors(FolderSource(self.job.folder / "packed_model", self.original.base_prefix), name, layer)

    def write(self, config: QuantConfig, progress: Progress, errors: Mapping[str, float]) -> None:
        """The checkpoints that are asked for and not there yet. errors: proxy errors by linear, as far as they are known."""
        parameters = [name for name, _ in self.skeleton.model.named_parameters()]
        packed, model = self.job.folder / "packed_model", self.job.folder / "model"
        if config.save_packed_model and not is_whole(packed):
            progress.phase("writing packed_model")
            tensors = ((name, self.job.tensors(name)) for name in self.stored)
            write_packed(packed, self.original, self.skeleton.form, parameters, self.layers, tensors, errors)
        if config.save_model and not is_whole(model):
            progress.phase("writing model")
            write_dequantized(model, self.original, self.skeleton.form, parameters, list(self.layers), self._dequantized())

    def _dequantized(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.stored:
            tensors = {key: tensor.to(self.device) for key, tensor in self.packed(name).items()}
            yield name, dequantize_packed(tensors, self.layers[name], self.skeleton.dtype).cpu()
