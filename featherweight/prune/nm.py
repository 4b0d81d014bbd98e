"""N:M sparsity: of every M neighbouring inputs N weights stay, a pattern that hardware multiplies by in less time.

Zhou et al., Learning N:M fine-grained structured sparse neural networks from scratch, 2021, arxiv.org/abs/2102.04010;
Mishra et al., Accelerating sparse deep neural networks (2:4 by magnitude, then training again), 2021,
arxiv.org/abs/2104.08378. Of a convolution the inputs are its channels, at each place of the kernel.

`prune.OBS` and `prune.Wanda` take ``n`` and ``m`` too, and lose less without training. NVIDIA's sparse tensor cores
know 2:4; a pattern of blocks suits kernels that skip whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from featherweight.curvature.gram import Statistics
from featherweight.forms import Constraint, Layer, Pattern
from featherweight.prune.magnitude import magnitude
from featherweight.prune.sparsity import Sparsity
from featherweight.task import Task


@dataclass(frozen=True)
class NM(Sparsity):
    """Keep N of every M neighbouring weights, or blocks of weights, along the inputs; under a budget N is chosen.

    Attributes:
        block: (outputs, inputs) of what stays or goes together.
        score: ``"l1"``, ``"l2"`` (which differ for blocks alone) or ``"random"``.
    """

    block: tuple[int, int] = (1, 1)
    score: Literal["l1", "l2", "random"] = "l1"

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if isinstance(self.block, tuple) and (len(self.block) != 2 or min(self.block, default=0) < 1):
            found.append(f"block is {self.block}: it is (outputs, inputs), each at least 1")
        return found

    def unfit(self, layer: Layer) -> str | None:
        return super().unfit(layer) or self.pattern(1).reason_against(layer.weight.shape)

    def pattern(self, n: int) -> Pattern:
        return Pattern(n, self.m, self.block)

    def offered(self, layer: Layer) -> list[Constraint]:
        return [] if self.n is not None else [self.pattern(n) for n in range(1, self.m)]

    def scores(self, layer: Layer, seen: Statistics | None) -> Tensor:
        return magnitude(layer, self.score)
