"""What all pruning of single weights has in common: how many stay in each layer, in which pattern, and the mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from featherweight.cost.confined import confined
from featherweight.cost.cost import Cost
from featherweight.cost.count import LayerCall, price
from featherweight.curvature import sweeps
from featherweight.curvature.gram import Statistics
from featherweight.errors import RecipeError
from featherweight.forms import (
    BlockMask,
    Constraint,
    Form,
    Layer,
    Mask,
    Masked,
    Pattern,
    beneath,
    constraints_on,
    in_blocks,
    in_runs,
    out_of_blocks,
)
from featherweight.layers import PerLayer, for_layer, layer_names, matches, settled
from featherweight.layerwise import Bench, Layerwise
from featherweight.mend import corrected_bias
from featherweight.prune import spreads
from featherweight.search.budget import Budget
from featherweight.search.optimal import within
from featherweight.search.options import Choosing, Option, Plan
from featherweight.step import Stage
from featherweight.study import Study
from featherweight.task import Task

Spread = Literal["uniform", "global", "erk", "lamp", "optimal"]
# From one option of a layer to the next sparser one, where there is a choice and where they are for the record alone;
# and the sparsest: two in a thousand weights stay.
FEWER, FEWER_SHOWN, SPARSEST = 0.85, 0.5, 0.002


@dataclass(frozen=True)
class Sparsity(Layerwise):
    """Some of the weights of Linear and Conv layers are held at zero.

    Attributes:
        n: of every `m` neighbouring inputs so many weights stay; per layer where it is a mapping.
        m: of how many.
    """

    n: PerLayer[int] | None = None
    m: int = 4

    stage: ClassVar[Stage] = Stage.MASK
    inside_forms: ClassVar[bool] = True
    metric: ClassVar[str] = "params"
    # Whether the technique cannot do without calibration data.
    needs_data: ClassVar[bool] = False

    # What a technique says ------------------------------------------------------------------------------------------

    @abstractmethod
    def scores(self, layer: Layer, seen: Statistics | None) -> Tensor:
        """What each weight is worth, of the weight's shape; weights of low score go."""

    def pruned(self, layer: Layer, form: Constraint, seen: Statistics | None) -> tuple[Tensor, Tensor | None]:
        """Which weights stay, and the weight where others have moved; both of the weight's shape."""
        return keep(self.scores(layer, seen), form), None

    @abstractmethod
    def offered(self, layer: Layer) -> list[Constraint]:
        """What a layer can become under a budget."""

    def asked(self, bench: Bench) -> dict[str, Form]:
        """What the settings spell out, by layer.

        Raises:
            RecipeError: a layer would be left without any weight.
        """
        assert self.n is not None
        kept = {name: for_layer(self.n, name, default=self.m) for name in bench.layers}
        return {name: self.pattern(n) for name, n in kept.items() if n < self.m}

    def pattern(self, n: int) -> Pattern:
        """The form that keeps `n` of every `m`."""
        return Pattern(n, self.m)

    # Settings -------------------------------------------------------------------------------------------------------

    def ways(self) -> dict[str, Any]:
        return {"budget": self.budget, "n": self.n, **super().ways()}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if isinstance(self.m, int) and self.m < 2:
            found.append(f"m is {self.m}: n of every m stay, so it is at least 2")
        for value in self.n.values() if isinstance(self.n, Mapping) else [self.n]:
            if isinstance(value, int) and isinstance(self.m, int) and not 1 <= value <= self.m:
                found.append(f"n is {value}: of every {self.m} at least 1 and at most {self.m} stay")
        some = any(not matches(name, self.ignore) for name in layer_names(model, inside=True))
        if some and self.needs_data and (not task.has_calibration or self.data_aware is False):
            found.append("it looks at what goes into every layer: give Task(calibration=...), and not data_aware=False")
        return found

    # Choosing -------------------------------------------------------------------------------------------------------

    def unfit(self, layer: Layer) -> str | None:
        if (reason := settled(layer)) is not None or self.n is None:
            return reason
        return self.pattern(1).reason_against(layer.weight.shape)

    def priced(self, name: str, layer: Layer, calls: Sequence[LayerCall]) -> list[Option]:
        whole = price(layer, calls)
        forms = dict.fromkeys(self.offered(layer))
        planned = self.plan.layers.get(name) if self.plan is not None else None
        if isinstance(planned, Constraint):
            forms[planned] = None
        options = [Option(name, form, confined(whole, layer, form), 0.0) for form in forms]
        return sorted(options, key=lambda option: option.cost.params)

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        of = sweeps.of_layer(layer, seen)
        found = []
        for option in options:
            stay, moved = self.pruned(layer, cast(Constraint, option.form), seen)
            weight = layer.weight.detach() if moved is None else moved
            found.append(sweeps.loss(of, (weight * stay).double().reshape(of.weight.shape)))
        return found

    def decided(self, name: str, options: Sequence[Option], whole: Cost) -> Option | None:
        """Nothing: what the settings spell out is looked at for all layers at once, by `asked`."""
        return None

    def choose(self, bench: Bench) -> Choosing:
        if self.plan is not None or self.budget is not None:
            return super().choose(bench)
        forms = self.asked(bench)
        for name, form in forms.items():
            bench.offer(name, cast(Constraint, form))
        return Choosing(Plan(self.name, forms), "manual", self.metric)

    def check(self, study: Study) -> None:
        super().check(study)
        if self.plan is None and self.budget is None:
            self.asked(self._bench(study))

    # Fitting --------------------------------------------------------------------------------------------------------

    def values(self, layer: Layer, form: Form, seen: Statistics | None) -> Mapping[str, Tensor]:
        form = cast(Constraint, form)
        stay, moved = self.pruned(layer, form, seen)
        built = cast(Layer, form.build(layer))
        with torch.no_grad():
            cast(Masked, constraints_on(built)[-1]).mask.copy_(stay)
            # Zero beneath the mask too: files hold no more than what is kept.
            beneath(built).copy_(((layer.weight if moved is None else moved) * stay).to(layer.weight.dtype))
            if moved is not None and layer.bias is not None and built.bias is not None and seen is not None:
                built.bias.copy_(corrected_bias(layer.weight, layer.bias, built.weight, seen))
        return built.state_dict()


