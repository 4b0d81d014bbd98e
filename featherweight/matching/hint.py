"""Hints: the student's features, adapted in width, are to be the teacher's.

Romero et al., FitNets: hints for thin deep nets, 2015, arxiv.org/abs/1412.6550.
"""

from __future__ import annotations

from torch import Tensor


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error as a share of the teacher's mean square about its mean, so that all layers weigh alike.

    Args:
        student, teacher: of one shape, (samples, ...).
    """
    size = (teacher - teacher.mean(0, keepdim=True)) if len(teacher) > 1 else teacher
    return (student - teacher).square().mean() / size.square().mean().clamp_min(1e-12)
