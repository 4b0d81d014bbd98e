"""Rounding a layer's weight so that its output moves least: the error of one value is made up for by the others.

All functions are pure and see a layer as stacks of matrices, weights (groups, outputs, d) and Gram matrices of inputs
(groups, d, d). What is rounded to is the caller's: a grid, a table, two values.

Frantar et al., GPTQ, 2023, arxiv.org/abs/2210.17323; Behdin et al., QuantEase, 2023, arxiv.org/abs/2309.01885; Nagel et
al., Up or down? Adaptive rounding for post-training quantization, 2020, arxiv.org/abs/2004.10568.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.curvature.sweeps import BLOCK, inverse

# Values of some columns, (groups, outputs, columns), and which columns → the nearest values that they may have.
Nearest = Callable[[Tensor, Tensor], Tensor]


def errors(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    """``E‖(w − ŵ) x‖²`` row by row: (groups, outputs)."""
    moved = weight - rounded
    return ((moved @ gram) * moved).sum(-1).clamp_min(0)


def swept(weight: Tensor, gram: Tensor, nearest: Nearest, held: Tensor | None = None, order: bool = False) -> Tensor:
    """Round column by column; the columns behind make up for every error as well as they can.

    Frantar et al., algorithm 1: with ``G⁻¹ = Uᵀ U``, row j of U says how the columns behind column j answer its
    error once those before it are fixed.

    Args:
        weight: W, (groups, outputs, d), float64.
        gram: G, (groups, d, d), damped: see `sweeps.steady`.
        nearest: what values may become.
        held: where they must become zero, of the weight's shape.
        order: begin with the columns whose inputs are largest ("act order").
    Returns:
        Ŵ, of the same shape.
    """
    width = weight.shape[-1]
    columns = torch.arange(width, device=weight.device)
    if order:
        columns = gram.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True, stable=True)
        gram, weight = gram[:, columns][:, :, columns], weight[..., columns]
        held = None if held is None else held[..., columns]
    upper: Tensor = torch.linalg.cholesky(inverse(gram), upper=True).to(weight)
    left = weight.clone()
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        passed = torch.empty_like(left[..., start:stop])
        for j in range(start, stop):
            value = nearest(left[..., j : j + 1], columns[j : j + 1])
            if held is not None:
                value = value.masked_fill(held[..., j : j + 1], 0)
            error = (left[..., j : j + 1] - value) / upper[:, j, j, None, None]
            left[..., j:stop] -= error * upper[:, j, None, j:stop]
            left[..., j : j + 1] = value
            passed[..., j - start : j - start + 1] = error
        left[..., stop:] -= passed @ upper[:, start:stop, stop:]
    if not order:
        return left
    back = torch.empty_like(left)
    back[..., columns] = left
    return back


def descended(
    weight: Tensor, rounded: Tensor, gram: Tensor, nearest: Nearest, held: Tensor | None = None, rounds: int = 8
) -> Tensor:
    """Give one column after the other the values that are best while all others stay; no row's error ever rises.

    Behdin et al., algorithm 1: the best free value of a column is its value less the residual's share, and the best
    that it may have is the one nearest to that.

    Args:
        weight: W, (groups, outputs, d), float64.
        rounded: where to begin, values that `nearest` allows.
        gram: G, (groups, d, d).
        nearest: what values may become.
        held: where they must stay zero.
        rounds: through all columns, at most.
    """
    rounded = rounded.clone()
    width = weight.shape[-1]
    columns = torch.arange(width, device=weight.device)
    size = gram.diagonal(dim1=-2, dim2=-1)
    # A column whose input never says anything stays as it is.
    over = torch.where(size > 1e-12 * size.mean(-1, keepdim=True), 1 / size, 0)
    moved = (rounded - weight) @ gram
    for _ in range(rounds):
        before = rounded.clone()
        for start in range(0, width, BLOCK):
            here = slice(start, min(start + BLOCK, width))
            local, steps = moved[..., here].clone(), torch.zeros_like(moved[..., here])
            block = gram[:, here, here]
            for j in range(local.shape[-1]):
                at = slice(start + j, start + j + 1)
                value = nearest(rounded[..., at] - local[..., j : j + 1] * over[:, None, at], columns[at])
                if held is not None:
                    value = value.masked_fill(held[..., at], 0)
                # Only steps that lower the error by more than its rounding: others would go to and fro for ever.
                step = value - rounded[..., at]
                gains = step.abs() * 1e-9 < -step.sign() * (2 * local[..., j : j + 1] * over[:, None, at] + step)
                step = step * gains
                rounded[..., at] += step
                local += step * block[:, j, None]
                steps[..., j : j + 1] = step
            moved += steps @ gram[:, here]
        if torch.equal(rounded, before):
            break
    # Sums of steps are not the values that `nearest` gives, to the last bit.
    again = torch.cat([nearest(rounded[..., j : j + 1], columns[j : j + 1]) for j in range(width)], -1)
    return again if held is None else again.masked_fill(held, 0)


def adarounded(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    held: Tensor | None = None,
    steps: int = 1000,
    rate: float = 1e-2,
    push: float = 0.3,
) -> Tensor:
    """Learn whether each value is better rounded up or down, by gradient descent on the output's error.

    Nagel et al., equations 21 to 24: a value is ``s · (⌊w / s⌋ + h(V))`` with a stretched sigmoid h; a growing penalty
    drives every h to 0 or 1. The output's error, in which the paper takes samples, is taken from G.

    Args:
        weight: W, (groups, outputs, d).
        gram: G, (groups, d, d).
        scale, zero_point: of the grid, which broadcast against the weight.
        low, high: the least and the greatest whole number of the grid.
        held: where values must become zero.
        steps: of Adam.
        rate: its learning rate.
        push: weight of the penalty beside the error, both a value.
    Returns:
        Whole numbers less the zero point, times the scale: (groups, outputs, d), float64.
    """
    target = (weight / scale).float()
    below = target.floor()
    shift = zero_point.to(target)
    size = scale.float().expand_as(target)
    # Errors in units of the mean error of a step: the penalty then weighs the same whatever the layer.
    metric = gram.float()
    typical = (metric.diagonal(dim1=-2, dim2=-1)[:, None] * size.square()).mean().clamp_min(1e-30)
    opened = Opened(below, target)
    mean, square = torch.zeros_like(target), torch.zeros_like(target)
    for step in range(
        1, steps + 1
    ):  # Adam by hand: the gradient has a closed form, and is all that autograd would find
        q = below + opened.share() + shift
        moved = (q.clamp(low, high) - shift - target) * size
        if held is not None:
            moved = moved.masked_fill(held, 0)
        gradient = 2 * (moved @ metric) * size / typical * ((q >= low) & (q <= high))
        gradient = opened.slope() * (gradient + push * opened.penalty_slope(step / steps))
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.001)
        opened.v -= rate * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    q = (below + opened.decided() + shift).clamp(low, high) - shift
    found = q.to(weight) * scale.to(weight)
    return found if held is None else found.masked_fill(held, 0)


class Opened:
    """Every value between two whole numbers, as a share that can be learnt and at last is 0 or 1.

    Attributes:
        v: the variables; the share is ``clamp(sigmoid(v) · 1.2 − 0.1, 0, 1)`` (Louizos et al., 2018).
    """

    def __init__(self, below: Tensor, target: Tensor) -> None:
        share = (target - below).clamp(0.01, 0.99)
        self.v = torch.logit((share + 0.1) / 1.2)

    def share(self) -> Tensor:
        """How far each value is from the whole number below to the one above."""
        return (self.v.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def slope(self) -> Tensor:
        """The derivative of the share by v; a little even where it has come to its end, so that it can come back."""
        sigmoid = self.v.sigmoid()
        return sigmoid * (1 - sigmoid) * 1.2

    def penalty_slope(self, done: float) -> Tensor:
        """What indecision costs, ``1 − |2 share − 1|^β`` with β from 20 to 2, derived by the share.

        Args:
            done: share of all steps gone by; in the first fifth indecision is free.
        """
        if done < 0.2:
            return torch.zeros_like(self.v)
        beta = 20 + (2 - 20) * (done - 0.2) / 0.8
        distance = 2 * self.share() - 1
        return -2 * beta * distance.sign() * distance.abs().pow(beta - 1)

    def decided(self) -> Tensor:
        """0 or 1."""
        return (self.v.detach() >= 0).to(self.v.dtype)


def rescaled(weight: Tensor, rounded: Tensor, gram: Tensor | None) -> Tensor:
    """What each row is best multiplied by: least squares of the whole row under G, (groups, outputs, 1).

    1 where that is no positive number.
    """
    seen = rounded if gram is None else rounded @ gram
    factor = (seen * weight).sum(-1, keepdim=True) / (seen * rounded).sum(-1, keepdim=True)
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, 1)
