"""Soft targets: the student's softened distribution against the teacher's.

Hinton, Vinyals & Dean, Distilling the knowledge in a neural network, 2015, arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

from torch import Tensor


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T² KL(softmax(t / T) ‖ softmax(s / T))``, in nats; T² keeps gradients as large as those at T = 1.

    Args:
        student, teacher: logits, (samples, classes).
        temperature: T; the higher, the more the wrong classes count.
    """
    right, given = ((logits / temperature).log_softmax(1) for logits in (teacher, student))
    return (right.exp() * (right - given)).sum(1).mean() * temperature**2
