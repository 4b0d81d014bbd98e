"""What the result may cost, and how much of its score it may lose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from featherweight.errors import BudgetError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_JOULES = {"j": 1.0, "mj": 1e-3, "uj": 1e-6, "µj": 1e-6, "nj": 1e-9}
_MILLISECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3}
_COSTS = ("macs", "params", "bytes", "energy")  # which add up over layers
_SUFFIX = {"macs": "macs?", "params": "params?", "bytes": "b|bytes?"}  # what a unit may end in
_SAMPLE = {"macs": "'200 M'", "params": "'1.5 M'", "bytes": "'5 MB'", "energy": "'3 mJ'", "latency": "'4 ms'"}
_RUNTIMES = ("onnx", "openvino", "torch")

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
        latency: how long one call of the task's example takes on this machine: a string such as ``"4 ms"`` (s, ms, us),
            or a share of what the original takes, which is timed in turn with it. It is measured while the step
            chooses, with as many threads as PyTorch has.
        runtime: what the latency is measured in, on the CPU: ``"onnx"`` (ONNX Runtime), which is the default with a
            latency, ``"openvino"``, or ``"torch"``.
        drop: how far the task's score may fall, in the score's own units (0.01 is one point of accuracy).
    """

    macs: Limit | None = None
    params: Limit | None = None
    bytes: Limit | None = None
    energy: Limit | None = None
    latency: float | str | None = None
    runtime: Literal["onnx", "openvino", "torch"] | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        """Raises:
        BudgetError: no limit is given, one is no positive number or known unit, there is no such runtime, or one
            without a latency.
        """
        if all(getattr(self, f.name) is None for f in fields(self) if f.name != "runtime"):
            raise BudgetError("the budget is empty: give at least one limit, such as Budget(macs=0.5)")
        if self.runtime is not None and self.runtime not in _RUNTIMES:
            raise BudgetError(f"runtime is {self.runtime!r}: a latency is measured in {', '.join(_RUNTIMES)}")
        if self.runtime is not None and self.latency is None:
            raise BudgetError(f"runtime is {self.runtime!r}, and there is no latency to measure in it: give latency=")
        if self.latency is not None:
            self.milliseconds(1.0)
            object.__setattr__(self, "runtime", self.runtime or "onnx")
        for metric, limit in self.costs().items():
            _absolute(metric, limit, 1.0)
        number = isinstance(self.drop, int | float) and not isinstance(self.drop, bool)
        if self.drop is not None and not (number and 0 <= self.drop < float("inf")):
            raise BudgetError(f"drop is {self.drop!r}: give a number from 0 up, in the units of the score")

    def costs(self) -> dict[str, Limit]:
        """The limits that are given on costs which add up over layers, as given, by metric; a latency does not."""
        limits = {metric: getattr(self, metric) for metric in _COSTS}
        return {metric: limit for metric, limit in limits.items() if limit is not None}

    @property
    def metrics(self) -> list[str]:
        """The costs that a choice is made by: those with a limit, and MACs, by which a latency is looked for."""
        return list(dict.fromkeys([*self.costs(), *(["macs"] if self.latency is not None else [])]))

    def limits(self, whole: Mapping[str, float]) -> dict[str, float]:
        """The cost limits in absolute numbers.

        Args:
            whole: the original's cost by metric.
        """
        return {metric: _absolute(metric, limit, whole[metric]) for metric, limit in self.costs().items()}

    def milliseconds(self, original: float) -> float:
        """The limit of latency in milliseconds, infinite where there is none.

        Args:
            original: what the original takes, in milliseconds.
        """
        return float("inf") if self.latency is None else _absolute("latency", self.latency, original)

    def to_json(self) -> dict[str, Any]:
        """The limits that are given, by name; ``Budget(**data)`` is the way back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def __str__(self) -> str:
        limits = {name: limit for name, limit in self.to_json().items() if name != "runtime"}
        where = {"latency": f" in {self.runtime}"}
        return ", ".join(f"{name} ≤ {limit}{where.get(name, '')}" for name, limit in limits.items())


def _absolute(metric: str, limit: Limit, whole: float) -> float:
    """A limit in the metric's own units."""
    units = {"energy": _JOULES, "latency": _MILLISECONDS}.get(metric, _UNITS)
    if isinstance(limit, str):
        number = r"(\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
        match = re.fullmatch(rf"\s*(?P<number>{number})\s*(?P<unit>[a-zµ]*)\s*", limit, re.IGNORECASE)
        unit = "" if match is None else re.sub(f"({_SUFFIX.get(metric, '')})$", "", match["unit"].lower())
        if match is None or unit not in units:
            raise BudgetError(f"{metric} is {limit!r}: write a number and a unit, such as {_SAMPLE[metric]}")
        value = float(match["number"]) * units[unit]
    elif isinstance(limit, bool) or not isinstance(limit, int | float):
        raise BudgetError(
            f"{metric} is {limit!r}, a {type(limit).__name__}: give a number or a string as {_SAMPLE[metric]}"
        )
    elif isinstance(limit, float) and 0 < limit <= 1:
        value = limit * whole
    elif metric == "latency" and limit >= 1:
        raise BudgetError(f"latency is {limit!r}: write a unit, such as '4 ms', or a share as 0.5 or 1.0")
    else:
        value = float(limit)
    if not 0 < value < float("inf"):
        raise BudgetError(f"{metric} is {limit!r}: a limit is greater than 0; as a share, between 0 and 1")
    return value
