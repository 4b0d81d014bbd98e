"""Correlation congruence: the samples' correlations under a kernel.

Peng et al., Correlation congruence for knowledge distillation, 2019, arxiv.org/abs/1904.01802.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> Tensor:
    """The mean over samples of the squared distance of their rows of correlations, under the Gaussian kernel.

    The paper expands the kernel into a series of powers; a batch is small enough to have it exactly.

    Args:
        student, teacher: (samples, any width of its own).
        gamma: the kernel is ``exp(−γ ‖a − b‖²)`` of the normalized vectors.
    """
    s, t = ((2 * gamma * (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T - 1)).exp() for x in (student, teacher))
    return (s - t).square().sum(1).mean()
