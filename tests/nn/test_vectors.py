"""Products with matrices of vectors: every way of cutting, every width of index, against the matrix itself."""

import pytest
import torch

from vptq.nn import vectors
from vptq.nn.packing import pack_bits
from vptq.nn.vectors import VectorMatrix, partial_sums_pay, vector_product, vector_weight

FORMS = {  # out_features, group_size, groups, vector_len, along_out, main bits, residual bits
    "plain": (48, 64, 1, 8, True, 12, 0),
    "padded rows": (50, 40, 1, 6, True, 12, 0),
    "large index": (16, 33, 1, 8, True, 16, 0),
    "residual": (32, 64, 1, 8, True, 8, 8),
    "odd widths": (33, 31, 1, 4, True, 9, 5),
    "32 bits": (24, 17, 1, 2, True, 16, 16),
    "groups": (40, 24, 3, 4, True, 7, 0),
    "groups and residual": (41, 24, 2, 4, True, 7, 3),
    "along inputs": (20, 48, 1, 8, False, 11, 0),
    "along inputs, padded": (21, 50, 2, 16, False, 6, 4),
    "along inputs, partial sums": (90, 50, 2, 8, False, 6, 4),
    "along inputs, one codebook": (70, 48, 1, 6, False, 6, 0),
}
FORM = pytest.mark.parametrize("form", FORMS, ids=lambda f: f.replace(" ", "-"))


def vector_matrix(form, generator, device):
    rows, size, groups, length, along_out, main_bits, residual_bits = FORMS[form]
    grid = (groups, -(-rows // length), size) if along_out else (groups, rows, -(-size // length))
    main = torch.randint(1 << main_bits, grid, generator=generator)
    second = torch.randint(1 << residual_bits, grid, generator=generator)
    words = pack_bits(main | (second << main_bits), main_bits + residual_bits)
    books = [torch.randn(groups, 1 << bits, length, generator=generator).to(device) for bits in (main_bits, residual_bits)]
    residual = books[1] if residual_bits else None
    matrix = VectorMatrix(words.to(device), books[0], residual, rows, size, along_out, main_bits, residual_bits)
    return matrix, main, second


def spelled_out(matrix, main, second):
    """The matrix, number by number."""
    weight = torch.zeros(matrix.out_features, matrix.group_size * len(main))
    length = matrix.vector_len
    for row in range(matrix.out_features):
        for column in range(weight.shape[1]):
            group, own = divmod(column, matrix.group_size)
            place = (group, row // length, own) if matrix.along_out else (group, row, own // length)
            element = row % length if matrix.along_out else own % length
            value = matrix.main[group, main[place], element]
            if matrix.residual is not None:
                value = value + matrix.residual[group, second[place], element]
            weight[row, column] = value
    return weight


@FORM
def test_matrix_is_what_its_indices_say(form, generator, device):
    matrix, main, second = vector_matrix(form, generator, device)
    assert torch.equal(vector_weight(matrix).cpu(), spelled_out(matrix, main, second))


@FORM
@pytest.mark.parametrize("count", [0, 1, 4, 20])
def test_product_is_that_with_the_matrix(form, count, generator, device, monkeypatch):
    monkeypatch.setattr("vptq.nn.vectors.BAG_INDICES", 100)
    monkeypatch.setattr("vptq.nn.vectors.CHUNK_WEIGHTS", 700)
    matrix, _, _ = vector_matrix(form, generator, device)
    columns = matrix.group_size * len(matrix.words)
    x = torch.randn(columns, count, generator=generator).to(device).T  # not contiguous
    expected = x.double() @ vector_weight(matrix).double().T
    torch.testing.assert_close(vector_product(x, matrix).double(), expected, rtol=1e-4, atol=1e-4)
    half = vector_product(x.bfloat16(), matrix)
    assert half.dtype == torch.bfloat16 and half.shape == (count, matrix.out_features)


def test_partial_sums_are_taken_where_there_are_few(generator, monkeypatch):
    called = []
    real = vectors.partial_sums
    monkeypatch.setattr(vectors, "partial_sums", lambda *given: called.append(1) or real(*given))
    for form, sums in (("along inputs, partial sums", 2), ("along inputs, one codebook", 1), ("along inputs", 0), ("plain", 0)):
        matrix, _, _ = vector_matrix(form, generator, torch.device("cpu"))
        called.clear()
        vector_product(torch.randn(2, matrix.group_size * len(matrix.words), generator=generator), matrix)
        assert len(called) == sums
    matrix, _, _ = vector_matrix("along inputs, one codebook", generator, torch.device("cpu"))
    assert partial_sums_pay(12, matrix) and not partial_sums_pay(0, matrix)
    monkeypatch.setitem(vectors.MOST_PARTIAL, "cpu", 12 * 8 * 64 - 1)
    assert partial_sums_pay(11, matrix) and not partial_sums_pay(12, matrix)
