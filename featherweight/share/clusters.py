"""Weighted k-means: pure functions of values and of how much each matters.

Lloyd, Least squares quantization in PCM, 1982; Arthur & Vassilvitskii, k-means++, 2007. Of single values, sorted and
summed up once, a round costs as many steps as there are centroids, however many values there are.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

Init = Literal["linear", "density", "random", "k-means++"]
# Pairs of a vector and a centroid whose distances are held at a time.
PAIRS = 1 << 24


def kmeans(
    values: Tensor, weights: Tensor, size: int, init: Init = "linear", *, rounds: int = 200, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Centroids that are near the values, and each value's.

    Args:
        values: (n, d).
        weights: (n,), at least 0: how much each value's squared distance matters.
        size: how many centroids.
        init: where they begin: evenly between the least and the greatest (``"linear"``, in Han et al. the best: the
            rare large weights matter), evenly among the values (``"density"``), at values drawn at random, or drawn by
            their distance from those drawn before (``"k-means++"``). Of vectors, ``"linear"`` is along their first
            principal axis, and so is ``"density"``.
        rounds: at most.
        seed: of what is drawn.
    Returns:
        centroids (size, d), and the index of every value's (n,).
    Raises:
        ValueError: there are no centroids, or more than values; or a value or a weight is not finite or below 0.
    """
    if size < 1:
        raise ValueError(f"{size} centroids: there is at least one")
    if size > len(values):
        raise ValueError(f"{size} centroids are more than {len(values)} values")
    if not bool(torch.isfinite(values).all()) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("values have to be finite, and their weights finite and at least 0")
    values, weights = values.double(), weights.double()
    # What the data never excites still has to have some value: the nearest, at no cost worth speaking of.
    weights = weights + max(float(weights.mean()), 1e-300) * 1e-6
    # In units of the data: squares of what is very small would be zero.
    unit = float(values.abs().max()) or 1.0
    values = values / unit
    generator = torch.Generator().manual_seed(seed)
    start = _start(values, weights, size, init, generator)
    if values.shape[1] == 1:
        centroids = _lloyd_on_a_line(values[:, 0], weights, start[:, 0].sort().values, rounds)[:, None]
    else:
        centroids = _lloyd(values, weights, start, rounds)
    return centroids * unit, nearest(values, centroids)


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The index of the centroid that is nearest each value: (n, d), (size, d) → (n,)."""
    if values.shape[1] == 1:
        ordered, order = centroids[:, 0].sort()
        return order[torch.bucketize(values[:, 0].contiguous(), (ordered[1:] + ordered[:-1]) / 2)]
    parts = torch.split(values, max(1, PAIRS // len(centroids)))
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in parts])


def _start(values: Tensor, weights: Tensor, size: int, init: Init, generator: torch.Generator) -> Tensor:
    match init:
        case "linear" | "density":
            along = values[:, 0]
            if values.shape[1] > 1:
                along = values @ torch.linalg.svd(values - values.mean(0), full_matrices=False).Vh[0]
            if init == "density":
                ordered = along.argsort()
                return values[ordered[((torch.arange(size) + 0.5) * len(values) / size).long()]]
            if values.shape[1] == 1:
                return torch.linspace(float(along.min()), float(along.max()), size, dtype=values.dtype)[:, None]
            wanted = torch.linspace(float(along.min()), float(along.max()), size, dtype=values.dtype)
            return values[(along[None] - wanted[:, None]).abs().argmin(1)]
        case "random":
            return values[torch.randperm(len(values), generator=generator)[:size]]
        case "k-means++":
            first = int(torch.multinomial(weights / weights.max(), 1, generator=generator))
            chosen = [first]
            distances = (values - values[first]).square().sum(1)
            for _ in range(size - 1):
                chances = weights * distances
                if not float(chances.sum()) > 0:  # all values are met already
                    chances = torch.ones_like(weights)
                # Not multinomial, which takes no more than 2²⁴ values.
                drawn = torch.rand(1, generator=generator, dtype=torch.float64) * chances.sum()
                chosen.append(min(int(torch.searchsorted(chances.cumsum(0), drawn)), len(values) - 1))
                distances = torch.minimum(distances, (values - values[chosen[-1]]).square().sum(1))
            return values[chosen]
        case _:
            assert_never(init)


def _lloyd_on_a_line(values: Tensor, weights: Tensor, centroids: Tensor, rounds: int) -> Tensor:
    """Lloyd's rounds for single values: clusters are runs of the sorted values."""
    values, order = values.sort()
    weights = weights[order]
    nothing = values.new_zeros(1)
    mass = torch.cat([nothing, weights.cumsum(0)])
    moment = torch.cat([nothing, (weights * values).cumsum(0)])
    first, last = values.new_tensor([0]).long(), values.new_tensor([len(values)]).long()
    ends: Tensor | None = None
    for _ in range(rounds):
        between = torch.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        if ends is not None and torch.equal(between, ends):
            break
        ends = between
        starts, stops = torch.cat([first, between]), torch.cat([between, last])
        masses = mass[stops] - mass[starts]
        means = (moment[stops] - moment[starts]) / masses.clamp_min(1e-300)
        centroids = torch.where(stops > starts, means, centroids)
        if bool((stops == starts).any()):
            centroids = _reseeded(values, weights, centroids, stops == starts)
    return centroids


def _reseeded(values: Tensor, weights: Tensor, centroids: Tensor, empty: Tensor) -> Tensor:
    """Centroids without any value go where most is lost."""
    ends = (centroids[1:] + centroids[:-1]) / 2
    lost = weights * (values - centroids[torch.bucketize(values, ends)]).square()
    worst = lost.topk(min(int(empty.sum()), len(values)))
    places = empty.nonzero()[: len(worst.indices), 0][worst.values > 0]
    moved = centroids.clone()
    moved[places] = values[worst.indices[: len(places)]]
    return moved.sort().values


def _lloyd(values: Tensor, weights: Tensor, centroids: Tensor, rounds: int) -> Tensor:
    before = torch.empty(0)
    for _ in range(rounds):
        found = nearest(values, centroids)
        if torch.equal(found, before):
            break
        before = found
        masses = torch.zeros(len(centroids), dtype=values.dtype).index_add_(0, found, weights)
        sums = torch.zeros_like(centroids).index_add_(0, found, values * weights[:, None])
        centroids = torch.where(masses[:, None] > 0, sums / masses.clamp_min(1e-300)[:, None], centroids)
        if bool((masses == 0).any()):
            lost = weights * (values - centroids[found]).square().sum(1)
            empty = (masses == 0).nonzero()[:, 0]
            centroids[empty] = values[lost.topk(len(empty)).indices]
    return centroids
