"""Least squares through a rectifier: against plain least squares, and against the answer that is there to be found."""

from __future__ import annotations

import math

import pytest
import torch

from featherweight.curvature.rectified import fit


def problem(rows: int = 2000, width: int = 12, kept: int = 7, outputs: int = 5, seed: int = 0):
    """Correlated inputs of which some go, what reached the rectifier before, a scale, and something beside."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
    scale = torch.rand(outputs, generator=generator) + 0.5
    beside = torch.randn(rows, outputs, generator=generator)
    weight = torch.randn(outputs, width, generator=generator) / width**0.5
    wanted = scale * (x @ weight.T) + beside
    return x[:, :kept], wanted, beside, scale, weight[:, :kept]


def missing(answer, x, wanted, beside, scale, ceiling):
    """How far answers have to move to be right, squared: not at all where both are cut off on the same side."""
    weight, constant = (part.float() for part in answer)
    given = scale * (x @ weight.T + constant) + beside
    right = torch.where(wanted <= 0, given.clamp_max(0), wanted)
    right = torch.where(wanted >= ceiling, given.clamp_min(ceiling), right)
    return float((given - right).square().mean())


def test_without_a_rectifier_it_is_least_squares_with_a_constant():
    x, wanted, beside, scale, prior = problem()
    weight, constant = fit(x, wanted, beside, scale, prior, ceiling=None, ridge=0)
    ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    expected = torch.linalg.lstsq(ones, ((wanted - beside) / scale).double()).solution.T
    assert torch.allclose(weight, expected[:, :-1], atol=2e-3)
    assert torch.allclose(constant, expected[:, -1], atol=2e-3)


@pytest.mark.parametrize("ceiling", [math.inf, 1.5])
def test_a_rectified_answer_comes_nearer_and_nearer(ceiling):
    x, wanted, beside, scale, prior = problem()
    found = [fit(x, wanted, beside, scale, prior, ceiling=ceiling, rounds=rounds) for rounds in (0, 1, 4, 16)]
    errors = [missing(one, x, wanted, beside, scale, ceiling) for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_nothing_changes_where_nothing_went():
    x, wanted, beside, scale, prior = problem(kept=12)
    weight, constant = fit(x, wanted, beside, scale, prior)
    assert torch.allclose(weight, prior.double(), atol=2e-3)  # as near as float32 brings inputs that say much the same
    assert constant.abs().max() < 2e-3


def test_inputs_that_say_nothing_leave_the_weight_as_it_was():
    x, wanted, beside, scale, prior = problem()
    x[:, 2] = 0
    weight, _ = fit(x, wanted, beside, scale, prior)
    assert torch.allclose(weight[:, 2], prior[:, 2].double())
    nothing, _ = fit(torch.zeros_like(x), wanted, beside, scale, prior)
    assert torch.equal(nothing, prior.double())
