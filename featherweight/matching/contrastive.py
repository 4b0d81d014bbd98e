"""Contrastive representation distillation: tell the teacher's view of a sample from its views of others.

Tian, Krishnan & Isola, Contrastive representation distillation, 2020, arxiv.org/abs/1910.10699.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Noise-contrastive loss: every sample's pair is real, its pairs with the other samples' teachers are not.

    The critic is ``h = r / (r + N)``, r the likeness ``exp(s · t / τ)`` as a share of the mean likeness (the paper's
    Z), N the number of others. The paper keeps the others in a memory of the whole data set; here they are the
    batch's, so that nothing needs to know which sample is which. It is not 0 for equal networks: it bounds what one
    tells of the other.

    Args:
        student, teacher: embeddings of one width, (samples, width).
        temperature: τ.
    """
    s, t = (F.normalize(x, dim=1) for x in (student, teacher))
    likeness = (s @ t.T / temperature).exp()
    share = likeness / likeness.mean().detach()
    others = max(1, len(s) - 1)
    same = torch.eye(len(s), device=s.device, dtype=torch.bool)
    real = (share / (share + others))[same].log()
    false = (others / (share + others)).log().masked_fill(same, 0.0).sum(1)
    return -(real + false).mean()
