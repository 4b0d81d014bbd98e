"""Damping, roots, inverses and least squares of Gram matrices: the second-order mathematics every technique calls.

All functions are pure, take matrices or stacks of them (leading dimensions are groups), and work in float64, where a
Gram matrix may be far worse conditioned than float32 could resolve.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean diagonal: directions that the data never excites leave the matrix singular (Frantar et al., GPTQ, 2023,
# section 3.3, uses 0.01; a root needs less than an inverse does).
DAMPING = 1e-4


def damp(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """``gram + damping · mean(diag) · I`` in float64, symmetrised; the identity where the gram is all zero.

    Args:
        gram: (..., d, d), positive semidefinite up to rounding.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    gram = _double(gram)
    gram = (gram + gram.transpose(-1, -2)).div_(2)  # a new tensor, worked on in place: these matrices are large
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, damping * mean, 1))
    return gram


def root(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """The lower Cholesky factor L of the damped gram, ``L Lᵀ = gram``: (..., d, d).

    Damping grows tenfold until the factorization succeeds, so rounding errors never stop it.

    Raises:
        ValueError: the gram holds NaN or infinite values, for which it never would.
    """
    if not bool(torch.isfinite(gram.sum(dtype=torch.float64))):
        raise ValueError("a Gram matrix holds NaN or infinite values")
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damp(gram, damping))
        if not bool(failed.any()):
            return factor
        damping *= 10


def least_squares(gram: Tensor, cross: Tensor, ridge: float = 0.0, prior: Tensor | None = None) -> Tensor:
    """The W that minimises ``E‖y − W x‖²`` from second moments, with a ridge towards a prior.

    Solves ``W (G + ρ I) = C + ρ W₀`` with ``ρ = ridge · mean(diag G)``. A ridge towards the solution that is there
    already keeps a refit from fitting noise where samples are few.

    Args:
        gram: G = E[x xᵀ], (..., d, d).
        cross: C = E[y xᵀ], (..., outputs, d).
        ridge: share of the mean diagonal; DAMPING at least.
        prior: W₀, (..., outputs, d); zero by default.
    Returns:
        W, (..., outputs, d), in float64.
    """
    gram, cross = _double(gram), _double(cross)
    start = torch.zeros_like(cross) if prior is None else _double(prior)
    # Solved for the step away from the prior: where the data says nothing there is none, however much damping it takes.
    step = torch.cholesky_solve((cross - start @ gram).transpose(-1, -2), root(gram, max(ridge, DAMPING)))
    return start + step.transpose(-1, -2)


def _double(x: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has no such type."""
    return x.detach().cpu().double() if x.device.type == "mps" else x.detach().double()
