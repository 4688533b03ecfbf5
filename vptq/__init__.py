"""Vector post-training quantization of causal language models (VPTQ, arXiv:2409.17066).

`import vptq` lets `transformers.AutoModelForCausalLM.from_pretrained` load packed checkpoints, and `peft` put adapters on
them. The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from vptq.checkpoint import transformers_bridge
from vptq.finetune import peft_bridge

__version__ = "0.1.0"

_LAZY = {
    "LinearConfig": "vptq.config",
    "FinetuneConfig": "vptq.finetune_config",
    "QuantConfig": "vptq.config",
    "VQuantLinear": "vptq.nn.vquant_linear",
    "VptqError": "vptq.errors",
    "finetune_model": "vptq.pipeline.finetune",
    "cache_weights": "vptq.nn.vquant_linear",
    "load_quantized": "vptq.checkpoint.reader",
    "quantize_linear": "vptq.quantize.linear",
    "quantize_model": "vptq.pipeline.run",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vptq' has no attribute {name!r}")


transformers_bridge.install()
peft_bridge.install()
