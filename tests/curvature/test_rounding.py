"""Rounding under a Gram matrix, against trying every grid point and against the formulas of the papers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.curvature.gram import Statistics
from featherweight.curvature.rounding import Nearest, adarounded, descended, errors, rescaled, swept
from featherweight.curvature.solve import damp
from featherweight.curvature.sweeps import loss, matrix


def problem(groups: int, outputs: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and a Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 200, width, generator=generator, dtype=torch.float64) @ mixing + 0.5
    return weight, x.transpose(1, 2) @ x / 200


def to_grid(low: int = -4, high: int = 3, scale: float = 0.5) -> Nearest:
    return lambda x, _: (x / scale).round().clamp(low, high) * scale


def every_rounding(weight: Tensor, gram: Tensor, levels: list[float]) -> Tensor:
    """The least error of each row over all choices of levels."""
    tried = torch.tensor(list(itertools.product(levels, repeat=weight.shape[-1])), dtype=torch.float64)
    moved = weight[:, :, None] - tried
    return torch.einsum("goni,gij,gonj->gon", moved, gram, moved).amin(-1)


@given(st.integers(0, 30))
@settings(max_examples=15, deadline=None)
def test_no_row_is_worse_than_before_and_few_are_far_from_the_best(seed):
    weight, gram = problem(2, 3, 5, seed)
    nearest = to_grid(-2, 1, 0.8)
    plain = nearest(weight, torch.arange(5))
    found = descended(weight, plain, gram, nearest)
    best = every_rounding(weight, gram, [-1.6, -0.8, 0, 0.8])
    before, after = errors(weight, plain, gram), errors(weight, found, gram)
    assert bool((after <= before + 1e-9).all())
    assert bool((after >= best - 1e-9).all())
    # No single value can be changed for the better.
    for j, level in itertools.product(range(5), [-1.6, -0.8, 0, 0.8]):
        other = found.clone()
        other[..., j] = level
        assert bool((errors(weight, other, gram) >= after - 1e-9).all())


@pytest.mark.parametrize("order", [False, True])
def test_a_sweep_is_gptq_as_its_paper_writes_it(order):
    weight, gram = problem(1, 4, 150, 3)  # more than one block of columns
    nearest = to_grid()
    gram = damp(gram, 0.01)
    damped = damp(gram)[0].numpy()
    w, width = weight[0].numpy().copy(), 150
    columns = np.argsort(-gram[0].diagonal().numpy(), kind="stable") if order else np.arange(width)
    # The paper's own steps: quantize a column, push its error on by the inverse of what is left, take it out.
    left, inverse = list(columns), np.linalg.inv(damped)
    positions = {c: i for i, c in enumerate(range(width))}
    for column in columns:
        at = positions[column]
        value = np.clip(np.round(w[:, column] / 0.5), -4, 3) * 0.5
        error = (w[:, column] - value) / inverse[at, at]
        for other in left:
            w[:, other] -= error * inverse[at, positions[other]]
        w[:, column] = value
        left.remove(column)
        inverse = inverse - np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
        keep = [i for i in range(len(inverse)) if i != at]
        inverse = inverse[np.ix_(keep, keep)]
        positions = {c: i for i, c in enumerate(sorted(left))}
    found = swept(weight, gram, nearest, order=order)
    assert float((found[0] - torch.tensor(w)).abs().max()) < 1e-6 or (found[0] != torch.tensor(w)).sum() <= 2
    assert float(errors(weight, found, gram).sum()) < float(errors(weight, nearest(weight, columns), gram).sum())


def test_what_is_held_at_zero_stays_zero_and_the_others_make_up_for_it():
    weight, gram = problem(2, 6, 20, 1)
    held = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    weight = weight.masked_fill(held, 0)
    plain = to_grid()(weight, torch.arange(20))
    for found in (
        swept(weight, gram, to_grid(), held),
        swept(weight, gram, to_grid(), held, order=True),
        descended(weight, plain, gram, to_grid(), held),
    ):
        assert not found[held].any()
        assert torch.equal(found, to_grid()(found, torch.arange(20)))
        assert float(errors(weight, found, gram).sum()) < 0.9 * float(errors(weight, plain, gram).sum())


def test_learned_rounding_moves_by_one_step_at_most_and_gains_what_descent_does():
    weight, gram = problem(1, 6, 24, 4)
    scale, shift = torch.full((1, 6, 1), 0.5, dtype=torch.float64), torch.zeros(1, 6, 1)
    plain = to_grid(-8, 7)(weight, torch.arange(24))
    found = adarounded(weight, gram, scale, shift, -8, 7, steps=400)
    inside = weight.abs() < 3.4
    assert float(((found - weight).abs() * inside).max()) <= 0.5 + 1e-6
    assert torch.equal(found, to_grid(-8, 7)(found, torch.arange(24)))
    assert float(errors(weight, found, gram).sum()) < 0.6 * float(errors(weight, plain, gram).sum())
    held = torch.zeros_like(weight, dtype=torch.bool)
    held[..., ::3] = True
    assert not adarounded(weight, gram, scale, shift, -8, 7, held, steps=20)[held].any()


def test_the_best_factor_of_a_row_is_that_of_least_squares():
    weight, gram = problem(1, 3, 8, 5)
    signs = weight.sign()
    factor = rescaled(weight, signs, gram)
    root = np.linalg.cholesky(gram[0].numpy())
    for row in range(3):
        left = (signs[0, row].numpy() @ root)[:, None]
        (expected,), *_ = np.linalg.lstsq(left, weight[0, row].numpy() @ root, rcond=None)
        assert float(factor[0, row]) == pytest.approx(expected) or expected <= 0
    assert torch.equal(rescaled(weight, torch.zeros_like(weight), gram), torch.ones(1, 3, 1))


def test_the_predicted_rise_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, generator=generator)  # (outputs, inputs / groups, kernel), two groups
    x, g = torch.randn(50, 2, 6, generator=generator), torch.randn(50, 4, generator=generator)
    gram, gradients = torch.einsum("ngi,ngj->gij", x, x) / 50, g.T @ g / 50
    seen = Statistics(gram, x.mean(0), gradients, positions=3.0)
    of = matrix(weight, 2, seen)
    rounded = of.weight.round()
    moved = of.weight - rounded
    expected = 0.0
    for k, outputs in enumerate((slice(0, 2), slice(2, 4))):
        weighed = gradients[outputs, outputs].double() @ moved[k] @ gram[k].double()
        expected += 0.5 * 3 * float(torch.trace(weighed @ moved[k].T))
    assert loss(of, rounded) == pytest.approx(expected)
    assert loss(matrix(weight, 2, None), rounded) == pytest.approx(
        float(moved.square().sum() / of.weight.square().sum())
    )


def test_a_weight_is_moved_to_where_it_answers_changed_inputs():
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(3, 5, generator=generator), torch.randn(4000, 5, generator=generator)
    changed = 0.8 * x + 0.05 * torch.randn(4000, 5, generator=generator)
    answers = x @ weight.T
    gram, cross = changed.T @ changed / 4000, answers.T @ changed / 4000
    seen = Statistics(gram[None], changed.mean(0)[None], cross=cross[None], answer_mean=answers.mean(0)[None])
    of = matrix(weight, 1, seen)
    torch.testing.assert_close(of.weight[0].float(), torch.linalg.lstsq(changed, answers).solution.T, atol=0.02, rtol=0)
