"""Binary and ternary weights: a sign, or a sign and zero, times a scale.

Rastegari et al., XNOR-Net, 2016, arxiv.org/abs/1603.05279; Li et al., Ternary weight networks, 2016,
arxiv.org/abs/1605.04711. The scale is the least-squares fit under the Gram matrix of the layer's inputs, of which the
papers' means of magnitudes are the case without data. Few networks survive this untrained: give `epochs`, and the
task's own training goes on with straight-through gradients. First and last layers are usually left alone: name them in
`ignore`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from featherweight.curvature.sweeps import Matrix
from featherweight.edits import Edit, Leave, Replace
from featherweight.forms import Layer, Projection, SignedInput
from featherweight.layers import PerLayer
from featherweight.quantize.gptq import GPTQ
from featherweight.quantize.rounding import Lattice, Rounding
from featherweight.search.options import Plan
from featherweight.study import Study


@dataclass(frozen=True)
class _Few(Rounding):
    """What two values and three have in common.

    Attributes:
        activations: give the layers the signs of their inputs, times the mean of each sample's magnitudes, as well.
    """

    activations: bool = False

    def ways(self) -> dict[str, Any]:
        given = super().ways()
        chosen = given["budget"] is not None or given["select"] is not None
        return {**given, "bits": None if chosen else self.bits}

    def rounded(self, of: Matrix, lattice: Lattice) -> Tensor:
        return GPTQ().rounded(of, lattice)

    def unfit(self, layer: Layer) -> str | None:
        if self.activations and isinstance(layer, Projection | NonDynamicallyQuantizableLinear):
            return "attention multiplies by it and calls no layer whose inputs could become signs"
        return super().unfit(layer)

    def edits(self, study: Study) -> Iterator[Edit]:
        """Round layer after layer; where inputs become signs too, those first, since weights are fitted to them."""
        if not self.activations:
            yield from super().edits(study)
            return
        bench = self._bench(study)
        choosing = self.choose(bench)
        plan = choosing.plan
        for name in plan.layers:
            values = {f"layer.{key}": value for key, value in bench.layers[name].state_dict().items()}
            yield Replace(name, SignedInput(), values)
        inside = Plan(self.name, {f"{name}.layer": form for name, form in plan.layers.items()})
        step = replace(self, activations=False, bits=None, budget=None, select=inside)
        left = {name: reason for name, reason in bench.left.items() if name not in plan.layers}
        for edit in step.edits(study.again()):
            yield replace(edit, reason=left.get(edit.layer, edit.reason)) if isinstance(edit, Leave) else edit
        bench.record(choosing)  # by the names that the layers had


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
