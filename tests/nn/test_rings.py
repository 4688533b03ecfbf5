"""What is stored of a trellis gives back what was chosen; the format is what docs/format.md says."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from tests.conftest import problem
from vptq.checkpoint.names import to_tensors
from vptq.config import LinearConfig
from vptq.geometry import plan_geometry
from vptq.layer_config import LayerConfig
from vptq.nn.reference import dequantize_packed
from vptq.nn.rings import RingMatrix, longest_run, make_run_table, pack_rings, ring_product, ring_weight, trellis_of
from vptq.nn.vquant_linear import VQuantLinear
from vptq.quantize.codebook import store_codebook
from vptq.quantize.linear import quantize_linear
from vptq.quantize.metric import proxy_error
from vptq.quantize.trellis import Trellis

BASE = {"rotation": "hadamard", "codebook_scope": "shared"}
CASES = {
    "trellis": {"vector_lens": (-1, 1), "num_centroids": (-1, 64), "trellis_bits": 2},
    "trellis of pairs": {"vector_lens": (-1, 2), "num_centroids": (-1, 64), "trellis_bits": 3},
    "5 of 11 bits": {"vector_lens": (-1, 1), "num_centroids": (-1, 2048), "trellis_bits": 5, "scale_scope": "row"},
    "trellis in groups": {"vector_lens": (-1, 1), "num_centroids": (-1, 64), "trellis_bits": 2, "row_groups": 3},
    "vectors": {"vector_lens": (-1, 4), "num_centroids": (-1, 16), "row_groups": 2},
    "residual": {"vector_lens": (-1, 4), "num_centroids": (-1, 16), "num_res_centroids": (-1, 8)},
    "inputs only": {"vector_lens": (-1, 4), "num_centroids": (-1, 16), "rotation_sides": "in"},
    "rows": {"vector_lens": (-1, 4), "num_centroids": (-1, 16), "vector_quant_dim": "in", "enable_perm": False},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(384, 24), (150, 22), (832, 8)])
def test_packed_weight_is_the_quantized_one(case, shape, generator):
    config = LinearConfig(**BASE | CASES[case])
    assert config.faults() == []
    geometry, faults = plan_geometry(*shape, config)
    assert not faults
    stages = [torch.randn(config.num_centroids[1], config.vector_len, generator=generator)]
    if config.has_residual:
        stages.append(torch.randn(config.num_res_centroids[1], config.vector_len, generator=generator) / 4)
    books = tuple(store_codebook(table[None], 16, 16, torch.float16) for table in stages)
    weight, hessian = problem(*shape, generator)
    quantized, report = quantize_linear(weight, hessian, config, shared=books)
    assert report.error == pytest.approx(proxy_error(weight, quantized.dequantize(), hessian), rel=1e-3)
    layer = LayerConfig.of(config, geometry, bias=False)
    tensors = to_tensors(quantized, layer, torch.float16)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: s for n, (s, _) in layer.tensor_shapes().items()}
    found = dequantize_packed(tensors, layer, torch.float32)
    torch.testing.assert_close(found, quantized.dequantize(), rtol=1e-5, atol=1e-5)
    assert LayerConfig.from_dict("x", layer.to_dict()) == layer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 20])
def test_linears_multiply_as_their_weight_does(case, count, generator, device):
    layer, tensors = random_layer(case, generator)
    owner, sharer = (VQuantLinear(**own.to_dict(), dtype=torch.float32) for own in (layer, replace(layer, codebook_of="other")))
    owner.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})
    own = {name: tensor for name, tensor in owner.state_dict().items() if name not in layer.codebook_shapes()}
    sharer.load_state_dict(own)
    sharer.share_codebook(owner)
    owner, sharer = owner.to(device), sharer.to(device)
    x = torch.randn(count, layer.in_features, generator=generator).to(device)
    expected = x.double() @ owner.dequantize().double().T
    for module in (owner, sharer):
        torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-3)
    torch.compiler.reset()
    found = torch.compile(sharer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    if device.type == "cpu" and count == 1:
        first, second = (module._operands(module._tensors()).main for module in (owner, sharer))
        same = [name for name in ("main", "table", "run_table") if hasattr(first, name)]
        assert all(getattr(first, name) is getattr(second, name) for name in same), "made once for all that share it"


def random_layer(case, generator):
    """A linear of 384 x 24 with random indices."""
    config = LinearConfig(**BASE | CASES[case])
    geometry, _ = plan_geometry(384, 24, config)
    layer = LayerConfig.of(config, geometry, bias=False)
    tensors = {}
    for name, (shape, kind) in layer.tensor_shapes().items():
        if kind == "float":
            tensors[name] = torch.randn(shape, generator=generator)
        else:
            tensors[name] = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    return layer, tensors


def test_bits_lie_where_the_format_says(generator):
    """Window of L bits that ends with vector t's own, in a ring, read bit by bit."""
    config = LinearConfig(**BASE | CASES["5 of 11 bits"])
    geometry, _ = plan_geometry(384, 3, config)
    layer = LayerConfig.of(config, geometry, bias=False)
    words = torch.randint(-(2**31), 2**31, layer.tensor_shapes()["indices"][0], generator=generator, dtype=torch.int32)
    matrix = RingMatrix(words, torch.empty(2048, 1), trellis_of(layer), 384, layer.ring_len)
    states = matrix.windows(slice(None), 1).flatten(0, 1)
    ring_len, rings = layer.ring_len, words.shape[0]
    for ring, vector, column in [(0, 0, 0), (rings - 1, 1, 2), (0, ring_len - 1, 1), (rings - 1, 40, 0)]:
        stream = [(int(words[ring, w, column]) >> bit) & 1 for w in range(words.shape[1]) for bit in range(32)]
        last = (vector + 1) * 5
        window = [stream[(last - 11 + i) % (ring_len * 5)] for i in range(11)]
        expected = sum(bit << i for i, bit in enumerate(window))
        assert int(states[ring * ring_len + vector, column]) == expected
    assert torch.equal(pack_rings(states, layer), words)