@dataclass(frozen=True)
class Unstructured(Sparsity):
    """Any weights may go.

    Attributes:
        sparsity: the share of weights that goes, 0 to below 1, instead of a budget; per layer where it is a mapping.
        spread: how one share is laid over the layers: ``"uniform"`` (the same in all), ``"global"`` (the lowest scores
            wherever they are), ``"erk"`` (by shape), ``"lamp"`` (by magnitudes, each layer normalised) or
            ``"optimal"`` (least predicted loss, from the curvature).
    """

    sparsity: PerLayer[float] | None = None
    spread: Spread = "uniform"

    def form(self, layer: Layer, kept: int) -> Constraint:
        """The form in which so many of a layer's weights stay."""
        return Mask(kept)

    def ways(self) -> dict[str, Any]:
        return {"budget": self.budget, "sparsity": self.sparsity, **super().ways()}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        for value in self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]:
            if isinstance(value, int | float) and not 0 <= value < 1:
                found.append(f"sparsity is {value}: it is the share of weights that goes, from 0 to below 1")
        if self.spread != "uniform" and (isinstance(self.sparsity, Mapping) or self.sparsity is None):
            found.append(f"spread={self.spread!r} lays one share over all layers: give sparsity= as one number")
        return found

    def offered(self, layer: Layer) -> list[Constraint]:
        if self.n is not None:
            return []
        now, size = int(layer.weight.detach().count_nonzero()), layer.weight.numel()
        fewer = FEWER if self.budget is not None or self.spread == "optimal" else FEWER_SHOWN
        kept, found = fewer * now, list[Constraint]()
        while round(kept) >= max(1.0, SPARSEST * size):
            found.append(self.form(layer, round(kept)))
            kept *= fewer
        return found

    def choose(self, bench: Bench) -> Choosing:
        if self.spread == "optimal" and self.plan is None:
            weights = sum(layer.weight.numel() for layer in bench.layers.values())
            stored = sum(int(layer.weight.detach().count_nonzero()) for layer in bench.layers.values())
            kept = round(weights * (1 - cast(float, self.sparsity)))
            limit = Budget(params=max(1, bench.prices.now.params - stored + kept))
            plan, notes = within(bench.table, limit, self.name)
            return Choosing(plan, "optimal", self.metric, notes=notes)
        return super().choose(bench)

    def asked(self, bench: Bench) -> dict[str, Form]:
        if self.n is not None:
            return super().asked(bench)
        forms: dict[str, Form] = {}
        if self.spread == "optimal":
            return forms
        for name, kept in self.counts(bench).items():
            layer = bench.layers[name]
            if not kept:
                reason = f"nothing would be left of {name!r}: let less go, or ignore=({name!r},) it"
                raise RecipeError([f"{self.name}: {reason}"])
            if kept < int(layer.weight.detach().count_nonzero()):
                forms[name] = self.form(layer, kept)
            elif kept < layer.weight.numel():
                bench.left[name] = "as many of its weights are zero already"
        return forms

    def counts(self, bench: Bench) -> dict[str, int]:
        """How many weights stay in each layer that can be pruned."""
        names, layers = list(bench.layers), list(bench.layers.values())
        if not names:
            return {}
        assert self.sparsity is not None
        if isinstance(self.sparsity, Mapping) or self.spread == "uniform":
            shares = [for_layer(self.sparsity, name, default=0.0) for name in names]
            kept = [spreads.uniform([layer.weight.numel()], s)[0] for layer, s in zip(layers, shares, strict=True)]
        elif self.spread == "global":
            kept = spreads.over_all([self.seen_scores(bench, name) for name in names], self.sparsity)
        elif self.spread == "lamp":
            kept = spreads.lamp([layer.weight.detach() for layer in layers], self.sparsity)
        else:
            kept = spreads.erk([layer.weight.shape for layer in layers], self.sparsity)
        return dict(zip(names, kept, strict=True))

    def seen_scores(self, bench: Bench, name: str) -> Tensor:
        """A layer's scores in the original."""
        return self.scores(bench.layers[name], bench.statistics.get(name) if bench.aware else None)


def keep(scores: Tensor, form: Form) -> Tensor:
    """The weights of highest score that a form keeps, as a mask of the scores' shape.

    Of blocks, the sums of their scores are compared.
    """
    if isinstance(form, Mask):
        return _highest(scores.flatten(), form.kept).reshape(scores.shape)
    assert isinstance(form, BlockMask | Pattern)
    blocks = in_blocks(scores, form.block)
    if isinstance(form, BlockMask):
        stay = _highest(blocks.flatten(), form.kept).reshape(blocks.shape)
    else:
        runs = in_runs(blocks, form.m)
        stay = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, runs.topk(form.n).indices, True)
        stay = stay.reshape(blocks.shape)
    return out_of_blocks(stay, form.block, scores.shape)


def _highest(scores: Tensor, count: int) -> Tensor:
    stay = torch.zeros_like(scores, dtype=torch.bool)
    stay[scores.topk(count).indices] = True
    return stay
