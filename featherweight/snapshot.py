"""A network's costs and score at one moment, as the ledger keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from featherweight.cost.cost import Cost
from featherweight.cost.count import Profile, profile
from featherweight.ledger import Row, Snapshot
from featherweight.task import Task


def snapshot(model: nn.Module, task: Task, score: float | None) -> Snapshot:
    """The network as it is now.

    Args:
        model: the network.
        task: whose example the costs are of.
        score: its score, where it was asked for.
    """
    return of_profile(profile(model, task.inputs()), score)


def repriced(before: Snapshot, layers: Mapping[str, Cost]) -> Snapshot:
    """The network as it would be with some layers at another cost; what it would score and keep alive is not known."""
    rows = {name: _row(cost, before.layers[name].kind) for name, cost in layers.items()}

    def total(field: str) -> Any:
        changes = (getattr(row, field) - getattr(before.layers[name], field) for name, row in rows.items())
        return getattr(before.total, field) + sum(changes)

    whole = Row(**{f.name: total(f.name) for f in fields(Row) if f.name != "kind"})
    return replace(before, score=None, total=whole, layers={**before.layers, **rows})


def of_profile(counted: Profile, score: float | None) -> Snapshot:
    """A snapshot out of costs that were counted already."""
    layers = {name: _row(layer.cost, layer.kind) for name, layer in counted.layers.items()}
    return Snapshot(score, _row(counted.total), layers, counted.peak_activation_bytes, counted.total.uncounted)


def _row(cost: Cost, kind: str = "") -> Row:
    return Row(cost.macs, cost.params, cost.bytes, cost.activation_bytes, cost.energy_joules, kind)
