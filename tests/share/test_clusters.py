"""k-means against the exact optimum on a line, found by going through all partitions, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.share.clusters import Init, kmeans, nearest

INITS: list[Init] = ["linear", "density", "random", "k-means++"]


def loss(values: Tensor, weights: Tensor, centroids: Tensor) -> float:
    distances = (values[:, None] - centroids[None]).square().sum(2)
    return float((weights * distances.min(1).values).sum())


def optimum(values: Tensor, weights: Tensor, size: int) -> float:
    """On a line the best clusters are runs of the sorted values: all ways of cutting them are gone through."""
    values, order = values[:, 0].sort()
    weights = weights[order]
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), size - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(values))):
            part, w = values[start:stop], weights[start:stop]
            mean = (w * part).sum() / w.sum()
            total += float((w * (part - mean).square()).sum())
        best = min(best, total)
    return best


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from(INITS))
@settings(max_examples=40, deadline=None)
def test_never_below_the_optimum_and_at_rest_where_it_ends(seed: int, size: int, init: Init) -> None:
    draw = torch.Generator().manual_seed(seed)
    values, weights = torch.randn(11, 1, generator=draw).double(), torch.rand(11, generator=draw).double() + 0.01
    centroids, found = kmeans(values, weights, size, init, seed=seed)
    lost = loss(values, weights, centroids)
    assert lost >= optimum(values, weights, size) * (1 - 1e-4)
    assert torch.equal(found, nearest(values, centroids))
    assert lost == pytest.approx(float((weights * (values - centroids[found]).square().sum(1)).sum()))
    for index in range(size):  # each centroid is the mean of its values
        here = found == index
        if bool(here.any()):
            mean = (weights[here] * values[here, 0]).sum() / weights[here].sum()
            assert float(centroids[index, 0]) == pytest.approx(float(mean), abs=1e-4)


def test_the_best_of_all_starts_is_mostly_the_optimum() -> None:
    hits = 0
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        values, weights = torch.randn(12, 1, generator=draw).double(), torch.rand(12, generator=draw).double()
        found = min(loss(values, weights, kmeans(values, weights, 3, init, seed=seed)[0]) for init in INITS)
        best = optimum(values, weights, 3)
        assert found <= 1.5 * best
        hits += found <= best * 1.0001
    assert hits >= 8


@pytest.mark.parametrize("init", INITS)
def test_as_many_centroids_as_values_are_the_values(init: Init) -> None:
    values = torch.tensor([[3.0], [-1.0], [0.5], [7.0]])
    centroids, found = kmeans(values, torch.ones(4), 4, init)
    torch.testing.assert_close(centroids[found], values.double())


def test_weights_pull_centroids() -> None:
    values = torch.tensor([[0.0], [1.0]])
    centroids, _ = kmeans(values, torch.tensor([3.0, 1.0]), 1)
    assert float(centroids) == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_clusters_of_vectors_that_lie_apart_are_found(init: Init) -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    values = (centres.repeat(20, 1) + 0.1 * torch.randn(60, 3, generator=draw)).double()
    losses = [loss(values, torch.ones(60), kmeans(values, torch.ones(60), 3, init, seed=seed)[0]) for seed in range(4)]
    assert min(losses) < 60 * 3 * 0.02


def test_tiny_and_huge_values_are_told_apart() -> None:
    for scale in (1e-30, 1e30):
        values = torch.tensor([[1.0], [1.1], [5.0], [5.2]], dtype=torch.float64) * scale
        centroids, found = kmeans(values, torch.ones(4), 2)
        assert found.tolist() == [0, 0, 1, 1]
        torch.testing.assert_close(centroids[:, 0], torch.tensor([1.05, 5.1], dtype=torch.float64) * scale)


def test_what_it_refuses() -> None:
    values = torch.ones(3, 1)
    with pytest.raises(ValueError, match="0 centroids: there is at least one"):
        kmeans(values, torch.ones(3), 0)
    with pytest.raises(ValueError, match="4 centroids are more than 3 values"):
        kmeans(values, torch.ones(3), 4)
    with pytest.raises(ValueError, match="values have to be finite"):
        kmeans(values * float("nan"), torch.ones(3), 2)
    with pytest.raises(ValueError, match="their weights finite and at least 0"):
        kmeans(values, -torch.ones(3), 2)
