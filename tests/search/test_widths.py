"""Widths under a budget: against every choice there is, on problems small enough to try them all."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import BudgetError
from featherweight.search.widths import (
    Bill,
    Curve,
    Length,
    Term,
    alike,
    between,
    filled,
    least_loss,
    nearest,
    ranked,
    ranked_within,
)

Problem = tuple[dict[str, Curve], dict[str, Bill]]


def chain(sizes: list[int], share: float, inputs: int = 3, outputs: int = 4) -> Bill:
    """What a chain of Linear layers with hidden layers of these sizes multiplies, and a share of it as limit."""
    groups = [Length(0.0, {str(n): 1.0}) for n in range(len(sizes))]
    ends = [Length(float(inputs)), *groups, Length(float(outputs))]
    terms = tuple(Term(1.0, pair) for pair in pairwise(ends))
    bill = Bill(0.0, terms, 1.0)
    return Bill(0.0, terms, share * bill.at({str(n): size for n, size in enumerate(sizes)}))


@st.composite
def problems(draw: st.DrawFn, convex: bool, metrics: int = 1) -> Problem:
    """Two or three groups one behind the other; losses that fall as groups get wider."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=2, max_size=3))
    curves = {}
    for n, size in enumerate(sizes):
        steps = draw(st.lists(st.floats(0, 10), min_size=size - 1, max_size=size - 1))
        steps = sorted(steps) if convex else steps  # what the first units that go lose, is least
        losses = [*np.cumsum(steps)[::-1], 0.0]
        curves[str(n)] = Curve(tuple(range(1, size + 1)), tuple(map(float, losses)))
    shares = draw(st.lists(st.floats(0.02, 1.1), min_size=metrics, max_size=metrics))
    bills = {str(m): chain(sizes, share, inputs=1 + 7 * m) for m, share in enumerate(shares)}
    if draw(st.booleans()):  # a part of the cost that nothing changes
        bills["0"] = Bill(5.0, bills["0"].terms, bills["0"].limit + 5.0)
    return curves, bills


def loss(curves: dict[str, Curve], widths: dict[str, int]) -> float:
    return sum(curve.losses[curve.widths.index(widths[name])] for name, curve in curves.items())


def within(bills: dict[str, Bill], widths: dict[str, int]) -> bool:
    return all(bill.at(widths) <= bill.limit for bill in bills.values())


def every(curves: dict[str, Curve]) -> list[dict[str, int]]:
    return [dict(zip(curves, chosen, strict=True)) for chosen in product(*(curve.widths for curve in curves.values()))]


def check(problem: Problem) -> None:
    """A choice exactly where there is one; within the limits; no group could be wider; and little worse than the best.

    What a price on cost leaves open is one group's whole swing; for every limit beyond the first, one more.
    """
    curves, bills = problem
    fitting = [widths for widths in every(curves) if within(bills, widths)]
    if not fitting:
        with pytest.raises(BudgetError, match="cannot come to"):
            least_loss(curves, bills)
        return
    found = least_loss(curves, bills)
    assert all(found[name] in curve.widths for name, curve in curves.items())
    assert within(bills, found)
    best = min(loss(curves, widths) for widths in fitting)
    swing = max(max(curve.losses) - min(curve.losses) for curve in curves.values())
    assert loss(curves, found) <= best + len(bills) * swing + 1e-9
    for name, curve in curves.items():
        at = curve.widths.index(found[name])
        if at + 1 < len(curve.widths):
            assert not within(bills, {**found, name: curve.widths[at + 1]}), f"{name} could be wider at no loss"


@settings(max_examples=120, deadline=None)
@given(problems(convex=True))
def test_convex_losses_against_every_choice(problem: Problem):
    check(problem)


@settings(max_examples=120, deadline=None)
@given(problems(convex=False))
def test_losses_of_any_shape_against_every_choice(problem: Problem):
    check(problem)


@settings(max_examples=80, deadline=None)
@given(problems(convex=True, metrics=2))
def test_two_bills_against_every_choice(problem: Problem):
    check(problem)


