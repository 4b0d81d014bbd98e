"""Settings of the wrong type are said in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from featherweight.settings import fits, mistyped


@dataclass(frozen=True)
class Pretend:
    share: float | Mapping[str, float] = 0.5
    norm: Literal["l1", "l2"] = "l2"
    layers: tuple[str, ...] = ()
    often: bool = False


@pytest.mark.parametrize(
    ("value", "annotation", "right"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (True, bool, True),
        (1, bool, False),
        (1.0, int, False),
        ("1", float, False),
        (None, float | None, True),
        ({"a": 1.0}, float | Mapping[str, float], True),
        ({"a": "high"}, float | Mapping[str, float], False),
        ({1: 1.0}, Mapping[str, float], False),
        (("a",), tuple[str, ...], True),
        ("a", tuple[str, ...], False),
        (("a", 1), tuple[str, ...], False),
        ("l1", Literal["l1", "l2"], True),
        ("l3", Literal["l1", "l2"], False),
        (object(), Any, True),
    ],
)
def test_what_fits_a_type(value: Any, annotation: Any, right: bool):
    assert fits(value, annotation) is right


def test_all_settings_of_the_wrong_type_are_said_at_once():
    assert mistyped(Pretend()) == []
    assert mistyped(Pretend(share={"conv*": 1}, layers=("a",), often=True)) == []
    assert mistyped(Pretend(share="high", norm="l3", layers="conv", often=1)) == [  # type: ignore[arg-type]
        "share is 'high', a str: it takes float or {layer pattern: float}",
        "norm is 'l3', a str: it takes 'l1' or 'l2'",
        "layers is 'conv', a str: it takes a list of str",
        "often is 1, a int: it takes bool",
    ]
