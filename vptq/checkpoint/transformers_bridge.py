"""The one place where this package reaches into transformers: `AutoModelForCausalLM.from_pretrained` on packed checkpoints.

transformers has a loader for `quant_method: vptq`. In 4.48 to 4.57 it works; in 5.x it trips over dotted module names and
shared settings, and refuses to run without CUDA. One quantizer class that suits both takes its place. Registering waits
until transformers itself is imported, so that `import vptq` stays light.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from vptq.checkpoint.on_import import when_imported

AUTO_MODULE = "transformers.quantizers.auto"
METHOD = "vptq"


def install() -> None:
    """Register with transformers, now if it is loaded, else when it is."""
    when_imported(AUTO_MODULE, _register)


def _register(auto: ModuleType) -> None:
    config_class, quantizer_class = _make_classes()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config_class
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer_class


def _make_classes() -> tuple[type, type]:
    from transformers.quantizers.base import HfQuantizer  # noqa: PLC0415 (transformers is being imported)
    from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod  # noqa: PLC0415

    class VptqConfig(QuantizationConfigMixin):
        """`quantization_config` of a packed checkpoint; keeps every key it was given, extensions too."""

        def __init__(self, config_for_layers: dict | None = None, **others: Any) -> None:
            self.quant_method = QuantizationMethod.VPTQ
            self.config_for_layers = config_for_layers or {}
            others.pop("quant_method", None)
            for key, value in others.items():
                setattr(self, key, value)

        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), "quant_method": METHOD}

        def to_diff_dict(self) -> dict[str, Any]:
            return self.to_dict()

    class VptqQuantizer(HfQuantizer):
        """Swaps the packed linears in before transformers reads the weights."""

        requires_calibration = True

        def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
            if isinstance(device_map, dict) and "disk" in device_map.values():
                raise ValueError("packed VPTQ linears can't be offloaded to disk; leave `disk` out of device_map")

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            _put_in(model, self.quantization_config.to_dict(), kwargs.get("checkpoint_files"))

        def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
            from vptq.nn.ranges import check_indices  # noqa: PLC0415
            from vptq.nn.vquant_linear import VQuantLinear, prepare_kernels  # noqa: PLC0415

            for module in model.modules():
                if isinstance(module, VQuantLinear):
                    module.requires_grad_(False)  # transformers 5 turns it on for every float tensor
                    vars(module).pop("weight", None)
            check_indices(model)
            prepare_kernels(model)
            return model

        def is_serializable(self, safe_serialization: bool | None = None) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True  # adapters do, over packed linears that give gradients to their inputs

    return VptqConfig, VptqQuantizer


def _put_in(model: Any, config: dict[str, Any], checkpoint_files: list[str] | None) -> None:
    """Packed linears where the checkpoint has them, in place.

    transformers only warns of missing tensors and goes on with noise; so the files are checked before.
    """
    import torch  # noqa: PLC0415 (these are loaded by now)

    from vptq.checkpoint.reader import check_packed  # noqa: PLC0415
    from vptq.layer_config import read_quantization_config  # noqa: PLC0415
    from vptq.layouts import quantization_entry  # noqa: PLC0415
    from vptq.models.architecture import packed_shapes  # noqa: PLC0415
    from vptq.models.form import parents, unify  # noqa: PLC0415
    from vptq.models.stream import FolderSource  # noqa: PLC0415
    from vptq.nn.replace import replace_linears  # noqa: PLC0415

    where = getattr(model.config, "_name_or_path", "") or "the checkpoint"
    folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(where)
    source = FolderSource(folder) if folder.is_dir() else None
    entry = quantization_entry({"quantization_config": config})
    packed = {name.removesuffix(".indices") for name in (source.entries if source else ()) if name.endswith(".indices")}
    packed |= set(entry.get("config_for_layers") or ())
    holders = {parent for name in packed for parent in parents(name)} | packed
    unify(model, {}, wanted=lambda name: name in holders)
    layers = read_quantization_config(entry, where, lambda: packed_shapes(model, source.entries if source else ()))
    if source:
        check_packed(source, layers)
    replace_linears(model, layers)
    for name in layers:  # some models begin the weights of linears by name, although they are read from files
        model.get_submodule(name).weight = torch.empty(0)
