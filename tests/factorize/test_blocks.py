"""The mathematics of factorizing a layer: predictions and errors against explicit traces, roots against NumPy's."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.curvature.gram import Statistics
from featherweight.factorize.blocks import Blocks, Factors, balanced, blocks, factors, predicted_losses, refit


def order(channels: int, kernel: Sequence[int], first_axes: Collection[int]) -> Tensor:
    """Where each element of (u, v) lies in a flattened input patch (channels, *kernel): (u, v) indices."""
    at = torch.arange(channels * math.prod(kernel)).reshape(channels, *kernel)
    second = [1 + axis for axis in range(len(kernel)) if axis not in first_axes]
    at = at.permute(*second, 0, *(1 + axis for axis in range(len(kernel)) if axis in first_axes))
    return at.reshape(math.prod(kernel[axis - 1] for axis in second), -1)


def moment(groups: int, width: int, generator: torch.Generator, samples: int = 40) -> tuple[Tensor, Tensor]:
    """E[x xᵀ] and E[x] of correlated x that are far from zero."""
    mix = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, samples, width, generator=generator, dtype=torch.float64) @ mix + 0.5
    return x.transpose(1, 2) @ x / samples, x.mean(1)


@st.composite
def cases(draw: st.DrawFn, gradients: bool | None = None) -> tuple[Tensor, int, tuple[int, ...], Statistics]:
    """A weight of a Linear (no kernel) or a convolution, its groups, the first factor's axes, and statistics."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    kernel = draw(st.sampled_from([(), (3,), (2, 3), (1, 1), (3, 3), (2, 1, 2)]))
    groups = draw(st.sampled_from([1, 2])) if kernel else 1
    outputs, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    axes = draw(st.sampled_from([(), *[(axis,) for axis in range(len(kernel))]]))
    weight = torch.randn(groups * outputs, inputs, *kernel, generator=generator, dtype=torch.float64)
    gram, mean = moment(groups, weight[0].numel(), generator)
    covariance = None
    if draw(st.booleans()) if gradients is None else gradients:
        covariance = moment(1, groups * outputs, generator)[0][0]
    positions = draw(st.sampled_from([1.0, 17.0]))
    return weight, groups, axes, Statistics(gram, mean, covariance, positions=positions)


def unblocked(product: Tensor, weight: Tensor, groups: int, axes: tuple[int, ...]) -> Tensor:
    """(groups, outputs, u, v) back to (groups, outputs, d), element by element."""
    u, v = product.shape[2:]
    places = order(weight.shape[1], weight.shape[2:], axes)
    flat = torch.empty(groups, product.shape[1], u * v, dtype=product.dtype)
    for i in range(u):
        for j in range(v):
            flat[..., places[i, j]] = product[:, :, i, j]
    return flat


def output_error(difference: Tensor, gram: Tensor, gradients: Tensor | None = None) -> float:
    """Σ over groups of tr(A ΔW G ΔWᵀ), A the group's own block."""
    total, outputs = 0.0, difference.shape[1]
    for g, (delta, of_inputs) in enumerate(zip(difference, gram, strict=True)):
        block = slice(g * outputs, (g + 1) * outputs)
        a = torch.eye(outputs, dtype=torch.float64) if gradients is None else gradients[block, block]
        total += float(torch.trace(a @ delta @ of_inputs @ delta.T))
    return total


