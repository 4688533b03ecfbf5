"""The operators: as torch wants them, compiled and exported alike, with the right gradients."""

import dataclasses

import pytest
import torch
from torch import library

from tests.nn.test_rings import RINGS, ring_matrix
from tests.nn.test_vectors import FORM, vector_matrix
from vptq.nn import ops
from vptq.nn.rings import ring_weight
from vptq.nn.vectors import vector_weight
from vptq.quantize.rotation import Rotation


def doubled(matrix, *names):
    """With codebooks in float64 that gradients go to."""
    found = {n: getattr(matrix, n) for n in names if getattr(matrix, n) is not None}
    return dataclasses.replace(matrix, **{n: t.double().requires_grad_() for n, t in found.items()})


@FORM
@pytest.mark.parametrize("count", [0, 1, 20])
def test_gradients_are_those_of_the_spelled_out_product(form, count, generator, device):
    matrix = doubled(vector_matrix(form, generator, device)[0], "main", "residual")
    books = [matrix.main] if matrix.residual is None else [matrix.main, matrix.residual]
    columns = matrix.group_size * len(matrix.words)
    x = torch.randn(count, columns, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    slope = torch.randn(count, matrix.out_features, generator=generator, dtype=torch.float64).to(device)
    found = torch.autograd.grad((ops.product(x, matrix) * slope).sum(), [x, *books])
    again = torch.autograd.grad((x @ ops.weight(matrix).T * slope).sum(), [x, *books])
    plain = torch.autograd.grad((x @ vector_weight_with_gradient(matrix).T * slope).sum(), [x, *books])
    for own, other, expected in zip(found, again, plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


def vector_weight_with_gradient(matrix):
    """`vector_weight` without writing in place, for autograd to go through."""
    from vptq.nn.vectors import _parts

    return torch.cat([part for _, part in _parts(matrix)])


@pytest.mark.parametrize("state_bits, step_bits, vector_len", RINGS)
def test_gradients_through_rings(state_bits, step_bits, vector_len, generator, device):
    from vptq.nn.rings import _parts

    matrix = doubled(ring_matrix(state_bits, step_bits, vector_len, generator, device), "table")
    x = torch.randn(3, 24, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    slope = torch.randn(3, 190, generator=generator, dtype=torch.float64).to(device)
    leaves = [x, matrix.table]
    found = torch.autograd.grad((ops.product(x, matrix) * slope).sum(), leaves)
    again = torch.autograd.grad((x @ ops.weight(matrix).T * slope).sum(), leaves)
    plain = torch.autograd.grad((x @ torch.cat([part for _, part in _parts(matrix)]).T * slope).sum(), leaves)
    for own, other, expected in zip(found, again, plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


def test_torch_accepts_the_operators(generator, device):
    vectors = vector_matrix("groups and residual", generator, device)[0]
    rings = ring_matrix(8, 3, 1, generator, device)
    x = torch.randn(2, 48, generator=generator).to(device).requires_grad_()
    short = torch.randn(2, 24, generator=generator).to(device).requires_grad_()
    check = library.opcheck
    check(ops._vector_product.operator, (x, vectors.words, vectors.main, vectors.residual, *ops._vector_sizes(vectors)))
    check(ops._vector_weight.operator, (vectors.words, vectors.main, vectors.residual, *ops._vector_sizes(vectors)))
    check(ops._ring_product.operator, (short, rings.words, rings.table, None, *ops._ring_sizes(rings)))
    check(ops._ring_weight.operator, (rings.words, rings.table, *ops._ring_sizes(rings)))
    check(ops._rotate.operator, (x, 3, "out", 2, True))


@pytest.mark.parametrize("back", [False, True])
def test_rotation_and_its_gradient(back, generator, device):
    rotation = Rotation(48, 5, "in", 2)
    x = torch.randn(2, 3, 48, generator=generator).to(device).requires_grad_()
    slope = torch.randn(2, 3, 48, generator=generator).to(device)
    turned = ops.rotate(x, rotation, back)
    torch.testing.assert_close(turned, rotation.undo(x) if back else rotation.apply(x))
    (found,) = torch.autograd.grad((turned * slope).sum(), x)
    torch.testing.assert_close(found, rotation.apply(slope) if back else rotation.undo(slope))
    assert ops.rotate(x, None) is x


def test_weights_are_the_plain_ones(generator, device):
    vectors, rings = vector_matrix("residual", generator, device)[0], ring_matrix(12, 2, 1, generator, device)
    assert torch.equal(ops.weight(vectors), vector_weight(vectors))
    assert torch.equal(ops.weight(rings), ring_weight(rings))
