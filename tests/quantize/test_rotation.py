"""Rotations are orthogonal, seeded, the same everywhere, and fast; the kernel is the plain transform."""

import pytest
import torch

from vptq.quantize.rotation import Rotation, hadamard_matrix, odd_part, orthogonal_transform, plain_transform, random_signs

SIZES = [1, 2, 3, 6, 8, 24, 64, 192, 576, 1536, 2048, 11008]


@pytest.mark.parametrize("size", SIZES)
def test_rotation_keeps_lengths_and_is_undone(size, generator):
    rows = torch.randn(3, size, generator=generator, dtype=torch.float64)
    rotation = Rotation(size, seed=5, side="in")
    turned = rotation.apply(rows)
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1))
    torch.testing.assert_close(rotation.undo(turned), rows)
    if size > 3:
        assert (turned - rows).abs().max() > 0.1


@pytest.mark.parametrize("size", [2, 24, 192])
def test_transform_is_symmetric_and_its_own_inverse(size):
    matrix = plain_transform(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-9  # flat: no input keeps much of itself


def test_hadamard_matrix_is_sylvesters():
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    torch.testing.assert_close(hadamard_matrix(4, torch.float64, torch.device("cpu")), expected)


def test_signs_never_change():
    """They are stored nowhere: another draw would make every rotated checkpoint unreadable."""
    assert random_signs(12, 0, "in", torch.device("cpu")).tolist() == [-1, 1, -1, 1, 1, 1, -1, 1, -1, -1, -1, -1]
    assert not torch.equal(random_signs(64, 0, "in", torch.device("cpu")), random_signs(64, 0, "out", torch.device("cpu")))
    assert not torch.equal(random_signs(64, 0, "in", torch.device("cpu")), random_signs(64, 1, "in", torch.device("cpu")))


def test_blocks_rotate_each_for_itself(generator):
    rows = torch.randn(2, 24, generator=generator)
    turned = Rotation(24, 0, "out", blocks=3).apply(rows)
    changed = rows.clone()
    changed[:, 8:16] += 1
    again = Rotation(24, 0, "out", blocks=3).apply(changed)
    assert torch.equal(turned[:, :8], again[:, :8]) and torch.equal(turned[:, 16:], again[:, 16:])
    assert not torch.equal(turned[:, 8:16], again[:, 8:16])


def test_conjugate_keeps_what_errors_cost(generator):
    error, root = (torch.randn(5, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    metric = root.T @ root
    rotation = Rotation(24, 0, "in")
    turned = rotation.apply(error)
    torch.testing.assert_close((turned @ rotation.conjugate(metric) * turned).sum(), (error @ metric * error).sum())


@pytest.mark.parametrize("size", [2, 6, 64, 192, 1536, 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_plain(kernel_device, size, dtype, generator):
    rows = torch.randn(2, 3, size, generator=generator).to(kernel_device, dtype)
    expected = plain_transform(rows.double())
    found = orthogonal_transform(rows)
    assert found.dtype == dtype and found.shape == rows.shape
    error = (found.double() - expected).abs().max()
    plain = (plain_transform(rows).double() - expected).abs().max()
    assert error <= 2 * plain + 2e-6 + (dtype == torch.bfloat16) * 0.008 * expected.abs().max()  # cut off, in the interpreter


def test_kernel_takes_no_rows_and_non_contiguous_ones(kernel_device):
    assert orthogonal_transform(torch.empty(0, 64, device=kernel_device)).shape == (0, 64)
    rows = torch.arange(128.0, device=kernel_device).view(64, 2).T
    torch.testing.assert_close(orthogonal_transform(rows), plain_transform(rows.contiguous()))


def test_odd_part():
    assert [odd_part(n) for n in (1, 12, 7, 4096)] == [(1, 1), (3, 4), (7, 1), (1, 4096)]


def test_gradients_pass(kernel_device, generator):
    rows = torch.randn(2, 64, generator=generator).to(kernel_device).requires_grad_()
    rotation = Rotation(64, 0, "in")
    target = torch.randn(2, 64, generator=generator).to(kernel_device)
    (rotation.apply(rows) * target).sum().backward()
    torch.testing.assert_close(rows.grad, rotation.undo(target))


def test_what_is_kept_under_inference_mode_serves_training(generator):
    rotation = Rotation(96, 7, "in")
    with torch.inference_mode():
        rotation.apply(torch.randn(2, 96, generator=generator))
    rows = torch.randn(2, 96, generator=generator, requires_grad=True)
    rotation.apply(rows).sum().backward()
    assert rows.grad is not None
