"""Similarity preserving: what the teacher finds alike, the student should.

Tung & Mori, Similarity-preserving knowledge distillation, 2019, arxiv.org/abs/1907.09682.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over samples of the squared distance of their rows of similarities.

    Args:
        student, teacher: (samples, any width of its own).
    """
    s, t = (F.normalize(x @ x.T, dim=1) for x in (student, teacher))
    return (s - t).square().sum(1).mean()
