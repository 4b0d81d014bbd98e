"""Weights that go one after the other, the others moving to make up for each: optimal brain surgeon for single weights.

A layer's output is W x, and what it loses is ½ · positions · tr(A ΔW G ΔWᵀ), with G = E[x xᵀ] and A = E[g gᵀ] as in
`gram`. Without A every output weighs the same, and rows are problems of their own: with H = G, removing weight i alone
costs wᵢ² / [H⁻¹]ᵢᵢ, after the others have moved by −wᵢ / [H⁻¹]ᵢᵢ · H⁻¹[:, i] (Hassibi & Stork, Second order derivatives
for network pruning, 1993). Two ways to go on from there:

* `eliminate`: the cheapest weight of each row, again and again, each in the light of those that went (Frantar &
  Alistarh, Optimal brain compression, 2022, algorithm 1, arxiv.org/abs/2208.11580): d³ for every row;
* `sweep`: column by column for all rows at once, each weight that goes made up for by the columns behind it (Frantar &
  Alistarh, SparseGPT, 2023, algorithm 1, arxiv.org/abs/2301.00774): d³ for all rows together.

`refit` then finds the best values of the weights that stay. All functions are pure and work in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from featherweight.curvature.gram import Statistics
from featherweight.curvature.solve import DAMPING, damp, least_squares, root
from featherweight.forms import Layer

# Of the mean diagonal, where weights are moved and nobody knows how many inputs were seen (SparseGPT and GPTQ: 0.01).
SWEEP_DAMPING = 1e-2
# The same, under which what inputs tell of each other is looked at first where that is known: see `steady`.
FIRST_DAMPING = 0.03
# The ridge of a fit to changed inputs, as a multiple of that damping: what changes has coefficients half as large.
CHANGED = 4.0
# Of the mean diagonal, in the fit to a changed network's inputs: holds weights near where they were.
RIDGE = 1e-3
# Columns after which what has been lost is handed on to all columns behind them; between, to the block's own.
BLOCK = 128

# Which of a block's weights go: (values (groups, outputs, columns), their column's d_i (groups, columns), the columns)
# → bool (groups, outputs, columns).
Choose = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True)
class Matrix:
    """A layer's weight as matrices, with its moments.

    Attributes:
        weight: W, (groups, outputs / groups, d).
        gram: G, (groups, d, d); None without data.
        gradients: A's diagonal blocks, (groups, outputs / groups, outputs / groups); None to weigh all outputs alike.
        positions: output positions a sample.
        held: where the weight stays zero whatever happens, (groups, outputs / groups, d), bool; None for nowhere.
        independent: how many independent inputs G is worth, of which there are no more than inputs and no fewer than
            samples: the geometric mean of both; 0 where nobody counted.
    """

    weight: Tensor
    gram: Tensor | None = None
    gradients: Tensor | None = None
    positions: float = 1.0
    held: Tensor | None = None
    independent: float = 0.0


def matrix(
    weight: Tensor, groups: int, seen: Statistics | None, held: Tensor | None = None, ridge: float = RIDGE
) -> Matrix:
    """A layer's weight and statistics, with the weight moved to where it best answers changed inputs.

    Args:
        weight: (outputs, inputs / groups, *kernel).
        groups: of the convolution; 1 for a Linear. Statistics may have more, where rows have inputs of their own.
        seen: of the layer's inputs. Where they hold a cross moment, the weight is first fitted to what the original
            answered (asymmetric reconstruction: Zhang et al., 2016, section 3.3, arxiv.org/abs/1505.06798).
        held: where the weight must stay zero, of its shape.
        ridge: of that fit, towards the weight as it is; more where the inputs that were seen call for it.
    """
    groups = groups if seen is None else len(seen.gram)
    flat = weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)
    held = None if held is None else held.reshape(flat.shape)
    if seen is None:
        return Matrix(flat, held=held)
    gram = seen.gram.to(flat)
    gradients, independent = _by_group(seen.gradients, groups, flat), math.sqrt(seen.samples * seen.rows)
    of = Matrix(flat, gram, gradients, seen.positions, held, independent)
    if seen.cross is not None:
        flat = least_squares(gram, seen.cross.to(flat), max(ridge, CHANGED * steadiness(of)), prior=flat)
        of = replace(of, weight=flat if held is None else flat.masked_fill(held, 0))
    return of


def of_layer(layer: Layer, seen: Statistics | None) -> Matrix:
    """A layer as matrices; where it has a bias that will be corrected, with moments about the means."""
    seen = seen if seen is None or layer.bias is None else seen.centred()
    return matrix(layer.weight, groups_of(layer), seen)


def groups_of(layer: Layer) -> int:
    """The groups of a convolution; 1 for a Linear."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def steady(of: Matrix, damping: float | None = None) -> Tensor:
    """G with so much on its diagonal that weights do not make up for each other where it is mere chance that they can.

    What a column's error does is made good by a regression on the columns behind it. Of few inputs that regression
    learns their noise, and on others the errors are there in full. The ridge against that is σ² d / n for coefficients
    of norm 1, σ² the variance that the others leave unexplained (Hoerl, Kennard & Baldwin, Ridge regression: some
    simulations, Communications in Statistics 4, 1975).

    Args:
        of: the layer, with its gram.
        damping: as a share of the mean diagonal; None for what the inputs call for.
    Returns:
        (groups, d, d), float64.
    """
    assert of.gram is not None
    return damp(of.gram, steadiness(of) if damping is None else damping)


