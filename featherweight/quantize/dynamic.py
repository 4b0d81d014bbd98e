"""Dynamic quantization: weights are whole numbers beforehand, activations at every call, in that call's own range.

As described at onnxruntime.ai/docs/performance/model-optimizations/quantization.html. No data is needed. It pays where
reading weights is what takes the time, as in the Linear layers of transformers on short inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from featherweight.edits import Edit, Quantize
from featherweight.forms import Rounding
from featherweight.graph import ModelGraph
from featherweight.quantize.activations import Activations, leave
from featherweight.quantize.placement import place
from featherweight.quantize.targets import Target
from featherweight.study import Study


@dataclass(frozen=True)
class Dynamic(Activations):
    """Round weights of Linear layers beforehand and what reaches them at every call; nothing is calibrated or trained.

    The range of an activation is that of the whole batch, so an answer depends a little on what else is in its batch.
    Activations have 8 bits and a zero point, for that is all that runtimes find at a call.
    """

    def runtime(self) -> Target:
        """The target, in which only Linear layers find their ranges at every call."""
        return replace(super().runtime(), layers=("linear",), between=(), rounded_results=(), signed=False)

    def rounded(self, study: Study, graph: ModelGraph) -> Iterator[Edit]:
        """Place, round."""
        placement = place(graph, self.runtime(), self.refused)
        left = {
            name: reason.replace("no integer kernel for", "no kernel that finds its range at every call for")
            for name, reason in self.reasons(study, placement).items()
        }
        yield from leave(left)
        rounding = Rounding(8, dynamic=True)
        edges = {
            name: (rounding, None if edge.readers is None else tuple(sorted(edge.readers)))
            for name, edge in placement.edges.items()
        }
        if edges:
            yield Quantize(edges)
        yield from self.weights(study, placement, {})
