"""What goes along an edge, watched batch by batch, and the range that a grid is given over it.

A histogram is kept, whose bins double in width when something falls outside, so that one pass is enough for every way
of choosing a range: Nagel et al., A white paper on neural network quantization, 2021, arxiv.org/abs/2106.08295,
section 3.1, compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featherweight.forms.grid import Grid, between, whole

HALF = 2048  # bins on either side of zero
MOST = 2.0**126  # beyond it a range from one end to the other is no number of float32
ENOUGH = 1 << 17  # values of a batch that are counted; the least and the greatest are of all of them


@dataclass
class Observer:
    """A tensor's values, batch by batch.

    Attributes:
        lowest, highest: of all finite values, and 0 is between them.
        average: running averages of the batches' least and greatest value.
        batches: seen so far, empty ones left out.
        infinite: how many values were infinite, NaN or beyond `MOST`.
        width: of a bin.
        counts: values by bin: (2 · HALF,), zero at the border of the two in the middle.
    """

    lowest: float = 0.0
    highest: float = 0.0
    average: tuple[float, float] = (0.0, 0.0)
    batches: int = 0
    infinite: int = 0
    width: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * HALF, dtype=torch.float64))

    def see(self, x: Tensor, histogram: bool = True) -> None:
        """Take in a batch.

        Args:
            x: any shape.
            histogram: whether to count values, and not only to keep the least and the greatest.
        """
        x = x.detach().float().flatten()
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not max(-low, high) <= MOST or math.isnan(low):
            finite = x.abs() <= MOST
            self.infinite += int((~finite).sum())
            x = x[finite]
            if not x.numel():
                return
            low, high = (float(v) for v in torch.aminmax(x))
        low, high = min(low, 0.0), max(high, 0.0)
        self.batches += 1
        # A plain mean to begin with, and one that forgets once there are ten batches.
        rate = max(1 / self.batches, 0.1)
        self.average = (
            self.average[0] + rate * (low - self.average[0]),
            self.average[1] + rate * (high - self.average[1]),
        )
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        if histogram and high > low:
            # A part of so many says as much: every so many-th, by an odd step, so that rows are not met in step.
            self._count(x[:: x.numel() // ENOUGH | 1].cpu(), max(-low, high))

    def _count(self, x: Tensor, reach: float) -> None:
        if not self.width:
            self.width = 2.0 ** math.ceil(math.log2(reach / HALF))
        while reach > HALF * self.width:
            merged = self.counts.view(2, HALF // 2, 2).sum(-1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[HALF // 2 : HALF] = merged[0]
            self.counts[HALF : HALF + HALF // 2] = merged[1]
            self.width *= 2
        end = HALF * self.width
        self.counts += torch.histc(x, 2 * HALF, -end, end).double()

    @property
    def centres(self) -> Tensor:
        """The middles of the bins: (2 · HALF,)."""
        return (torch.arange(-HALF, HALF, dtype=torch.float64) + 0.5) * self.width


def min_max(seen: Observer, grid: Grid) -> tuple[float, float]:
    """All that was seen: nothing is cut off."""
    return seen.lowest, seen.highest


def moving_average(seen: Observer, grid: Grid) -> tuple[float, float]:
    """The batches' least and greatest values, on average, so that one odd sample does not set the range."""
    return seen.average


def percentile(seen: Observer, grid: Grid, share: float = 0.9999) -> tuple[float, float]:
    """All but the same number of values at either end: in all `share` of them are kept."""
    total = float(seen.counts.sum())
    if not total:
        return seen.lowest, seen.highest
    below = seen.counts.cumsum(0)
    cut = total * (1 - share) / 2
    first = int((below > cut).nonzero()[0])
    last = int((below >= total - cut).nonzero()[0])
    low, high = (first - HALF) * seen.width, (last + 1 - HALF) * seen.width
    return max(min(low, 0.0), seen.lowest), min(max(high, 0.0), seen.highest)


def least_squares(seen: Observer, grid: Grid, steps: int = 50) -> tuple[float, float]:
    """The range at which rounding and cutting off move the values least, ``E(x − rounded x)²``.

    The whole range is shrunk step by step, then either end alone.
    """
    return _searched(seen, grid, steps, _squared_error)


