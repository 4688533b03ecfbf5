"""A block of the Llama family by fused kernels, against the model's own code; on a GPU, and on a CPU by cuda_on_cpu.h."""

import copy

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, StaticCache
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from tests.nn.test_fused import random_module, relative
from vptq.nn.decoder_block import fused_block
from vptq.nn.kernels.attention import Heads, attend

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # with biases
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=64)),  # with norms of heads
}


def exact_attention(q, k, v, rotary, cache, position, heads):
    """In float64, (1, groups, each, dim): queries and keys normed and turned, the cache as it is up to the position."""

    def placed(x, norm):
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + heads.epsilon).sqrt() * norm.double()
        first, second = x.chunk(2, -1)
        return x * rotary[0].double() + torch.cat([-second, first], -1) * rotary[1].double()

    q = placed(q.double().view(heads.groups, heads.each, heads.dim), heads.q_norm)
    key = placed(k.double().view(heads.groups, 1, heads.dim), heads.k_norm)
    keys = torch.cat([cache[0][:, :position].double(), key], 1)
    values = torch.cat([cache[1][:, :position].double(), v.double().view(heads.groups, 1, heads.dim)], 1)
    weights = torch.softmax(q @ keys.mT * heads.scale, -1)
    return (weights @ values).reshape(1, -1), key[:, 0]


def check_attention(device, generator, dim, each, groups, dtype, norm, length, positions):
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    norms = (make(dim), make(dim)) if norm else (None, None)
    heads = Heads(groups, each, dim, 0.7 * dim**-0.5, *norms, epsilon=0.1)
    assert heads.fit()
    arrived = torch.zeros(groups, dtype=torch.int32, device=device)
    for position in positions:
        q, k, v = (make(1, groups * n * dim) for n in (each, 1, 1))
        rotary, cache = (make(dim), make(dim)), (make(groups, length, dim), make(groups, length, dim))
        right, key = exact_attention(q, k, v, rotary, cache, position, heads)
        before = [copy.deepcopy(t) for t in cache]
        place = torch.tensor([position], device=device)
        found = attend(q, k, v, rotary, cache, place, heads, arrived)
        assert found.shape == q.shape and found.dtype == dtype
        assert relative(found, right) < 3 * torch.finfo(dtype).eps, position
        assert relative(cache[0][:, position], key) < torch.finfo(dtype).eps
        assert torch.equal(cache[1][:, position].flatten(), v[0])
        for old, new in zip(before, cache, strict=True):
            old[:, position] = new[:, position]
            assert torch.equal(old, new), "only the token's own place is written"
        assert not arrived.any()


@pytest.mark.parametrize("dim, each, norm", [(32, 1, False), (64, 7, True), (128, 4, False), (256, 2, True)])
def test_attention_runs_on_a_cpu(dim, each, norm, generator, emulated):
    check_attention(torch.device("cpu"), generator, dim, each, 2, torch.bfloat16, norm, 150, (0, 3, 70, 149))


