"""Settings as data, and what is said of those of the wrong type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from networks import Mixed, make, task_of

import featherweight as fw
from featherweight import factorize
from featherweight.edits import Edit
from featherweight.forms import LowRank
from featherweight.search.optimal import Optimal
from featherweight.search.options import Plan
from featherweight.step import Stage, Step, plain
from featherweight.study import Study


@dataclass(frozen=True)
class Pretend(Step):
    """A step that a script of the user's own defines."""

    share: float | Mapping[str, float] = 0.5
    norm: Literal["l1", "l2"] = "l2"
    layers: tuple[str, ...] = ()
    often: bool = False

    stage: ClassVar[Stage] = Stage.MASK

    def edits(self, study: Study) -> Iterator[Edit]:
        return iter(())


def test_a_steps_name_is_its_path():
    assert factorize.SpatialSVD(ratio=0.5).name == "factorize.SpatialSVD"
    assert Pretend().name == "Pretend"


def test_settings_are_those_that_differ_from_the_defaults():
    assert Pretend().settings() == {}
    assert Pretend(share=0.5, often=True, layers=("a", "b")).settings() == {"often": True, "layers": ["a", "b"]}


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (fw.Budget(macs=0.5, bytes="5 MB"), {"macs": 0.5, "bytes": "5 MB"}),
        (fw.Greedy(), {"greedy": {}}),
        (fw.Greedy(candidates=5), {"greedy": {"candidates": 5}}),
        (Optimal(evaluations=3), {"optimal": {"evaluations": 3}}),
        (
            Plan("factorize.SVD", {"fc": LowRank(3)}),
            {"step": "factorize.SVD", "layers": {"fc": {"form": "LowRank", "rank": 3}}},
        ),
        ({"conv*": 0.5, "fc": None}, {"conv*": 0.5, "fc": None}),
        (np.float64(0.25), 0.25),
    ],
)
def test_settings_of_every_kind_are_plain_data(value: Any, data: Any):
    assert plain(value) == data
    assert json.loads(json.dumps(plain(value))) == data
    assert type(plain(value)) in (dict, float)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share": "high"}, "share is 'high', a str: it takes float or {layer pattern: float}"),
        ({"share": {"conv*": None}}, "share is {'conv*': None}, a dict: it takes float or {layer pattern: float}"),
        ({"often": 1}, "often is 1, a int: it takes bool"),
        ({"layers": "conv"}, "layers is 'conv', a str: it takes a list of str"),
        ({"norm": "l3"}, "norm is 'l3', a str: it takes 'l1' or 'l2'"),
    ],
)
def test_a_setting_of_the_wrong_type_is_said_in_words(settings: dict[str, Any], said: str):
    model = make(Mixed)
    assert Pretend(**settings).problems(model, task_of(model)) == [said]
