"""Binary and ternary weights: a sign, or a sign and zero, times a scale.

Rastegari et al., XNOR-Net, 2016, arxiv.org/abs/1603.05279; Li et al., Ternary weight networks, 2016,
arxiv.org/abs/1605.04711. The scale is the least-squares fit under the Gram matrix of the layer's inputs, of which the
papers' means of magnitudes are the case without data. Few networks survive this untrained: give `epochs`, and the
task's own training goes on with straight-through gradients. First and last layers are usually left alone: name them in
`ignore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featherweight.curvature.rounding import Matrix
from featherweight.layers import PerLayer
from featherweight.quantize.gptq import GPTQ
from featherweight.quantize.rounding import Lattice, Rounding


@dataclass(frozen=True)
class _Few(Rounding):
    def ways(self) -> dict[str, Any]:
        given = super().ways()
        chosen = given["budget"] is not None or given["select"] is not None
        return {**given, "bits": None if chosen else self.bits}

    def rounded(self, of: Matrix, lattice: Lattice) -> Tensor:
        return GPTQ().rounded(of, lattice)


@dataclass(frozen=True)
class Binary(_Few):
    """Weights of one bit; trained on with straight-through gradients where `epochs` is given.

    Attributes:
        bits: 1, or per layer where it is a mapping; other bits are allowed there.
        offer: the bits among which a budget chooses.
    """

    bits: PerLayer[int | str] | None = 1
    offer: tuple[int | str, ...] = (8, 4, 2, 1)


@dataclass(frozen=True)
class Ternary(_Few):
    """Weights of three values; trained on with straight-through gradients where `epochs` is given.

    Attributes:
        bits: ``"ternary"``, or per layer where it is a mapping; other bits are allowed there.
        offer: the bits among which a budget chooses.
    """

    bits: PerLayer[int | str] | None = "ternary"
    offer: tuple[int | str, ...] = (8, 4, 2, "ternary")
