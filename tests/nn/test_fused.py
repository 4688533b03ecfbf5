"""Fused kernels on a GPU: every form of a linear, few rows and many, to twice the error that torch's own product has.

Without one the same sources run on the CPU (cuda_on_cpu.h), for a few forms in the ordinary tests and for all in the slow ones.
"""

from dataclasses import replace

import pytest
import torch

from tests.nn.test_vectors import FORM, vector_matrix
from vptq.config import LinearConfig
from vptq.geometry import plan_geometry
from vptq.layer_config import LayerConfig
from vptq.nn.kernels import products, turns
from vptq.nn.kernels.fused import few_rows, fused_linear, go_together
from vptq.nn.kernels.nvrtc import Limits
from vptq.nn.kernels.packed import kernel_matrix, lane_words, make_tables, takes, unit_vectors, unit_words
from vptq.nn.kernels.products import cut_products
from vptq.nn.kernels.turns import _sign_bits, _small_matrix, cut_turn
from vptq.nn.reference import dequantize_packed
from vptq.nn.rings import RingMatrix, make_run_table
from vptq.nn.vectors import MOST_ROWS, VectorMatrix
from vptq.nn.vquant_linear import VQuantLinear
from vptq.quantize.rotation import Rotation
from vptq.quantize.trellis import Trellis

ROTATED = {"rotation": "hadamard", "codebook_scope": "shared"}
SETTINGS = {
    **{f"v{v}k{1 << b}": {"vector_lens": (-1, v), "num_centroids": (-1, 1 << b)} for v, b in
       [(2, 3), (3, 5), (4, 8), (5, 9), (6, 12), (7, 6), (8, 12), (8, 16), (10, 7), (12, 12), (16, 13)]},
    "residual": {"vector_lens": (-1, 8), "num_centroids": (-1, 256), "num_res_centroids": (-1, 256)},
    "residual of 32 bits": {"vector_lens": (-1, 16), "num_centroids": (-1, 65536), "num_res_centroids": (-1, 65536)},
    "odd residual": {"vector_lens": (-1, 6), "num_centroids": (-1, 128), "num_res_centroids": (-1, 32)},
    "groups": {"vector_lens": (-1, 8), "num_centroids": (-1, 4096), "group_num": 4},
    "groups and residual": {"vector_lens": (-1, 4), "num_centroids": (-1, 64), "num_res_centroids": (-1, 16), "group_num": 2},
    "outliers": {"vector_lens": (4, 8), "num_centroids": (4096, 4096), "npercent": 2},
    "outliers of 4, v = 6": {"vector_lens": (4, 6), "num_centroids": (128, 4096), "npercent": 1, "group_num": 2},
    "outliers of 4, v = 10": {"vector_lens": (4, 10), "num_centroids": (16, 256), "npercent": 3},
    "outliers as they come": {"vector_lens": (4, 8), "num_centroids": (64, 64), "npercent": 2, "enable_perm": False},
    "codebook in 8 bits": {"vector_lens": (-1, 8), "num_centroids": (-1, 1024), "bitwidth": 8},
    "no scale, no order": {"vector_lens": (-1, 8), "num_centroids": (-1, 256), "enable_norm": False, "enable_perm": False},
    "inputs": {"vector_lens": (-1, 8), "num_centroids": (-1, 512), "vector_quant_dim": "in"},
    "rotated": {"vector_lens": (-1, 4), "num_centroids": (-1, 256), **ROTATED},
    "rotated, row scales": {"vector_lens": (-1, 4), "num_centroids": (-1, 256), "scale_scope": "row", **ROTATED},
    "rotated inputs": {"vector_lens": (-1, 4), "num_centroids": (-1, 256), "rotation_sides": "in", **ROTATED},
    "rotated, own codebook": {"vector_lens": (-1, 8), "num_centroids": (-1, 1024), "rotation": "hadamard"},
    **{f"trellis {b}": {"vector_lens": (-1, 1), "num_centroids": (-1, 4096), "trellis_bits": b, **ROTATED}
       for b in range(1, 9)},
    "trellis of pairs": {"vector_lens": (-1, 2), "num_centroids": (-1, 1024), "trellis_bits": 3, **ROTATED},
    "trellis of 16384": {"vector_lens": (-1, 1), "num_centroids": (-1, 16384), "trellis_bits": 2, **ROTATED},
    "trellis in groups": {"vector_lens": (-1, 1), "num_centroids": (-1, 64), "trellis_bits": 2, "row_groups": 3, **ROTATED},
}  # fmt: skip
SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.replace(" ", "-"))
SHAPES = [(384, 512), (300, 204)]  # the second: nothing is a whole number of anything, nor can it be turned by a kernel
COUNTS = [0, 1, 2, 3, 8, 11, MOST_ROWS, MOST_ROWS + 1, 70]


