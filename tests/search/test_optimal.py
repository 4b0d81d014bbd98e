"""The optimal selector: against every plan there is, on tables small enough to try them all."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.cost.cost import Cost
from featherweight.errors import BudgetError, RecipeError
from featherweight.forms import LowRank
from featherweight.search.budget import Budget
from featherweight.search.optimal import Optimal, allocate, cheapest_share, rounded_up, within
from featherweight.search.options import Option, Plan, Table


def least_loss(costs, losses, room) -> float | None:
    """Of all plans that fit, the least loss."""
    total, loss = np.zeros((1, len(room))), np.zeros(1)
    for cost, of in zip(costs, losses, strict=True):
        total = (total[:, None] + cost[None]).reshape(-1, len(room))
        loss = (loss[:, None] + of[None]).ravel()
    fits = (total <= room * (1 + 1e-12)).all(1)
    return float(loss[fits].min()) if fits.any() else None


@st.composite
def tables(draw: st.DrawFn, metrics: int):
    """Options of two to five layers with costs in `metrics` metrics, and some room; often a tight one."""
    costs, losses = [], []
    for _ in range(draw(st.integers(1, 5))):
        options = draw(st.integers(1, 5))
        cost = st.lists(st.integers(1, 20), min_size=metrics, max_size=metrics)
        costs.append(np.array(draw(st.lists(cost, min_size=options, max_size=options)), float))
        losses.append(np.array(draw(st.lists(st.floats(0, 100), min_size=options, max_size=options))))
    least, most = (sum(getattr(c, end)(0) for c in costs) for end in ("min", "max"))
    part = np.array(draw(st.lists(st.floats(0, 1), min_size=metrics, max_size=metrics)))
    return costs, losses, least + part * (most - least)


def check(table) -> None:
    costs, losses, room = table
    best, chosen = least_loss(costs, losses, room), allocate(costs, losses, room)
    assert (chosen is None) == (best is None), "there is a plan exactly where one is found"
    if chosen is None or best is None:
        return
    used = np.sum([cost[i] for cost, i in zip(costs, chosen, strict=True)], axis=0)
    assert (used <= room * (1 + 1e-9)).all(), "never over the room"
    loss = sum(float(of[i]) for of, i in zip(losses, chosen, strict=True))
    # What a Lagrangian leaves open is a layer's whole swing for every limit, however many layers there are.
    assert loss - best <= len(room) * max(float(of.max() - of.min()) for of in losses) * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(tables(metrics=1))
def test_one_limit_against_every_plan(table):
    check(table)


@settings(max_examples=30, deadline=None)
@given(tables(metrics=2))
def test_two_limits_against_every_plan(table):
    check(table)


@settings(max_examples=15, deadline=None)
@given(tables(metrics=3))
def test_three_limits_against_every_plan(table):
    check(table)


def test_many_layers_come_within_a_percent_of_what_no_plan_can_beat():
    """The bound is the linear relaxation: fractions of options, which no plan can beat."""
    random = np.random.default_rng(0)
    shares = np.arange(1, 33) / 32
    costs = [np.outer(shares[::-1], [size]) for size in random.uniform(1, 50, 60)]
    losses = [weight * (1 - shares[::-1]) ** 2 for weight in random.exponential(size=60)]
    room = np.array([0.4 * sum(c.max() for c in costs)])
    chosen = allocate(costs, losses, room)
    assert chosen is not None
    bounds = []
    for multiplier in np.logspace(-6, 2, 4000):
        lowest = sum(float((of + multiplier * c[:, 0]).min()) for of, c in zip(losses, costs, strict=True))
        bounds.append(lowest - multiplier * room[0])
    loss = sum(float(of[i]) for of, i in zip(losses, chosen, strict=True))
    assert max(bounds) <= loss <= 1.01 * max(bounds)
    assert 0.99 * room[0] <= sum(float(c[i, 0]) for c, i in zip(costs, chosen, strict=True)) <= room[0]


def test_a_tight_corner_that_no_price_finds():
    """Two limits that only mixed choices meet: each layer's cheapest in one metric is its dearest in the other."""
    costs = [np.array([[1.0, 9.0], [9.0, 1.0], [6.0, 6.0]])] * 2
    losses = [np.array([0.0, 0.0, 5.0])] * 2
    chosen = allocate(costs, losses, np.array([10.0, 10.0]))
    assert chosen is not None
    assert sorted(chosen) == [0, 1]