def test_typical_losses_come_near_the_best():
    """Over many problems with the losses that networks have, falling steeply at first, the mean shortfall is small."""
    generator = np.random.default_rng(0)
    worse = []
    for _ in range(60):
        sizes = generator.integers(6, 13, size=3).tolist()
        curves = {}
        for n, size in enumerate(sizes):
            steps = np.sort(generator.exponential(size=size - 1) ** 2)
            losses = [*np.cumsum(steps)[::-1].tolist(), 0.0]
            curves[str(n)] = Curve(tuple(range(1, size + 1)), tuple(losses))
        bills = {"macs": chain(sizes, float(generator.uniform(0.2, 0.8)))}
        best = min(loss(curves, widths) for widths in every(curves) if within(bills, widths))
        worse.append(loss(curves, least_loss(curves, bills)) / max(best, 1e-9))
    assert np.mean(worse) < 1.1
    assert max(worse) < 2


@settings(max_examples=80, deadline=None)
@given(problems(convex=True, metrics=2))
def test_the_same_share_is_the_largest_that_fits_filled_up(problem: Problem):
    curves, bills = problem
    if not within(bills, {name: curve.widths[0] for name, curve in curves.items()}):
        with pytest.raises(BudgetError, match="cannot come to"):
            alike(curves, bills)
        return
    found = alike(curves, bills)
    assert within(bills, found)
    shares = [n / 1000 for n in range(1001)]
    of_share = [{name: nearest(curve.widths, s * curve.widths[-1]) for name, curve in curves.items()} for s in shares]
    largest = [widths for widths in of_share if within(bills, widths)][-1]
    assert all(found[name] >= width for name, width in largest.items())
    for name, curve in curves.items():  # and then filled up
        at = curve.widths.index(found[name])
        assert at + 1 == len(curve.widths) or not within(bills, {**found, name: curve.widths[at + 1]})


def test_what_is_left_of_the_same_share_goes_to_groups_one_step_each_first():
    losses = {"a": (9.0, 5.0, 0.0), "b": (1.5, 0.5, 0.0), "c": (0.6, 0.1, 0.0)}
    curves = {name: Curve((1, 2, 3), lost) for name, lost in losses.items()}
    bill = Bill(0.0, tuple(Term(1.0, (Length(0.0, {name: 1.0}),)) for name in curves), 5.0)
    assert alike(curves, {"macs": bill}) == {"a": 2, "b": 2, "c": 1}


def test_filling_up_asks_another_judge_and_never_again_for_a_group_that_was_too_dear():
    curves = {name: Curve((1, 2, 3), (4.0, 1.0, 0.0)) for name in ("a", "b")}
    bill = Bill(0.0, tuple(Term(1.0, (Length(0.0, {name: 1.0}),)) for name in curves), 1.0)
    asked: list[dict[str, int]] = []

    def fits(widths: dict[str, int]) -> bool:
        asked.append(widths)
        return widths["a"] < 2

    assert filled(curves, {"macs": bill}, {"a": 1, "b": 1}, fits) == {"a": 1, "b": 3}
    assert [widths["a"] for widths in asked] == [2, 1, 1]


@pytest.mark.parametrize("select", [least_loss, alike])
def test_a_limit_that_everything_keeps_leaves_all(select):
    curves = {"0": Curve((2, 4, 6), (3.0, 1.0, 0.0)), "1": Curve((1, 5), (9.0, 0.0))}
    bills = {"macs": chain([6, 5], 1.0), "params": chain([6, 5], 2.0)}
    assert select(curves, bills) == {"0": 6, "1": 5}


@pytest.mark.parametrize("select", [least_loss, alike])
def test_the_message_says_what_the_least_is(select):
    curves = {"0": Curve((2, 4), (1.0, 0.0))}
    bill = Bill(0.0, (Term(1.0, (Length(0.0, {"0": 1.0}),)),), 1.0)
    with pytest.raises(BudgetError, match=r"params cannot come to 0\.25 of what it is: at the least .* comes to 0\.5"):
        select(curves, {"params": bill})