def flat_weight(weight: Tensor, groups: int) -> Tensor:
    return weight.reshape(groups, weight.shape[0] // groups, -1)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_blocks_hold_every_element_once(case: tuple[Tensor, int, tuple[int, ...], Statistics]) -> None:
    weight, groups, axes, statistics = case
    known = blocks(weight, groups, axes, statistics)
    assert torch.equal(unblocked(known.weight, weight, groups, axes), flat_weight(weight, groups))
    assert known.gram is not None
    x = torch.randn(groups, weight[0].numel(), dtype=torch.float64)
    places = order(weight.shape[1], weight.shape[2:], axes)
    by_block = torch.einsum("guv,guvpq,gpq->g", x[:, places], known.gram, x[:, places])
    torch.testing.assert_close(by_block, torch.einsum("gd,gde,ge->g", x, statistics.gram, x))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_all_columns_together_are_the_weight(case: tuple[Tensor, int, tuple[int, ...], Statistics]) -> None:
    weight, groups, axes, statistics = case
    for seen in (None, statistics, replace(statistics, gradients=None)):
        known = blocks(weight, groups, axes, seen)
        found = factors(known)
        torch.testing.assert_close(found.product(), known.weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(refit(known, found).product(), known.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(balanced(found).product(), known.weight, rtol=1e-6, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans())
def test_the_predicted_loss_is_the_trace(case: tuple[Tensor, int, tuple[int, ...], Statistics], plain: bool) -> None:
    """½ tr(A ΔW G ΔWᵀ) · positions at every rank; where u > 1, with the mean block of G for every block."""
    weight, groups, axes, statistics = case
    known = blocks(weight, groups, axes, statistics)
    found = factors(replace(known, gram=None, gradients=None) if plain else known)
    losses = predicted_losses(known, found)
    assert len(losses) == found.first.shape[1] + 1
    assert float(losses[-1]) == 0
    assert known.gram is not None
    u = known.weight.shape[2]
    mean_block = sum(known.gram[:, i, :, i] for i in range(u)) / u
    scale = float(losses.max()) + 1e-12

    def explicit(difference: Tensor) -> float:
        return sum(output_error(difference[:, :, i], mean_block, statistics.gradients) for i in range(u))

    for rank, loss in enumerate(losses.tolist()):
        expected = explicit(known.weight - found.truncated(rank).product())
        if statistics.gradients is None:
            expected /= explicit(known.weight)
        else:
            expected *= 0.5 * statistics.positions
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7 * scale)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_without_data_the_share_of_the_weight_is_predicted(
    case: tuple[Tensor, int, tuple[int, ...], Statistics],
) -> None:
    weight, groups, axes, _ = case
    known = blocks(weight, groups, axes, None)
    found = factors(known)
    for rank, loss in enumerate(predicted_losses(known, found).tolist()):
        left_out = known.weight - found.truncated(rank).product()
        assert loss == pytest.approx(float(left_out.norm() / weight.norm()) ** 2, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans())
def test_more_rank_is_never_predicted_to_lose_more(
    case: tuple[Tensor, int, tuple[int, ...], Statistics], data: bool
) -> None:
    weight, groups, axes, statistics = case
    known = blocks(weight, groups, axes, statistics if data else None)
    losses = predicted_losses(known, factors(known))
    # damping makes what is minimised differ a little from what is predicted
    assert float((losses[1:] - losses[:-1]).max()) <= 2e-2 * float(losses[0])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_linears_factors_are_the_best_of_their_rank(gradients: bool, seed: int) -> None:
    """Against the singular values of A^½ W G^½ with symmetric roots: no factors of that rank can err less."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    gram, mean = moment(1, 9, generator, samples=400)
    covariance = moment(1, 6, generator, samples=400)[0][0] if gradients else None
    known = blocks(weight, 1, (), Statistics(gram, mean, covariance))
    found = factors(known)

    def symmetric_root(matrix: Tensor) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix.numpy())
        return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T

    left = np.eye(6) if covariance is None else symmetric_root(covariance)
    singular = np.linalg.svd(left @ weight.numpy() @ symmetric_root(gram[0]), compute_uv=False)
    for rank in range(6):
        best = float((singular[rank:] ** 2).sum())
        error = output_error(known.weight[:, :, 0] - found.truncated(rank).product()[:, :, 0], gram, covariance)
        assert best * (1 - 1e-9) <= error <= best * 1.02


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 6))
def test_refitting_never_errs_more(case: tuple[Tensor, int, tuple[int, ...], Statistics], rank: int) -> None:
    weight, groups, axes, statistics = case
    known = blocks(weight, groups, axes, statistics)
    start = factors(known).truncated(rank)
    truth = flat_weight(weight, groups)

    def error(of: Factors) -> float:
        return output_error(truth - unblocked(of.product(), weight, groups, axes), statistics.gram)

    again = refit(known, start)
    assert torch.equal(again.first, start.first)
    assert error(again) <= error(start) * (1 + 1e-9) + 1e-9 * output_error(truth, statistics.gram)


def test_refitting_is_an_ordinary_least_squares_fit() -> None:
    """Against NumPy's fit of the layer's outputs on what comes out of the first factor."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(3000, 27, generator=generator, dtype=torch.float64).cumsum(1)
    known = blocks(weight, 1, (0,), Statistics((x.T @ x / len(x))[None], x.mean(0)[None]))
    start = factors(known).truncated(2)
    found = refit(known, start)
    cut = x.reshape(-1, 3, 3, 3).permute(0, 3, 1, 2).reshape(-1, 3, 9)  # (samples, width, channels · height)
    between = torch.einsum("nuv,rv->nur", cut, start.first[0]).reshape(len(x), -1)
    best, *_ = np.linalg.lstsq(between.numpy(), (x @ weight.reshape(4, -1).T).numpy(), rcond=None)

    def error(second: Tensor) -> float:
        return float((between @ second - x @ weight.reshape(4, -1).T).square().sum())

    assert error(found.second[0].reshape(4, -1).T) == pytest.approx(error(torch.from_numpy(best)), rel=0.02)
    assert error(start.second[0].reshape(4, -1).T) > 1.1 * error(torch.from_numpy(best))


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 6), st.floats(-6, 6))
def test_balancing_keeps_the_product_and_evens_out_the_scales(
    case: tuple[Tensor, int, tuple[int, ...], Statistics], rank: int, scale: float
) -> None:
    weight, groups, axes, statistics = case
    known = blocks(weight, groups, axes, statistics)
    found = factors(known).truncated(rank)
    uneven = Factors(found.first * 10**scale, found.second / 10**scale)
    even = balanced(uneven)
    torch.testing.assert_close(even.product(), found.product(), rtol=1e-6, atol=1e-8)
    left = torch.einsum("gour,gous->grs", even.second, even.second)
    right = torch.einsum("grv,gsv->grs", even.first, even.first)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(left, torch.diag_embed(left.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-7)
    assert even.first.shape == found.first.shape
    assert even.second.shape == found.second.shape


def test_a_rank_that_the_matrix_does_not_have_is_filled_with_zeros() -> None:
    known = Blocks(torch.randn(1, 3, 1, 2, dtype=torch.float64))
    found = balanced(Factors(torch.randn(1, 5, 2).double(), torch.randn(1, 3, 1, 5).double()))
    assert (found.first.shape, found.second.shape) == ((1, 5, 2), (1, 3, 1, 5))
    assert not bool(found.first[:, 2:].any())
    assert factors(known).first.shape == (1, 2, 2)


def test_what_changed_before_the_layer_is_made_good_for() -> None:
    """With a cross moment the factors answer the changed inputs as the original answered its own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    was = torch.randn(2000, 6, generator=generator, dtype=torch.float64).cumsum(1)
    now = was @ (torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator)).double()
    seen = Statistics(
        (now.T @ now / 2000)[None],
        now.mean(0)[None],
        cross=(weight @ was.T @ now / 2000)[None],
        answer_mean=(was @ weight.T).mean(0)[None],
    )

    def error(product: Tensor) -> float:
        return float((was @ weight.T - now @ product[0, :, 0].T).square().mean())

    def best(rank: int) -> float:
        answers = now.numpy() @ np.linalg.lstsq(now.numpy(), (was @ weight.T).numpy(), rcond=None)[0]
        columns, values, others = np.linalg.svd(answers, full_matrices=False)
        low = (columns[:, :rank] * values[:rank]) @ others[:rank]
        return float(np.square((was @ weight.T).numpy() - low).mean())

    known = blocks(weight, 1, (), seen)
    blind = blocks(weight, 1, (), replace(seen, cross=None, answer_mean=None))
    whole = float((was @ weight.T).square().mean())
    for rank in (1, 2, 3, 4):
        found = error(factors(known).truncated(rank).product())
        assert best(rank) * (1 - 1e-9) - 1e-12 <= found <= best(rank) * 1.05 + 1e-3 * whole
        assert found < error(factors(blind).truncated(rank).product())


@pytest.mark.parametrize("axes", [(), (0,), (1,)])
def test_data_that_says_nothing_leaves_the_plain_factors(axes: tuple[int, ...]) -> None:
    """All-zero moments, as of one sample once its mean is taken off, must not set weights to zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(1, 27, 27)
    seen = Statistics(nothing, torch.zeros(1, 27), torch.zeros(4, 4), torch.zeros(1, 4, 27), torch.zeros(1, 4))
    known, plain = blocks(weight, 1, axes, seen), blocks(weight, 1, axes, None)
    for rank in (1, 3):
        found = refit(known, factors(known).truncated(rank))
        torch.testing.assert_close(found.product(), factors(plain).truncated(rank).product())