@pytest.mark.parametrize("metrics", [1, 2])
def test_a_table_of_two_thousand_layers_and_forty_options_each(metrics: int):
    """Of costs that conflict: an option that is cheap in one metric is dear in another."""
    random = np.random.default_rng(metrics)
    sizes = random.uniform(1, 10, 2000)
    costs = [size * (0.02 + random.dirichlet(np.full(metrics, 0.4), 40) * random.random((40, 1))) for size in sizes]
    losses = [random.exponential() * (1 - cost.mean(1) / cost.mean(1).max()) for cost in costs]
    room = 0.1 * np.sum([cost.max(0) for cost in costs], axis=0)
    chosen = allocate(costs, losses, room)
    assert chosen is not None
    used = np.sum([cost[i] for cost, i in zip(costs, chosen, strict=True)], axis=0)
    assert (used <= room * (1 + 1e-9)).all()
    # No plan can beat the bound that any prices give.
    loss, bounds = sum(float(of[i]) for of, i in zip(losses, chosen, strict=True)), []
    for multiplier in np.logspace(-3, 3, 120):
        prices = multiplier / room
        bounds.append(sum(float((of + c @ prices).min()) for of, c in zip(losses, costs, strict=True)) - prices @ room)
    assert max(bounds) <= loss <= 1.02 * max(bounds)


def test_a_tight_corner_of_two_thousand_layers():
    """Only mixed choices meet both limits, as in the small corner, and there are too many pairs to try them all."""
    random = np.random.default_rng(0)
    torn = [np.stack([share, 1 - share], axis=1) + 0.1 for share in random.random((2000, 40)).round()]
    costs = [size * cost for size, cost in zip(random.uniform(1, 10, 2000), torn, strict=True)]
    losses = [np.zeros(40) for _ in costs]
    total = sum(cost.max() + cost.min() for cost in costs)
    chosen = allocate(costs, losses, np.full(2, total / 2 * 1.00001))
    assert chosen is not None
    used = np.sum([cost[i] for cost, i in zip(costs, chosen, strict=True)], axis=0)
    assert used == pytest.approx([total / 2] * 2, rel=2e-5)


# Plans


def table_of(*layers: list[tuple[int, int, float]], fixed: int = 0) -> Table:
    """A table of (macs, params, loss), each layer as it is first."""
    options = {
        f"layer{n}": tuple(
            Option(f"layer{n}", LowRank(i) if i else None, Cost(macs=macs, params=params), loss)
            for i, (macs, params, loss) in enumerate(rows)
        )
        for n, rows in enumerate(layers)
    }
    now = sum((o[0].cost for o in options.values()), Cost(macs=fixed, params=fixed))
    return Table(options, now, now)


PLAIN = table_of(
    [(100, 100, 0.0), (30, 30, 1.0), (60, 60, 0.2)], [(100, 100, 0.0), (30, 30, 4.0), (60, 60, 2.0)], fixed=10
)
# Cheap in one metric is dear in the other, as of convolutions with strides.
TORN = table_of([(100, 100, 0.0), (20, 60, 1.0), (60, 20, 2.0)], fixed=10)


class Measured:
    """Trials in which the score is minus the predicted loss, squared where told to."""

    baseline = 0.0

    def __init__(self, table: Table, power: float = 1.0) -> None:
        self.table, self.power, self.asked = table, power, 0

    def score(self, plan: Plan) -> float:
        self.asked += 1
        return -(self.table.loss(plan) ** self.power)

    def score_alone(self, option: Option) -> float:
        raise AssertionError("not what this selector asks for")


def test_the_least_loss_within_the_limit_is_chosen():
    plan, notes = within(PLAIN, Budget(macs=0.81), "a.B")
    assert plan == Plan("a.B", {"layer0": LowRank(2)})
    assert PLAIN.cost(plan).macs == 170
    assert notes == ()


def test_a_limit_that_is_met_already_leaves_everything():
    assert within(PLAIN, Budget(macs=1.0), "a.B") == (Plan("a.B"), ())


def test_coarse_options_are_said():
    plan, (note,) = within(PLAIN, Budget(macs=0.9), "a.B")
    assert plan.layers == {"layer0": LowRank(2)}
    assert note == "macs came to 0.899 of the limit: no option lies nearer below it"


@pytest.mark.parametrize(
    ("budget", "metrics"),
    [
        (Budget(macs=0.2), ["macs"]),
        (Budget(params="60"), ["params"]),
        (Budget(macs=0.2, params=0.1), ["macs", "params"]),
    ],
)
def test_an_infeasible_limit_names_the_nearest_that_is(budget: Budget, metrics: list[str]):
    with pytest.raises(BudgetError) as refused:
        within(PLAIN, budget, "a.B")
    text = str(refused.value)
    assert text.endswith("ask for no less, or let more layers be replaced")
    named = re.findall(r"(\w+) cannot go below ([\d.e-]+) of the original's \(([\d.e+]+)\)", text)
    assert [metric for metric, _, _ in named] == metrics
    for shares in ({m: float(share) for m, share, _ in named}, {m: float(number) for m, _, number in named}):
        plan, _ = within(PLAIN, Budget(**shares), "a.B")
        assert PLAIN.cost(plan).macs == 70
    with pytest.raises(BudgetError):
        within(PLAIN, Budget(**{m: float(share) - 0.001 for m, share, _ in named}), "a.B")


