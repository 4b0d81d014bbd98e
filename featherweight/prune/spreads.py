"""How many weights stay in each layer when a share of all of them goes: pure functions of scores and shapes.

Each returns, layer by layer, how many stay. What the curvature says is best is the optimal selector's, and not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(sizes: Sequence[int], share: float) -> list[int]:
    """The same share goes from every layer; at least one weight stays.

    Args:
        sizes: weights by layer.
        share: that goes, 0 to below 1.
    """
    return [max(1, round(size * (1 - share))) for size in sizes]


def over_all(scores: Sequence[Tensor], share: float) -> list[int]:
    """The weights of lowest score go, wherever they are; a layer may be left with none.

    Args:
        scores: by layer, of any shapes.
        share: of all weights that goes.
    """
    flat = torch.cat([s.flatten().double() for s in scores])
    stay = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    stay[flat.topk(max(1, round(len(flat) * (1 - share)))).indices] = True
    return [int(part.sum()) for part in torch.split(stay, [s.numel() for s in scores])]


def erk(shapes: Sequence[Sequence[int]], share: float) -> list[int]:
    """Densities in proportion to (outputs + inputs + kernel sides) / weights: the wider a layer, the sparser.

    Evci et al., Rigging the lottery (Erdős–Rényi kernels), 2020, section 3 (1), arxiv.org/abs/1911.11134. Layers that
    would be denser than dense stay dense, and the others take the rest.

    Args:
        shapes: of the weights, (outputs, inputs, *kernel).
        share: of all weights that goes.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        room = (1 - share) * sum(sizes) - sum(sizes[i] for i in dense)
        others = [i for i in range(len(sizes)) if i not in dense]
        scale = room / sum(raw[i] * sizes[i] for i in others) if others else 0.0
        over = {i for i in others if scale * raw[i] > 1}
        if not over:
            return [size if i in dense else max(1, round(scale * raw[i] * size)) for i, size in enumerate(sizes)]
        dense |= over


def lamp(weights: Sequence[Tensor], share: float) -> list[int]:
    """Global pruning by w² over the sum of the squares that are no smaller in its layer: no layer is left with none.

    Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021, equation 4, arxiv.org/abs/2010.07611.

    Args:
        weights: by layer, of any shapes.
        share: of all weights that goes.
    """
    scores = []
    for weight in weights:
        squares, order = weight.flatten().double().square().sort()
        rest = squares.flip(0).cumsum(0).flip(0)
        scores.append(torch.zeros_like(squares).scatter_(0, order, squares / rest.clamp_min(1e-300)))
    return over_all(scores, share)
