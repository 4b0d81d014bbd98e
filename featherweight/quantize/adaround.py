"""AdaRound: whether each weight is rounded up or down is learnt, so that the layer's output moves least.

Nagel et al., Up or down? Adaptive rounding for post-training quantization, 2020, arxiv.org/abs/2004.10568. The layer's
error, in which the paper takes batches, is taken in closed form from the Gram matrix of its inputs; with asymmetric
fitting the target is the original's answer to the uncompressed input, as in its equation 25, without the activation.
What is learned is up or down; coordinate descent (Behdin et al., QuantEase, 2023, arxiv.org/abs/2309.01885) then moves
values further where that lowers the error, which it never raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from featherweight.curvature.gram import Statistics
from featherweight.curvature.rounding import adarounded, descended
from featherweight.curvature.sweeps import Matrix, steady
from featherweight.forms import Layer
from featherweight.quantize.gptq import GPTQ
from featherweight.quantize.rounding import Lattice, Rounding, TwoValues
from featherweight.search.options import Option
from featherweight.task import Task


@dataclass(frozen=True)
class AdaRound(Rounding):
    """Learn the rounding of weights layer by layer; needs calibration data, without it rounds to nearest.

    Attributes:
        steps: of gradient descent for every layer.
        rounds: of coordinate descent afterwards, at most; 0 for the paper's own result.
    """

    steps: int = 1000
    rounds: int = 4

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if self.rounds < 0:
            found.append(f"rounds is {self.rounds}: it must be at least 0")
        return [*found, f"steps is {self.steps}: it must be at least 1"] if self.steps < 1 else found

    def rounded(self, of: Matrix, lattice: Lattice) -> Tensor:
        if isinstance(lattice, TwoValues):  # there is no up and down
            return GPTQ().rounded(of, lattice)
        gram, (scale, shift, low, high) = steady(of), (lattice.scale, lattice.zero_point, lattice.low, lattice.high)
        found = adarounded(of.weight, gram, scale, shift, low, high, of.held, self.steps)
        return descended(of.weight, found, gram, lattice.nearest, of.held, self.rounds)

    def drafted(self, of: Matrix, lattice: Lattice) -> Tensor:
        return GPTQ().drafted(of, lattice)

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        # Learning for every option would take too long: a sweep ends nearly as low.
        return GPTQ(data_aware=self.data_aware, ranges=self.ranges).losses(layer, options, seen)
