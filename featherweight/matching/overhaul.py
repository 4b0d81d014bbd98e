"""The overhaul of feature distillation: before the ReLU, with a margin, and blind where both are cut off anyway.

Heo et al., A comprehensive overhaul of feature distillation, 2019, arxiv.org/abs/1904.01866.
"""

from __future__ import annotations

import torch
from torch import Tensor


def margin(teacher: Tensor) -> Tensor:
    """Every channel's mean over its negative values: (samples, *positions, channels) → (channels,).

    0 where it has none. The paper finds it from batch norms; here it is measured, so that none are needed.
    """
    flat = teacher.flatten(0, -2)
    negative = flat.clamp_max(0)
    return negative.sum(0) / (flat < 0).sum(0).clamp_min(1)


def overhaul(student: Tensor, teacher: Tensor, margins: Tensor) -> Tensor:
    """The partial squared distance to ``max(t, margin)``, as a share of its mean square.

    Where the teacher is not positive and the student below it, the ReLU behind makes both alike: no loss.

    Args:
        student, teacher: before the ReLU, (samples, *positions, channels).
        margins: of the channels, as `margin` gives them.
    """
    wanted = torch.maximum(teacher, margins)
    blind = (student <= wanted) & (wanted <= 0)
    error = (student - wanted).square().masked_fill(blind, 0.0)
    return error.mean() / wanted.square().mean().clamp_min(1e-12)
