"""The mathematics that weight SVD and spatial SVD share: low rank between blocks of a weight, under the data's metric.

A weight is seen as (groups, outputs, u, v): the second factor runs over outputs and u, the first over v. For a Linear
u is 1 and v the inputs; for a convolution as 1×1 then k×k, u is the kernel and v the channels; for k×1 then 1×k, u is
the second axis and v channels and first axis. Rank r then means W[:, u, v] ≈ Σ_r second[:, u, r] first[r, v].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.curvature.gram import Statistics
from featherweight.curvature.solve import least_squares, root

# Of the mean gradient covariance. Outputs whose gradient is small on the calibration data still matter elsewhere.
GRADIENT_DAMPING = 1e-2
# Of the mean diagonal, towards what is there: a refit has few samples for its unknowns where kernels are large.
RIDGE = 1e-3


@dataclass(frozen=True)
class Blocks:
    """A layer's weight and its statistics in the order that a factorization needs.

    Attributes:
        weight: (groups, outputs, u, v), float64.
        gram: E[x xᵀ] of the layer's inputs, (groups, u, v, u, v), float32, or None without data.
        gradients: per group, (groups, outputs, outputs), or None.
        positions: output positions a sample.
    """

    weight: Tensor
    gram: Tensor | None = None
    gradients: Tensor | None = None
    positions: float = 1.0


@dataclass(frozen=True)
class Factors:
    """Two factors of a weight, in falling order of what their columns are worth.

    Attributes:
        first: (groups, rank, v).
        second: (groups, outputs, u, rank).
    """

    first: Tensor
    second: Tensor

    def truncated(self, rank: int) -> Factors:
        """The leading columns only."""
        return Factors(self.first[:, :rank], self.second[..., :rank])

    def product(self) -> Tensor:
        """The weight that the factors stand for: (groups, outputs, u, v)."""
        return torch.einsum("gour,grv->gouv", self.second, self.first)


def by_blocks(x: Tensor, dim: int, channels: int, kernel: Sequence[int], first_axes: Collection[int]) -> Tensor:
    """A tensor with a dimension of flattened patches, (channels, *kernel), taken apart into u and v; a view if it can.

    Args:
        x: any tensor.
        dim: the dimension; its two parts take its place.
        channels, kernel: what it is flattened from.
        first_axes: kernel axes that belong to v, as do the channels.
    """
    x = x.reshape(*x.shape[:dim], channels, *kernel, *x.shape[dim + 1 :])
    second = [1 + axis for axis in range(len(kernel)) if axis not in first_axes]
    inner = [*second, 0, *(1 + axis for axis in range(len(kernel)) if axis in first_axes)]
    x = x.permute(*range(dim), *(dim + axis for axis in inner), *range(dim + len(inner), x.ndim))
    u = int(torch.Size([kernel[axis - 1] for axis in second]).numel())
    return x.reshape(*x.shape[:dim], u, -1, *x.shape[dim + len(inner) :])


def blocks(weight: Tensor, groups: int, first_axes: Collection[int], statistics: Statistics | None) -> Blocks:
    """A layer's weight and statistics, block by block.

    Args:
        weight: (outputs, inputs / groups, *kernel).
        groups: of the convolution; 1 for a Linear.
        first_axes: kernel axes of the first factor.
        statistics: of the layer's inputs, or None to go without data. Where they hold a cross moment, the weight is
            first moved to where it best answers the changed inputs as the original answered its own (asymmetric
            reconstruction: Zhang et al., Accelerating very deep convolutional networks, 2016, section 3.3,
            arxiv.org/abs/1505.06798).
    """
    flat = weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)
    patch = (weight.shape[1], weight.shape[2:], first_axes)
    if statistics is None:
        return Blocks(by_blocks(flat, 2, *patch))
    gram = statistics.gram.to(weight.device)
    if statistics.cross is not None:
        flat = least_squares(gram, statistics.cross.to(weight.device), RIDGE, prior=flat).to(flat)
    gram = by_blocks(by_blocks(gram, 2, *patch), 1, *patch)  # (groups, u, v, u, v)
    return Blocks(by_blocks(flat, 2, *patch), gram, _by_group(statistics.gradients, groups), statistics.positions)


def factors(layer: Blocks) -> Factors:
    """All factors of a weight, so that every truncation is the best of its rank: the SVD in the data's metric.

    Without data this is the plain SVD of the (outputs · u, v) matrix. With it, what is minimised is the error of the
    layer's output (inputs whitened by the root of their Gram matrix), weighed by the gradients where they are known
    (outputs whitened by theirs), which is the predicted rise of the loss. Where u > 1 the correlation between blocks is
    left to `refit`.
    """
    groups, outputs, u, _ = layer.weight.shape
    matrix, left, right = _whitened(layer)
    # Singular vectors of the shorter side alone, as eigenvectors: the other side is then a product, exact at full rank.
    if matrix.shape[1] <= matrix.shape[2]:
        second = torch.linalg.eigh(matrix @ matrix.transpose(1, 2)).eigenvectors.flip(2)
        rows = second.transpose(1, 2) @ matrix
    else:
        rows = torch.linalg.eigh(matrix.transpose(1, 2) @ matrix).eigenvectors.flip(2).transpose(1, 2)
        second = matrix @ rows.transpose(1, 2)
    second = second.reshape(groups, outputs, -1)
    if left is not None:
        second = torch.linalg.solve_triangular(left, second, upper=True)
    first = rows if right is None else torch.linalg.solve_triangular(right, rows, upper=False, left=False)
    return Factors(first, second.reshape(groups, outputs, u, -1))


def least_losses(layer: Blocks) -> Tensor:
    """What `predicted_losses` says of `factors`, under the damped metric in which they are the best: (ranks + 1,).

    The sum of the squared singular values that a rank leaves out; they alone are found much faster than the factors.
    """
    matrix, _, _ = _whitened(layer)
    if matrix.shape[1] > matrix.shape[2]:
        matrix = matrix.transpose(1, 2)
    squares = torch.linalg.eigvalsh(matrix @ matrix.transpose(1, 2)).clamp_min(0).sum(0)
    losses = torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)
    if layer.gradients is None:
        return losses / losses[0].clamp_min(torch.finfo(losses.dtype).tiny)
    return losses * (0.5 * layer.positions)


def predicted_losses(layer: Blocks, of: Factors) -> Tensor:
    """The predicted rise of the loss at every rank from 0 to full: (ranks + 1,).

    ½ tr(A ΔW G ΔWᵀ) · positions, with ΔW the columns left out; without gradients the output's error as a share of the
    output, ‖ΔW x‖² / ‖W x‖²; without data ‖ΔW‖² / ‖W‖². Across blocks of u the Gram matrix is taken as its mean block.
    """
    gram = None if layer.gram is None else _between_blocks(layer.gram)
    first = of.first if gram is None else of.first @ gram
    inputs = first @ of.first.transpose(1, 2)  # (groups, rank, rank)
    second = of.second
    if layer.gradients is not None:
        second = torch.einsum("gpo,gour->gpur", layer.gradients.to(second), second)
    outputs = torch.einsum("gour,gous->grs", second, of.second)
    # Column pairs (k, l) with both k, l ≥ r are what rank r leaves out: a sum over the lower right corner.
    pairs = (inputs * outputs).sum(0)
    corner = pairs.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
    losses = torch.cat([corner, corner.new_zeros(1)]).clamp_min(0)
    if layer.gradients is None:
        return losses / losses[0].clamp_min(torch.finfo(losses.dtype).tiny)
    return losses * (0.5 * layer.positions)


def refit(layer: Blocks, start: Factors) -> Factors:
    """The best second factor for the first one, under the whole Gram matrix, correlations between blocks included.

    One half of an alternating least-squares sweep: with the first factor fixed, the second sees (u, rank) inputs and is
    an ordinary least-squares fit. A ridge holds it near where it was.
    """
    if layer.gram is None or layer.weight.shape[2] == 1:
        return start
    groups, outputs, u, _ = layer.weight.shape
    rank = start.first.shape[1]
    seen = torch.einsum("gtv,gpvqw->gptqw", start.first, layer.gram.to(start.first))
    gram = torch.einsum("gptqw,gsw->gptqs", seen, start.first).reshape(groups, u * rank, u * rank)
    cross = torch.einsum("gopv,gqspv->goqs", layer.weight, seen).reshape(groups, outputs, u * rank)
    prior = start.second.reshape(groups, outputs, u * rank)
    second = least_squares(gram, cross, RIDGE, prior).to(prior)
    return replace(start, second=second.reshape(groups, outputs, u, rank))


def balanced(of: Factors) -> Factors:
    """The same product with equal scales on both sides: the SVD of the product, √σ each way.

    Factors that come out of whitening are badly scaled: a network of such factors breaks down when it is trained on.
    """
    groups, outputs, u, rank = of.second.shape
    # QR of both sides first: the SVD is then of a small matrix.
    left, left_core = torch.linalg.qr(of.second.reshape(groups, outputs * u, rank))
    right, right_core = torch.linalg.qr(of.first.transpose(1, 2))
    columns, values, rows = torch.linalg.svd(left_core @ right_core.transpose(1, 2), full_matrices=False)
    half = values.sqrt()
    first = half[..., None] * (rows @ right.transpose(1, 2))
    second = (left @ columns * half[:, None]).reshape(groups, outputs, u, -1)
    return Factors(_padded(first, rank, 1), _padded(second, rank, 3))


def _whitened(layer: Blocks) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weight as a matrix in the data's metric, (groups, outputs · u, v), and the roots at its left and right."""
    groups, outputs, u, v = layer.weight.shape
    matrix = layer.weight
    left = None if layer.gradients is None else root(layer.gradients, GRADIENT_DAMPING).transpose(1, 2).to(matrix)
    right = None if layer.gram is None else root(_between_blocks(layer.gram)).to(matrix)
    if left is not None:
        matrix = torch.einsum("gpo,gouv->gpuv", left, matrix)
    matrix = matrix.reshape(groups, outputs * u, v)
    return matrix if right is None else matrix @ right, left, right


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros up to the rank asked for, where the matrix has no more."""
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _between_blocks(gram: Tensor) -> Tensor:
    """The mean over u of a Gram matrix's diagonal blocks: (groups, u, v, u, v) → (groups, v, v)."""
    return gram.diagonal(dim1=1, dim2=3).mean(-1, dtype=torch.float64)


def _by_group(gradients: Tensor | None, groups: int) -> Tensor | None:
    """The diagonal blocks of the gradients' covariance, one for each group's outputs: (groups, outputs, outputs)."""
    if gradients is None:
        return None
    size = gradients.shape[0] // groups
    return torch.stack(
        [gradients[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)]
    ).double()
