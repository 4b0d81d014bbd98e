"""Roots and least squares of Gram matrices: against NumPy's, and where matrices are singular."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.curvature.solve import DAMPING, damp, least_squares, root


def rows(count: int, width: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    """(count, width) vectors that span `rank` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if rank is None:
        return x
    return x[:, :rank] @ torch.randn(rank, width, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 8), st.floats(-30, 30), st.integers(0, 99))
def test_a_root_times_itself_is_the_damped_gram(width: int, rank: int, scale: float, seed: int) -> None:
    x = rows(12, width, rank=min(rank, width), seed=seed) * 10**scale
    gram = x.T @ x / len(x)
    factor = root(gram)
    assert torch.equal(factor, factor.tril())
    assert float(factor.diagonal().min()) > 0
    eye = torch.eye(width, dtype=torch.float64)
    expected = gram + DAMPING * gram.diagonal().mean() * eye if rank else eye
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-6, atol=1e-10 * float(expected.max()))


def test_a_stack_has_the_roots_of_its_matrices() -> None:
    grams = torch.stack([x.T @ x for x in (rows(9, 4), rows(9, 4, rank=2), torch.zeros(3, 4).double())])
    for one, other in zip(root(grams), grams, strict=True):
        torch.testing.assert_close(one, root(other))


def test_rounding_that_makes_a_gram_indefinite_does_not_stop_its_root() -> None:
    gram = torch.ones(5, 5, dtype=torch.float64) - 1e-3 * torch.eye(5)  # four eigenvalues of -0.001
    factor = root(gram)
    assert bool(torch.isfinite(factor).all())
    torch.testing.assert_close(factor @ factor.T, gram, rtol=0, atol=0.02)


def test_float32_grams_are_worked_on_in_float64() -> None:
    x = rows(50, 6)
    gram = (x.T @ x / 50).float()
    assert root(gram).dtype == least_squares(gram, gram).dtype == damp(gram).dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_root_is_refused(bad: float) -> None:
    gram = torch.eye(3)
    gram[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        root(gram)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 99))
def test_least_squares_is_numpys_with_the_ridge_as_further_rows(width: int, outputs: int, seed: int) -> None:
    x, y, prior = rows(30, width, seed=seed), rows(30, outputs, seed=seed + 1), rows(outputs, width, seed=seed + 2)
    gram, cross, ridge = x.T @ x / 30, y.T @ x / 30, 0.1
    penalty = math.sqrt(30 * ridge * float(gram.diagonal().mean()))
    tall = np.concatenate([x.numpy(), penalty * np.eye(width)])
    for start in (None, prior):
        target = np.zeros((width, outputs)) if start is None else penalty * prior.T.numpy()
        expected, *_ = np.linalg.lstsq(tall, np.concatenate([y.numpy(), target]), rcond=None)
        np.testing.assert_allclose(least_squares(gram, cross, ridge, start).T, expected, rtol=1e-6, atol=1e-8)


def test_without_a_ridge_it_is_nearly_exact() -> None:
    x, w = rows(200, 5), rows(3, 5, seed=4)
    gram = x.T @ x / 200
    torch.testing.assert_close(least_squares(gram, w @ gram), w, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(least_squares(gram, w @ gram, prior=w), w)


def test_a_large_ridge_keeps_the_prior() -> None:
    x, y, prior = rows(30, 4), rows(30, 2, seed=1), rows(2, 4, seed=2)
    gram, cross = x.T @ x / 30, y.T @ x / 30
    for ridge in (1e6, 1e9):
        torch.testing.assert_close(least_squares(gram, cross, ridge, prior), prior, rtol=0, atol=10 / ridge)
        torch.testing.assert_close(least_squares(gram, cross, ridge), torch.zeros_like(prior), rtol=0, atol=10 / ridge)


def test_where_the_data_says_nothing_the_prior_stays() -> None:
    """Directions, or whole layers, that the calibration data never excites must not be set to zero."""
    prior = rows(2, 6, seed=2)
    nothing = torch.zeros(6, 6)
    torch.testing.assert_close(least_squares(nothing, torch.zeros(2, 6), 1e-3, prior), prior)
    x = rows(30, 6)
    x[:, 3:] = 0
    y = rows(30, 2, seed=1)
    found = least_squares(x.T @ x / 30, y.T @ x / 30, 1e-3, prior)
    torch.testing.assert_close(found[:, 3:], prior[:, 3:])
    assert float((found[:, :3] - prior[:, :3]).abs().min()) > 1e-3


def test_a_stack_is_solved_matrix_by_matrix() -> None:
    x = torch.stack([rows(20, 3), rows(20, 3, rank=1), torch.zeros(20, 3).double()])
    y, prior = rows(20, 2, seed=3).expand(3, 20, 2), rows(2, 3, seed=4).expand(3, 2, 3)
    gram, cross = x.transpose(1, 2) @ x / 20, y.transpose(1, 2) @ x / 20
    whole = least_squares(gram, cross, 1e-2, prior)
    for group in range(3):
        torch.testing.assert_close(whole[group], least_squares(gram[group], cross[group], 1e-2, prior[group]))
