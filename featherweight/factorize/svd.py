"""Weight SVD: a Linear as two thinner Linears, a convolution as 1×1 then k×k.

Plain (``data_aware=False``) it is the truncated SVD of the weight seen as (inputs, outputs · kernel), as in Xue et al.,
Restructuring of deep neural network acoustic models with singular value decomposition, Interspeech 2013, and in AIMET's
weight SVD. Data-aware, the error that is minimised is that of the layer's output on calibration data: inputs whitened
by the root of their Gram matrix, outputs weighed by the loss's gradients (Hsu et al., Language model compression with
weighted low-rank factorization, 2022, arxiv.org/abs/2207.00112, weigh rows; Wang et al., SVD-LLM, 2024,
arxiv.org/abs/2403.07378, whiten inputs), and each layer is fitted to the original's answers (Zhang et al., 2016).

Helps where Linear layers are wide, and where convolutions have far more channels than their rank. Of a strided
convolution the 1×1 factor runs at the input's resolution, so spatial SVD is usually the better choice there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from featherweight.factorize.factorization import Factorization
from featherweight.forms import Form, Layer, LowRank


@dataclass(frozen=True)
class SVD(Factorization):
    """Replace Linear and Conv layers by two of lower rank: inputs → rank → outputs."""

    def unfit(self, layer: Layer) -> str | None:
        return None

    def form(self, rank: int) -> Form:
        return LowRank(rank)

    def first_axes(self, layer: Layer) -> Collection[int]:
        return ()
