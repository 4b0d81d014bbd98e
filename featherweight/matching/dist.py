"""DIST: not the teacher's probabilities but their order: correlations over the classes and over the samples.

Huang et al., Knowledge distillation from a stronger teacher, 2022, arxiv.org/abs/2205.10536.
"""

from __future__ import annotations

from torch import Tensor


def relation_of_classes(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, beta: float = 2.0, gamma: float = 2.0
) -> Tensor:
    """``T² (β (1 − ρ over the classes of a sample) + γ (1 − ρ over the samples of a class))``, ρ Pearson's correlation.

    Args:
        student, teacher: logits, (samples, classes).
        temperature: T of the softmax before.
        beta: weight of the relation between classes.
        gamma: weight of the relation within a class; nothing is learned from it where there is one sample.
    """
    s, t = ((logits / temperature).softmax(1) for logits in (student, teacher))
    between = 1 - _correlation(s, t).mean()
    within = 1 - _correlation(s.T, t.T).mean() if len(s) > 1 else s.new_zeros(())
    total: Tensor = temperature**2 * (beta * between + gamma * within)
    return total


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, row by row: (rows, n) → (rows,)."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    lengths = a.square().sum(1).clamp_min(1e-16).sqrt() * b.square().sum(1).clamp_min(1e-16).sqrt()
    return (a * b).sum(1) / lengths
