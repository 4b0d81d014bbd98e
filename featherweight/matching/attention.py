"""Attention transfer: where the network looks, whatever its width.

Zagoruyko & Komodakis, Paying more attention to attention, 2017, arxiv.org/abs/1612.03928.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention_map(features: Tensor) -> Tensor:
    """How strong the features are at every position: (samples, *positions, channels) → (samples, positions).

    Normalized; the sum of squares over the channels, which the paper found best.
    """
    return F.normalize(features.square().sum(-1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance of both maps.

    Args:
        student, teacher: (samples, *positions, channels), with the same positions.
    """
    return (attention_map(student) - attention_map(teacher)).square().sum(1).mean()