def random_module(setting, shape, dtype, device, generator, bias=False):
    config = LinearConfig(**SETTINGS[setting])
    assert not config.faults()
    geometry, faults = plan_geometry(*shape, config)
    assert not faults, faults
    layer = LayerConfig.of(config, geometry, bias=bias)
    module = VQuantLinear(**layer.to_dict(), dtype=dtype)
    for name, parameter in module.named_parameters():
        if name == "perm":
            parameter.data.copy_(torch.randperm(shape[1], generator=generator))
        elif name == "outlier_indices":
            parameter.data.copy_(torch.randint(config.num_centroids[0], parameter.shape, generator=generator))
        elif name == "indices":
            parameter.data.copy_(valid_indices(layer, parameter.shape, generator))
        elif name.endswith("packed"):
            parameter.data.copy_(torch.randint(-(2**31), 2**31, parameter.shape, generator=generator))
        else:
            parameter.data.copy_(
                torch.randn(parameter.shape, generator=generator) * (0.05 if "scale" in name or name == "weight_bias" else 1)
            )
    return module.to(device)


def valid_indices(layer, shape, generator):
    """Words whose indices name centroids that are there."""
    from vptq.nn.packing import pack_bits

    if layer.trellis_bits:
        return torch.randint(-(2**31), 2**31, shape, generator=generator)
    grid = (layer.group_num, *layer.geometry.group_grid)
    main = torch.randint(layer.num_centroids[1], grid, generator=generator)
    if layer.residual_bits:
        main |= torch.randint(layer.num_res_centroids[1], grid, generator=generator) << layer.main_bits
    return pack_bits(main, layer.main_bits + layer.residual_bits)


def relative(found, right):
    return float((found.double() - right).square().mean().sqrt() / right.square().mean().sqrt())


