"""What a causal language model is made of: its decoder blocks and the linears in them, found from the module tree."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vptq.errors import CheckpointError, UsageError
from vptq.layouts import quantization_entry
from vptq.models.form import Form, unify
from vptq.models.headers import is_hub_name, read_config, read_headers
from vptq.models.shapes import LinearShape, ModelShapes
from vptq.models.stream import FLOAT_TYPES, FolderSource

DEMO = Path(__file__).parent / "demo"
# model_type of those that write and read the residual stream as Llama does, with linears of the same names, and nowhere else
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names in configurations
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LinearInfo:
    """One linear of one block. `name` is its full module name, `suffix` its name inside the block."""

    name: str
    block: int
    suffix: str
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def kind(self) -> str:
        """Its name in the block, experts of a block as one kind."""
        return all_experts(self.suffix)


def all_experts(suffix: str) -> str:
    """The name of a linear inside a block with * for the number of an expert."""
    return re.sub(r"\.\d+\.", ".*.", suffix)


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights: modules on the meta device, buffers real.

    Attributes:
        folder: the model folder. model: the transformers module. blocks_name: full name of the list of decoder blocks.
        dtype: float type of the stored weights. form: in what its modules and its files differ.
    """

    folder: Path
    model: Any
    blocks_name: str
    dtype: torch.dtype
    form: Form = field(default_factory=Form)

    @property
    def blocks(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.blocks_name)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def hidden_size(self) -> int:
        """Of the hidden states; a usual size where the configuration does not say."""
        return int(getattr(self.model.config.get_text_config(), "hidden_size", 4096))

    def block_name(self, block: int) -> str:
        return f"{self.blocks_name}.{block}"

    def linears(self) -> list[LinearInfo]:
        """Every linear of every block, in module order."""
        found = []
        for number, block in enumerate(self.blocks):
            for suffix, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    name = f"{self.block_name(number)}.{suffix}"
                    has_bias = module.bias is not None
                    found.append(LinearInfo(name, number, suffix, module.out_features, module.in_features, has_bias))
        return found

    def is_router(self, linear: LinearInfo) -> bool:
        """Whether it stands beside experts, or is called router, and has an output for each, or one alone: it chooses them."""
        path = linear.suffix
        if "router" in path.split("."):
            return linear.out_features in self._expert_counts(self.blocks[linear.block])
        while "." in path:
            path = path.rpartition(".")[0]
            experts = getattr(self.blocks[linear.block].get_submodule(path), "experts", None)
            if isinstance(experts, nn.Module):
                inside = linear.suffix.startswith(f"{path}.experts.")
                return not inside and linear.out_features in (1, *self._expert_counts(experts))
        return False

    def _expert_counts(self, experts: nn.Module) -> set[int]:
        config = self.model.config.get_text_config()
        stated = [getattr(config, name, None) for name in EXPERT_COUNTS] + [getattr(experts, "num_experts", None)]
        found = {count for count in stated if isinstance(count, int)}
        return found | {len(experts)} if isinstance(experts, nn.ModuleList) else found

    def end(self, which: Literal["embedding", "head"]) -> LinearInfo | None:
        """The input embeddings, a row a token, or the output head, as a linear; None where there is none of the usual kind."""
        asked = self.model.get_input_embeddings() if which == "embedding" else self.model.get_output_embeddings()
        name = next((n for n, module in self.model.named_modules() if module is asked), None)
        if name is None or type(asked) not in (nn.Embedding, nn.Linear):
            return None
        rows, columns = asked.weight.shape
        return LinearInfo(name, len(self.blocks), name, rows, columns, getattr(asked, "bias", None) is not None)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embeddings."""
        return bool(tied_names(self.model))

    @property
    def max_seq_len(self) -> int | None:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def source_prefix(self) -> str:
        """What older checkpoints leave out of, or put before, the model's own parameter names."""
        return getattr(self.model, "base_model_prefix", "")

    def source(self) -> FolderSource:
        return FolderSource(self.folder, self.source_prefix, self.form.origins)


def load_skeleton(folder: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Skeleton:
    """Build the model of a folder without reading its weights.

    Args:
        dtype: float type it will run in, which buffers are made in; None for the stored one.
    Raises:
        CheckpointError: a missing or damaged folder, or one quantized by another method.
        UsageError: a model whose blocks or linears are not found.
    """
    from accelerate import init_empty_weights  # noqa: PLC0415 (slow imports, only where a model is built)
    from transformers import AutoConfig  # noqa: PLC0415

    method = quantization_entry(read_config(folder)).get("quant_method", "vptq")
    if method != "vptq":
        raise CheckpointError(f"`{folder}` is quantized by {method!r}, which is not read", hint="give the unquantized original")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        stored = _stored_dtype(folder, config)
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype or stored)
        with init_empty_weights(include_buffers=False):
            model = _class_of(config).from_config(config, trust_remote_code=trust_remote_code)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged or unknown config
        raise CheckpointError(
            f"transformers can't build a causal language model from `{folder}`",
            where=[str(error).strip().split("\n")[0]],
            hint="check config.json; a model with code of its own needs --trust_remote_code",
        ) from error
    model.eval()
    form = unify(model, _tensor_names(folder))
    _add_biases(model, folder)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Skeleton(folder, model, _find_blocks(model, folder), stored, form)


def _class_of(config: Any) -> Any:
    """The class that builds a model which writes text: of text alone, or of images and other things too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: PLC0415 (slow imports)

    known = getattr(AutoModelForImageTextToText, "_model_mapping", ())
    alone = getattr(AutoModelForCausalLM, "_model_mapping", ())
    return AutoModelForImageTextToText if type(config) in known and type(config) not in alone else AutoModelForCausalLM


def _tensor_names(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the files, with shapes; none where there are no files, or damaged ones: that is said where weights are asked for."""
    try:
        return {name: entry.shape for name, entry in read_headers(folder).items()}
    except CheckpointError:
        return {}


