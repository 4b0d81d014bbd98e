"""Scores against their definitions written out one weight at a time, and what no score may depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.prune import scores
from featherweight.prune.scores import combine, normalize


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


A, B = random(5, 3, 2, 2, seed=0), random(5, 4, seed=1)
GA, GB = random(5, 3, 2, 2, seed=2), random(5, 4, seed=3)

Rule = Callable[[list[Tensor], scores.Reduction], Tensor]
RULES: dict[str, Rule] = {
    "l1": scores.l1,
    "l2": scores.l2,
    "geometric_median": scores.geometric_median,
    "taylor": lambda members, reduction: scores.taylor(members, [m.flip(-1) for m in members], reduction),
    "hessian_diagonal": lambda members, reduction: scores.hessian_diagonal(
        members, [m.flip(-1).square() for m in members], reduction
    ),
    "fisher": scores.fisher,
    "mean_activation": scores.mean_activation,
    "nonzero_share": lambda members, reduction: scores.nonzero_share(members, reduction, threshold=0.3),
}


def each(rule: Callable[[list[float]], float], *members: Tensor) -> list[float]:
    """The sum over members of a rule on each unit's numbers."""
    return [sum(rule(member[unit].flatten().tolist()) for member in members) for unit in range(len(members[0]))]


def same(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-8)


def test_norms_are_those_of_each_members_row() -> None:
    same(scores.l1([A, B]), each(lambda row: sum(map(abs, row)), A, B))
    same(scores.l2([A, B]), each(lambda row: math.sqrt(sum(w * w for w in row)), A, B))


def test_batch_norm_scales_count_by_their_size() -> None:
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
    same(scores.batch_norm_scale([norm.weight]), [0.5, 2.0, 0.0])
    assert not scores.batch_norm_scale([norm.weight]).requires_grad


def test_the_unit_nearest_the_geometric_median_is_worth_least() -> None:
    same(
        scores.geometric_median([A, B]),
        [sum(math.dist(m[u].flatten(), m[v].flatten()) for m in (A, B) for v in range(5)) for u in range(5)],
    )
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])  # the median is 2, the mean is not
    assert int(scores.geometric_median([line]).argmin()) == 2
    # Units this close to each other have a distance that inner products in float64 would not see.
    close = 1e6 + torch.arange(40.0).double()[:, None] * 1e-4
    expected = (close - close.T).abs().sum(1)
    torch.testing.assert_close(scores.geometric_median([close]), expected, rtol=1e-4, atol=0)


def test_taylor_predicts_the_first_order_change_of_a_real_loss() -> None:
    weight = random(4, 6, seed=0).double().requires_grad_()
    x = random(20, 6, seed=1).double()

    def loss(w: Tensor) -> Tensor:
        return (x @ w.T).tanh().square().sum()

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    found = scores.taylor([weight], [gradient])
    step = 1e-6
    for unit in range(4):
        smaller = weight.detach().clone()
        smaller[unit] *= 1 - step
        slope = float((loss(smaller) - loss(weight.detach())) / step)
        assert math.isclose(float(found[unit]), slope**2, rel_tol=1e-3)


def test_the_hessians_diagonal_is_exact_where_the_hessian_is_diagonal() -> None:
    weight, curvature = random(4, 6, seed=0).double(), random(4, 6, seed=1).double().square()
    found = scores.hessian_diagonal([weight], [curvature])
    for unit in range(4):
        without = weight.clone()
        without[unit] = 0
        rise = 0.5 * (curvature * (without - weight) ** 2).sum()
        assert math.isclose(float(found[unit]), float(rise), rel_tol=1e-9)


def test_fisher_is_half_the_mean_square_of_gate_gradients() -> None:
    same(scores.fisher([B]), each(lambda row: sum(g * g for g in row) / len(row) / 2, B))


