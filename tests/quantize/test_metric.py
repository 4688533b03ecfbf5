"""Damping, factor and proxy error."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import correlated_hessian
from vptq.errors import NumericalError
from vptq.quantize.metric import factor_inverse, proxy_error, scale_metric


def test_factor_is_upper_and_inverts_the_damped_metric(generator, device):
    metric = correlated_hessian(20, generator).to(device)
    before = metric.clone()
    factor = factor_inverse(metric, 0.01)
    damped = metric.double() + 0.01 * metric.double().diagonal().mean() * torch.eye(20, dtype=torch.float64, device=device)
    u = factor.inv_chol.double()
    assert factor.inv_chol.is_contiguous() and torch.equal(metric, before)
    assert torch.equal(u, u.triu()) and factor.retries == 0 and factor.damping_frac == 0.01
    assert torch.allclose(u.T @ u @ damped, torch.eye(20, dtype=torch.float64, device=device), atol=1e-3)


def test_damping_is_raised_and_recorded_when_the_metric_is_indefinite():
    metric = torch.eye(4)
    metric[0, 1] = metric[1, 0] = 1.5  # eigenvalue -0.5
    factor = factor_inverse(metric, 0.01)
    assert factor.retries == 2 and factor.damping_frac == pytest.approx(1.0)


def test_damping_zero_is_raised_from_a_small_start():
    factor = factor_inverse(torch.ones(3, 3), 0.0)
    assert factor.retries >= 1 and factor.damping_frac >= 1e-4


@pytest.mark.gpu
def test_no_more_than_two_float64_matrices_are_held(generator):
    size = 2048
    metric = correlated_hessian(size, generator).cuda()
    factor_inverse(metric, 0.01)  # libraries take their workspaces
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    factor_inverse(metric, 0.01)
    assert torch.cuda.max_memory_allocated() - before < 22 * size**2


def test_zero_metric_still_factors():
    assert torch.isfinite(factor_inverse(torch.zeros(3, 3), 0.01).inv_chol).all()


def test_hopeless_metric_raises():
    with pytest.raises(NumericalError, match="can't be factored"):
        factor_inverse(torch.full((3, 3), -1e30) * torch.eye(3) + torch.diag(torch.tensor([4e30, 0.0, 0.0])) * 1e-9, 1e-9)


def test_proxy_error_equals_the_double_loop(generator):
    weight, error = torch.randn(3, 4, generator=generator), 0.1 * torch.randn(3, 4, generator=generator)
    hessian = correlated_hessian(4, generator)
    top = sum(float(error[r] @ hessian @ error[r]) for r in range(3))
    bottom = sum(float(weight[r] @ hessian @ weight[r]) for r in range(3))
    assert proxy_error(weight, weight - error, hessian) == pytest.approx(top / bottom, rel=1e-4)


def test_proxy_error_is_the_same_in_the_normalised_problem(generator):
    """tr(E' H' E'ᵀ) with E' = E / scale and H' = S H S is tr(E H Eᵀ): the metric goes with the normalisation."""
    error, scale = torch.randn(3, 4, generator=generator), torch.rand(4, generator=generator) + 0.5
    hessian = correlated_hessian(4, generator)
    direct = torch.trace(error @ hessian @ error.T)
    normalised = error / scale
    assert torch.trace(normalised @ scale_metric(hessian, scale) @ normalised.T) == pytest.approx(direct.item(), rel=1e-4)


def test_proxy_error_of_nothing_is_zero():
    zero = torch.zeros(2, 2)
    assert proxy_error(zero, zero, torch.eye(2)) == 0
    assert proxy_error(zero, torch.ones(2, 2), torch.eye(2)) == float("inf")
