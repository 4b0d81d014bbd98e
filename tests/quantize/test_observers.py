"""What is watched on an edge, and the ranges that come of it, against sorting and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.forms import Grid
from featherweight.quantize.observers import (
    HALF,
    Observer,
    least_divergence,
    least_squares,
    min_max,
    moving_average,
    percentile,
    range_of,
)

EIGHT = Grid(8, symmetric=False, signed=False, axis=None)
FOUR = Grid(4, symmetric=False, signed=False, axis=None)


def seen(*batches: torch.Tensor) -> Observer:
    observer = Observer()
    for batch in batches:
        observer.see(batch)
    return observer


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 1e5), st.integers(1, 30)), min_size=1, max_size=6), st.integers(0, 9))
def test_a_histogram_counts_everything_whatever_the_order_of_ranges(batches, seed):
    generator = torch.Generator().manual_seed(seed)
    given_ = [scale * torch.randn(count, generator=generator) for scale, count in batches]
    observer, every = seen(*given_), torch.cat(given_)
    assert observer.counts.sum() == len(every)
    assert (observer.lowest, observer.highest) == (min(0, every.min().item()), max(0, every.max().item()))
    assert HALF * observer.width >= every.abs().max()
    assert observer.width * HALF <= 4 * every.abs().max()
    mean = float(observer.centres @ observer.counts) / len(every)
    assert abs(mean - float(every.double().mean())) <= observer.width


def test_constant_and_empty_and_infinite_values():
    assert seen(torch.zeros(4)).counts.sum() == 0
    assert range_of(seen(torch.zeros(4)), EIGHT, "mse") == (torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8))
    scale, zero_point = range_of(seen(torch.full((5,), 3.0)), EIGHT, "mse")
    assert 255 * scale == pytest.approx(3.0)
    assert zero_point == 0
    assert seen(torch.zeros(0)).batches == 0
    odd = seen(torch.tensor([1.0, float("inf"), float("nan"), -2.0]))
    assert (odd.infinite, odd.lowest, odd.highest) == (2, -2, 1)


def test_min_max_and_average():
    observer = seen(torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 4.0]))
    assert min_max(observer, EIGHT) == (-3, 4)
    assert moving_average(observer, EIGHT) == (-2, 3)


def test_a_percentile_is_that_of_the_sorted_values():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    observer = seen(x[:1000], x[1000:])
    low, high = percentile(observer, EIGHT, share=0.99)
    expected = np.quantile(x.numpy(), [0.005, 0.995])
    assert (low, high) == pytest.approx(tuple(expected), abs=2 * observer.width)


@pytest.mark.parametrize("tails", [1, 3], ids=["normal", "heavy tails"])
def test_least_squares_is_near_the_best_of_all_ranges(tails):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator) ** tails
    observer = seen(x)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 15
        q = (x / scale).round() + round(-low / scale)
        return float(((q.clamp(0, 15) - round(-low / scale)) * scale - x).square().mean())

    found = error(*least_squares(observer, FOUR))
    ends = np.linspace(0.05, 1, 25)
    best = min(error(observer.lowest * a, observer.highest * b) for a in ends for b in ends)
    assert found <= 1.05 * best
    assert found < error(observer.lowest, observer.highest)


def test_least_divergence_cuts_off_a_far_tail_and_keeps_an_even_spread():
    generator = torch.Generator().manual_seed(0)
    body = torch.randn(100_000, generator=generator).abs()
    low, high = least_divergence(seen(torch.cat([body, torch.tensor([400.0])])), EIGHT)
    assert low == 0
    assert 2 < high < 100
    even = torch.rand(100_000, generator=generator)
    assert least_divergence(seen(even), EIGHT)[1] > 0.9


def test_a_symmetric_range_reaches_as_far_on_both_sides():
    grid = Grid(8, axis=None)
    scale, zero_point = range_of(seen(torch.tensor([-1.0, 0.2, 5.0])), grid, "min-max")
    assert zero_point == 0
    assert 127 * scale == pytest.approx(5.0)


def test_sixteen_bits_take_all_that_was_seen():
    grid = Grid(16, symmetric=False, signed=False, axis=None)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale, _ = range_of(seen(x), grid, "mse")
    assert 65535 * float(scale) == pytest.approx(float(x.max() - x.min()), rel=1e-4)


def test_values_too_large_for_a_range_are_counted_and_left_out():
    seen = Observer()
    seen.see(torch.tensor([1.0, -3e38, 2.0**127, 2.0, math.nan, math.inf]))
    assert seen.infinite == 4
    assert (seen.lowest, seen.highest, seen.batches) == (0.0, 2.0, 1)
    seen.see(torch.tensor([2.0**126, -(2.0**126)]))
    scale, _ = range_of(seen, Grid(8, symmetric=False, signed=False, axis=None), "mse")
    assert bool(scale.isfinite())