@pytest.mark.gpu
@pytest.mark.parametrize("dim, each, groups", [(32, 1, 3), (64, 7, 2), (64, 3, 3), (128, 1, 32), (128, 8, 8), (256, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_attention_is_exact_to_rounding(dim, each, groups, dtype, norm, generator):
    check_attention(torch.device("cuda", 0), generator, dim, each, groups, dtype, norm, 2048, (0, 1, 63, 64, 255, 1000, 2047))


def packed_model(name, settings, dtype, device, generator):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (
            1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        )
    model.to(device, dtype)
    layer = model.model.layers[0]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    for place, setting in zip([*names, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], settings, strict=True):
        linear = layer.get_submodule(place)
        if setting is not None:
            packed = random_module(setting, tuple(linear.weight.shape), dtype, device, generator, linear.bias is not None)
            size = linear.in_features**0.5 * packed.dequantize(torch.float32).std()
            with torch.no_grad():
                for name, parameter in packed.named_parameters():
                    if "centroids" in name or name == "weight_bias":
                        parameter.div_(size)  # so that products are about as large as what goes in
            parent, _, child = place.rpartition(".")
            setattr(layer.get_submodule(parent), child, packed)
    return model


def check_block(name, settings, device, generator, dtype=torch.bfloat16):
    """Token by token as the model's own block, whose cache starts with another text."""
    model = packed_model(name, settings, dtype, device, generator)
    layer, exact = model.model.layers[0], copy.deepcopy(model).double()
    hidden = model.config.hidden_size
    caches = []
    for whose in (model, exact):
        cache = StaticCache(config=model.config, max_cache_len=64)
        places = torch.arange(5, device=device)
        x = torch.linspace(-2, 2, 5 * hidden, device=device).sin().view(1, 5, hidden).to(whose.dtype)
        with torch.no_grad():
            whose.model(
                inputs_embeds=x, past_key_values=cache, use_cache=True, cache_position=places, position_ids=places[None]
            )
        caches.append(cache)
    kept = caches[0].layers[0]
    position = torch.full((1,), 5, device=device)
    block = fused_block(layer, (kept.keys, kept.values), position, torch.zeros(2, dtype=torch.int32, device=device))
    assert block is not None
    for number in range(3):
        x = torch.randn(1, 1, hidden, generator=generator).to(device, dtype)
        with torch.no_grad():
            rotary = model.model.rotary_emb(x, position[None])
            found = block(x, position_embeddings=rotary, attention_mask=None)
            mask = torch.arange(64, device=device)[None, None, None] <= position
            given = {"past_key_values": caches[1], "cache_position": position}
            right = exact.model.layers[0](
                x.double(), position_embeddings=tuple(t.double() for t in rotary), attention_mask=mask, **given
            )
        right = right[0] if isinstance(right, tuple) else right
        assert found.shape == x.shape
        assert relative(found - x, right - x.double()) < 4 * torch.finfo(dtype).eps, number
        position += 1


ROTATED = ["rotated"] * 7
MIXED = ["outliers", "v6k4096", "v6k4096", None, "v8k4096", "residual", None]


@pytest.mark.parametrize(
    "name, settings", [("llama", ["v6k4096"] * 7), ("qwen2", ROTATED), ("qwen3", MIXED)], ids=["llama", "qwen2", "qwen3"]
)
@pytest.mark.ci
def test_blocks_run_on_a_cpu(name, settings, generator, emulated):
    check_block(name, settings, torch.device("cpu"), generator)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [["v6k4096"] * 7, ROTATED, MIXED, ["trellis 2"] * 7, [None] * 7], ids=lambda s: str(s[-1]))
def test_blocks_are_the_models_own(name, settings, generator):
    check_block(name, settings, torch.device("cuda", 0), generator)


def test_what_the_kernels_do_not_know_is_left_alone(generator, emulated):
    cpu = torch.device("cpu")
    arrived, position = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)

    def made(change, name="llama", dtype=torch.bfloat16, dim=32):
        model = packed_model(name, ["v6k4096"] * 7, dtype, cpu, generator)
        layer = model.model.layers[0]
        change(layer)
        cache = torch.zeros(2, 1, 2, 64, dim, dtype=dtype)
        return fused_block(layer, (cache[0], cache[1]), position, arrived) is not None

    assert made(lambda layer: None)
    assert not made(lambda layer: layer.mlp.register_forward_hook(print))
    assert not made(lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Identity()))
    assert not made(lambda layer: layer.input_layernorm.float())
    assert not made(lambda layer: layer.mlp.up_proj.register_parameter("bias", torch.nn.Parameter(torch.zeros(192))))
    assert not made(lambda layer: setattr(layer.self_attn, "num_key_value_groups", 9))
    assert not made(lambda layer: None, dim=48)
    assert not made(lambda layer: None, dtype=torch.float32)
