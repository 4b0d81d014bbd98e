"""Decoupled distillation: what the teacher says of the right class, and apart from it what of the others.

Zhao et al., Decoupled knowledge distillation, 2022, arxiv.org/abs/2203.08679.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """``T² (α TCKD + β NCKD)``: the divergence of right against wrong, and that among the wrong classes.

    In plain distillation the second is weighed by the teacher's doubt, so that of sure teachers least is learned.

    Args:
        student, teacher: logits, (samples, classes).
        labels: the right classes, (samples,), whole numbers.
        temperature: T.
        alpha: weight of the target class's part.
        beta: weight of the other classes' part.
    """
    right = torch.nn.functional.one_hot(labels, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = (logits / temperature).log_softmax(1)
        others = logs[~right].reshape(len(logs), -1)
        binary = torch.stack((logs[right], others.logsumexp(1)), 1)
        return binary, others.log_softmax(1)

    total = student.new_zeros(())
    for weight, t, s in zip((alpha, beta), parts(teacher), parts(student), strict=True):
        total = total + weight * (t.exp() * (t - s)).sum(1).mean()
    return total * temperature**2
