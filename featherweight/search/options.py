"""The table that every selector reads, and the plan that every selector returns."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from featherweight.cost.cost import Cost
from featherweight.errors import ArtifactError, RecipeError, did_you_mean
from featherweight.files import read_json
from featherweight.forms import Form


@dataclass(frozen=True)
class Option:
    """One way of making one layer.

    Attributes:
        layer: the layer's name.
        form: what to replace it by; None leaves it as it is.
        cost: what the layer then costs.
        loss: predicted rise of the loss, nats or relative squared error a sample; 0 for the layer as it is.
    """

    layer: str
    form: Form | None
    cost: Cost
    loss: float

    def __str__(self) -> str:
        return "as it is" if self.form is None else str(self.form)


@dataclass(frozen=True)
class Table:
    """Every layer's options, and the network around them.

    Attributes:
        options: by layer, in calling order: the layer as it is first, then its options by rising cost.
        now: what the whole network costs as it is.
        start: what the network costs that shares of a budget are shares of.
    """

    options: Mapping[str, tuple[Option, ...]]
    now: Cost
    start: Cost

    def cost(self, plan: Plan) -> Cost:
        """What the network costs under a plan."""
        total = self.now
        for layer, form in plan.layers.items():
            option = self.find(layer, form)
            total = total - self.options[layer][0].cost + option.cost
        return total

    def loss(self, plan: Plan) -> float:
        """The predicted rise of the loss under a plan: predictions add up over layers."""
        return sum(self.find(layer, form).loss for layer, form in plan.layers.items())

    def find(self, layer: str, form: Form) -> Option:
        """The option that gives this layer this form.

        Raises:
            RecipeError: the layer cannot be replaced, or not by this form.
        """
        if layer not in self.options:
            raise RecipeError(
                [f"the plan names {layer!r}, which cannot be replaced{did_you_mean(layer, self.options)}"]
            )
        found = next((option for option in self.options[layer] if option.form == form), None)
        if found is None:
            forms = [str(o.form) for o in self.options[layer][1:]] or ["none"]
            known = f"whose options are {forms[0]} to {forms[-1]}"
            raise RecipeError([f"the plan asks for {form} of {layer!r}, {known}: is it another model's plan?"])
        return found


@dataclass(frozen=True)
class Plan:
    """What to make of every layer: plain data, to be looked at, edited and kept.

    Attributes:
        step: the step it belongs to, such as ``factorize.SVD``.
        layers: the form of every layer that is to be replaced; layers that stay are not among them.
    """

    step: str
    layers: Mapping[str, Form] = field(default_factory=dict)

    def edited(self, changes: Mapping[str, Form | None]) -> Plan:
        """The same plan with some layers changed; None leaves a layer as it is."""
        layers = {**self.layers, **changes}
        return Plan(self.step, {name: form for name, form in layers.items() if form is not None})

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {"step": self.step, "layers": {name: form.to_json() for name, form in self.layers.items()}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The plan back from `to_json`.

        Raises:
            ArtifactError: not a plan.
        """
        match data:
            case {"step": str(step), "layers": Mapping() as layers, **rest} if not rest:
                if wrong := [name for name, form in layers.items() if not isinstance(form, Mapping)]:
                    raise ArtifactError(f"this is not a plan: of {wrong[0]!r} it says {layers[wrong[0]]!r}, not a form")
                return Plan(step, {str(name): Form.from_json(form) for name, form in layers.items()})
        has = sorted(map(str, data)) if isinstance(data, Mapping) else f"only {data!r}"
        raise ArtifactError(f"this is not a plan: it needs 'step' and 'layers', and has {has}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ArtifactError: the file cannot be read, is not JSON, or not a plan.
        """
        return read_json(path, "a plan", Plan.from_json)


class Trials(Protocol):
    """Real measurements that a selector may ask for."""

    @property
    def baseline(self) -> float:
        """The score of the network as it is."""

    def score(self, plan: Plan) -> float:
        """The score of the network made to this plan, mended as the result would be."""

    def score_alone(self, option: Option) -> float:
        """The score of the network with only this layer changed."""


class Selector(Protocol):
    """Chooses one option for every layer."""

    def problems(self, budget: Any) -> list[str]:
        """All that keeps the selector from choosing under this budget, a sentence each; needs no table."""

    def cheapest(self, table: Table, metric: str) -> float:
        """The least cost that it can choose, as a share of the start's."""

    def choose(self, table: Table, budget: Any, trials: Trials, step: str) -> Choosing:
        """The plan, and what it was chosen by."""


@dataclass(frozen=True)
class Choosing:
    """What a selector chose and why.

    Attributes:
        plan: the choice.
        by: the selector's name: ``optimal``, ``greedy`` or ``manual``.
        metric: the cost the choice was made by.
        scores: measured scores by layer and option, where the selector measured any.
        notes: what the user should know.
    """

    plan: Plan
    by: str
    metric: str = "macs"
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def shortfall(table: Table, plan: Plan, limits: Mapping[str, float]) -> tuple[str, ...]:
    """Says so where a plan stays more than 1 % below every limit though layers were replaced: options are coarse.

    Args:
        table: where the plan's options are found.
        plan: the plan.
        limits: the cost limits it was chosen under, in absolute numbers by metric.
    """
    cost = table.cost(plan)
    used = {metric: cost.metric(metric) / limit for metric, limit in limits.items()}
    if not plan.layers or max(used.values()) >= 0.99:
        return ()
    metric = max(used, key=lambda m: used[m])
    return (f"{metric} came to {used[metric]:.3f} of the limit: no option lies nearer below it",)
