"""`finetune --train indices`: a packed checkpoint is quantized anew from its original, part by part, before all else trains."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptq.checkpoint.reader import DequantizedSource, fill_model, packed_tensors
from vptq.checkpoint.writer import is_whole, write_changed
from vptq.errors import UsageError
from vptq.finetune.fit import Schedule
from vptq.finetune.incremental import HESSIAN_TOKENS, Codebooks, Form, Incremental, parts_of
from vptq.finetune.noise import ErrorNoise, measure_shrinkage
from vptq.geometry import plan_geometry
from vptq.layer_config import LayerConfig
from vptq.models.architecture import Skeleton, load_skeleton
from vptq.models.remote import mirror_of
from vptq.models.stream import TensorSource
from vptq.nn.operands import stored_centroids
from vptq.nn.reference import dequantize_packed
from vptq.pipeline.block_pass import unpacked_in
from vptq.pipeline.fold import find_fold, open_folder
from vptq.pipeline.tune_models import Pair
from vptq.pipeline.tune_whole import WholeModel, compute_blocks_twice
from vptq.quantize.codebook import store_codebook

STATE, FOLDER, FOUND = "indices", "indices", "indices-found"
SHRINKAGE_TOKENS = 1 << 15  # that it is measured on
SAVE_SECONDS = 120.0  # between two states that a stopped run goes on from


@dataclass(frozen=True)
class NewIndices:
    """What came of it.

    Attributes:
        folder: the checkpoint to go on with. held_out: the loss before and after. history: of the training.
    """

    folder: Path
    held_out: tuple[float, float]
    history: list[dict[str, Any]]


class _Start:
    """The original's blocks, as they were before they were quantized; all else as the packed checkpoint has it.

    Args:
        packed, original: the two models' tensors. blocks: what names in the blocks begin with.
    """

    def __init__(self, packed: TensorSource, original: TensorSource, blocks: str) -> None:
        self.packed, self.original, self.blocks = packed, original, blocks

    def _of(self, name: str) -> TensorSource:
        return self.packed if not name.startswith(self.blocks) and self.packed.has(name) else self.original

    def has(self, name: str) -> bool:
        return self._of(name).has(name)

    def get(self, name: str) -> Tensor:
        return self._of(name).get(name)


def linears_of(pair: Pair) -> list[str]:
    """The quantized linears in the blocks, in their order."""
    return [info.name for info in pair.original.linears() if info.name in pair.layers]


def form_of(pair: Pair, name: str) -> Form:
    """What a linear is quantized to: with its own codebook as it is where others share it, or a trellis runs over it."""
    layer = pair.layers[name]
    given = bool(layer.codebook_of) or name in pair.lent or bool(layer.trellis_bits)
    return Form(layer, layer.linear_config(given), (layer.codebook_of or name) if given else "")


def check_forms(pair: Pair) -> None:
    """Raise UsageError where a linear's form is none that settings give."""
    bad = []
    for name in linears_of(pair):
        form = form_of(pair, name)
        layer, config = form.layer, form.config
        geometry, faults = plan_geometry(layer.out_features, layer.in_features, config)
        fits = geometry == layer.geometry and not faults and not config.faults()
        scales = 0 if geometry is None else LayerConfig.of(config, geometry, bias=False).num_scales
        if not fits or (form.shared and scales != layer.num_scales):
            bad.append(name)
    if bad:
        raise UsageError(
            "these linears are packed in a form that can't be quantized anew", where=bad, hint="leave out --train indices"
        )


