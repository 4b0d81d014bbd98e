"""Single weights taken out under the Gram matrix, against brute force over all masks and against plain inverses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.curvature import gather, sweeps
from featherweight.curvature.rounding import swept
from featherweight.curvature.solve import damp


def problem(seed: int, rows: int = 3, width: int = 6, groups: int = 1) -> sweeps.Matrix:
    """A weight and the moments of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 200, width, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(groups, width, width, generator=draw, dtype=torch.float64)
    weight = torch.randn(groups, rows, width, generator=draw, dtype=torch.float64)
    return sweeps.Matrix(weight, x.transpose(1, 2) @ x / 200)


def error(of: sweeps.Matrix, replaced: Tensor) -> float:
    moved = of.weight - replaced
    return float(((moved @ of.gram) * moved).sum())


def least_squares_on(of: sweeps.Matrix, stay: Tensor) -> Tensor:
    """Row by row with numpy's solver in mind: w_S = (W G)_S G_SS⁻¹."""
    found = torch.zeros_like(of.weight)
    for g, o in itertools.product(range(len(of.weight)), range(of.weight.shape[1])):
        on = stay[g, o].nonzero()[:, 0]
        if len(on):
            gram = damp(of.gram)[g][on][:, on]
            found[g, o, on] = torch.linalg.solve(gram, (damp(of.gram)[g] @ of.weight[g, o])[on])
    return found


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_refit_is_least_squares_on_each_rows_support(seed: int) -> None:
    of = problem(seed, groups=2)
    stay = torch.rand(of.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = sweeps.refit(of.weight, of.gram, stay, of.weight)
    torch.testing.assert_close(found, least_squares_on(of, stay), rtol=1e-4, atol=1e-6)
    assert not found[~stay].any()


def test_each_step_costs_what_the_refitted_error_rises_by() -> None:
    of = problem(3, rows=4)
    order, costs = sweeps.eliminate(of.weight[0], of.gram[0])
    damped = sweeps.Matrix(of.weight, damp(of.gram))
    gone = torch.zeros(1, 4, 6, dtype=torch.bool)
    total = torch.zeros(4, dtype=torch.float64)
    for step in range(6):
        gone[0, torch.arange(4), order[:, step]] = True
        total += costs[:, step]
        for row in range(4):
            alone = sweeps.Matrix(damped.weight[:, row : row + 1], damped.gram)
            on = (~gone[0, row]).nonzero()[:, 0]
            best = torch.zeros_like(alone.weight)
            if len(on):
                gram = alone.gram[0]
                best[0, 0, on] = torch.linalg.solve(gram[on][:, on], (gram @ alone.weight[0, 0])[on])
            assert error(alone, best) == pytest.approx(float(total[row]), rel=1e-6)


def test_the_first_weight_to_go_is_the_one_that_brute_force_takes() -> None:
    for seed in range(8):
        of = problem(seed, rows=1)
        damped = sweeps.Matrix(of.weight, damp(of.gram))
        order, _ = sweeps.eliminate(of.weight[0], of.gram[0])
        losses = []
        for column in range(6):
            stay = torch.ones(1, 1, 6, dtype=torch.bool)
            stay[0, 0, column] = False
            losses.append(error(damped, least_squares_on(damped, stay)))
        assert int(order[0, 0]) == int(torch.tensor(losses).argmin())


def brute_force(of: sweeps.Matrix, kept: int) -> float:
    """The least error of all masks that keep so many weights in all."""
    size = of.weight.numel()
    best = float("inf")
    for on in itertools.combinations(range(size), kept):
        stay = torch.zeros(size, dtype=torch.bool)
        stay[list(on)] = True
        stay = stay.reshape(of.weight.shape)
        best = min(best, error(of, least_squares_on(of, stay)))
    return best


def test_eliminated_masks_are_mostly_the_best_of_all_masks() -> None:
    """Greedy elimination is no exact method, but far from what masks drawn at random lose."""
    ratios, drawn = [], []
    for seed in range(8):
        of = problem(seed, rows=2, width=4)
        gone = torch.zeros_like(of.weight, dtype=torch.bool)
        stay = sweeps.eliminated(*sweeps.orders(of, gone), kept=4).reshape(of.weight.shape)
        assert int(stay.sum()) == 4
        found, best = error(of, sweeps.refit(of.weight, of.gram, stay, of.weight)), brute_force(of, 4)
        assert found >= best * (1 - 1e-6)
        shuffled = stay.flatten()[torch.randperm(8, generator=torch.Generator().manual_seed(seed))].reshape(stay.shape)
        ratios.append(found / best)
        drawn.append(error(of, least_squares_on(of, shuffled)) / best)
    assert sum(ratio < 1.001 for ratio in ratios) >= 5
    assert max(ratios) < 3 < sum(drawn) / len(drawn)


def test_a_sweep_with_one_column_is_the_surgeons_step() -> None:
    of = problem(1)
    inverse = sweeps.inverse(of.gram)[0]
    going = torch.zeros_like(of.weight, dtype=torch.bool)
    going[..., 0] = True
    moved, stay = sweeps.sweep(of.weight, of.gram, lambda part, pivots, here: going[..., here])
    expected = of.weight[0] - of.weight[0, :, :1] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(moved[0], expected)
    assert torch.equal(stay, ~going)


@pytest.mark.parametrize("block", [1, 2, 5, 128])
def test_blocks_only_say_when_errors_are_handed_on(block: int) -> None:
    of = problem(5, rows=4, width=11)
    going = torch.rand(of.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    whole, _ = sweeps.sweep(of.weight, of.gram, lambda part, pivots, here: going[..., here], block=11)
    part, stay = sweeps.sweep(of.weight, of.gram, lambda part, pivots, here: going[..., here], block=block)
    torch.testing.assert_close(part, whole)
    assert torch.equal(stay, ~going)


def test_the_loss_is_the_quadratic_form() -> None:
    of = problem(2, groups=2)
    draw = torch.randn(2, 3, 5, dtype=torch.float64)
    with_gradients = sweeps.Matrix(of.weight, of.gram, draw @ draw.transpose(1, 2), positions=7.0)
    replaced = of.weight * 0.9
    moved = of.weight - replaced
    by_hand = sum(
        float(torch.trace(with_gradients.gradients[g] @ moved[g] @ of.gram[g] @ moved[g].T)) for g in range(2)
    )
    assert sweeps.loss(with_gradients, replaced) == pytest.approx(0.5 * 7 * by_hand)
    assert sweeps.loss(of, torch.zeros_like(of.weight)) == pytest.approx(1)
    assert sweeps.loss(sweeps.Matrix(of.weight), torch.zeros_like(of.weight)) == pytest.approx(1)


def test_a_layers_matrix_answers_as_the_layer_does() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    x = torch.randn(40, 4, 6, 6)
    seen = gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))], effort=1e9)["0"]
    of = sweeps.of_layer(layer, seen)
    zeroed = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    stay = torch.rand(layer.weight.shape) < 0.5
    with torch.no_grad():
        zeroed.weight.copy_(layer.weight * stay)
        wrong = (layer(x) - zeroed(x)).square().sum() / layer(x).square().sum()
    lost = sweeps.loss(of, (layer.weight.detach() * stay).reshape(of.weight.shape))
    assert lost == pytest.approx(float(wrong), rel=1e-3)


