"""Wanda: of every output's weights those with the smallest |weight| · ‖input‖ go, and no other moves.

Sun et al., A simple and effective pruning approach for large language models, 2023, section 3,
arxiv.org/abs/2306.11695. Inputs are what reaches a layer after the layers before it were pruned, as there.

Costs one pass over a few samples. OBS, which moves the weights that stay, loses less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.curvature.gram import Statistics
from featherweight.forms import Constraint, Layer, Mask
from featherweight.prune.sparsity import Unstructured, keep


@dataclass(frozen=True)
class Wanda(Unstructured):
    """Zero weights by magnitude times the norm of their input, output by output."""

    needs_data: ClassVar[bool] = True

    def scores(self, layer: Layer, seen: Statistics | None) -> Tensor:
        assert seen is not None
        weight = layer.weight.detach().double()
        norms = seen.gram.diagonal(dim1=1, dim2=2).double().clamp_min(0).sqrt()[:, None]
        rows = weight.abs().reshape(len(norms), -1, norms.shape[2])
        return (rows * norms).reshape(weight.shape)

    def pruned(self, layer: Layer, form: Constraint, seen: Statistics | None) -> tuple[Tensor, Tensor | None]:
        scores = self.scores(layer, seen)
        if isinstance(form, Mask):
            return best_of_rows(scores.flatten(1), form.kept).reshape(scores.shape), None
        return keep(scores, form), None


def best_of_rows(scores: Tensor, kept: int) -> Tensor:
    """As many of the highest scores in every row, and where rows cannot share alike, the best of the next.

    Args:
        scores: (rows, columns).
        kept: how many in all.
    Returns:
        (rows, columns), bool.
    """
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    each, more = divmod(kept, len(scores))
    stay = rank < each
    if more:
        following = scores.masked_fill(rank != each, -torch.inf).flatten()
        stay.view(-1)[following.topk(more).indices] = True
    return stay
