"""Budgets: shares, absolute limits and strings mean what they say, and nothing else is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featherweight.errors import BudgetError
from featherweight.search.budget import Budget

WHOLE = {"macs": 1000.0, "params": 1000.0, "bytes": 1000.0, "energy": 0.5}


@pytest.mark.parametrize(
    ("metric", "limit", "absolute"),
    [
        ("macs", 0.25, 250),
        ("macs", 1.0, 1000),
        ("macs", np.float64(0.5), 500),
        ("macs", 1, 1),  # a whole number is a number of things, not a share
        ("macs", 400, 400),
        ("macs", 250.5, 250.5),
        ("macs", "200 M", 200e6),
        ("macs", "1.5GMACs", 1.5e9),
        ("macs", "2 T", 2e12),
        ("macs", "1e3 k", 1e6),
        ("params", "1.5 M", 1.5e6),
        ("params", ".5k", 500),
        ("params", "300 params", 300),
        ("bytes", "5 MB", 5e6),
        ("bytes", "5 mib", 5 * 2**20),
        ("bytes", "2 Ki", 2048),
        ("bytes", "512", 512),
        ("bytes", "12 bytes", 12),
        ("energy", 0.5, 0.25),
        ("energy", "3 mJ", 3e-3),
        ("energy", "20 µJ", 20e-6),
        ("energy", "20 uj", 20e-6),
        ("energy", "1.5 J", 1.5),
    ],
)
def test_limits_in_every_form(metric: str, limit: Any, absolute: float):
    assert Budget(**{metric: limit}).limits(WHOLE) == {metric: pytest.approx(absolute)}


@pytest.mark.parametrize(
    ("metric", "limit", "message"),
    [
        ("macs", 0, "macs is 0: a limit is greater than 0; as a share, between 0 and 1"),
        ("macs", -0.5, r"macs is -0\.5: a limit is greater than 0"),
        ("macs", float("nan"), "macs is nan: a limit is greater than 0"),
        ("macs", float("inf"), "macs is inf: a limit is greater than 0"),
        ("macs", "0 M", "macs is '0 M': a limit is greater than 0"),
        ("macs", "1e999", "macs is '1e999': a limit is greater than 0"),
        ("macs", True, "macs is True, a bool: give a number or a string as '200 M'"),
        ("macs", [0.5], r"macs is \[0\.5\], a list: give a number or a string"),
        ("macs", "half", "macs is 'half': write a number and a unit, such as '200 M'"),
        ("macs", "", "macs is '': write a number and a unit"),
        ("macs", "50%", "macs is '50%': write a number and a unit"),
        ("macs", "1.2.3 M", r"macs is '1\.2\.3 M': write a number and a unit"),
        ("macs", ".", r"macs is '\.': write a number and a unit"),
        ("macs", "-5 M", "macs is '-5 M': write a number and a unit"),
        ("macs", "5 MB", "macs is '5 MB': write a number and a unit, such as '200 M'"),
        ("bytes", "5 MMACs", "bytes is '5 MMACs': write a number and a unit, such as '5 MB'"),
        ("params", "5 XB", r"params is '5 XB': write a number and a unit, such as '1\.5 M'"),
        ("energy", "3", "energy is '3': write a number and a unit, such as '3 mJ'"),
        ("energy", "3 MB", "energy is '3 MB': write a number and a unit, such as '3 mJ'"),
        ("drop", -0.1, r"drop is -0\.1: give a number from 0 up, in the units of the score"),
        ("drop", float("nan"), "drop is nan: give a number"),
        ("drop", float("inf"), "drop is inf: give a number"),
        ("drop", "1 %", "drop is '1 %': give a number"),
        ("drop", True, "drop is True: give a number"),
    ],
)
def test_limits_that_are_none(metric: str, limit: Any, message: str):
    with pytest.raises(BudgetError, match=message):
        Budget(**{metric: limit})


def test_an_empty_budget_is_none():
    with pytest.raises(BudgetError, match=r"the budget is empty: give at least one limit, such as Budget\(macs=0\.5\)"):
        Budget()


def test_a_drop_of_nothing_is_a_limit():
    assert Budget(drop=0).costs() == {}
    assert Budget(drop=0).drop == 0


def test_a_budget_is_data():
    budget = Budget(macs=0.5, bytes="5 MB", drop=0.01)
    assert Budget(**budget.to_json()) == budget
    assert str(budget) == "macs ≤ 0.5, bytes ≤ 5 MB, drop ≤ 0.01"
    assert list(budget.costs()) == ["macs", "bytes"]


@pytest.mark.parametrize(
    ("limit", "milliseconds"),
    [(0.25, 2), (1.0, 8), ("4 ms", 4), ("0.5 s", 500), ("20us", 0.02), ("20 µs", 0.02), (None, float("inf"))],
)
def test_a_latency_is_a_share_or_has_a_unit(limit: Any, milliseconds: float):
    assert Budget(latency=limit, macs=0.5).milliseconds(8.0) == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency": 4}, "latency is 4: write a unit, such as '4 ms', or a share as"),
        ({"latency": 0}, "latency is 0: a limit is greater than 0"),
        ({"latency": "4"}, "latency is '4': write a number and a unit, such as '4 ms'"),
        ({"latency": "4 MB"}, "latency is '4 MB': write a number and a unit, such as '4 ms'"),
        ({"latency": True}, "latency is True, a bool: give a number or a string as '4 ms'"),
        ({"latency": 0.5, "runtime": "tflite"}, "runtime is 'tflite': a latency is measured in onnx, openvino, torch"),
        ({"macs": 0.5, "runtime": "onnx"}, "runtime is 'onnx', and there is no latency to measure in it"),
        ({"runtime": "onnx"}, "the budget is empty"),
    ],
)
def test_latencies_that_are_none(given: dict[str, Any], message: str):
    with pytest.raises(BudgetError, match=message):
        Budget(**given)


def test_a_latency_is_no_cost_that_adds_up():
    budget = Budget(latency="4 ms", params=0.5)
    assert budget.runtime == "onnx"
    assert Budget(**budget.to_json()) == budget
    assert str(budget) == "params ≤ 0.5, latency ≤ 4 ms in onnx"
    assert list(budget.costs()) == ["params"]
    assert budget.metrics == ["params", "macs"]