def least_divergence(seen: Observer, grid: Grid, steps: int = 50) -> tuple[float, float]:
    """The range at which the distribution of values loses least: the least divergence of Kullback and Leibler.

    Migacz, 8-bit inference with TensorRT, 2017: what is cut off piles up at the ends of the one distribution, and of
    the other every level's share is spread over the bins it stands for, empty ones left out.
    """
    return _searched(seen, grid, steps, _divergence)


RANGES: Mapping[str, Callable[[Observer, Grid], tuple[float, float]]] = {
    "min-max": min_max,
    "average": moving_average,
    "percentile": percentile,
    "mse": least_squares,
    "entropy": least_divergence,
}


def range_of(seen: Observer, grid: Grid, by: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point for what was seen: float32 of shape (), a whole number of shape ().

    Args:
        seen: what went along the edge.
        grid: of one scale; of 16 bits its range is all that was seen, which bins are too coarse to better.
        by: one of `RANGES`.
    """
    choose = min_max if grid.bits > 8 and by in ("mse", "entropy") else RANGES[by]
    low, high = choose(seen, grid)
    return between(torch.tensor(low), torch.tensor(high), grid)


Loss = Callable[[Tensor, Tensor, Grid, Tensor, Tensor], Tensor]  # of ranges, given by their ends: (ranges,)


def _searched(seen: Observer, grid: Grid, steps: int, loss: Loss) -> tuple[float, float]:
    used = seen.counts > 0
    if not bool(used.any()):
        return seen.lowest, seen.highest
    centres, counts = seen.centres[used], seen.counts[used]
    shares = 1 - torch.arange(steps, dtype=torch.float64) / steps

    def best(lows: Tensor, highs: Tensor) -> tuple[float, float]:
        at = int(loss(centres, counts, grid, lows, highs).argmin())  # the first of equals: the widest
        return float(lows[at]), float(highs[at])

    low, high = seen.lowest, seen.highest
    if grid.symmetric and grid.signed:
        reach = max(-low, high)
        low, high = -reach, reach
    found = best(low * shares, high * shares)
    if grid.symmetric or not low or not high:
        return found
    for end in (0, 1):
        lows, highs = (torch.full((steps + 1,), at, dtype=torch.float64) for at in found)
        (lows, highs)[end][1:] = (low, high)[end] * shares
        found = best(lows, highs)
    return found


def _levels(centres: Tensor, grid: Grid, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers of every range, (ranges, centres), scales and zero points, (ranges, 1)."""
    scale, zero_point = (made.double()[:, None] for made in between(lows, highs, grid))
    return whole(centres, scale, zero_point, grid.low, grid.high), scale, zero_point


def _squared_error(centres: Tensor, counts: Tensor, grid: Grid, lows: Tensor, highs: Tensor) -> Tensor:
    q, scale, zero_point = _levels(centres, grid, lows, highs)
    return ((q - zero_point) * scale - centres).square() @ counts


def _divergence(centres: Tensor, counts: Tensor, grid: Grid, lows: Tensor, highs: Tensor) -> Tensor:
    each = zip(*_levels(centres, grid, lows, highs), strict=True)
    found = [_divergence_of(centres, counts, grid, q, float(scale), float(zero)) for q, scale, zero in each]
    return torch.tensor(found, dtype=torch.float64)


def _divergence_of(centres: Tensor, counts: Tensor, grid: Grid, q: Tensor, scale: float, zero_point: float) -> float:
    inside = (centres >= (grid.low - 0.5 - zero_point) * scale) & (centres <= (grid.high + 0.5 - zero_point) * scale)
    if not bool(inside.any()):
        return math.inf
    level = (q[inside] - grid.low).long()
    kept = counts[inside]
    right = kept.clone()
    right[0] += counts[centres < centres[inside][0]].sum()
    right[-1] += counts[centres > centres[inside][-1]].sum()
    levels = grid.high - grid.low + 1
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, torch.ones_like(kept))
    given = (sums / bins.clamp(min=1))[level]
    right, given = right / right.sum(), given / given.sum()
    return float((right * (right / given).log()).sum())
