import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from featherweight.cost.cost import Cost
from featherweight.errors import BudgetError, RecipeError
from featherweight.forms import LowRank
from featherweight.search.budget import Budget
from featherweight.search.greedy import Greedy, descend, isotonic
from featherweight.search.options import Choosing, Option, Plan, Table

RANKS = 100


def table_of(costs: Mapping[str, int], losses: Mapping[str, Sequence[float]] | None = None, fixed: int = 0) -> Table:
    """Layers of these MACs with an option at every hundredth; parameters are twice the MACs, bytes eight times."""

    def price(macs: int) -> Cost:
        return Cost(macs=macs, params=2 * macs, bytes=8 * macs)

    def options(layer: str, macs: int) -> tuple[Option, ...]:
        loss = losses[layer] if losses else [0.0] * RANKS
        found = [Option(layer, LowRank(r), price(macs * r // RANKS), loss[r]) for r in range(1, RANKS)]
        return (Option(layer, None, price(macs), 0.0), *found)

    total = price(sum(costs.values()) + fixed)
    return Table({layer: options(layer, macs) for layer, macs in costs.items()}, total, total)


@dataclass
class Measured:
    """Trials that look scores up: by layer, at tenths of its cost from 0 to 1, straight in between."""

    curves: Mapping[str, Sequence[float]]
    asked: list[tuple[str, int]] = field(default_factory=list)

    @property
    def baseline(self) -> float:
        return next(iter(self.curves.values()))[-1]

    def score(self, plan: Plan) -> float:
        raise AssertionError("greedy measures layers alone")

    def score_alone(self, option: Option) -> float:
        assert isinstance(option.form, LowRank)
        self.asked.append((option.layer, option.form.rank))
        curve = self.curves[option.layer]
        return float(np.interp(option.form.rank / RANKS, np.linspace(0, 1, len(curve)), curve))


def share(table: Table, choosing: Choosing, metric: str = "macs") -> float:
    return table.cost(choosing.plan).metric(metric) / table.start.metric(metric)


def kept(choosing: Choosing, layer: str) -> float:
    """The share of a layer's cost that the plan keeps."""
    form = choosing.plan.layers.get(layer)
    return form.rank / RANKS if isinstance(form, LowRank) else 1.0


SMOOTH = [0.0, 0.3, 0.5, 0.62, 0.7, 0.76, 0.8, 0.83, 0.86, 0.88, 0.9]
TOUGH = [0.7, 0.8, 0.84, 0.86, 0.87, 0.88, 0.885, 0.89, 0.894, 0.897, 0.9]
FLAT = [0.9] * 11


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.77, 0.95])
def test_the_target_is_met_at_one_common_score(target: float, lazy: bool) -> None:
    table, trials = table_of({"a": 30_000, "b": 70_000}), Measured({"a": SMOOTH, "b": TOUGH})
    choosing = Greedy(lazy=lazy).choose(table, Budget(macs=target), trials, "factorize.SVD")
    assert target - 0.01 < share(table, choosing) <= target
    assert (choosing.plan.step, choosing.by, choosing.metric) == ("factorize.SVD", "greedy", "macs")
    scores = [np.interp(kept(choosing, n), np.linspace(0, 1, 11), trials.curves[n]) for n in ("a", "b")]
    assert scores[0] == pytest.approx(scores[1], abs=0.025)  # as near as a hundredth of a layer's cost allows
    if not lazy:
        assert len(trials.asked) == 2 * 9


def test_scores_are_handed_on_as_they_were_measured() -> None:
    table, trials = table_of({"a": 1000, "b": 1000}), Measured({"a": SMOOTH, "b": TOUGH})
    choosing = Greedy(candidates=4, lazy=False).choose(table, Budget(macs=0.5), trials, "s")
    assert choosing.scores["a"] == pytest.approx({"rank 25": 0.56, "rank 50": 0.76, "rank 75": 0.845, "as it is": 0.9})
    assert any("6 of 6 single-layer scores" in note for note in choosing.notes)


@pytest.mark.parametrize("metric", ["params", "bytes", "energy"])
def test_any_one_cost(metric: str) -> None:
    table, trials = table_of({"a": 30_000, "b": 70_000}, fixed=5_000), Measured({"a": SMOOTH, "b": TOUGH})
    choosing = Greedy().choose(table, Budget(**{metric: 0.6}), trials, "s")
    assert 0.59 < share(table, choosing, metric) <= 0.6
    assert choosing.metric == metric


# What goes wrong in AIMET's search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, False])
def test_plateaus_do_not_overshoot(lazy: bool) -> None:
    """Scores in steps, as accuracies are: every target is met, and neighbouring ones get different plans."""
    steps = [0.5, 0.7, 0.7, 0.7, 0.7, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    table = table_of({"a": 50_000, "b": 50_000})
    for target in (0.15, 0.25, 0.3, 0.42, 0.45, 0.5, 0.6, 0.75, 0.8, 0.93):
        choosing = Greedy(lazy=lazy).choose(table, Budget(macs=target), Measured({"a": steps, "b": steps}), "s")
        assert target - 0.011 < share(table, choosing) <= target
        assert kept(choosing, "a") == pytest.approx(kept(choosing, "b"), abs=0.011)


@pytest.mark.parametrize("lazy", [True, False])
def test_flat_layers_are_compressed_first(lazy: bool) -> None:
    table, trials = table_of({"flat": 50_000, "tough": 50_000}), Measured({"flat": FLAT, "tough": TOUGH})
    half = Greedy(lazy=lazy).choose(table, Budget(macs=0.75), trials, "s")
    assert kept(half, "tough") == 1.0
    assert kept(half, "flat") == 0.5
    more = Greedy(lazy=lazy).choose(table, Budget(macs=0.45), trials, "s")
    assert kept(more, "flat") == 0.1
    assert 0.79 <= kept(more, "tough") <= 0.8


def test_a_network_of_one_layer_reaches_its_lowest_score() -> None:
    table = table_of({"only": 100_000})
    for target in (0.1, 0.11, 0.5, 0.95):
        choosing = Greedy().choose(table, Budget(macs=target), Measured({"only": SMOOTH}), "s")
        assert kept(choosing, "only") == pytest.approx(target)
    choosing = Greedy().choose(table, Budget(macs=0.5), Measured({"only": FLAT}), "s")
    assert kept(choosing, "only") == 0.5


@pytest.mark.parametrize("lazy", [True, False])
def test_a_dip_next_to_the_layer_as_it_is(lazy: bool) -> None:
    dip = [*FLAT[:9], 0.88, 0.9]
    table, curves = table_of({"dip": 50_000, "tough": 50_000}), {"dip": dip, "tough": TOUGH}
    choosing = Greedy(lazy=lazy).choose(table, Budget(macs=0.4), Measured(curves), "s")
    assert 0.39 < share(table, choosing) <= 0.4
    assert kept(choosing, "dip") < 0.5  # it got past the dip, once the level was as low
    fitted = Greedy(monotone=True, lazy=lazy).choose(table, Budget(macs=0.6), Measured(curves), "s")
    assert 0.59 < share(table, fitted) <= 0.6
    assert kept(fitted, "dip") < 0.35 < 0.85 < kept(fitted, "tough")  # the dip is a flat stretch of the fitted curve
    if not lazy:
        assert any("rise where these layers get cheaper: dip" in note for note in choosing.notes)
        assert not any("rise where" in note for note in fitted.notes)


def test_the_last_interval_is_interpolated_too() -> None:
    table, trials = table_of({"a": 50_000, "b": 50_000}), Measured({"a": SMOOTH, "b": SMOOTH})
    choosing = Greedy().choose(table, Budget(macs=0.96), trials, "s")
    assert (kept(choosing, "a"), kept(choosing, "b")) == (0.96, 0.96)


def test_a_target_that_cannot_be_met_is_an_error_that_names_the_nearest() -> None:
    table, trials = table_of({"a": 50_000, "b": 40_000}, fixed=10_000), Measured({"a": SMOOTH, "b": TOUGH})
    with pytest.raises(BudgetError, match=r"cannot go below 0\.190 .* and 0\.100 .* let more layers be replaced"):
        Greedy().choose(table, Budget(macs=0.1), trials, "s")
    with pytest.raises(BudgetError, match=r"cannot go below 0\.190 .* no less than 1/10 of a layer; give it more cand"):
        Greedy().choose(table, Budget(macs=0.15), trials, "s")
    assert trials.asked == []
    assert share(table, Greedy().choose(table, Budget(macs=0.19), trials, "s")) == 0.19
    assert 0.14 < share(table, Greedy(candidates=40).choose(table, Budget(macs=0.15), trials, "s")) <= 0.15


# Lazy evaluation ----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, dict[str, list[float]], float]:
    """Layers with scores that never fall with cost, flat stretches among them, and predictions good or bad."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, levels = draw(st.integers(1, 6)), draw(st.sampled_from([3, 8, 1000]))
    names = [f"layer {i}" for i in range(count)]
    curves = {}
    for name in names:
        curve = np.sort(rng.random(10) ** rng.uniform(0.2, 3))
        curves[name] = [*(np.floor(curve * levels) / levels), 1.0]
    noise = draw(st.sampled_from([0.0, 0.3, 3.0]))
    losses = {
        name: [
            float((1 - np.interp(r / 100, np.linspace(0, 1, 11), c)) * np.exp(noise * rng.normal())) for r in range(100)
        ]
        for name, c in curves.items()
    }
    table = table_of(
        {name: int(rng.integers(1_000, 100_000)) for name in names}, losses, fixed=int(rng.integers(0, 9_000))
    )
    least = 0.1 + 0.9 * (table.now.macs - sum(o[0].cost.macs for o in table.options.values())) / table.now.macs
    return table, curves, draw(st.floats(least + 0.01, 0.99))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_lazy_gives_the_plan_of_the_whole_table(problem: tuple[Table, dict[str, list[float]], float]) -> None:
    table, curves, target = problem
    lazy, whole = Measured(curves), Measured(curves)
    few = Greedy().choose(table, Budget(macs=target), lazy, "s")
    assert few.plan == Greedy(lazy=False).choose(table, Budget(macs=target), whole, "s").plan
    assert few.plan == Greedy(monotone=True).choose(table, Budget(macs=target), Measured(curves), "s").plan
    assert set(lazy.asked) <= set(whole.asked)
    assert len(set(lazy.asked)) == len(lazy.asked)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_no_option_fits_into_what_is_left(problem: tuple[Table, dict[str, list[float]], float]) -> None:
    table, curves, target = problem
    choosing = Greedy().choose(table, Budget(macs=target), Measured(curves), "s")
    left = target * table.start.macs - table.cost(choosing.plan).macs
    assert left >= 0
    for layer, options in table.options.items():
        form = choosing.plan.layers.get(layer)
        cost = options[0].cost.macs if form is None else table.find(layer, form).cost.macs
        assert all(not cost < option.cost.macs <= cost + left for option in options)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 45), (1.0, 70)])
def test_lazy_asks_for_far_fewer_scores(noise: float, most: int) -> None:
    """Of 20 layers × 9 = 180, with predictions that order the options right, or are wrong by a factor of e."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        names = [f"layer {i}" for i in range(20)]
        shares = np.linspace(0, 1, 11)
        drops = {n: np.exp(rng.normal()) * 0.05 * (1 - shares) ** rng.uniform(0.5, 4) / (shares + 0.02) for n in names}
        curves = {n: list(0.95 - 0.9 * (1 - np.exp(-drop))) for n, drop in drops.items()}
        losses = {
            n: list(np.interp(np.arange(100) / 100, shares, drop) * np.exp(noise * rng.normal()))
            for n, drop in drops.items()
        }
        table = table_of({n: int(rng.integers(10_000, 1_000_000)) for n in names}, losses)
        for target in (0.3, 0.5, 0.75):
            trials = Measured(curves)
            choosing = Greedy().choose(table, Budget(macs=target), trials, "s")
            assert len(trials.asked) <= most
            assert any(f"{len(trials.asked)} of 180" in note for note in choosing.notes)


def test_layers_are_asked_about_in_calling_order() -> None:
    """So that a replay of what lies before a layer can go on from the layer before."""
    curves = {f"layer {i}": SMOOTH for i in range(9)}
    trials = Measured(curves)
    Greedy(lazy=False).choose(table_of(dict.fromkeys(curves, 1000)), Budget(macs=0.5), trials, "s")
    assert [layer for layer, _ in trials.asked] == [name for name in curves for _ in range(9)]
    trials = Measured(curves)
    Greedy().choose(table_of(dict.fromkeys(curves, 1000)), Budget(macs=0.5), trials, "s")
    assert [layer for layer, _ in trials.asked[:9]] == list(curves)


# Settings and corners -----------------------------------------------------------------------------------------------


def test_a_network_within_the_limit_is_left_alone() -> None:
    table, trials = table_of({"a": 1000}), Measured({"a": SMOOTH})
    choosing = Greedy().choose(table, Budget(macs=1.0), trials, "s")
    assert (dict(choosing.plan.layers), trials.asked) == ({}, [])
    assert choosing.notes == ("macs is within the limit as it is",)


@pytest.mark.parametrize("budget", [Budget(macs=0.5, params=0.5), Budget(drop=0.1), Budget(macs=0.5, drop=0.1)])
def test_exactly_one_cost(budget: Budget) -> None:
    (problem,) = Greedy().problems(budget)
    assert "greedy takes exactly one cost limit" in problem
    assert problem.endswith("choose with 'optimal', which takes several and a drop")
    with pytest.raises(BudgetError, match=re.escape(problem)):
        Greedy().choose(table_of({"a": 1000}), budget, Measured({"a": SMOOTH}), "s")
    assert Greedy().problems(Budget(energy="3 mJ")) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidates": 1}, "candidates is 1: give a whole number from 2 up"),
        ({"candidates": 2.5}, "candidates is 2.5, a float: it takes int"),
        ({"candidates": True}, "candidates is True, a bool: it takes int"),
        ({"candidates": "x"}, "candidates is 'x', a str: it takes int"),
        ({"monotone": "no"}, "monotone is 'no', a str: it takes bool"),
        ({"lazy": 1}, "lazy is 1, a int: it takes bool"),
    ],
)
def test_settings_that_cannot_be_used_are_said(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Greedy(**settings)
    assert refused.value.problems == (f"Greedy: {said}",)


def test_coarse_options_are_said_to_miss_the_target() -> None:
    whole, half = Cost(macs=1000), Cost(macs=300)
    options = {n: (Option(n, None, whole, 0.0), Option(n, LowRank(30), half, 0.1)) for n in ("a", "b")}
    table = Table(options, Cost(macs=2000), Cost(macs=2000))
    choosing = Greedy().choose(table, Budget(macs=0.8), Measured({"a": SMOOTH, "b": TOUGH}), "s")
    assert share(table, choosing) == 0.65
    assert any("no option lies nearer below it" in note for note in choosing.notes)


def test_layers_without_a_candidate_are_named() -> None:
    table = table_of({"a": 50_000, "b": 50_000})
    stiff = {**table.options, "b": (table.options["b"][0], table.options["b"][95])}
    trials = Measured({"a": SMOOTH, "b": SMOOTH})
    choosing = Greedy().choose(Table(stiff, table.now, table.start), Budget(macs=0.7), trials, "s")
    assert "b" not in choosing.plan.layers
    assert "no option is at or below 0.9 of the cost of b" in choosing.notes


# The mathematics ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_isotonic_fit_is_scikit_learns(values: list[float]) -> None:
    expected = IsotonicRegression().fit_transform(np.arange(len(values)), values)
    np.testing.assert_allclose(isotonic(np.array(values)), expected, atol=1e-9)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_descent_is_the_walk_of_the_guide(seed: int) -> None:
    """Against a search over a fine grid of levels, each layer walking down its interpolated curve step by step."""
    rng = np.random.default_rng(seed)
    shares = [np.array([*np.sort(rng.uniform(0.05, 0.95, 5)), 1.0]) for _ in range(3)]
    scores = [np.array([*rng.random(5) * 0.9, 0.9]) for _ in range(3)]  # rising and falling
    wholes = rng.uniform(1, 5, 3)
    room = float(rng.uniform(sum(w * s[0] for w, s in zip(wholes, shares, strict=True)), wholes.sum() * 0.99))

    def walk(x: np.ndarray, y: np.ndarray, level: float) -> float:
        steps = np.union1d(np.linspace(1, x[0], 1500), x)[::-1]  # with the points: the narrowest dip is seen
        below = np.flatnonzero(np.interp(steps, x, y) < level)
        return float(steps[max(below[0] - 1, 0)]) if len(below) else float(x[0])

    found = descend(shares, scores, wholes, room)
    assert found.ratios @ wholes == pytest.approx(room)
    for level, holds in ((found.level + 0.003, np.greater_equal), (found.level - 0.003, np.less_equal)):
        ratios = np.array([walk(x, y, level) for x, y in zip(shares, scores, strict=True)])
        assert holds(ratios + (0.01 if holds is np.greater_equal else -0.01), found.ratios).all()