@pytest.mark.gpu
@SETTING
@pytest.mark.parametrize("shape", [*SHAPES, (352, 224)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linears_err_no_more_than_twice_as_torch_does(setting, shape, dtype, generator):
    device = torch.device("cuda", 0)
    module = random_module(setting, shape, dtype, device, generator, bias=True)
    weight = dequantize_packed(module.stored_tensors(), module.layer_config, torch.float32)
    with torch.no_grad():
        for count in COUNTS:
            x = torch.randn(shape[1], count, generator=generator).to(device, dtype).T  # not contiguous
            y = module(x)
            assert y.shape == (count, shape[0]) and y.dtype == dtype
            if count:
                right = x.double() @ weight.double().T + module.bias.double()
                torchs = relative(torch.nn.functional.linear(x, weight.to(dtype), module.bias), right)
                assert relative(y, right) <= 2 * torchs, count
        batch = torch.randn(2, 3, shape[1], generator=generator).to(device, dtype)
        torch.testing.assert_close(module(batch), module(batch.flatten(0, 1)).unflatten(0, (2, 3)))
    fused = module._fused.peek()[0]
    turned = SETTINGS[setting].get("rotation") == "hadamard"
    assert (fused is None) == (setting == "inputs" or (turned and shape == SHAPES[1])), "the kernels take what they are for"
    if fused is not None:
        found = fused.weight()
        stored = found if fused.order is None else found[:, torch.argsort(fused.order.long())]
        from vptq.nn.reference import dequantize_rotated

        exact = dequantize_rotated(module.stored_tensors(), module.layer_config)
        assert relative(stored, exact.double()) <= 2 * relative(exact.to(dtype), exact.double())


EMULATED = [
    "v6k4096",
    "groups and residual",
    "outliers as they come",
    "rotated",
    "trellis 2",
    "trellis 5",
]


@pytest.mark.parametrize("setting", [s if s in EMULATED else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS])
@pytest.mark.ci
def test_cuda_sources_run_on_a_cpu(setting, generator, emulated):
    """Odd sizes on three processors: several turns, several steps, some of them empty."""
    shape, dtype = ((352, 224), torch.bfloat16) if "rotation" in SETTINGS[setting] else ((76, 1100), torch.float16)
    module = random_module(setting, shape, dtype, torch.device("cpu"), generator, bias=True)
    tensors, config = module.stored_tensors(), module.layer_config
    fused = fused_linear(tensors, config, dtype)
    if setting == "inputs":
        assert fused is None
        return
    assert fused is not None
    weight = dequantize_packed(tensors, config, torch.float32)
    for count in (1, 5, MOST_ROWS + 1):
        x = torch.randn(shape[1], count, generator=generator).to(dtype).T
        right = x.double() @ weight.double().T + module.bias.double()
        torchs = relative(torch.nn.functional.linear(x, weight.to(dtype), module.bias), right)
        assert relative(fused(x, module.bias), right) <= 2 * torchs, count
    assert fused(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("setting, copies", [("v6k4096", 0), ("trellis 2", 0), ("rotated", 2)])
@pytest.mark.ci
def test_codebooks_stay_in_global_memory_where_there_is_little_shared(setting, copies, generator, emulated, monkeypatch):
    monkeypatch.setattr(products, "limits_of", lambda device: Limits(processors=3, shared=41 << 10))
    shape = (352, 224) if "rotation" in SETTINGS[setting] else (76, 600)
    module = random_module(setting, shape, torch.float16, torch.device("cpu"), generator)
    fused = fused_linear(module.stored_tensors(), module.layer_config, torch.float16)
    assert fused.main.defines["COPIES"] == copies
    weight = dequantize_packed(module.stored_tensors(), module.layer_config, torch.float32)
    for count in (1, MOST_ROWS + 1):
        x = torch.randn(count, shape[1], generator=generator).half()
        right = x.double() @ weight.double().T
        assert relative(fused(x), right) <= 2 * relative(torch.nn.functional.linear(x, weight.half()), right)


def test_several_matrices_in_one_launch_on_a_cpu(generator, emulated):
    cpu, shapes = torch.device("cpu"), [(76, 600), (20, 600)]
    modules = [random_module("v8k4096", shape, torch.float16, cpu, generator) for shape in shapes]
    forms = [fused_linear(module.stored_tensors(), module.layer_config, torch.float16) for module in modules]
    assert go_together(*forms)
    for count in (1, 3):
        x = torch.randn(count, 600, generator=generator).half()
        for y, form in zip(few_rows(x, forms, [None, None]), forms, strict=True):
            torch.testing.assert_close(y, form(x), rtol=2e-3, atol=1e-2)
    other = random_module("v6k4096", (76, 600), torch.float16, cpu, generator)
    assert not go_together(forms[0], fused_linear(other.stored_tensors(), other.layer_config, torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["outliers", "rotated", "trellis 2"])
def test_compiled_and_exported_as_it_is(setting, generator):
    device = torch.device("cuda", 0)
    module = random_module(setting, (384, 512), torch.float16, device, generator)
    x = torch.randn(3, 512, generator=generator).to(device).half()
    with torch.no_grad():
        right = module(x)
        torch.compiler.reset()
        assert torch.equal(torch.compile(module, fullgraph=True)(x), right)
        program = torch.export.export(module, (x,))
    assert any("fused_linear" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), right)


@pytest.mark.gpu
def test_other_forms_are_multiplied_by_triton(generator, monkeypatch):
    from vptq.nn.kernels import tiles

    called = []
    real = tiles.product_by_kernel
    monkeypatch.setattr(tiles, "product_by_kernel", lambda *given: called.append(1) or real(*given))
    device = torch.device("cuda", 0)
    for setting, dtype in (("inputs", torch.float16), ("v8k4096", torch.float32)):
        module = random_module(setting, (384, 512), dtype, device, generator)
        x = torch.randn(MOST_ROWS, 512, generator=generator).to(device, dtype)
        called.clear()
        with torch.no_grad():
            torch.testing.assert_close(module(x).float(), x.float() @ module.dequantize().float().T, rtol=2e-2, atol=2e-2)
        assert called


@pytest.mark.gpu
def test_products_go_into_a_cuda_graph(generator):
    device = torch.device("cuda", 0)
    module = random_module("outliers", (384, 512), torch.float16, device, generator, bias=True)
    x = torch.randn(1, 512, generator=generator).to(device).half()
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, module(x))


@pytest.mark.gpu
def test_changes_are_seen_and_gradients_go_another_way(generator, monkeypatch):
    device = torch.device("cuda", 0)
    module = random_module("v8k4096", (384, 512), torch.float16, device, generator)
    x = torch.randn(2, 512, generator=generator).to(device).half()
    with torch.no_grad():
        before = module(x)
        module.centroids.weight.mul_(2)
        doubled = module(x)
        module.weight_bias.zero_()
        module.centroids.weight.div_(2)
    assert not torch.allclose(before, doubled)
    x.requires_grad_()
    module(x).sum().backward()
    weight = module.dequantize().float()
    torch.testing.assert_close(x.grad.float(), weight.sum(0).expand(2, -1), rtol=2e-2, atol=2e-2)
    monkeypatch.setenv("VPTQ_KERNELS", "torch")
    with torch.no_grad():
        torch.testing.assert_close(module(x.detach()).float(), (x.float() @ weight.T).detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("size, blocks", [(64, 1), (96, 1), (576, 1), (4096, 1), (11008, 1), (28672, 1), (832, 2), (3072, 3)])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("count", [3, turns.MANY_ROWS + 5])
def test_turns_are_the_rotation(size, blocks, back, count, generator):
    check_turn(size, blocks, back, count, generator, torch.device("cuda", 0))


@pytest.mark.parametrize(
    "size, blocks, back, count", [(576, 1, True, 2), (576, 1, False, 33), (1536, 3, False, 2), (832, 2, True, 33)]
)
def test_turns_run_on_a_cpu(size, blocks, back, count, generator, emulated):
    check_turn(size, blocks, back, count, generator, torch.device("cpu"))
    rotations = [Rotation(size, seed, "in", blocks) for seed in range(5)]
    xs = [torch.randn(count, size, generator=generator) for _ in rotations]
    works = [turns.Turn(x, rotation) for x, rotation in zip(xs, rotations, strict=True)]
    for y, x, rotation in zip(turns.turns(works, torch.float32, back), xs, rotations, strict=True):
        torch.testing.assert_close(y, rotation.undo(x) if back else rotation.apply(x), rtol=1e-4, atol=1e-4)


def check_turn(size, blocks, back, count, generator, device):
    rotation = Rotation(size, 5, "out", blocks)
    x = torch.randn(count, size, generator=generator).to(device)
    bias = torch.randn(size, generator=generator).to(device) if back else None
    right = rotation.undo(x.double()) + bias.double() if back else rotation.apply(x.double())
    (turned,) = turns.turns([turns.Turn(x, rotation, bias)], torch.float32, back)
    torch.testing.assert_close(turned.double(), right, rtol=1e-5, atol=1e-5)
    work = turns.Turn(x.half(), rotation, None if bias is None else bias.half())
    torch.testing.assert_close(turns.turns([work], torch.float16, back)[0].double(), right, rtol=2e-3, atol=4e-3)


def given_rows(size, dtype, generator):
    """x, and what it becomes: itself, normed, gated; exactly."""
    from vptq.nn.kernels.given import AS_IT_IS, gated, normed

    x, beside = (torch.randn(1, size, generator=generator).to(dtype) for _ in range(2))
    beside, wide = beside[0], x.double()
    rows = wide / (wide.square().mean() + 0.1).sqrt() * beside.double()
    yield x, AS_IT_IS, wide
    yield 2 * x, normed(beside, 0.4), rows
    yield x, gated(beside), torch.nn.functional.silu(wide) * beside.double()


@pytest.mark.parametrize("setting", ["outliers of 4, v = 10", "rotated", "no scale, no order"])
@pytest.mark.ci
def test_activations_are_normed_and_gated_on_the_way(setting, generator, emulated):
    check_given(setting, (352, 224), torch.device("cpu"), generator)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["outliers of 4, v = 10", "rotated", "no scale, no order", "trellis 2", "v6k4096"])
@pytest.mark.parametrize("shape", [(384, 512), (512, 14336)], ids=str)
def test_activations_are_normed_and_gated_on_a_gpu(setting, shape, generator):
    check_given(setting, shape, torch.device("cuda", 0), generator)


def check_given(setting, shape, device, generator):
    dtype = torch.bfloat16
    module = random_module(setting, shape, dtype, device, generator, bias=True)
    fused = fused_linear(module.stored_tensors(), module.layer_config, dtype)
    weight = dequantize_packed(module.stored_tensors(), module.layer_config, torch.float32).double()
    residual = torch.randn(1, shape[0], generator=generator).to(device, dtype)
    for x, given, rows in given_rows(shape[1], dtype, generator):
        given = replace(given, beside=None if given.beside is None else given.beside.to(device))
        rows = rows.to(device)
        right = rows @ weight.T + module.bias.double() + residual.double()
        torchs = relative(torch.nn.functional.linear(rows.to(dtype), weight.to(dtype), module.bias) + residual, right)
        (y,) = few_rows(x.to(device), [fused], [module.bias], given, residual)
        assert relative(y, right) <= 2 * torchs, given.kind


@pytest.mark.parametrize("size, blocks", [(832, 2), (576, 1)])
def test_a_turn_norms_and_gates_what_it_reads(size, blocks, generator, emulated):
    rotation = Rotation(size, 5, "in", blocks)
    for x, given, rows in given_rows(size, torch.float16, generator):
        torch.testing.assert_close(
            turns.turn(x, rotation, torch.float32, given).double(), rotation.apply(rows), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("size, blocks", [(64, 1), (96, 1), (576, 1), (11008, 1), (14336, 1), (832, 2)])
def test_a_rotation_is_laid_out_as_its_kernel_takes_it(size, blocks, generator):
    """What turn.cu does, in words of torch."""
    rotation = Rotation(size, 5, "out", blocks)
    height, run = cut_turn(rotation)
    assert height * run * blocks == size
    words = _sign_bits(rotation, height, run, torch.device("cpu")).long()
    small = _small_matrix(rotation, height, run, torch.device("cpu"))
    rows = torch.arange(height)
    negative = (words[:, rows // 32] >> (rows % 32)[:, None]) & 1  # (blocks, height, run)
    x = torch.randn(blocks, height, run, generator=generator)
    turned = torch.einsum("ik,bkj->bij", small, torch.where(negative > 0, -x, x))
    from vptq.quantize.rotation import hadamard_matrix

    turned = turned @ hadamard_matrix(run, torch.float32, x.device) * run**0.5
    torch.testing.assert_close(turned.flatten(), rotation.apply(x.flatten()), rtol=1e-4, atol=1e-4)


def test_sizes_without_a_turn_are_left_to_torch():
    assert cut_turn(Rotation(231 * 128, 0, "in")) is None and cut_turn(Rotation(97 * 16, 0, "in")) is None


@FORM
def test_tables_hold_the_codebooks_padded(form, generator):
    matrix = vector_matrix(form, generator, torch.device("cpu"))[0]
    if not matrix.along_out:
        assert not takes(matrix, torch.float16)
        return
    assert takes(matrix, torch.float16) and not takes(matrix, torch.float32)
    tables = make_tables(matrix, torch.float16)
    for table, book in zip(tables, (matrix.main, matrix.residual), strict=True):
        assert (table is None) == (book is None)
        if book is not None:
            assert torch.equal(table[:, : book.shape[1], : book.shape[2]], book.half())
            assert table.shape[2] in (2, 4, 8, 16) and not table[:, :, book.shape[2] :].any()
    made = kernel_matrix(matrix, tables)
    assert (made.defines["COPIES"] == 0) == (len(matrix.words) > 1 or made.table_bytes > 128 << 10)
    last = matrix.words.numel() - made.struct.last_words
    assert last == (lane_words(made.defines) if made.defines["EVEN"] else 1)


@pytest.mark.parametrize("setting", ["v8k4096", "v6k4096", "residual", "trellis 2", "trellis 3", "trellis 8"])
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_small_gpus_have_kernels_too(setting, shared, generator, monkeypatch):
    monkeypatch.setattr(products, "limits_of", lambda device: Limits(processors=20, shared=shared))
    module = random_module(setting, (384, 14336), torch.float16, torch.device("cpu"), generator)
    fused = fused_linear(module.stored_tensors(), module.layer_config, torch.float16)
    assert fused is not None
    for count in range(1, MOST_ROWS + 1):
        (cut,) = cut_products([fused.main], count, [20], shared)
        assert cut.shared <= shared and cut.threads in (128, 256, 512)


def test_codebooks_of_a_few_numbers_are_left_to_others():
    words, main, residual = torch.zeros(1, 8, 2, dtype=torch.int32), torch.randn(1, 64, 2), torch.randn(1, 2, 2)
    matrix = VectorMatrix(words, main, residual, 16, 8, True, 6, 1)
    assert not takes(matrix, torch.float16)


def test_rings_look_several_numbers_up_at_once():
    words = torch.zeros(2, 24, 12, dtype=torch.int32)
    matrix = RingMatrix(words, torch.randn(4096, 1), Trellis(12, 3), 500, 256)
    made = kernel_matrix(matrix, make_tables(matrix, torch.float16))
    assert torch.equal(made.main[0], make_run_table(matrix.table, matrix.trellis, 2).half())
    assert (made.defines["ENTRY"], made.defines["MAIN_BITS"], made.struct.units, made.unit_rows) == (2, 15, 16, 32)
    assert [unit_words(b) for b in (1, 2, 3, 4, 6, 8)] == [1, 1, 3, 1, 3, 1]
    assert [unit_vectors(b) for b in (0, 1, 2, 3, 4, 6, 8)] == [1, 32, 16, 32, 8, 16, 4]


@pytest.mark.parametrize("count", [1, 2, 5, 8, 16])
@FORM
def test_the_work_is_cut_so_that_all_of_it_is_done(form, count, generator):
    matrix = vector_matrix(form, generator, torch.device("cpu"))[0]
    if not matrix.along_out:
        return
    made = kernel_matrix(matrix, make_tables(matrix, torch.float16))
    for processors in (1, 132):
        (cut,) = cut_products([made], count, [processors], 227 << 10)
        assert cut.batch * cut.tiles >= count and cut.batch in (1, 2, 4, 8) and cut.shared <= 227 << 10
        assert cut.blocks <= processors and cut.threads // 32 % cut.across == 0
        slices = -(-matrix.group_size // (256 // cut.batch)) * len(matrix.words)
        assert cut.columns >= slices * 256 // cut.batch
