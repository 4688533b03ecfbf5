"""Triton's products and matrices against the plain ones: every form, odd sizes, no rows, any layout of x."""

import dataclasses

import pytest
import torch

from tests.nn.test_rings import RINGS, ring_matrix
from tests.nn.test_vectors import FORM, vector_matrix
from vptq.nn import ops
from vptq.nn.rings import ring_weight
from vptq.nn.vectors import vector_weight


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def in_type(matrix, dtype):
    names = [n for n in ("main", "residual", "table") if getattr(matrix, n, None) is not None]
    return dataclasses.replace(matrix, **{n: getattr(matrix, n).to(dtype) for n in names})


def check(matrix, plain, generator, device):
    """The matrix to its last bit (but for one rounding of a sum), products to twice the error of torch's own."""
    from vptq.nn.kernels.tiles import MOST_ROWS, product_by_kernel, weight_by_kernel

    exact = plain(in_type(matrix, torch.float32))
    found = weight_by_kernel(matrix)
    cut_off = device.type == "cpu" and matrix.dtype == torch.bfloat16  # as Triton's interpreter makes bfloat16
    expected = exact.to(matrix.dtype)
    torch.testing.assert_close(found, expected, rtol=2**-7 if cut_off else 0, atol=0)
    for count in (0, 1, 3, MOST_ROWS):
        x = torch.randn(exact.shape[1], count, generator=generator).to(device, matrix.dtype).T  # not contiguous
        y = product_by_kernel(x, matrix)
        assert y.shape == (count, matrix.out_features) and y.dtype == x.dtype
        if count:
            right = x.double() @ exact.double().T
            allowed = (4 if cut_off else 2) * (
                torch.nn.functional.linear(x, exact.to(x.dtype)).double() - right
            ).square().mean().sqrt()
            floor = 1e-6 * right.square().mean().sqrt()
            assert (y.double() - right).square().mean().sqrt() <= allowed + floor


def check_gradients(matrix, generator, device):
    """Those of the codebooks, from kernel and plainly."""
    from vptq.nn.kernels.tiles import gradients_by_kernel

    shape = ops.weight(matrix).shape
    gradient = torch.randn(shape[1], shape[0], generator=generator).to(device, matrix.dtype).T  # not contiguous
    names = [n for n in ("main", "residual", "table") if getattr(matrix, n, None) is not None]
    plain = ops._plain_gradients(in_type(matrix, torch.float32), gradient)
    found = gradients_by_kernel(matrix, gradient)
    assert len(found) == len(names)
    for own, expected in zip(found, plain, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@FORM
def test_gradients_of_codebooks(form, generator, kernel_device):
    check_gradients(vector_matrix(form, generator, kernel_device)[0], generator, kernel_device)


@pytest.mark.parametrize("state_bits, step_bits, vector_len", RINGS)
def test_gradients_of_tables(state_bits, step_bits, vector_len, generator, kernel_device):
    check_gradients(ring_matrix(state_bits, step_bits, vector_len, generator, kernel_device), generator, kernel_device)


def test_gradients_in_several_copies(generator, kernel_device, monkeypatch):
    from vptq.nn.kernels import tiles

    for copies in (1, 3):
        monkeypatch.setattr(tiles, "MOST_COPIES", copies)
        check_gradients(vector_matrix("residual", generator, kernel_device)[0], generator, kernel_device)


@FORM
def test_vectors(form, dtype, generator, kernel_device):
    if dtype == torch.bfloat16 and form not in ("residual", "along inputs, padded"):
        pytest.skip("the type only matters where numbers are read and written")
    matrix = in_type(vector_matrix(form, generator, kernel_device)[0], dtype)
    check(matrix, vector_weight, generator, kernel_device)


@pytest.mark.parametrize("form, sums", [("along inputs, partial sums", 2), ("along inputs", 0)])
def test_partial_sums_are_taken_where_there_are_few(form, sums, generator, kernel_device, monkeypatch):
    from vptq.nn.kernels import tiles

    called = []
    real = tiles.partial_sums
    monkeypatch.setattr(tiles, "partial_sums", lambda *given: called.append(1) or real(*given))
    matrix = vector_matrix(form, generator, kernel_device)[0]
    x = torch.randn(2, matrix.group_size * len(matrix.words), generator=generator).to(kernel_device)
    tiles.product_by_kernel(x, matrix)
    assert len(called) == sums


@pytest.mark.parametrize("state_bits, step_bits, vector_len", RINGS)
def test_rings(state_bits, step_bits, vector_len, generator, kernel_device):
    matrix = ring_matrix(state_bits, step_bits, vector_len, generator, kernel_device)
    check(in_type(matrix, torch.float16), ring_weight, generator, kernel_device)


def test_operators_go_to_the_kernels(generator, kernel_device, monkeypatch):
    from vptq.nn.kernels import tiles

    called = []
    for name in ("weight_by_kernel", "product_by_kernel"):
        real = getattr(tiles, name)
        monkeypatch.setattr(tiles, name, lambda *args, name=name, real=real: called.append(name) or real(*args))
    matrix = vector_matrix("groups and residual", generator, kernel_device)[0]
    weight = ops.weight(matrix)
    for count in (3, 17):
        x = torch.randn(count, 48, generator=generator).to(kernel_device)
        torch.testing.assert_close(ops.product(x, matrix), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert called == ["weight_by_kernel", "product_by_kernel", "weight_by_kernel"]
    called.clear()
    double = dataclasses.replace(matrix, main=matrix.main.double(), residual=matrix.residual.double())
    assert ops.weight(double).dtype == torch.float64 and not called
    monkeypatch.setenv("VPTQ_KERNELS", "torch")
    assert torch.equal(ops.weight(matrix), weight) and not called
