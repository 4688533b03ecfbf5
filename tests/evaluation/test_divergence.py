"""KL divergence by closed forms."""

import math

import pytest
import torch

from vptq.errors import NumericalError
from vptq.evaluation.divergence import summarize, token_divergences


def test_divergence_is_the_original_s_expectation():
    """KL(p ‖ q), not KL(q ‖ p): p = (0.9, 0.1), q = (0.5, 0.5)."""
    found = token_divergences(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log() + 3)
    assert found.item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)


def test_figures_of_known_divergences():
    found = summarize(torch.arange(100, dtype=torch.float64).view(4, 25), 0.5, "x")
    assert (found.mean, found.median, found.p90, found.p99) == (49.5, 50, 90, 99)
    means = torch.tensor([12.0, 37.0, 62.0, 87.0])
    assert found.standard_error == pytest.approx(means.std().item() / 2)
    assert (found.num_tokens, found.num_windows, found.seq_len, found.same_top1) == (100, 4, 26, 0.5)
    assert summarize(torch.ones(1, 3, dtype=torch.float64), 1.0, "x").to_dict()["standard_error"] is None


def test_non_finite_logits_are_refused():
    with pytest.raises(NumericalError):
        summarize(torch.tensor([[math.nan]]), 0.0, "x")