def test_activations_are_counted_over_samples_and_positions() -> None:
    after_relu = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[1.0, 3.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    same(scores.mean_activation([after_relu]), [0.5, 1.5, 0.0])
    same(scores.nonzero_share([after_relu]), [0.25, 0.75, 0.0])
    same(scores.nonzero_share([after_relu - 0.01], threshold=0.1), [0.25, 0.75, 0.0])
    same(scores.mean_activation([-after_relu]), [0.5, 1.5, 0.0])


def test_random_scores_are_the_seeds() -> None:
    assert torch.equal(scores.random(50, 7), scores.random(50, 7))
    assert not torch.equal(scores.random(50, 7), scores.random(50, 8))
    before = torch.random.get_rng_state()
    found = scores.random(1000, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 0 <= float(found.min()) < 0.05 < 0.95 < float(found.max()) < 1


def test_reductions_are_over_members() -> None:
    parts = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0])]
    assert combine(parts).tolist() == combine(parts, "sum").tolist() == [4.0, 4.0]
    assert combine(parts, "mean").tolist() == [2.0, 2.0]
    assert combine(parts, "max").tolist() == [3.0, 4.0]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_every_rule_reduces_the_same_way(name: str, reduction: scores.Reduction) -> None:
    rule = RULES[name]
    alone = torch.stack([rule([A], "sum"), rule([B], "sum")])
    expected = {"sum": alone.sum(0), "mean": alone.mean(0), "max": alone.amax(0)}[reduction]
    found = rule([A, B], reduction)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6))
def test_a_units_score_goes_with_the_unit_and_is_never_negative(name: str, seed: int, units: int) -> None:
    members = [random(units, 3, 2, seed=seed), random(units, 1, seed=seed + 1)]
    found = RULES[name](members, "sum")
    assert found.shape == (units,)
    assert bool((found >= 0).all())
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(RULES[name]([m[order] for m in members], "sum"), found[order])
    if name not in ("geometric_median", "nonzero_share"):
        dead = [torch.cat([m, torch.zeros_like(m[:1])]) for m in members]
        assert float(RULES[name](dead, "sum")[-1]) == 0


def test_members_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="without members"):
        scores.l1([])
    with pytest.raises(ValueError, match=r"different numbers of units: \[4, 5\]"):
        scores.l2([A, A[:4]])
    with pytest.raises(ValueError, match=r"gradients are \[\(5, 4\)\]: one for each"):
        scores.taylor([A], [GB])
    with pytest.raises(ValueError, match="curvatures are"):
        scores.hessian_diagonal([A, B], [GA])


LISTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).map(lambda x: torch.tensor(x).double())


@settings(max_examples=60, deadline=None)
@given(LISTS, st.sampled_from(["none", "mean", "max", "lamp"]))
def test_a_normalization_keeps_the_order_within_a_group(x: Tensor, how: scores.Normalization) -> None:
    found = normalize(x, how)
    for i in range(len(x)):
        for j in range(len(x)):
            assert not x[i] < x[j] or found[i] <= found[j]
    assert bool(torch.isfinite(found).all())


@settings(max_examples=40, deadline=None)
@given(LISTS, st.floats(1e-3, 1e3))
def test_a_normalized_score_does_not_depend_on_the_groups_scale(x: Tensor, scale: float) -> None:
    for how in ("mean", "max", "lamp"):
        if float(x.max()) > 1e-300:
            torch.testing.assert_close(normalize(x * scale, how), normalize(x, how))
    assert torch.equal(normalize(x, "none"), x)


def test_normalizations_are_what_they_are_called() -> None:
    x = torch.tensor([3.0, 1.0, 2.0])
    torch.testing.assert_close(normalize(x, "mean"), torch.tensor([1.5, 0.5, 1.0]))
    torch.testing.assert_close(normalize(x, "max"), torch.tensor([1.0, 1 / 3, 2 / 3]))
    torch.testing.assert_close(normalize(x, "lamp"), torch.tensor([3 / 3, 1 / 6, 2 / 5]))
    for how in ("none", "mean", "max", "lamp"):
        assert normalize(torch.zeros(3), how).tolist() == [0.0] * 3


def test_lamp_leaves_every_group_its_best_unit_to_the_end_even_among_equals() -> None:
    equal, other = normalize(torch.ones(4), "lamp"), normalize(torch.tensor([1e6, 1e5, 1e-3]), "lamp")
    assert sorted(equal.tolist()) == [0.25, pytest.approx(1 / 3), 0.5, 1.0]
    assert sorted(torch.cat([equal, other]).tolist())[-2:] == [1.0, 1.0]
