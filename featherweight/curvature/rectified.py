"""Least squares through a rectifier: where the answer will be cut off, it need only be cut off too.

Zhang, Zou, He & Sun, Accelerating very deep convolutional networks for classification and detection, 2015, section
3.3, arxiv.org/abs/1505.06798 (nonlinear, asymmetric reconstruction). There an auxiliary answer is penalised towards the
linear one; here it is the nearest one that the rectifier maps to the right place, which needs no penalty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from featherweight.curvature.solve import DAMPING

# Rounds after which the fit of networks at half their cost no longer improves.
ROUNDS = 8


def fit(
    x: Tensor,
    wanted: Tensor,
    beside: Tensor,
    scale: Tensor,
    prior: Tensor,
    *,
    ceiling: float | None = math.inf,
    ridge: float = DAMPING,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """The weight and the constant for which ``r(scale · (W x + c) + beside)`` comes nearest to ``r(wanted)``.

    In turn the right answers are set (where ``wanted`` is cut off and the present answer is too, the present one; where
    only ``wanted`` is, the edge; elsewhere ``wanted``) and W and c are fitted to them by least squares, all with one
    factorization. What falls from round to round is the sum of squares of how far answers have to move to be right; it
    is above the squared error of the rectified answers, and equal to it where no answer is cut off that should not be.

    Args:
        x: what goes into the layer: (rows, d).
        wanted: what reached the rectifier in the original: (rows, outputs).
        beside: what is added to the layer's scaled answer, (rows, outputs) or (outputs,).
        scale: of every output, not zero: (outputs,).
        prior: W₀, to which the ridge draws: (outputs, d).
        ceiling: where the rectifier stops rising; None for no rectifier.
        ridge: share of the mean diagonal of E[x xᵀ]; DAMPING at least.
        rounds: how often the right answers are set anew.
    Returns:
        W (outputs, d) and c (outputs,), float64.
    """
    rows = len(x)
    mean = x.double().mean(0)
    centred = (x.double() - mean).to(x.dtype)
    gram = (centred.T @ centred / rows).double()
    damping = max(ridge, DAMPING) * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + damping * torch.eye(len(gram), dtype=gram.dtype).to(gram))
        if not bool(failed):
            break
        damping = damping * 10
    start = prior.double()
    scale_, wanted_, beside_ = scale.to(x.dtype), wanted.to(x.dtype), beside.to(x.dtype)

    def solved(target: Tensor) -> tuple[Tensor, Tensor]:
        middle = target.double().mean(0)
        cross = ((target - middle.to(target)).T @ centred / rows).double()
        weight = start + torch.cholesky_solve((cross - start @ gram).T, factor).T
        return weight, middle - weight @ mean

    weight, constant = solved((wanted_ - beside_) / scale_)
    for _ in range(rounds if ceiling is not None else 0):
        assert ceiling is not None
        now = scale_ * (x @ weight.to(x.dtype).T + constant.to(x.dtype)) + beside_
        right = torch.where(wanted_ <= 0, now.clamp_max(0), wanted_)
        if math.isfinite(ceiling):
            right = torch.where(wanted_ >= ceiling, now.clamp_min(ceiling), right)
        weight, constant = solved((right - beside_) / scale_)
    return weight, constant
