"""What the result may cost, and how much of its score it may lose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from featherweight.errors import BudgetError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_JOULES = {"j": 1.0, "mj": 1e-3, "uj": 1e-6, "µj": 1e-6, "nj": 1e-9}
_SUFFIX = {"macs": "macs?", "params": "params?", "bytes": "b|bytes?", "energy": ""}  # what a unit may end in
_SAMPLE = {"macs": "'200 M'", "params": "'1.5 M'", "bytes": "'5 MB'", "energy": "'3 mJ'"}

Limit = float | int | str


@dataclass(frozen=True)
class Budget:
    """Limits on costs, and on the drop of the score. All that are given must hold together.

    A cost limit is a share of the original's cost (a float from 0 to 1: ``macs=0.5`` is half), or absolute (a larger
    number, or a string with a unit: ``bytes="5 MB"``, ``macs="200 M"``).

    Attributes:
        macs: multiply-accumulates of one call on the task's example.
        params: number of parameters.
        bytes: bytes of weights as they are stored.
        energy: the energy estimate of one call, such as ``"3 mJ"``.
        drop: how far the task's score may fall, in the score's own units (0.01 is one point of accuracy).
    """

    macs: Limit | None = None
    params: Limit | None = None
    bytes: Limit | None = None
    energy: Limit | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        """Raises:
        BudgetError: no limit is given, or one is no positive number or known unit.
        """
        if all(getattr(self, f.name) is None for f in fields(self)):
            raise BudgetError("the budget is empty: give at least one limit, such as Budget(macs=0.5)")
        for metric, limit in self.costs().items():
            _absolute(metric, limit, 1.0)
        number = isinstance(self.drop, int | float) and not isinstance(self.drop, bool)
        if self.drop is not None and not (number and 0 <= self.drop < float("inf")):
            raise BudgetError(f"drop is {self.drop!r}: give a number from 0 up, in the units of the score")

    def costs(self) -> dict[str, Limit]:
        """The cost limits that are given, as given, by metric."""
        limits = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "drop"}
        return {metric: limit for metric, limit in limits.items() if limit is not None}

    def limits(self, whole: Mapping[str, float]) -> dict[str, float]:
        """The cost limits in absolute numbers.

        Args:
            whole: the original's cost by metric.
        """
        return {metric: _absolute(metric, limit, whole[metric]) for metric, limit in self.costs().items()}

    def to_json(self) -> dict[str, Any]:
        """The limits that are given, by name; ``Budget(**data)`` is the way back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} ≤ {limit}" for name, limit in self.to_json().items())


def _absolute(metric: str, limit: Limit, whole: float) -> float:
    """A limit in the metric's own units."""
    units = _JOULES if metric == "energy" else _UNITS
    if isinstance(limit, str):
        number = r"(\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
        match = re.fullmatch(rf"\s*(?P<number>{number})\s*(?P<unit>[a-zµ]*)\s*", limit, re.IGNORECASE)
        unit = "" if match is None else re.sub(f"({_SUFFIX[metric]})$", "", match["unit"].lower())
        if match is None or unit not in units:
            raise BudgetError(f"{metric} is {limit!r}: write a number and a unit, such as {_SAMPLE[metric]}")
        value = float(match["number"]) * units[unit]
    elif isinstance(limit, bool) or not isinstance(limit, int | float):
        raise BudgetError(
            f"{metric} is {limit!r}, a {type(limit).__name__}: give a number or a string as {_SAMPLE[metric]}"
        )
    elif isinstance(limit, float) and 0 < limit <= 1:
        value = limit * whole
    else:
        value = float(limit)
    if not 0 < value < float("inf"):
        raise BudgetError(f"{metric} is {limit!r}: a limit is greater than 0; as a share, between 0 and 1")
    return value
