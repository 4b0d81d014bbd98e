"""What every technique that puts a cheaper layer in a layer's place has in common: how much of it to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from featherweight.cost.cost import Cost
from featherweight.layers import PerLayer, for_layer
from featherweight.layerwise import Layerwise
from featherweight.search.optimal import rounded_up
from featherweight.search.options import Option
from featherweight.step import Stage
from featherweight.task import Task


@dataclass(frozen=True)
class Replacing(Layerwise):
    """A layer replaced by a cheaper one.

    Attributes:
        ratio: the share of a layer's MACs to keep, 0 to 1, instead of a budget; per layer where it is a mapping.
    """

    ratio: PerLayer[float] | None = None

    stage: ClassVar[Stage] = Stage.SHAPE

    def ways(self) -> dict[str, Any]:
        return {"budget": self.budget, "ratio": self.ratio, **super().ways()}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        for value in self.ratio.values() if isinstance(self.ratio, Mapping) else [self.ratio]:
            if isinstance(value, int | float) and not 0 < value <= 1:
                found.append(f"ratio is {value}: it is the share of a layer's MACs to keep, above 0 and at most 1")
        return found

    def decided(self, name: str, options: Sequence[Option], whole: Cost) -> Option | None:
        assert self.ratio is not None
        ratio = for_layer(self.ratio, name, default=1.0)
        if ratio == 1:
            return None
        found = [o for o in options if o.cost.macs <= ratio * whole.macs]
        if not found:
            least = min(o.cost.macs for o in options) / whole.macs
            raise LookupError(f"no option keeps as little as {ratio:g} of its MACs: the least is {rounded_up(least):g}")
        return max(found, key=lambda o: o.cost.macs)
