"""Optimal brain surgeon: weights go where the data misses them least, and those that stay make up for them.

Frantar & Alistarh, Optimal brain compression, 2022, arxiv.org/abs/2208.11580, where a layer is small enough for an
exact order; SparseGPT, 2023, arxiv.org/abs/2301.00774, where it is not. Either way the weights that stay are then
fitted to the layer's output by least squares, and the bias to its mean.

Needs calibration data and no training. Where much is to go, train afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from featherweight.curvature import sweeps
from featherweight.curvature.gram import Statistics
from featherweight.curvature.sweeps import Choose, Matrix
from featherweight.forms import Constraint, Layer, Mask, Pattern
from featherweight.prune.sparsity import Unstructured
from featherweight.search.options import Option

# Outputs times columns cubed, up to which the order is found exactly: about ten seconds on one core.
EXACT = 1.5e9
# Options that are swept for, where no order tells what all of them lose; what lies between is interpolated.
SWEPT = 10


@dataclass(frozen=True)
class OBS(Unstructured):
    """Zero weights by what they do to the output, and move the others to make up for it.

    Attributes:
        exact: find each output's order of weights exactly (d³ for every output) or go column by column (d³ for all of
            them); None for exactly wherever that is a matter of seconds.
        refit: fit the weights that stay by least squares at the end.
    """

    exact: bool | None = None
    refit: bool = True

    needs_data: ClassVar[bool] = True

    def scores(self, layer: Layer, seen: Statistics | None) -> Tensor:
        """What each weight alone would lose, w² / [H⁻¹]ᵢᵢ, weighed by its output's gradient."""
        of, gone = _prepared(layer, seen)
        return _alone(of).masked_fill(gone, 0).reshape(layer.weight.shape)

    def pruned(self, layer: Layer, form: Constraint, seen: Statistics | None) -> tuple[Tensor, Tensor | None]:
        of, gone = _prepared(layer, seen)
        assert of.gram is not None
        if isinstance(form, Mask) and self._exactly(of):
            stay = sweeps.eliminated(*sweeps.orders(of, gone), form.kept).reshape(of.weight.shape)
            # What stays moves as the last of the steps leaves it, which is where least squares would have it.
            moved = sweeps.refit(of.weight, of.gram, stay, of.weight)
        else:
            moved, stay = self._swept(layer, form, of, gone)
        return stay.reshape(layer.weight.shape), moved.reshape(layer.weight.shape)

    def _swept(self, layer: Layer, form: Constraint, of: Matrix, gone: Tensor) -> tuple[Tensor, Tensor]:
        # A pattern runs along channels, a convolution's columns along its kernel first.
        kernel = layer.weight[0, 0].numel() if isinstance(form, Pattern) else 1
        columns = torch.arange(of.weight.shape[2], device=gone.device).reshape(-1, kernel).T.flatten()
        of, gone = sweeps.reordered(of, columns), gone[..., columns]
        assert of.gram is not None
        if isinstance(form, Pattern):
            moved, stay = sweeps.sweep(of.weight, of.gram, _runs(form, gone), block=form.m)
        else:
            assert isinstance(form, Mask)
            moved, stay = sweeps.sweep(of.weight, of.gram, _lowest(of, gone, form.kept))
        if self.refit:
            moved = sweeps.refit(of.weight, of.gram, stay, moved)
        back = columns.argsort()
        return moved[..., back], stay[..., back]

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        of, gone = _prepared(layer, seen)
        kept = [option.form.kept for option in options if isinstance(option.form, Mask)]
        if len(kept) == len(options) and self._exactly(of):
            costs = sweeps.orders(of, gone)[1].cummax(1).values.flatten().sort().values.cumsum(0)
            whole = 1.0 if of.gradients is not None else sweeps.output(of)
            return [float(costs[len(costs) - k - 1]) / whole if k < len(costs) else 0.0 for k in kept]
        places = sorted({round(i) for i in torch.linspace(0, len(options) - 1, SWEPT).tolist()}) if options else []
        found = replace(self, refit=False)
        known = super(OBS, found).losses(layer, [options[i] for i in places], seen)
        between = np.interp(range(len(options)), places, np.log(np.maximum(known, 1e-300)))
        return [float(value) for value in np.exp(between)]

    def _exactly(self, of: Matrix) -> bool:
        groups, outputs, width = of.weight.shape
        return groups * outputs * width**3 <= EXACT if self.exact is None else self.exact


def _prepared(layer: Layer, seen: Statistics | None) -> tuple[Matrix, Tensor]:
    """The layer as matrices, G damped, and which weights are worth nothing: zero already, or of an input that never is.

    Damping would have the latter matter; SparseGPT sets them to zero first, and so does this.
    """
    of = sweeps.of_layer(layer, seen)
    assert of.gram is not None
    inputs = of.gram.diagonal(dim1=1, dim2=2)
    dead = (inputs <= 1e-7 * inputs.mean(1, keepdim=True))[:, None]
    gone = (layer.weight.detach() == 0).reshape(of.weight.shape) | dead
    return replace(of, weight=of.weight.masked_fill(dead, 0), gram=sweeps.steady(of)), gone


def _alone(of: Matrix) -> Tensor:
    assert of.gram is not None
    pivots = sweeps.inverse(of.gram).diagonal(dim1=1, dim2=2)[:, None]
    return of.weight.square() / pivots * sweeps.row_weights(of)


def _lowest(of: Matrix, gone: Tensor, kept: int) -> Choose:
    """So many of each block's weights go as have a score, each alone, among the lowest of the layer.

    Which ones it is is seen when the block is reached. SparseGPT takes the same share of every block, though whole
    blocks of inputs may hardly ever be seen.
    """
    rows, size = sweeps.row_weights(of), gone.numel()
    going = torch.zeros(size, dtype=torch.bool, device=gone.device)
    going[_alone(of).masked_fill(gone, -1.0).flatten().argsort(stable=True)[: size - kept]] = True
    going = going.reshape(gone.shape)

    def choose(part: Tensor, pivots: Tensor, here: slice) -> Tensor:
        scores = (part / pivots[:, None]).square() * rows
        scores = scores.masked_fill(gone[..., here], -1.0).flatten()
        found = torch.zeros_like(scores, dtype=torch.bool)
        found[scores.argsort(stable=True)[: int(going[..., here].sum())]] = True
        return found.reshape(part.shape)

    return choose


def _runs(form: Pattern, gone: Tensor) -> Choose:
    """Of every m neighbours those that lose least."""

    def choose(part: Tensor, pivots: Tensor, here: slice) -> Tensor:
        scores = (part / pivots[:, None]).square().masked_fill(gone[..., here], -1.0)
        runs = scores.reshape(*scores.shape[:2], -1, form.m)
        lowest = runs.topk(form.m - form.n, largest=False).indices
        return torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, lowest, True).reshape(part.shape)

    return choose
