"""The table of options, and plans as data."""

from __future__ import annotations

import json

import pytest

from featherweight.cost.cost import Cost
from featherweight.errors import ArtifactError, RecipeError
from featherweight.forms import LowRank, Separable
from featherweight.search.options import Option, Plan, Table, shortfall


def option(layer: str, rank: int | None, macs: int, loss: float) -> Option:
    return Option(layer, None if rank is None else LowRank(rank), Cost(macs=macs, params=10 * macs), loss)


TABLE = Table(
    options={
        "one": (option("one", None, 100, 0.0), option("one", 1, 20, 0.9), option("one", 2, 40, 0.3)),
        "two": (option("two", None, 50, 0.0), option("two", 1, 10, 0.5)),
    },
    now=Cost(macs=170, params=1700),
    start=Cost(macs=200, params=2000),
)
PLAN = Plan("factorize.SVD", {"one": LowRank(2), "two": LowRank(1)})


def test_costs_and_losses_of_a_plan_add_up():
    assert TABLE.cost(PLAN) == Cost(macs=170 - 60 - 40, params=1700 - 600 - 400)
    assert TABLE.loss(PLAN) == pytest.approx(0.8)
    assert TABLE.cost(Plan("factorize.SVD")) == TABLE.now
    assert TABLE.loss(Plan("factorize.SVD")) == 0


def test_options_have_names():
    assert [str(o) for o in TABLE.options["one"]] == ["as it is", "rank 1", "rank 2"]


@pytest.mark.parametrize(
    ("layer", "form", "message"),
    [
        ("on", LowRank(1), "the plan names 'on', which cannot be replaced; did you mean 'one'?"),
        ("one", LowRank(7), "the plan asks for rank 7 of 'one', whose options are rank 1 to rank 2: is it another"),
        ("one", Separable(1), "the plan asks for rank 1 of 'one'"),
    ],
)
def test_a_plan_that_the_table_does_not_have(layer, form, message):
    with pytest.raises(RecipeError) as refused:
        TABLE.cost(Plan("factorize.SVD", {layer: form}))
    assert message in str(refused.value)


def test_a_plan_is_edited_without_changing_it():
    edited = PLAN.edited({"one": None, "three": LowRank(4)})
    assert edited == Plan("factorize.SVD", {"two": LowRank(1), "three": LowRank(4)})
    assert set(PLAN.layers) == {"one", "two"}


def test_a_plan_survives_its_file(tmp_path):
    plan = PLAN.edited({"conv.0": Separable(3, axis=1)})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a plan: it is not JSON"),
        ("3", "this is not a plan: it needs 'step' and 'layers', and has only 3"),
        ("[]", r"this is not a plan: it needs 'step' and 'layers', and has only \[\]"),
        ('{"step": "a.B"}', r"this is not a plan: it needs 'step' and 'layers', and has \['step'\]"),
        ('{"step": "a.B", "layers": {}, "more": 1}', "and has .*'more'"),
        ('{"step": "a.B", "layers": {"fc": null}}', "of 'fc' it says None, not a form"),
        (
            '{"step": "a.B", "layers": {"fc": {"form": "LowRang", "rank": 1}}}',
            "no form 'LowRang'; did you mean 'LowRank'",
        ),
        ('{"step": "a.B", "layers": {"fc": {"form": "LowRank"}}}', "the form LowRank has the fields"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ArtifactError, match=message) as refused:
        Plan.load(tmp_path / "plan.json")
    assert str(refused.value).startswith(str(tmp_path / "plan.json"))


def test_options_too_coarse_for_a_limit_are_said():
    assert shortfall(TABLE, PLAN, {"macs": 70.0}) == ()
    assert shortfall(TABLE, PLAN, {"macs": 100.0, "params": 705.0}) == (), "one limit is all but reached"
    (note,) = shortfall(TABLE, PLAN, {"macs": 140.0, "params": 1000.0})
    assert note == "params came to 0.700 of the limit: no option lies nearer below it"
    assert shortfall(TABLE, Plan("factorize.SVD"), {"macs": 1000.0}) == (), "nothing was replaced"


def test_a_plan_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        Plan.load(tmp_path / "missing.json")
