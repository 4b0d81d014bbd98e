"""Relations between samples: how far apart they lie, and what angles they span.

Park et al., Relational knowledge distillation, 2019, arxiv.org/abs/1904.05068.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss of the distances between all pairs of samples, each network's as shares of their mean.

    Args:
        student, teacher: (samples, any width of its own).
    """
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss of the cosines of all angles that three samples span: their number is samples³.

    Args:
        student, teacher: (samples, any width of its own).
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _distances(x: Tensor) -> Tensor:
    """Between all pairs, as shares of the mean of those between different samples: (samples, samples)."""
    squares = x.square().sum(1)
    # Not torch.cdist, whose gradient at a distance of 0 is none; 1e-12 keeps that of a root finite.
    far = (squares[:, None] + squares - 2 * x @ x.T).clamp_min(1e-12).sqrt()
    far = far * (1 - torch.eye(len(x), device=x.device, dtype=x.dtype))
    return far / (far.sum() / max(1, len(x) * (len(x) - 1))).clamp_min(1e-12)


def _cosines(x: Tensor) -> Tensor:
    """Of the angle at the middle sample of every three: (samples, samples, samples)."""
    sides = F.normalize(x[None] - x[:, None], dim=2)  # (from, to, width)
    return sides @ sides.transpose(1, 2)
