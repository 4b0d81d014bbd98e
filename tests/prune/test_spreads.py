"""Shares of weights over layers: sums that hold, and each rule against its own formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.prune.spreads import erk, lamp, over_all, uniform


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.floats(0, 0.99))
@settings(max_examples=50, deadline=None)
def test_uniform_shares_leave_something_everywhere(sizes: list[int], share: float) -> None:
    kept = uniform(sizes, share)
    assert all(1 <= k <= size for k, size in zip(kept, sizes, strict=True))
    assert all(abs(k - size * (1 - share)) <= 1 for k, size in zip(kept, sizes, strict=True))


@given(st.integers(0, 1000), st.floats(0.01, 0.98))
@settings(max_examples=30, deadline=None)
def test_global_and_lamp_shares_sum_up(seed: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, generator=draw) * scale for size, scale in ((30, 1.0), (50, 0.1), (7, 5.0))]
    for kept in (over_all([w.abs() for w in weights], share), lamp(weights, share)):
        assert sum(kept) == max(1, round(87 * (1 - share)))
    assert min(lamp(weights, share)) >= (1 if round(87 * (1 - share)) >= 3 else 0), "the largest of a layer scores 1"


def test_global_takes_the_lowest_wherever_they_are() -> None:
    assert over_all([torch.tensor([5.0, 4.0, 3.0]), torch.tensor([2.0, 1.0])], 0.4) == [3, 0]


def test_lamp_by_hand() -> None:
    # Squares 1, 4, 9 → 1/14, 4/13, 1; squares 1, 1 → 1/2, 1.
    weights = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, -1.0])]
    assert lamp(weights, 0.2) == [2, 2]
    assert lamp(weights, 0.4) == [1, 2]
    assert lamp(weights, 0.6) == [1, 1]


def test_erk_by_hand() -> None:
    shapes = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
    kept = erk(shapes, 0.9)
    sizes = [500, 25_000, 400_000, 5_000]
    assert sum(kept) == pytest.approx(0.1 * sum(sizes), abs=3)
    densities = [k / size for k, size in zip(kept, sizes, strict=True)]
    assert densities[0] == 1  # it would be denser than dense
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    if densities[3] < 1:
        assert densities[3] / densities[2] == pytest.approx(raw[3] / raw[2], rel=0.01)
    assert densities[1] / densities[2] == pytest.approx(raw[1] / raw[2], rel=0.01)
