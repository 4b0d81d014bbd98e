"""GPTQ: column after column is rounded, and the columns behind make up for the error.

Frantar et al., GPTQ: Accurate post-training quantization for generative pre-trained transformers, 2023,
arxiv.org/abs/2210.17323; the same column sweep for convolutions as for Linear layers, group by group. What the sweep
leaves is taken up by coordinate descent (Behdin et al., QuantEase, 2023, arxiv.org/abs/2309.01885), which is monotone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from featherweight.curvature.gram import Statistics
from featherweight.curvature.rounding import descended, swept
from featherweight.curvature.sweeps import Matrix, steady
from featherweight.forms import Layer
from featherweight.quantize.rounding import Lattice, Rounding
from featherweight.search.options import Option
from featherweight.task import Task


@dataclass(frozen=True)
class GPTQ(Rounding):
    """Round weights column by column with feedback of the error; needs calibration data, without it rounds to nearest.

    Attributes:
        order: begin with the columns whose inputs are largest.
        damping: of the Gram matrix, as a share of its mean diagonal (the paper: 0.01); None for what the inputs that
            were seen call for: more, the fewer there are and the less they tell of each other.
        rounds: of coordinate descent afterwards, at most; 0 for the paper's own result.
    """

    order: bool = False
    damping: float | None = None
    rounds: int = 4

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if self.damping is not None and self.damping < 0:
            found.append(f"damping is {self.damping}: it is a share of the mean diagonal, 0 or more")
        return [*found, f"rounds is {self.rounds}: it must be at least 0"] if self.rounds < 0 else found

    def weighing(self, of: Matrix) -> Tensor | None:
        return None if of.gram is None else steady(of, self.damping)

    def rounded(self, of: Matrix, lattice: Lattice) -> Tensor:
        gram = cast(Tensor, self.weighing(of))
        found = swept(of.weight, gram, lattice.nearest, of.held, self.order)
        return descended(of.weight, found, gram, lattice.nearest, of.held, self.rounds) if self.rounds else found

    def drafted(self, of: Matrix, lattice: Lattice) -> Tensor:
        return replace(self, rounds=0).rounded(of, lattice)

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        quick = replace(self, rounds=0, ranges="mse" if self.ranges == "output" else self.ranges)
        return Rounding.losses(quick, layer, options, seen)  # near enough, and much faster