def steadiness(of: Matrix) -> float:
    """The damping that the inputs call for, as a share of the mean diagonal."""
    assert of.gram is not None
    size = float(of.gram.diagonal(dim1=1, dim2=2).mean())
    if not of.independent or not size > 0:
        return SWEEP_DAMPING
    unexplained = float(conditional(damp(of.gram, FIRST_DAMPING)).mean()) / size
    return of.weight.shape[-1] / of.independent * unexplained


def conditional(gram: Tensor) -> Tensor:
    """The variance of each input given those behind it, largest first as in `swept`: 1 / U_jj², (groups, 1, d)."""
    columns = gram.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True, stable=True)
    factor = torch.linalg.cholesky(inverse(gram[:, columns][:, :, columns]), upper=True).double()
    found = torch.empty(len(gram), 1, len(columns), dtype=torch.float64, device=gram.device)
    found[..., columns] = factor.diagonal(dim1=1, dim2=2).square().reciprocal()[:, None, :]
    return found


def loss(of: Matrix, replaced: Tensor) -> float:
    """The predicted rise of the loss when the weight becomes another.

    ½ tr(A ΔW G ΔWᵀ) · positions; without gradients the output's error as a share of the output; without data the
    weight's as a share of the weight: as for factorizations.

    Args:
        of: the layer.
        replaced: Ŵ, (groups, outputs, d).
    """
    moved = of.weight - replaced.to(of.weight)
    seen = moved if of.gram is None else moved @ of.gram
    if of.gradients is not None:
        return max(0.0, float(((of.gradients @ seen) * moved).sum()) * 0.5 * of.positions)
    return max(0.0, float((seen * moved).sum())) / output(of)


def output(of: Matrix) -> float:
    """The square of a layer's outputs, E‖W x‖², of its weights without data; never 0."""
    seen = of.weight if of.gram is None else of.weight @ of.gram
    return max(float((seen * of.weight).sum()), torch.finfo(torch.float64).tiny)


def diagonal(of: Matrix) -> Tensor:
    """What a squared change of each weight alone does to the loss: ½ A_oo G_ii · positions, (groups, outputs, d).

    Ones where nothing is known; outputs weigh the same without gradients.
    """
    if of.gram is None:
        return torch.ones_like(of.weight)
    inputs = of.gram.diagonal(dim1=1, dim2=2).clamp_min(0)[:, None]
    if of.gradients is None:
        return inputs.expand_as(of.weight)
    outputs = of.gradients.diagonal(dim1=1, dim2=2).clamp_min(0)[..., None]
    return outputs * inputs * (0.5 * of.positions)


def row_weights(of: Matrix) -> Tensor:
    """How much a squared error of each output matters: (groups, outputs, 1), ones without gradients."""
    if of.gradients is None:
        return of.weight.new_ones(*of.weight.shape[:2], 1)
    return of.gradients.diagonal(dim1=1, dim2=2).clamp_min(0)[..., None] * (0.5 * of.positions)


def inverse(gram: Tensor) -> Tensor:
    """The inverse of a gram, damped by what numbers need: (..., d, d)."""
    found: Tensor = torch.cholesky_inverse(root(gram))
    return found


