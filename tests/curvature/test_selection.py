"""Choosing a layer's inputs from moments: against dense least squares on samples, exhaustive search and LARS."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import lars_path
from torch import Tensor

from featherweight.curvature.selection import (
    Consumer,
    Elimination,
    greedy_elimination,
    lasso,
    removal_losses,
)
from featherweight.curvature.solve import damp, least_squares


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(count: int, width: int, seed: int) -> Tensor:
    """(count, width) correlated inputs."""
    return random(count, width, seed=seed) @ random(width, width, seed=seed + 1) + 0.3


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@st.composite
def consumers(draw: st.DrawFn, units: int | None = None, cross: bool | None = None) -> Consumer:
    """A layer whose units have some columns each, here and there none, in any order, and which has further columns."""
    seed = draw(st.integers(0, 10_000))
    count = units or draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    width = max(1, sum(sizes) + draw(st.integers(0, 2)))
    places = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    outputs = draw(st.integers(1, 6))
    gram = moment(samples(draw(st.sampled_from([3, 40])), width, seed))
    return Consumer(
        weight=random(outputs, width, seed=seed + 2),
        gram=gram * 10.0 ** draw(st.integers(-12, 12)),
        units=list(places[: sum(sizes)].split(sizes)),
        gradients=moment(random(9, outputs, seed=seed + 3)) if draw(st.booleans()) else None,
        positions=draw(st.sampled_from([1.0, 49.0])),
        cross=random(outputs, width, seed=seed + 4) @ gram
        if (draw(st.booleans()) if cross is None else cross)
        else None,
    )


def error(consumer: Consumer, weight: Tensor) -> float:
    """½ · positions · E‖t − Ŵ x‖² under the gradients, up to what no weight changes, with the ridge that damping is."""
    gram = damp(consumer.gram, 0.0)
    ridge = damp(consumer.gram) - gram
    cross = consumer.weight @ gram if consumer.cross is None else consumer.cross
    metric = torch.eye(len(weight)).double() if consumer.gradients is None else consumer.gradients
    away = weight - consumer.weight
    square = weight @ gram @ weight.T - 2 * cross @ weight.T + away @ ridge @ away.T
    return 0.5 * consumer.positions * float((metric * square).sum())


def best(consumer: Consumer, gone: set[int]) -> float:
    """The least error of any weight without these units, by dense least squares."""
    gram = damp(consumer.gram)
    ridge = gram - damp(consumer.gram, 0.0)
    cross = (consumer.weight @ gram) if consumer.cross is None else consumer.cross + consumer.weight @ ridge
    out = {int(column) for unit in gone for column in consumer.units[unit]}
    columns = [column for column in range(len(gram)) if column not in out]
    weight = torch.zeros_like(consumer.weight)
    if columns:
        solution, *_ = np.linalg.lstsq(gram[columns][:, columns].numpy(), cross[:, columns].T.numpy(), rcond=None)
        weight[:, columns] = torch.from_numpy(solution).T
    return error(consumer, weight)


def rise(several: list[Consumer], gone: set[int]) -> float:
    return sum(best(one, gone) - best(one, set()) for one in several)


def near(several: list[Consumer]) -> float:
    """What rounding may do to a loss: a little of all there is to lose."""
    return 1e-7 * sum(rise([one], set(range(len(one.units)))) for one in several) + 1e-30


@st.composite
def groups(draw: st.DrawFn, cross: bool | None = None) -> list[Consumer]:
    """One to three layers that read the same units."""
    units = draw(st.integers(1, 5))
    return draw(st.lists(consumers(units, cross), min_size=1, max_size=3))


@settings(max_examples=60, deadline=None)
@given(groups())
def test_a_units_loss_is_what_the_best_refit_without_it_loses(several: list[Consumer]) -> None:
    found = removal_losses(several)
    expected = [rise(several, {unit}) for unit in range(len(several[0].units))]
    np.testing.assert_allclose(found.refitted, expected, rtol=1e-6, atol=near(several))


@settings(max_examples=40, deadline=None)
@given(groups(cross=False))
def test_without_a_refit_it_is_what_the_weight_with_those_columns_zero_loses(several: list[Consumer]) -> None:
    found = removal_losses(several)
    for unit, loss in enumerate(found.unrefitted.tolist()):
        expected = 0.0
        for one in several:
            weight = one.weight.clone()
            weight[:, one.units[unit]] = 0
            expected += error(one, weight) - error(one, one.weight)
        assert math.isclose(loss, expected, rel_tol=1e-6, abs_tol=near(several))
    assert bool((found.refitted <= found.unrefitted * (1 + 1e-9) + near(several)).all())


@settings(max_examples=40, deadline=None)
@given(groups(), st.integers(1, 4))
def test_after_any_number_of_removals_the_loss_is_that_of_the_best_weight(
    several: list[Consumer], at_once: int
) -> None:
    run = greedy_elimination(several, at_once=at_once)
    units = len(several[0].units)
    assert sorted(run.order.tolist()) == list(range(units))
    assert run.loss(units) == 0
    assert bool((run.losses.diff() >= 0).all())
    for count in range(units):
        kept = run.kept(count).tolist()
        assert sorted(kept) == kept
        assert len(kept) == count
        gone = set(range(units)) - set(kept)
        assert math.isclose(run.loss(count), rise(several, gone), rel_tol=1e-5, abs_tol=near(several))


@settings(max_examples=30, deadline=None)
@given(groups())
def test_every_removal_is_the_best_that_exhaustive_search_finds(several: list[Consumer]) -> None:
    run = greedy_elimination(several)
    gone: set[int] = set()
    for unit in run.order.tolist():
        left = set(range(len(several[0].units))) - gone
        least = min(rise(several, gone | {other}) for other in left)
        assert rise(several, gone | {unit}) <= least * (1 + 1e-5) + near(several)
        gone.add(unit)


def test_many_units_take_the_same_path_as_dense_least_squares() -> None:
    """Enough of them for the matrices to be cut down on the way, at a rate that is checked step by step."""
    channels, taps = 24, 4
    width = channels * taps
    one = Consumer(
        random(10, width, seed=0), moment(samples(300, width, 1)), torch.arange(width).reshape(channels, taps)
    )
    for at_once in (1, 5):
        run = greedy_elimination([one], left=3, at_once=at_once)
        for count in (20, 11, 4, 3):
            gone = set(range(channels)) - set(run.kept(count).tolist())
            assert math.isclose(run.loss(count), rise([one], gone), rel_tol=1e-8)
    with pytest.raises(ValueError, match="2 units were asked for: this elimination answers for 3 to 24"):
        run.kept(2)
    with pytest.raises(ValueError, match="25 units"):
        run.loss(25)


def test_the_greedy_choice_is_near_the_best_of_all_and_sees_what_single_losses_do_not() -> None:
    # Units 0 and 1 are nearly the same signal: each alone is free to go, both together are not.
    x = samples(500, 6, 0)
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    one = Consumer(torch.ones(1, 6).double(), moment(x), torch.arange(6)[:, None])
    alone = removal_losses([one]).refitted
    assert set(alone.argsort()[:2].tolist()) == {0, 1}
    run = greedy_elimination([one])
    assert len({0, 1} & set(run.order[:2].tolist())) == 1
    for count in (2, 3, 4):
        least = min(rise([one], set(range(6)) - set(kept)) for kept in itertools.combinations(range(6), count))
        assert run.loss(count) <= 1.5 * least


@settings(max_examples=20, deadline=None)
@given(groups(), st.data())
def test_what_must_stay_stays(several: list[Consumer], data: st.DataObject) -> None:
    units = len(several[0].units)
    keep = data.draw(st.sets(st.integers(0, units - 1)))
    left = data.draw(st.integers(0, units))
    run = greedy_elimination(several, left=left, keep=keep)
    assert len(run.order) == units - max(left, len(keep))
    assert not keep & set(run.order.tolist())
    for count, kept in zip(
        range(len(keep), units + 1), lasso(several, range(len(keep), units + 1), keep=keep), strict=True
    ):
        assert keep <= set(kept.tolist())
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == count


@settings(max_examples=30, deadline=None)
@given(groups(), st.integers(0, 100))
def test_losses_do_not_depend_on_how_units_are_numbered_or_units_measured(several: list[Consumer], seed: int) -> None:
    units = len(several[0].units)
    before = removal_losses(several).refitted
    mixed = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    renumbered = [replace(one, units=[one.units[int(unit)] for unit in mixed]) for one in several]
    torch.testing.assert_close(removal_losses(renumbered).refitted, before[mixed], rtol=1e-9, atol=near(several))
    # Inputs twice as large into weights half as large are the same layer; outputs turned with their gradients are too.
    turned = []
    for one in several:
        turn = torch.linalg.qr(random(len(one.weight), len(one.weight), seed=seed)).Q
        metric = torch.eye(len(one.weight)).double() if one.gradients is None else one.gradients
        turned.append(
            replace(
                one,
                weight=turn @ one.weight / 2,
                gram=4 * one.gram,
                gradients=turn @ metric @ turn.T,
                cross=None if one.cross is None else 2 * turn @ one.cross,
            )
        )
    torch.testing.assert_close(removal_losses(turned).refitted, before, rtol=1e-6, atol=near(several))


def test_a_consumer_that_no_data_reaches_or_no_loss_sees_says_nothing() -> None:
    seen = Consumer(random(3, 4, seed=0), moment(samples(20, 4, 1)), torch.arange(4)[:, None])
    dark = replace(seen, gram=torch.zeros(4, 4))
    flat = replace(seen, gradients=torch.zeros(3, 3))
    for silent in (dark, flat):
        assert removal_losses([silent]).refitted.tolist() == [0.0] * 4
        assert greedy_elimination([silent]).losses.tolist() == [0.0] * 5
        torch.testing.assert_close(removal_losses([seen, silent]).refitted, removal_losses([seen]).refitted)
        for one, other in zip(lasso([seen, silent], [1, 2, 3]), lasso([seen], [1, 2, 3]), strict=True):
            assert torch.equal(one, other)
        assert [len(kept) for kept in lasso([silent], [0, 2, 4])] == [0, 2, 4]


def test_more_samples_than_columns_are_not_needed() -> None:
    """A singular gram has removals that the damping alone makes finite; they are as small as it is."""
    x = samples(5, 12, 0)
    one = Consumer(random(4, 12, seed=1), moment(x), torch.arange(12).reshape(6, 2))
    run = greedy_elimination([one])
    everything = run.loss(0)
    assert bool(torch.isfinite(run.losses).all())
    assert run.loss(4) < 1e-2 * everything
    assert math.isclose(everything, -error(one, one.weight) + error(one, torch.zeros_like(one.weight)), rel_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.booleans(), st.booleans())
def test_lasso_supports_are_those_of_the_exact_path(seed: int, units: int, weighed: bool, asymmetric: bool) -> None:
    """Least-angle regression on the samples themselves, one feature a unit, knows every support on the path."""
    several, features, targets = [], [], []
    for index in range(2):
        taps, outputs = 1 + index, 3
        x = samples(30, units * taps, seed + 10 * index)
        weight = random(outputs, units * taps, seed=seed + 10 * index + 2)
        # What the layer should answer may be anything; then some gates want to be negative.
        t = x @ (random(outputs, units * taps, seed=seed + 5) if asymmetric else weight).T
        metric = moment(random(9, outputs, seed=seed + 3)) if weighed else torch.eye(outputs).double()
        several.append(
            Consumer(
                weight,
                moment(x),
                torch.arange(units * taps).reshape(units, taps),
                metric if weighed else None,
                positions=1.0 + index,
                cross=t.T @ x / len(x) if asymmetric else None,
            )
        )
        half = math.sqrt(1 + index) * torch.linalg.cholesky(metric)
        parts = x.reshape(30, units, taps), weight.reshape(outputs, units, taps)
        features.append(
            (torch.einsum("nut,out->nou", *parts).transpose(1, 2) @ half).transpose(1, 2).reshape(-1, units)
        )
        targets.append((t @ half).reshape(-1))
    _, _, path = lars_path(torch.cat(features).numpy(), torch.cat(targets).numpy(), method="lasso")
    path = np.hstack([path, (path[:, 1:] + path[:, :-1]) / 2])  # the path is straight between its knots
    supports = [set(np.flatnonzero(np.abs(gates) > 1e-9).tolist()) for gates in path.T]
    sizes = {len(support) for support in supports}
    for count, kept in enumerate(lasso(several, range(units), tolerance=1e-9)):
        if count in sizes:
            assert set(kept.tolist()) in supports


def test_lasso_finds_the_units_that_an_exactly_sparse_answer_needs() -> None:
    channels, taps, needed = 12, 3, {1, 4, 5, 10}
    width = channels * taps
    weight, x = random(8, width, seed=0), random(400, width, seed=1) + 0.5 * random(400, 1, seed=2)
    sparse = weight.clone().reshape(8, channels, taps)
    sparse[:, sorted(set(range(channels)) - needed)] = 0
    gram = moment(x)
    one = Consumer(
        weight, gram, torch.arange(width).reshape(channels, taps), cross=sparse.reshape(8, width) @ gram, positions=7.0
    )
    assert set(lasso([one], [4])[0].tolist()) == needed
    assert lasso([one], [12, 4, 12])[1].tolist() == sorted(needed)
    assert set(greedy_elimination([one]).kept(4).tolist()) == needed
    assert 3 in lasso([one], [4], keep=[3])[0]


def test_lasso_takes_one_of_two_units_that_say_the_same() -> None:
    x = samples(200, 5, 0)
    x[:, 1] = x[:, 0] + 1e-4 * x[:, 1]
    one = Consumer(torch.tensor([[3.0, 2.0, 1.0, 1.0, 1.0]]), moment(x), torch.arange(5)[:, None])
    (kept,) = lasso([one], [3])
    assert 0 in kept
    assert 1 not in kept


def test_equal_units_and_dead_ones_still_give_the_count_asked_for() -> None:
    alike = Consumer(torch.ones(1, 4), torch.eye(4), torch.arange(4)[:, None])
    assert [len(kept) for kept in lasso([alike], [0, 1, 2, 3, 4])] == [0, 1, 2, 3, 4]
    dead = replace(alike, weight=torch.tensor([[0.0, 1.0, 0.0, 2.0]]))
    assert [kept.tolist() for kept in lasso([dead], [1, 2])] == [[3], [1, 3]]
    assert len(lasso([dead], [3])[0]) == 3
    assert [kept.tolist() for kept in lasso([dead], [1, 2], keep=[0])] == [[0], [0, 3]]


def test_a_column_of_no_unit_answers_what_it_can_before_the_gates_do() -> None:
    """Of two units the first says what the free column says already, and the second what is missing."""
    x = random(300, 3, seed=0)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    weight = torch.ones(1, 3).double()
    t = x[:, :1] + 0.5 * x[:, 2:]
    one = Consumer(weight, moment(x), [torch.tensor([1]), torch.tensor([2])], cross=t.T @ x / len(x))
    assert lasso([one], [1])[0].tolist() == [1]
    assert removal_losses([one]).refitted.argmax() == 1
    alone = replace(one, cross=x[:, :1].T @ x / len(x))
    assert greedy_elimination([alone]).loss(0) < 1e-3 * float(moment(x)[0, 0])


def test_a_refitted_layer_loses_what_the_elimination_said() -> None:
    one = Consumer(
        random(5, 12, seed=0), moment(samples(60, 12, 1)), torch.arange(12).reshape(6, 2), moment(random(9, 5, seed=3))
    )
    run = greedy_elimination([one], damping=1e-3)
    columns = one.units[run.kept(3)].reshape(-1)
    weight = torch.zeros_like(one.weight)
    kept, cross = one.gram[columns][:, columns], one.weight @ one.gram[:, columns]
    weight[:, columns] = least_squares(kept, cross, ridge=1e-3, prior=one.weight[:, columns])
    away = one.weight - weight
    measured = 0.5 * float((one.gradients * (away @ one.gram @ away.T)).sum())
    assert math.isclose(run.loss(3), measured, rel_tol=0.02)


GOOD = Consumer(torch.ones(2, 4), torch.eye(4), torch.arange(4)[:, None])


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ([], "without a consumer"),
        ([replace(GOOD, units=[])], "no units"),
        ([replace(GOOD, gram=torch.eye(3))], r"consumer 0: gram is \(3, 3\), not \(4, 4\)"),
        ([GOOD, replace(GOOD, gradients=torch.eye(4))], r"consumer 1: gradients is \(4, 4\), not \(2, 2\)"),
        ([replace(GOOD, cross=torch.eye(4))], r"cross is \(4, 4\), not \(2, 4\)"),
        ([GOOD, replace(GOOD, units=[torch.tensor([0])])], "consumer 1 has 1 units, consumer 0 has 4"),
        ([replace(GOOD, units=[torch.tensor([4])])], "columns outside 0 to 3"),
        ([replace(GOOD, units=[torch.tensor([-1])])], "columns outside 0 to 3"),
        ([replace(GOOD, units=[torch.tensor([1]), torch.tensor([2, 1])])], "more than one unit"),
    ],
)
def test_consumers_that_do_not_fit_are_refused(several: list[Consumer], message: str) -> None:
    for choose in (removal_losses, greedy_elimination, lambda several: lasso(several, [0])):
        with pytest.raises(ValueError, match=message):
            choose(several)


def test_settings_out_of_range_are_refused() -> None:
    for damping in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="damping"):
            removal_losses([GOOD], damping=damping)
    with pytest.raises(ValueError, match=r"keep holds \[4\]: units are numbered 0 to 3"):
        greedy_elimination([GOOD], keep=[4, 1])
    with pytest.raises(ValueError, match="left=5: there are 4 units"):
        greedy_elimination([GOOD], left=5)
    with pytest.raises(ValueError, match="at_once=0"):
        greedy_elimination([GOOD], at_once=0)
    with pytest.raises(ValueError, match="counts holds 5: there are 4 units"):
        lasso([GOOD], [2, 5])
    with pytest.raises(ValueError, match="counts holds 1: there are 4 units, 2 of which must be kept"):
        lasso([GOOD], [1], keep=[0, 3])


def test_nothing_given_is_changed() -> None:
    one = Consumer(
        random(2, 4, seed=0), moment(samples(9, 4, 0)), torch.arange(4)[:, None], torch.eye(2), cross=torch.ones(2, 4)
    )
    before = [x.clone() for x in (one.weight, one.gram, one.units, one.gradients, one.cross)]
    removal_losses([one]), greedy_elimination([one]), lasso([one], [2])
    for x, was in zip((one.weight, one.gram, one.units, one.gradients, one.cross), before, strict=True):
        assert torch.equal(x, was)


def test_float32_moments_are_worked_on_in_float64() -> None:
    one = Consumer(random(2, 4, seed=0).float(), moment(samples(9, 4, 0)).float(), torch.arange(4)[:, None])
    run: Elimination = greedy_elimination([one])
    assert run.losses.dtype == removal_losses([one]).refitted.dtype == torch.float64
