"""Tiny random models of many architectures, as transformers makes and saves them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from vptq.models.architecture import DEMO

BASE = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
ENDS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TEXT = BASE | {"head_dim": 8, "model_type": "gemma3_text"}
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip
ARCHITECTURES: dict[str, dict] = {  # model_type -> what its configuration is given
    "llama": BASE,
    "mistral": BASE,
    "qwen2": BASE,
    "qwen3": BASE | {"head_dim": 8, "tie_word_embeddings": True},
    "phi3": BASE,
    "gemma2": BASE | {"head_dim": 8},
    "gemma3_text": BASE | {"head_dim": 8},
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 4095},
    "opt": ENDS | {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        "word_embed_proj_dim": 32, "pad_token_id": 0,
    },
    "gpt2": ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": BASE,
    "falcon": ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "olmo2": BASE,
    "granite": BASE,
    "smollm3": BASE,
    "deepseek_v3": BASE | {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
    },
    "mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": BASE | MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": BASE | MOE | {"head_dim": 8},
    "olmoe": BASE | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}  # fmt: skip


def make_tiny(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **saving: object) -> Path:
    """A random two-block model of an architecture, with the demo's tokenizer."""
    from transformers import AutoConfig

    from vptq.models.architecture import _class_of

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type])
    model = _class_of(config).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder, **saving)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
