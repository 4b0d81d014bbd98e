"""What each unit of a coupled group is worth, by rules of thumb: plain tensors in, one score a unit out.

Units are slices that go together. Each tensor they are slices of is a *member* of their group and comes as a matrix (or
more dimensions) with one row a unit. A rule scores every member's rows, and a reduction makes one score of a unit's
scores. Higher is worth more; no score is negative. What a unit's removal is predicted to lose, with its consumers
refitted, is not a rule of thumb and stands in `curvature.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

Reduction = Literal["sum", "mean", "max"]
Normalization = Literal["none", "mean", "max", "lamp"]


def l1(members: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The sum of absolute weights.

    Li et al., Pruning filters for efficient ConvNets, 2017, section 3.1, arxiv.org/abs/1608.08710.

    Args:
        members: weights, each (units, ...).
        reduction: over members.
    Returns:
        (units,), float64, as from every function here.
    Raises:
        ValueError: there is no member, or members have different numbers of units; so in every function here.
    """
    return _each(members, reduction, lambda rows: rows.abs().sum(1))


def l2(members: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The Euclidean norm of the weights.

    Args:
        members: weights, each (units, ...).
        reduction: over members.
    """
    return _each(members, reduction, lambda rows: rows.norm(dim=1))


def random(units: int, seed: int) -> Tensor:
    """Uniform in [0, 1): what every other score has to beat.

    Args:
        units: how many.
        seed: the same seed gives the same scores.
    """
    return torch.rand(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_norm_scale(scales: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The absolute scale γ of the batch norm behind the units.

    Liu et al., Learning efficient convolutional networks through network slimming, 2017, section 3,
    arxiv.org/abs/1708.06519. Says something after training with a penalty on the scales: `schedules.slimming`.

    Args:
        scales: of every batch norm in the group, each (units,).
        reduction: over batch norms.
    """
    return l1(scales, reduction)


def geometric_median(members: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The sum of distances to all other units' weights: least near the geometric median, where others say the same.

    He et al., Filter pruning via geometric median (FPGM), 2019, arxiv.org/abs/1811.00250.

    Args:
        members: weights, each (units, ...).
        reduction: over members.
    """
    # Not by way of inner products, which lose the small distances that decide here.
    exact = "donot_use_mm_for_euclid_dist"
    return _each(members, reduction, lambda rows: torch.cdist(rows, rows, compute_mode=exact).sum(1))


def taylor(members: Sequence[Tensor], gradients: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The squared first-order change of the loss when a unit goes, (Σ g · w)².

    Molchanov et al., Importance estimation for neural network pruning, 2019, arxiv.org/abs/1906.10771. The paper
    takes it per batch and then the mean over batches; so do callers with more than one batch's gradient.

    Args:
        members: weights, each (units, ...).
        gradients: of the loss with respect to them, in the same order and shapes.
        reduction: over members.
    """
    return _each(_products(members, gradients, "gradients"), reduction, lambda rows: rows.sum(1).square())


def hessian_diagonal(members: Sequence[Tensor], curvatures: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The second-order change of the loss when a unit goes, ½ Σ h w², off-diagonal curvature left out.

    LeCun et al., Optimal brain damage, 1990. With the mean of squared per-sample gradients as h it is the empirical
    Fisher information's estimate.

    Args:
        members: weights, each (units, ...).
        curvatures: h ≥ 0, the Hessian's or Fisher's diagonal, in the same order and shapes.
        reduction: over members.
    """
    weights = _products(members, members, "members")
    return _each(_products(weights, curvatures, "curvatures"), reduction, lambda rows: rows.sum(1) / 2)


def fisher(gates: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The second-order change of the loss when a unit's activations are shut off, ½ E[g²], g its gate's gradient.

    Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018,
    arxiv.org/abs/1801.05787.

    Args:
        gates: per unit and sample the loss's gradient with respect to a factor on the unit's activations, that is
            −Σ activation · gradient over positions: each (units, samples).
        reduction: over places in the network where the units' activations were watched.
    """
    return _each(gates, reduction, lambda rows: rows.square().mean(1) / 2)


def mean_activation(activations: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The mean absolute activation.

    Args:
        activations: what units answered, each (units, ...) over samples and positions.
        reduction: over places in the network where the units' activations were watched.
    """
    return _each(activations, reduction, lambda rows: rows.abs().mean(1))


def nonzero_share(activations: Sequence[Tensor], reduction: Reduction = "sum", *, threshold: float = 0.0) -> Tensor:
    """The share of activations that are not zero: one less the average percentage of zeros (APoZ).

    Hu et al., Network trimming, 2016, arxiv.org/abs/1607.03250.

    Args:
        activations: what units answered, each (units, ...) over samples and positions.
        reduction: over places in the network where the units' activations were watched.
        threshold: what counts as zero: 0 after a ReLU, more after functions that come near it only.
    """
    return _each(activations, reduction, lambda rows: (rows.abs() > threshold).double().mean(1))


def combine(scores: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """One score a unit from several.

    Args:
        scores: each (units,).
        reduction: ``"sum"``, ``"mean"`` or ``"max"``.
    Raises:
        ValueError: there are no scores, or they are of different numbers of units.
    """
    if not scores:
        raise ValueError("a group without members has no scores")
    counts = {len(one) for one in scores}
    if len(counts) > 1:
        raise ValueError(f"members of one group have different numbers of units: {sorted(counts)}")
    stacked = torch.stack(list(scores))
    match reduction:
        case "sum":
            return stacked.sum(0)
        case "mean":
            return stacked.mean(0)
        case "max":
            return stacked.amax(0)
    assert_never(reduction)


def normalize(scores: Tensor, normalization: Normalization) -> Tensor:
    """One group's scores made comparable with other groups'.

    Args:
        scores: of one group, none negative: (units,).
        normalization: ``"none"``; ``"mean"`` or ``"max"``, in which the group's mean or largest score becomes 1; or
            ``"lamp"``, each score as a share of its own and all larger ones' sum, so that the largest becomes 1 and no
            group is emptied before all have one unit left (Lee et al., Layer-adaptive sparsity for the magnitude-based
            pruning, 2021, arxiv.org/abs/2010.07611, of squared weights).
    Returns:
        (units,); zeros where all scores are.
    """
    match normalization:
        case "none":
            return scores.clone()
        case "mean":
            return _over(scores, scores.mean())
        case "max":
            return _over(scores, scores.amax())
        case "lamp":
            order = scores.argsort(stable=True)
            above = scores[order].flip(0).cumsum(0).flip(0)
            return _over(scores, torch.empty_like(above).index_copy_(0, order, above))
    assert_never(normalization)


def _each(members: Sequence[Tensor], reduction: Reduction, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """The members' scores under a rule on (units, everything else), combined."""
    return combine([rule(member.detach().double().reshape(len(member), -1)) for member in members], reduction)


def _products(members: Sequence[Tensor], others: Sequence[Tensor], name: str) -> list[Tensor]:
    """Member by member the elementwise product, in float64."""
    if [one.shape for one in members] != [one.shape for one in others]:
        shapes = [tuple(one.shape) for one in members], [tuple(one.shape) for one in others]
        raise ValueError(f"members are {shapes[0]}, {name} are {shapes[1]}: one for each, of its shape")
    return [one.detach().double() * other.detach().double() for one, other in zip(members, others, strict=True)]


def _over(scores: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, scores / total, torch.zeros_like(scores))
