"""Schedules at their ends and between, rounds that stop where they should, penalties against plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.prune.schedules import (
    cubic,
    geometric,
    group_lasso,
    growing_factor,
    linear,
    one_shot,
    rounds,
    slimming,
    weight_penalty,
)

SHARES = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([linear, cubic]), SHARES, SHARES, st.integers(-5, 50), st.integers(1, 80), st.integers(1, 100))
def test_gradual_schedules_go_from_initial_to_final_and_never_back(
    schedule: Callable[..., float], one: float, other: float, begin: int, length: int, every: int
) -> None:
    initial, final = sorted((one, other))
    end = begin + length

    def share(step: int) -> float:
        return schedule(step, final=final, end=end, begin=begin, initial=initial, every=every)

    values = [share(step) for step in range(begin - 2, end + 3)]
    assert values[0] == values[1] == pytest.approx(initial)
    assert values[-1] == values[-2] == values[-3] == pytest.approx(final)
    assert all(before <= after + 1e-12 for before, after in itertools.pairwise(values))
    for step in range(begin, end):
        if (step - begin) % every:
            assert share(step) == share(step - 1)


def test_the_cubic_schedule_is_that_of_the_paper() -> None:
    for step in range(10, 60):
        expected = 0.9 + (0.1 - 0.9) * (1 - (step - 10) / 50) ** 3
        assert cubic(step, final=0.9, initial=0.1, begin=10, end=60) == pytest.approx(expected)
    # Pruned every 20th step only, and at the end.
    assert cubic(49, final=0.9, initial=0.1, begin=10, end=60, every=20) == pytest.approx(0.9 - 0.8 * 0.6**3)
    assert cubic(50, final=0.9, initial=0.1, begin=10, end=60, every=20) == pytest.approx(0.9 - 0.8 * 0.2**3)
    assert cubic(60, final=0.9, initial=0.1, begin=10, end=60, every=20) == 0.9


def test_one_shot_is_all_at_once() -> None:
    assert [one_shot(step, final=0.5, begin=2) for step in range(4)] == [0.0, 0.0, 0.5, 0.5]
    for schedule in (linear, cubic):
        assert [schedule(step, final=0.5, begin=2, end=2) for step in range(4)] == [0.0, 0.0, 0.5, 0.5]


def test_a_geometric_schedule_takes_the_same_share_of_what_is_left() -> None:
    left = [1 - geometric(step, each=0.2) for step in range(6)]
    assert left[0] == 1
    assert all(after / before == pytest.approx(0.8) for before, after in itertools.pairwise(left))
    assert geometric(50, each=0.2, final=0.7) == 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_shot(0, final=1.1), r"final=1.1: a share lies between 0 and 1"),
        (lambda: linear(0, final=-0.1, end=3), "final=-0.1"),
        (lambda: cubic(0, final=0.5, initial=2.0, end=3), "initial=2.0"),
        (lambda: cubic(0, final=0.5, begin=4, end=3), "end=3 comes before begin=4"),
        (lambda: linear(0, final=0.5, end=3, every=0), "every=0"),
        (lambda: geometric(1, each=math.nan), "each=nan"),
        (lambda: growing_factor(0, increment=0.0, every=1, ceiling=1.0), "increment=0.0: it has to be above 0"),
        (lambda: growing_factor(0, increment=0.1, every=0, ceiling=1.0), "every=0"),
        (lambda: growing_factor(0, increment=0.1, every=1, ceiling=-1.0), "ceiling=-1.0"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def run(scores: dict[float, float], shares: list[float], max_drop: float = 0.02) -> tuple[list[float], float]:
    """The shares that were tried and the one returned, for a model whose score is known at every share."""
    asked = rounds(shares, baseline=0.9, max_drop=max_drop)
    tried: list[float] = []
    try:
        share = next(asked)
        while True:
            tried.append(share)
            share = asked.send(scores[share])
    except StopIteration as stop:
        return tried, stop.value


def test_rounds_end_at_the_first_score_that_dropped_too_far() -> None:
    scores = {0.2: 0.91, 0.4: 0.89, 0.6: 0.87, 0.8: 0.9}
    assert run(scores, [0.2, 0.4, 0.6, 0.8]) == ([0.2, 0.4, 0.6], 0.4)
    assert run(scores, [0.2, 0.4]) == ([0.2, 0.4], 0.4)
    assert run(scores, [0.6, 0.8]) == ([0.6], 0.0)
    assert run(scores, [0.2, 0.4], max_drop=0.0) == ([0.2, 0.4], 0.2)
    assert run({0.2: 0.9, 0.4: 0.8999}, [0.2, 0.4], max_drop=0.0) == ([0.2, 0.4], 0.2)
    assert run(scores, []) == ([], 0.0)


@pytest.mark.parametrize(
    ("shares", "message"),
    [([0.4, 0.4], "0.4 comes after 0.4"), ([0.4, 0.2], "have to rise"), ([0.2, 1.2], "share=1.2")],
)
def test_rounds_that_do_not_go_on_are_refused(shares: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run({0.2: 0.9, 0.4: 0.9}, shares)


def test_a_round_without_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the score after pruning 0\.2 is NaN"):
        run({0.2: math.nan}, [0.2, 0.4])


def test_a_growing_factor_climbs_in_steps_to_its_ceiling() -> None:
    found = [growing_factor(step, increment=0.1, every=5, ceiling=0.25, begin=3) for step in range(20)]
    assert found == pytest.approx([0.0] * 3 + [0.1] * 5 + [0.2] * 5 + [0.25] * 7)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_a_weight_penaltys_gradient_is_the_factor_times_the_weight() -> None:
    a, b, factors = random(4, 3, 2, seed=0), random(4, 5, seed=1), torch.tensor([0.0, 0.1, 1.0, 2.0])
    ga, gb = torch.autograd.grad(weight_penalty([a, b], factors), [a, b])
    torch.testing.assert_close(ga, factors[:, None, None].double() * a.detach())
    torch.testing.assert_close(gb, factors[:, None].double() * b.detach())
    assert float(weight_penalty([a], 0.5).detach()) == pytest.approx(0.25 * float(a.detach().square().sum()))


def test_a_growing_penalty_drives_its_units_to_zero_and_leaves_the_others() -> None:
    layer = nn.Linear(3, 4, bias=False)
    torch.nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    going = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for step in range(60):
        optimizer.zero_grad()
        factor = growing_factor(step, increment=0.1, every=5, ceiling=1.0)
        weight_penalty([layer.weight], factor * going).backward()
        optimizer.step()
    weight = layer.weight.detach()
    assert float(weight[[0, 2]].abs().max()) < 1e-4
    assert bool((weight[[1, 3]] == 1).all())


def test_group_lasso_is_one_norm_a_unit_over_all_members() -> None:
    a, b = random(4, 3, 2, seed=0), random(4, 5, seed=1)
    rows = torch.cat([a.detach().reshape(4, -1), b.detach()], dim=1).tolist()
    expected = sum(math.hypot(*row) for row in rows)
    assert float(group_lasso([a, b]).detach()) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x, y: group_lasso([x, y]), (a, b))


def test_a_unit_at_zero_has_no_gradient_rather_than_nan() -> None:
    weight = torch.zeros(2, 3)
    weight[1] = 2
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(group_lasso([weight]), weight)
    torch.testing.assert_close(gradient, torch.tensor([[0.0] * 3, [1 / math.sqrt(3)] * 3]))


def test_training_with_a_group_lasso_shrinks_the_units_that_are_not_needed_away() -> None:
    """Least squares that needs two of four inputs: with the penalty the columns of the others go, all together."""
    x = random(200, 4, seed=0).detach()
    target = x[:, :2] @ random(2, 3, seed=1).detach()
    weight = nn.Parameter(torch.ones(4, 3).double())
    optimizer = torch.optim.SGD([weight], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        ((x @ weight - target).square().sum(1).mean() + 0.1 * group_lasso([weight])).backward()
        optimizer.step()
    norms = weight.detach().norm(dim=1)
    assert float(norms[2:].max()) < 0.02 < 0.2 < float(norms[:2].min())


def test_slimming_is_the_l1_norm_of_all_scales() -> None:
    scales = [torch.tensor([0.5, -2.0], requires_grad=True), torch.tensor([0.0, 1.0, 3.0], requires_grad=True)]
    total = slimming(scales)
    assert float(total.detach()) == 6.5
    gradients = torch.autograd.grad(total, scales)
    assert [gradient.tolist() for gradient in gradients] == [[1.0, -1.0], [0.0, 1.0, 1.0]]


def test_penalties_on_nothing_are_refused() -> None:
    for penalty in (group_lasso, slimming, lambda members: weight_penalty(members, 1.0)):
        with pytest.raises(ValueError, match=r"without members|no batch-norm scale"):
            penalty([])
    with pytest.raises(ValueError, match=r"different numbers of units: \[2, 3\]"):
        group_lasso([torch.ones(2, 1), torch.ones(3, 1)])
    with pytest.raises(ValueError, match=r"factors are \(3,\), not \(2,\): one a unit"):
        weight_penalty([torch.ones(2, 1)], torch.ones(3))
