"""The one place where this package reaches into peft: LoRA on packed linears, for `get_peft_model` and `PeftModel` alike.

peft looks at a linear's class to choose the adapter's; it has no list that others can add to and that reaches models loaded
from disk. So its chooser is asked only for what is not a packed linear. Registering waits until peft itself is imported.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

from vptq.checkpoint.on_import import when_imported

CHOOSER = "peft.tuners.lora.model"
COLLECTOR = "peft.tuners.tuners_utils"
NO_MERGE = (
    "adapters can't be merged into a packed linear: its weight is indices into a codebook, which can't take the sum. "
    "Keep the adapter beside it, or merge into a dequantized copy: vptq finetune --mode lora --save_model"
)
NEEDS_WEIGHT = ("use_dora", "use_bdlora", "kasa_config", "corda_config", "eva_config", "lora_ga_config")
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # init_lora_weights that don't look at the weight


def install() -> None:
    """Register with peft, now if it is loaded, else when it is."""
    when_imported(COLLECTOR, _collect_packed)
    when_imported(CHOOSER, _choose_packed)


def _collect_packed(utils: ModuleType) -> None:
    """`target_modules="all-linear"` finds packed linears too."""
    name = "_maybe_include_all_linear_layers"
    original = getattr(utils, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def collect(peft_config: Any, model: Any) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        packed = packed_linears(model) if isinstance(asked, str) and asked.lower() == "all-linear" else set()
        peft_config = original(peft_config, model)
        if packed:
            peft_config.target_modules = set(peft_config.target_modules) | packed
        return peft_config

    setattr(utils, name, collect)


def packed_linears(model: Any) -> set[str]:
    """Names of the packed linears of a model, but its head and embeddings."""
    from vptq.nn.vquant_embedding import VQuantEmbedding  # noqa: PLC0415 (torch, not before it is needed)
    from vptq.nn.vquant_linear import VQuantLinear  # noqa: PLC0415

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, VQuantLinear) and not isinstance(module, VQuantEmbedding) and module is not head
    }


def _choose_packed(lora: ModuleType) -> None:
    original = lora.LoraModel._create_new_module

    @functools.wraps(original)
    def choose(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        from vptq.nn.vquant_embedding import VQuantEmbedding  # noqa: PLC0415
        from vptq.nn.vquant_linear import VQuantLinear  # noqa: PLC0415

        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, VQuantLinear) or isinstance(base, VQuantEmbedding):
            return original(lora_config, adapter_name, target, **kwargs)
        _refuse(lora_config)
        return adapter_class()(target, adapter_name, lora_config, **kwargs)

    lora.LoraModel._create_new_module = staticmethod(choose)


def _refuse(config: Any) -> None:
    """Raise ValueError for kinds of LoRA that start from, or go through, the weight itself."""
    asked = [name for name in NEEDS_WEIGHT if getattr(config, name, None)]
    if getattr(config, "init_lora_weights", True) not in PLAIN_STARTS:
        asked.append(f"init_lora_weights={config.init_lora_weights!r}")
    if asked:
        raise ValueError(f"packed VPTQ linears take plain LoRA only: leave out {', '.join(asked)}")


@functools.cache
def adapter_class() -> type:
    """peft's adapter of a linear, on a packed one."""
    import inspect  # noqa: PLC0415

    from peft.tuners.lora.layer import Linear  # noqa: PLC0415 (only where peft is)

    takes_config = "config" in inspect.signature(Linear.__init__).parameters  # since 0.19; the parts one by one before

    class LoraVQuantLinear(Linear):
        """LoRA on a `VQuantLinear`: the packed product, and beside it the adapter's."""

        def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
            if takes_config:
                kwargs["config"] = config
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type")  # it has the sizes that are looked for
                super().__init__(base_layer, adapter_name, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
            raise ValueError(NO_MERGE)

        def unmerge(self) -> None:
            raise ValueError(NO_MERGE)

    return LoraVQuantLinear