@pytest.mark.parametrize("rows", [24, 100, 1000])
def test_what_few_rows_say_serves_inputs_that_were_not_seen(rows: int) -> None:
    """Rounded with the damping that the rows call for, a layer errs on new inputs as little as with any."""
    draw = torch.Generator().manual_seed(rows)
    width = 96
    spread = torch.linspace(0, 4, width, dtype=torch.float64).neg().exp()
    mixing = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0] * spread
    x = torch.randn(rows, width, generator=draw, dtype=torch.float64) @ mixing.T
    weight = torch.randn(1, 64, width, generator=draw, dtype=torch.float64)
    of = sweeps.Matrix(weight, (x.T @ x / rows)[None], independent=rows)
    truth = sweeps.Matrix(weight, (mixing @ mixing.T)[None])

    def left(damping: float | None) -> float:
        found = swept(weight, sweeps.steady(of, damping), lambda values, _: (2 * values).round() / 2)
        return error(truth, found)

    assert left(None) < 1.15 * min(left(damping) for damping in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0))
    assert rows > width or left(None) < 0.9 * left(0.001)
    assert sweeps.steadiness(truth) == sweeps.SWEEP_DAMPING


def test_inputs_count_for_as_many_as_between_samples_and_positions() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))], effort=100.0)["0"]
    of = sweeps.of_layer(layer, seen)
    assert seen.rows == 5 * 36
    assert of.independent == pytest.approx((5 * 180) ** 0.5)
    # More samples that say the same leave less in doubt.
    more = sweeps.of_layer(layer, gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))] * 4, effort=100.0)["0"])
    assert sweeps.steadiness(more) == pytest.approx(sweeps.steadiness(of) / 4, rel=1e-4)