class IndexTuning(WholeModel):
    """The quantizing anew of all linears in the blocks."""

    _saved = 0.0

    @functools.cached_property
    def forms(self) -> dict[str, Form]:
        """What each linear is quantized to."""
        return {name: form_of(self.pair, name) for name in linears_of(self.pair)}

    @functools.cached_property
    def parts(self) -> list[tuple[str, ...]]:
        """What is quantized together."""
        sizes = [(name, form.layer.out_features * form.layer.in_features) for name, form in self.forms.items()]
        return parts_of(sizes, self.config.rounds or len(self.pair.original.blocks))

    @property
    def description(self) -> str:
        """What it will do, in a line."""
        config = self.config
        return f"indices: {len(self.parts)} parts, {config.round_steps} steps after each, learning rate {config.round_rate:g}"

    def units(self) -> float:
        """What `told` is told in all: tokens that went forward through a block."""
        return len(self.parts) * (self._hessian_units() + self.config.round_steps * self._step_units())

    def _schedule(self) -> Schedule:
        config = self.config
        steps = config.round_steps
        warmup = math.ceil(steps / 10)
        return Schedule(steps, config.round_rate, warmup, config.weight_decay, eval_every=steps, patience=steps)

    def _hessian_units(self) -> float:
        return self.units_of(sum(map(len, self._batches())))

    def _step_units(self) -> float:
        return self.units_of(self.config.batch_size or 1, 2 * self.looked / self.config.round_steps)

    def _batches(self) -> list[Tensor]:
        """The text that Hessians are summed over."""
        train = len(self.tokens) - (self.config.num_held_out or 0)
        count = min(train, max(1, HESSIAN_TOKENS // self.tokens.shape[1]))
        return list(self.tokens[:count].split(self.config.at_once))

    def run(self) -> NewIndices:
        """Quantize anew; or what a stopped run found."""
        folder, kept = self.job.work / FOLDER, self.job.load_tensors(FOUND)
        if kept is not None:
            better = kept[1]["better"]
            if not better or is_whole(folder):
                self.told("quantizing", self.units())
                return NewIndices(folder if better else self.pair.packed.folder, tuple(kept[1]["held_out"]), kept[1]["history"])
        self._saved = time.monotonic()
        before = self._before()
        work = self._prepare()
        state = self.job.load_tensors(STATE)
        if state is not None:
            work.load_state(*state)
            self.told("quantizing", work.done * self.units() / len(self.parts))
        work.run(self._told, self._after_part)
        better = work.loss < before
        word = "" if better else "; that is no gain: the old indices stay"
        self.note(f"indices chosen anew in {len(self.parts)} parts: held-out loss {before:.4f} -> {work.loss:.4f}{word}")
        if better:
            own = [name for name, _ in self.pair.packed.model.named_parameters()]
            write_changed(folder, self.pair.packed_source, own, self.pair.layers, self._changed(work))
        held_out = (before, work.loss if better else before)
        self.job.save_tensors(FOUND, {}, {"better": better, "held_out": held_out, "history": work.history})
        return NewIndices(folder if better else self.pair.packed.folder, held_out, work.history)

    def _told(self, phase: str) -> None:
        self.told(phase, self._hessian_units() if phase == "quantizing" else self._step_units())

    def _after_part(self, work: Incremental) -> None:
        noise = ", noise on what is float" if work.noise and work.done < len(self.parts) else ""
        self.job.log(
            f"part {work.done} of {len(self.parts)}: held-out loss {work.quantized_loss:.4f} -> {work.loss:.4f}{noise}"
        )
        if work.stopped:
            less = "its best values are kept. A lower --round_rate may help"
            self.note(f"warning: training after part {work.done} {work.stopped}; {less}")
        over, here = work.done == len(self.parts), mirror_of(self.job.folder) is None  # it is too large to copy to a URL
        if not over and here and time.monotonic() - self._saved >= SAVE_SECONDS:
            self.job.check_lock()
            self.job.save_tensors(STATE, *work.state())
            self._saved = time.monotonic()

    def _before(self) -> float:
        """The held-out loss of the checkpoint as it is."""
        student = self.pair.load_student()
        return self.distillation(student, unpacked_in(student, self.pair, self.config)).held_out()

    def _prepare(self) -> Incremental:
        pair, model = self.pair, self._float_model()
        codebooks = {owner: self._codebooks(owner) for owner in {form.shared for form in self.forms.values()} if owner}
        parts = model, self.parts, self.forms, codebooks, pair.packed.dtype, self.distillation(model)
        noise = self._noise(model) if self.config.noise else None
        return Incremental(*parts, self._schedule(), self._batches(), noise)

    def _noise(self, model: Any) -> ErrorNoise:
        """Errors of the packed checkpoint, as large as is asked for."""
        weights = {name: model.get_parameter(f"{name}.weight").detach() for name in self.forms}
        errors = {}
        for name, form in self.forms.items():
            error = dequantize_packed(self._stored(name), form.layer, torch.float32).sub_(weights[name]).mul_(self.config.noise)
            errors[name] = error.to(torch.bfloat16)
        linears = {name: model.get_submodule(name) for name in self.forms}
        tokens = self.tokens[: max(1, SHRINKAGE_TOKENS // self.tokens.shape[1])].split(self.config.at_once)
        shrinkage = measure_shrinkage(model.base_model, linears, errors, tokens)
        groups = {name: form.layer.row_groups for name, form in self.forms.items()}
        return ErrorNoise(weights, errors, shrinkage, groups, self.config.seed)

    def _float_model(self) -> nn.Module:
        """The original in float32, rotated where the packed one is, with what is not in the blocks from that."""
        pair = self.pair
        skeleton: Skeleton = load_skeleton(pair.original.folder, pair.trust_remote_code, torch.float32)
        ends = {name: layer for name, layer in pair.layers.items() if name not in self.forms}
        with contextlib.closing(open_folder(skeleton, find_fold(skeleton, pair.layers), pair.device)) as original:
            base = _Start(pair.packed_source, original, f"{pair.packed.blocks_name}.")
            stored = DequantizedSource(
                base, ends, lambda name: packed_tensors(pair.packed_source, name, ends[name]), torch.float32, pair.device
            )
            fill_model(skeleton, stored, pair.device, torch.float32)
        if self.config.gradient_checkpointing:
            compute_blocks_twice(skeleton.model)
        return skeleton.model

    def _stored(self, linear: str) -> dict[str, Tensor]:
        """A linear's tensors as the given checkpoint has them, on the device."""
        found = packed_tensors(self.pair.packed_source, linear, self.pair.layers[linear])
        return {key: tensor.to(self.pair.device) for key, tensor in found.items()}

    def _codebooks(self, owner: str) -> Codebooks:
        """The codebooks that a linear stores, for itself or for all that share them."""
        layer, dtype = self.pair.layers[owner], self.pair.packed.dtype
        tensors = self._stored(owner)
        sizes = {"centroids": layer.num_centroids[1], "res_centroids": layer.num_res_centroids[1]}
        found = [stored_centroids(name, tensors, layer, size, layer.vector_lens[1]) for name, size in sizes.items() if size > 0]
        books = tuple(store_codebook(values, layer.bitwidth, layer.bsize, dtype) for values in found)
        return Codebooks(books, {key: tensors[key] for key in layer.codebook_shapes()})

    def _changed(self, work: Incremental) -> dict[str, Tensor]:
        """All that differs from the given checkpoint, by the packed model's names."""
        known = {name for name, _ in self.pair.packed.model.named_parameters()}
        norms = {item.name: item.rounded().cpu() for item in work.items() if item.name in known}
        return norms | work.tensors