def _add_biases(model: Any, folder: Path) -> None:
    """Linears that a packed checkpoint gives a bias, where the model's own have none."""
    layers = quantization_entry(read_config(folder)).get("config_for_layers") or {}
    for name in [name for name, entry in layers.items() if entry.get("added_bias")]:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            continue  # said where its linears are put in
        if isinstance(linear, nn.Linear) and linear.bias is None:
            rows = linear.weight.new_empty(linear.out_features, device="meta")
            linear.register_parameter("bias", nn.Parameter(rows, requires_grad=False))


def _find_blocks(model: nn.Module, folder: Path) -> str:
    """The list of modules that holds the most weights of linears, in the part that reads text: the decoder blocks."""
    finder: Any = getattr(model, "get_decoder", None)
    decoder = finder() if finder else None
    inside = {id(module) for module in (decoder if isinstance(decoder, nn.Module) else model).modules()}
    sizes = {
        name: sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside
    }
    best = max(sizes, key=lambda name: sizes[name], default=None)
    if best is None or not sizes[best]:
        raise UsageError(
            f"no decoder blocks with linear layers were found in `{folder}`",
            where=[f"model class {type(model).__name__}"],
            hint="only linear layers in a list of blocks are quantized",
        )
    return best


def _stored_dtype(folder: Path, config: Any) -> torch.dtype:
    stated = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(stated, torch.dtype) and stated.is_floating_point:
        return stated
    try:
        kinds = [e.dtype for e in read_headers(folder).values() if e.dtype in FLOAT_TYPES]
    except CheckpointError:  # config.json alone is enough to count bits
        return torch.float16
    return FLOAT_TYPES[max(set(kinds), key=kinds.count)] if kinds else torch.float32


def packed_shapes(model: nn.Module, names: Collection[str]) -> dict[str, tuple[int, int, bool]]:
    """Of the linears of a model that are packed in a folder: out_features, in_features, whether there is a bias.

    names: of the tensors in the files.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: linear for name, linear in linears.items() if f"{name}.indices" in names}
    return {name: (own.out_features, own.in_features, own.bias is not None) for name, own in found.items()}


def shapes_in(folder: Path, trust_remote_code: bool = False) -> dict[str, tuple[int, int, bool]]:
    """`packed_shapes` of a packed checkpoint."""
    return packed_shapes(load_skeleton(folder, trust_remote_code).model, read_headers(folder))


def skeleton_shapes(folder: Path) -> ModelShapes:
    """Shapes of any model that transformers builds, for types that `shapes.can_derive` does not know."""
    skeleton = load_skeleton(folder)
    linears = tuple(LinearShape(i.name, i.out_features, i.in_features) for i in skeleton.linears())
    tied = tied_names(skeleton.model)
    total = sum(p.numel() for name, p in skeleton.model.named_parameters() if name not in tied)
    quantized = sum(linear.out_features * linear.in_features for linear in linears)
    return ModelShapes(linears, total - quantized, skeleton.dtype.itemsize * 8)


def tied_names(model: Any) -> set[str]:
    """Parameters that a checkpoint may leave out because they are tied to others."""
    keys = getattr(model, "_tied_weights_keys", None) or ()
    tied = getattr(model.config, "tie_word_embeddings", False)
    return set(keys) if tied else set()


def check_weights(skeleton: Skeleton, source: FolderSource, quantized: Collection[str] = ()) -> None:
    """See that the folder holds every parameter of the model in its shape, and linears as floats; reads headers only.

    Args:
        quantized: linears whose weight the folder holds packed.
    Raises:
        CheckpointError: lists all that do not fit.
    """
    linears = {f"{linear.name}.weight" for linear in skeleton.linears()}
    tied = tied_names(skeleton.model)
    faults, missing = [], 0
    for name, parameter in skeleton.model.named_parameters():
        if name.removesuffix(".weight") in quantized or (name in tied and not source.has(name)):
            continue
        if not source.has(name):
            faults.append(f"{name}: missing")
            missing += 1
            continue
        entry, shape = source.entry(name), source.shape(name)
        if shape not in (None, tuple(parameter.shape)):
            faults.append(f"{name}: {shape} in the file, {tuple(parameter.shape)} by config.json")
        elif name in linears and entry.dtype not in FLOAT_TYPES:
            faults.append(f"{name}: stored as {entry.dtype}: already quantized?")
    if faults:
        renamed = "get the folder anew, or another transformers: its modules have names that these files don't"
        raise CheckpointError(
            f"the weights in `{source.folder}` are not those of the model that config.json describes",
            where=faults,
            hint=renamed if missing else "get the folder anew, or give the unquantized original",
        )


def resolve_folder(model_name: str | None) -> Path:
    """A model folder from what the user typed: nothing (the demo model), a folder, or a hub name (downloaded)."""
    if model_name is None:
        return DEMO
    path = Path(model_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"`{model_name}` is a file, not a model folder", hint="give the folder that holds config.json")
    if not is_hub_name(model_name):
        raise CheckpointError(
            f"model folder `{model_name}` does not exist", hint="give a folder with config.json, or a hub name"
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "README.md"]
    patterns += ["LICENSE*", "NOTICE*", "USE_POLICY*"]
    try:
        return Path(snapshot_download(model_name, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"`{model_name}` is neither a folder here nor a model the hub gives",
            where=[str(error).strip().split("\n")[0]],
            hint="check the name, the network, and whether the model needs `hf auth login`",
        ) from error