def test_damaged_settings_are_refused():
    from vptq.errors import CheckpointError

    config = LinearConfig(**BASE | CASES["trellis"])
    geometry, _ = plan_geometry(384, 24, config)
    layer = LayerConfig.of(config, geometry, bias=False)
    for change in ({"rotation": "fourier"}, {"ring_len": 31}, {"ring_len": 0}, {"num_scales": 7}, {"trellis_bits": 9},
                   {"row_groups": 5}, {"rotation_sides": "up"}):  # fmt: skip
        with pytest.raises(CheckpointError, match="does not fit together"):
            LayerConfig.from_dict("x", dataclasses.replace(layer, **change).to_dict())


@pytest.mark.parametrize("out_features", [832, 960, 3328, 8960, 11008, 13696, 18944])
@pytest.mark.parametrize("row_groups", [2, 3, 4, 8])
def test_groups_of_rows_are_whole_rings_and_the_same_on_every_rung(out_features, row_groups):
    from vptq.config import QuantConfig
    from vptq.pipeline.allocation import rungs
    from vptq.recipe import RECIPE

    base = dataclasses.replace(QuantConfig.from_flat(dict(RECIPE)).linear, row_groups=row_groups)
    found = set()
    for config in rungs(base):
        geometry, faults = plan_geometry(out_features, 64, config)
        assert not faults
        found.add(geometry.row_groups)
        if geometry.row_groups > 1:
            assert out_features % (geometry.row_groups * geometry.ring_len * config.vector_len) == 0
            assert geometry.of_row_group().group_grid[0] * geometry.row_groups == geometry.group_grid[0]
    assert len(found) == 1


RINGS = [(12, 1, 1), (12, 2, 1), (12, 3, 1), (12, 4, 1), (12, 5, 2), (12, 3, 2), (7, 7, 1), (8, 6, 3), (16, 2, 1)]


def ring_matrix(state_bits, step_bits, vector_len, generator, device, rows=190, columns=24, ring_len=64):
    rings = -(-rows // (ring_len * vector_len))
    shape = (rings, ring_len * step_bits // 32, columns)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    table = torch.randn(1 << state_bits, vector_len, generator=generator)
    return RingMatrix(words.to(device), table.to(device), Trellis(state_bits, step_bits), rows, ring_len)


@pytest.mark.parametrize("state_bits, step_bits, vector_len", RINGS)
def test_runs_of_vectors_say_what_single_ones_do(state_bits, step_bits, vector_len, generator, device):
    matrix = ring_matrix(state_bits, step_bits, vector_len, generator, device)
    single = torch.nn.functional.embedding(matrix.windows(slice(None), 1), matrix.table)
    for run in (1, 2, longest_run(matrix.trellis, vector_len)):
        table = make_run_table(matrix.table, matrix.trellis, run)
        several = torch.nn.functional.embedding(matrix.windows(slice(None), run), table)
        assert torch.equal(several.unflatten(3, (run, vector_len)).permute(0, 1, 3, 2, 4).flatten(1, 2), single)


@pytest.mark.parametrize("state_bits, step_bits, vector_len", RINGS)
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_product_with_rings(state_bits, step_bits, vector_len, count, generator, device, monkeypatch):
    monkeypatch.setattr("vptq.nn.rings.BAG_INDICES", 1000)
    monkeypatch.setattr("vptq.nn.rings.CHUNK_WEIGHTS", 5000)
    matrix = ring_matrix(state_bits, step_bits, vector_len, generator, device)
    x = torch.randn(24, count, generator=generator).to(device).T  # not contiguous
    expected = x.double() @ ring_weight(matrix).double().T
    torch.testing.assert_close(ring_product(x, matrix).double(), expected, rtol=1e-4, atol=1e-4)
    half = ring_product(x.bfloat16(), matrix)
    assert half.dtype == torch.bfloat16 and half.shape == (count, 190)