def test_a_limit_of_exactly_the_least_is_met():
    curves = {"0": Curve((1, 2, 3), (5.0, 1.0, 0.0)), "1": Curve((1, 2, 3), (5.0, 1.0, 0.0))}
    whole = chain([3, 3], 1.0)
    bill = Bill(0.0, whole.terms, whole.at({"0": 1, "1": 1}))
    assert least_loss(curves, {"macs": bill}) == {"0": 1, "1": 1}
    assert alike(curves, {"macs": bill}) == {"0": 1, "1": 1}


def test_what_costs_the_most_for_its_loss_goes():
    """Two groups that lose the same, one of which is between wider layers."""
    curves = {name: Curve((4, 8), (1.0, 0.0)) for name in ("narrow", "wide")}
    terms = tuple(Term(inputs, (Length(0.0, {name: 1.0}),)) for name, inputs in (("narrow", 2.0), ("wide", 20.0)))
    assert least_loss(curves, {"macs": Bill(0.0, terms, 120.0)}) == {"narrow": 8, "wide": 4}


def test_of_equal_losses_the_budget_is_used_up():
    """Units that lose nothing stay as long as there is room, and no group is left narrower than it must be."""
    curves = {name: Curve(tuple(range(1, 9)), (0.0,) * 8) for name in ("0", "1")}
    bill = chain([8, 8], 0.5)
    found = least_loss(curves, {"macs": bill})
    assert within({"macs": bill}, found)
    assert all(bill.at({**found, name: width + 1}) > bill.limit for name, width in found.items() if width < 8)


def test_a_group_in_no_bill_stays_whole():
    curves = {"0": Curve((1, 2), (1.0, 0.0)), "free": Curve((1, 2), (0.0, 0.0))}
    bill = Bill(0.0, (Term(1.0, (Length(0.0, {"0": 1.0}),)),), 1.0)
    assert least_loss(curves, {"macs": bill}) == {"0": 1, "free": 2}


def test_lengths_that_two_groups_share():
    """A concatenation: 2 units in the other layer for every unit of the one group, 1 of the other, and 3 that stay."""
    length = Length(3.0, {"a": 2.0, "b": 1.0})
    assert length.at({"a": 4, "b": 5}) == 16
    assert Term(0.5, (length, Length(10.0))).at({"a": 4, "b": 5}) == 80
    curves = {"a": Curve((1, 2, 3), (4.0, 1.0, 0.0)), "b": Curve((1, 2, 3), (4.0, 1.0, 0.0))}
    bill = Bill(0.0, (Term(1.0, (length,)),), 9.0)
    assert least_loss(curves, {"macs": bill}) == {"a": 2, "b": 2}


def test_the_nearest_width_and_of_two_the_narrower():
    assert nearest((2, 4, 8), 5.1) == 4
    assert nearest((2, 4, 8), 6) == 4
    assert nearest((2, 4, 8), 0) == 2


@settings(max_examples=30, deadline=None)
@given(problem=problems(convex=True))
@pytest.mark.parametrize("select", [between, ranked], ids=lambda select: select.__name__)
def test_other_ways_keep_the_limits_too(select, problem):
    curves, bills = problem
    try:
        chosen = select(curves, bills)
    except BudgetError:
        assert not within(bills, {name: curve.widths[0] for name, curve in curves.items()})
        return
    assert within(bills, chosen)
    assert all(chosen[name] in curve.widths for name, curve in curves.items())


def test_one_ranking_takes_the_units_that_lose_least_wherever_they_are():
    sizes = [8, 8]
    curves = {
        "0": Curve(tuple(range(1, 9)), tuple(float(8 - n) ** 2 * 0.01 for n in range(1, 9))),
        "1": Curve(tuple(range(1, 9)), tuple(float(8 - n) ** 2 for n in range(1, 9))),
    }
    bills = {"macs": chain(sizes, 0.6)}
    assert ranked(curves, bills)["1"] == 8
    assert ranked(curves, bills)["0"] < 8
    apart = ranked_within(curves, bills, {"0": "one", "1": "other"})
    assert abs(apart["0"] - apart["1"]) <= 2, "each class keeps the same share"