def test_limits_that_hold_singly_but_not_together_name_the_nearest_that_do():
    for budget in (Budget(macs=0.5), Budget(params=0.5)):
        within(TORN, budget, "a.B")
    with pytest.raises(
        BudgetError, match=r"no plan was found that keeps to all of macs ≤ 0\.5, params ≤ 0\.5 at once"
    ) as no:
        within(TORN, Budget(macs=0.5, params=0.5), "a.B")
    shares = {m: float(s) for m, s in re.findall(r"(macs|params)=([\d.]+)", str(no.value))}
    assert set(shares) == {"macs", "params"}
    assert all(70 / 110 <= share <= 1.01 * 70 / 110 for share in shares.values())
    plan, _ = within(TORN, Budget(**shares), "a.B")
    cost = TORN.cost(plan)
    assert cost.macs <= shares["macs"] * TORN.start.macs
    assert cost.params <= shares["params"] * TORN.start.params


@pytest.mark.parametrize("value", [0.12301, 0.5, 1.0, 1234567.8, 3.2e-7, 999.99])
def test_numbers_that_are_named_are_rounded_up(value: float):
    for digits in (3, 6):
        assert value <= rounded_up(value, digits) <= value * (1 + 10.0 ** (1 - digits))
        assert float(f"{rounded_up(value, digits):.{digits}g}") == rounded_up(value, digits)


# Drops


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_measured_drop_is_kept_to_with_few_evaluations(drop: float, power: float):
    ranks = [(100 - r, 100 - r, (r / 20) ** 2) for r in range(0, 100, 5)]
    table = table_of(ranks, ranks, fixed=5)
    trials = Measured(table, power)
    choosing = Optimal().choose(table, Budget(drop=drop), trials, "a.B")
    assert trials.asked <= Optimal().evaluations
    assert -trials.score(choosing.plan) <= drop
    # The cheapest plan of all is found to within the bracket of seven halvings.
    lines = np.linspace(cheapest_share(table, "macs"), 1, 100)
    kept = [s for s in lines if table.loss(within(table, Budget(macs=float(s)), "a.B")[0]) ** power <= drop]
    assert table.cost(choosing.plan).macs / table.start.macs <= min(kept, default=1.0) + 1 / 2**6
    assert any("measured drop" in note for note in choosing.notes)


def test_a_drop_can_be_turned_into_another_cost_than_macs():
    table = table_of([(100, 100, 0.0), (90, 20, 0.5)], [(100, 100, 0.0), (20, 90, 0.5)])
    choosing = Optimal(metric="params").choose(table, Budget(drop=0.6), Measured(table), "a.B")
    assert choosing.plan.layers == {"layer0": LowRank(1)}
    assert choosing.metric == "params"


def test_a_budget_with_a_drop_holds_both_or_names_the_nearest():
    trials = Measured(PLAIN)
    kept = Optimal().choose(PLAIN, Budget(macs=0.81, drop=0.3), trials, "a.B")
    assert kept.plan.layers == {"layer0": LowRank(2)}
    assert "measured drop 0.2, allowed 0.3" in kept.notes
    with pytest.raises(
        BudgetError, match=r"at macs ≤ 0\.7, drop ≤ 0\.3 the score drops by 1: the nearest budget"
    ) as no:
        Optimal().choose(PLAIN, Budget(macs=0.7, drop=0.3), trials, "a.B")
    share = float(str(no.value).rpartition("macs=")[2])
    assert -trials.score(Optimal().choose(PLAIN, Budget(macs=share, drop=0.3), trials, "a.B").plan) <= 0.3


def test_without_any_layer_only_what_is_met_already_can_be_met():
    empty = Table({}, Cost(macs=10), Cost(macs=10))
    assert within(empty, Budget(macs=1.0), "a.B")[0] == Plan("a.B")
    with pytest.raises(BudgetError, match="macs cannot go below 1 of the original's"):
        within(empty, Budget(macs=0.5), "a.B")
    assert Optimal().choose(empty, Budget(drop=0.1), Measured(empty), "a.B").plan == Plan("a.B")


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluations": "many"}, "evaluations is 'many', a str: it takes int"),
        ({"evaluations": 2.5, "metric": 3}, "evaluations is 2.5, a float: it takes int"),
        ({"evaluations": 0}, "evaluations is 0: give a whole number from 1 up"),
        ({"metric": None}, "metric is None, a NoneType: it takes str"),
        ({"metric": "param"}, "metric is 'param': it is one of macs, params, bytes, energy; did you mean 'params'?"),
    ],
)
def test_settings_that_cannot_be_used_are_said(settings: dict[str, Any], said: str):
    with pytest.raises(RecipeError) as refused:
        Optimal(**settings)
    assert refused.value.problems[0] == f"Optimal: {said}"