def eliminate(weight: Tensor, gram: Tensor, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In which order each row's weights go, the cheapest first in the light of those that went, and what each costs.

    Args:
        weight: (rows, d).
        gram: (d, d), the same for all rows.
        gone: (rows, d), weights that have gone before: they go first, at no cost.
    Returns:
        order: (rows, d), the column that goes at each step; costs: (rows, d), the rise of the row's error
        E‖ΔW x‖² at each step.
    """
    rows, width = weight.shape
    weight = weight.double().clone()
    inverses = inverse(gram).repeat(rows, 1, 1)
    left = torch.ones(rows, width, dtype=torch.bool, device=weight.device)
    at = torch.arange(rows, device=weight.device)
    order = torch.zeros(rows, width, dtype=torch.long, device=weight.device)
    costs = torch.zeros_like(weight)
    first = torch.zeros_like(left) if gone is None else gone
    for step in range(width):
        pivots = inverses.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny)
        each = weight.square() / pivots
        found = each.masked_fill(first, -1.0).masked_fill(~left, torch.inf).argmin(1)
        order[:, step] = found
        costs[:, step] = torch.where(first[at, found], torch.zeros_like(each[:, 0]), each[at, found])
        column = inverses[at, :, found]
        pivot = pivots[at, found]
        weight -= column * (weight[at, found] / pivot)[:, None]
        left[at, found] = False
        weight.masked_fill_(~left, 0)
        inverses.baddbmm_(column[:, :, None], column[:, None] / pivot[:, None, None], alpha=-1)
    return order, costs


def orders(of: Matrix, gone: Tensor) -> tuple[Tensor, Tensor]:
    """`eliminate` for all of a layer's outputs, costs weighed by what each output matters.

    Args:
        of: the layer, with its gram.
        gone: (groups, outputs, d), weights that have gone before.
    Returns:
        order and costs, (groups · outputs, d).
    """
    assert of.gram is not None
    found = [eliminate(*part) for part in zip(of.weight, of.gram, gone, strict=True)]
    costs = torch.cat([costs for _, costs in found])
    return torch.cat([order for order, _ in found]), costs * row_weights(of).flatten()[:, None]


def eliminated(order: Tensor, costs: Tensor, kept: int) -> Tensor:
    """Which weights stay when rows give theirs up in their own order, the cheapest over all rows first.

    Args:
        order, costs: (rows, d), as from `orders`.
        kept: how many stay in all.
    Returns:
        (rows, d), bool.
    """
    # A row cannot skip a step: what stands in the way of cheaper ones behind it counts as much as they do at the least.
    rising = costs.cummax(1).values
    going = torch.zeros_like(rising, dtype=torch.bool)
    # By place where costs are the same, so that of a row's equals the earlier one goes.
    going.view(-1)[rising.flatten().argsort(stable=True)[: rising.numel() - kept]] = True
    return torch.ones_like(going).scatter_(1, order, ~going)


def sweep(weight: Tensor, gram: Tensor, choose: Choose, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Prune column by column, every error made up for by the columns behind it.

    Args:
        weight: (groups, outputs, d).
        gram: (groups, d, d).
        choose: which weights of a block go, looked at when the block is reached.
        block: columns between two choices.
    Returns:
        The weight, and where it stays (bool), both (groups, outputs, d).
    """
    # H⁻¹ = Uᵀ U: row i of U holds what is left of H⁻¹'s row i once the columns before it are fixed.
    upper: Tensor = torch.linalg.cholesky(inverse(gram), upper=True)
    weight = weight.double().clone()
    stay = torch.ones_like(weight, dtype=torch.bool)
    width = weight.shape[2]
    for start in range(0, width, block):
        here = slice(start, min(start + block, width))
        part, pivots = weight[..., here], upper[:, here, here]
        going = choose(part, pivots.diagonal(dim1=1, dim2=2), here)
        stay[..., here] = ~going
        lost = torch.zeros_like(part)
        for i in range(part.shape[2]):
            error = torch.where(going[..., i], part[..., i], 0.0) / pivots[:, i, i, None]
            part[..., i:] -= error[..., None] * pivots[:, None, i, i:]
            lost[..., i] = error
        weight[..., here.stop :] -= lost @ upper[:, here, here.stop :]
    return weight.masked_fill(~stay, 0), stay


def refit(weight: Tensor, gram: Tensor, stay: Tensor, start: Tensor, steps: int = 64) -> Tensor:
    """The values of the weights that stay for which the output is nearest: least squares on every row's own support.

    By conjugate gradients on all rows at once, which from `start` on only come nearer; exact after as many steps as a
    row keeps weights.

    Args:
        weight: W, what the output should be that of, (groups, outputs, d).
        gram: (groups, d, d).
        stay: (groups, outputs, d), bool.
        start: values to begin with, zero where they do not stay.
        steps: at most.
    """
    gram = damp(gram, DAMPING)
    scale = gram.diagonal(dim1=1, dim2=2)[:, None].clamp_min(torch.finfo(torch.float64).tiny)  # Jacobi's preconditioner
    found = torch.where(stay, start.double(), 0.0)
    residual = torch.where(stay, (weight.double() - found) @ gram, 0.0)
    preconditioned = residual / scale
    direction = preconditioned
    energy = (residual * preconditioned).sum(2, keepdim=True)
    enough = energy * 1e-12
    for _ in range(steps):
        if not bool((energy > enough).any()):
            break
        ahead = torch.where(stay, direction @ gram, 0.0)
        curvature = (direction * ahead).sum(2, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature.clamp_min(1e-300), 0.0)
        found = found + length * direction
        residual = residual - length * ahead
        preconditioned = residual / scale
        before, energy = energy, (residual * preconditioned).sum(2, keepdim=True)
        direction = preconditioned + torch.where(before > 0, energy / before.clamp_min(1e-300), 0.0) * direction
    return found


def reordered(of: Matrix, columns: Tensor) -> Matrix:
    """The same with columns in another order."""
    gram = None if of.gram is None else of.gram[:, columns][:, :, columns]
    return replace(of, weight=of.weight[..., columns], gram=gram)


def _by_group(gradients: Tensor | None, groups: int, like: Tensor) -> Tensor | None:
    """The diagonal blocks of the gradients' covariance, one for each group's outputs."""
    if gradients is None:
        return None
    size = gradients.shape[0] // groups
    gradients = gradients.reshape(groups, size, groups, size)
    return gradients.diagonal(dim1=0, dim2=2).permute(2, 0, 1).to(like)
