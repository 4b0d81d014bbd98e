"""Weight SVD and spatial SVD as techniques: AIMET's where plain, better where data speaks, priced as they turn out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

import featherweight as fw
from featherweight.batch import Inputs
from featherweight.cost.count import price, profile
from featherweight.curvature.gram import classifier_loss, gather
from featherweight.edits import Replace
from featherweight.errors import NoEffect, RecipeError
from featherweight.factorize import SVD, SpatialSVD
from featherweight.forms import ConvPair, LinearPair, LowRank, Separable
from featherweight.score import Divergence


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Images whose neighbouring pixels, and channels, go together, as natural ones do."""
    x = randn(*shape, seed=seed).cumsum(1)
    for axis in range(2, len(shape)):
        x = x.cumsum(axis) / shape[axis] ** 0.5
    return x


def fitted(step: Any, layer: Any, rank: int, seen: Any = None) -> Any:
    """The layer at that rank, with the step's values."""
    pair = step.form(rank).build(layer)
    pair.load_state_dict(step.values(layer, step.form(rank), seen))
    return pair


def watched(layer: Any, x: Tensor, **settings: Any) -> Any:
    return gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))], effort=1e9, **settings)["0"]


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    columns, values, rows = np.linalg.svd(matrix, full_matrices=False)
    return (columns[:, :rank] * values[:rank]) @ rows[:rank]


# Plain


def as_aimet_unfolds(weight: np.ndarray, technique: str, rank: int) -> np.ndarray:
    """AIMET's low-rank kernels: (n, m, kh, kw) as (m, n·kh·kw) for weight SVD, as (m·kh, n·kw) for spatial SVD."""
    n, m, kh, kw = weight.shape
    if technique == "weight":
        low = truncated(weight.transpose(1, 0, 2, 3).reshape(m, n * kh * kw), rank)
        return low.reshape(m, n, kh, kw).transpose(1, 0, 2, 3)
    low = truncated(weight.transpose(1, 2, 0, 3).reshape(m * kh, n * kw), rank)
    return low.reshape(m, kh, n, kw).transpose(2, 0, 1, 3)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from(["weight", "spatial"]),
)
def test_plain_it_is_aimets_at_every_rank(shape: tuple[int, int, int, int], technique: str) -> None:
    n, m, kh, kw = shape
    conv = nn.Conv2d(m, n, (kh, kw), dtype=torch.float64)
    step, full = (SVD(), min(m, n * kh * kw)) if technique == "weight" else (SpatialSVD(), min(m * kh, n * kw))
    for rank in range(1, full + 1):
        pair = fitted(step, conv, rank)
        expected = as_aimet_unfolds(conv.weight.detach().numpy(), technique, rank)
        np.testing.assert_allclose(pair.weight.detach().numpy(), expected, atol=1e-10)
        assert torch.equal(pair.bias, conv.bias)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_a_linear_is_its_truncated_svd(inputs: int, outputs: int) -> None:
    layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    for rank in range(1, min(inputs, outputs) + 1):
        found = fitted(SVD(), layer, rank).weight.detach().numpy()
        np.testing.assert_allclose(found, truncated(layer.weight.detach().numpy(), rank), atol=1e-10)


def test_groups_are_factorized_each_alone() -> None:
    conv = nn.Conv2d(6, 9, 3, groups=3, dtype=torch.float64)
    for step, technique in ((SVD(), "weight"), (SpatialSVD(), "spatial")):
        found = fitted(step, conv, 2).weight.detach()
        for group, alone in zip(found.chunk(3), conv.weight.detach().chunk(3), strict=True):
            np.testing.assert_allclose(group, as_aimet_unfolds(alone.numpy(), technique, 2), atol=1e-10)


def test_the_other_axis_is_the_same_on_transposed_images() -> None:
    conv = nn.Conv2d(3, 4, (2, 5), dtype=torch.float64)
    turned = nn.Conv2d(3, 4, (5, 2), dtype=torch.float64)
    with torch.no_grad():
        turned.weight.copy_(conv.weight.transpose(2, 3))
    one = fitted(SpatialSVD(axis=1), conv, 3).weight
    other = fitted(SpatialSVD(axis=0), turned, 3).weight
    torch.testing.assert_close(one, other.transpose(2, 3))


# Full rank


torch.manual_seed(0)  # for the layers that all tests share
LAYERS: list[Any] = [
    nn.Linear(7, 5),
    nn.Linear(5, 7, bias=False),
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, bias=False),
    nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 8, 3, groups=4, padding=1),
    nn.Conv3d(2, 4, (1, 3, 2)),
]


def shape_for(layer: Any, samples: int = 6) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return samples * 4, layer.in_features
    return samples, layer.in_channels, *[7] * len(layer.kernel_size)


def full_rank(step: Any, layer: Any) -> int:
    calls = profile(nn.Sequential(layer), Inputs((randn(*shape_for(layer)),))).layers["0"].calls
    return max(option.form.rank for option in step.options("0", layer, calls, None))


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("mode", ["plain", "inputs", "gradients", "paired"])
def test_full_rank_is_the_layer(layer: Any, mode: str) -> None:
    x = smooth(*shape_for(layer))
    seen = None
    if mode != "plain":
        seen = watched(layer, x, gradients=(lambda y, _: (y * y.detach().cos()).sum()) if mode == "gradients" else None)
    if mode == "paired":
        matrix = layer.weight.detach().reshape(len(seen.gram), -1, seen.gram.shape[-1])
        bias = 0 if layer.bias is None else layer.bias.detach().reshape(len(matrix), -1)
        seen.answer_mean = (matrix @ seen.mean[..., None])[..., 0] + bias
        offset = seen.answer_mean - (matrix @ seen.mean[..., None])[..., 0]
        seen.cross = matrix @ seen.gram + offset[..., None] * seen.mean[:, None]
    for step in (SVD(), SpatialSVD()):
        if step.unfit(layer) is None:
            pair = fitted(step, layer, full_rank(step, layer), seen)
            # Gram matrices are float32 and nearly singular here: a weight that the data hardly excites is less exact.
            exact = mode == "plain" or isinstance(step, SVD)
            torch.testing.assert_close(pair.weight, layer.weight, rtol=1e-3, atol=5e-5 if exact else 1e-4)
            torch.testing.assert_close(pair(x), layer(x), rtol=1e-3, atol=1e-4)


# Data


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("step", [SVD(), SpatialSVD()], ids=lambda step: type(step).__name__)
def test_data_makes_the_output_err_less(layer: Any, step: Any) -> None:
    if step.unfit(layer) is not None:
        return
    x = smooth(*shape_for(layer, samples=40))
    truth, seen = layer(x).detach(), watched(layer, x)
    whole = float((truth - truth.mean((0, *range(2, truth.ndim)), keepdim=True)).square().sum())
    errors = []
    for rank in range(1, full_rank(step, layer)):
        answers = [fitted(step, layer, rank, s)(x).detach() for s in (None, seen)]
        plain, aware = (float((answer - truth).square().sum()) for answer in answers)
        errors.append((plain, aware))
        if isinstance(
            layer, nn.Linear
        ):  # exact there; between the blocks of a kernel the metric is a mean, then refitted
            assert aware <= plain * 1.001 + 1e-6 * whole, rank
    assert sum(a for _, a in errors) <= sum(p for p, _ in errors) * 1.001 + 1e-6 * whole


def test_a_linear_errs_as_little_as_any_of_its_rank() -> None:
    """Against NumPy's SVD of the answers themselves, bias and all."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 8).double(), randn(500, 12).double().cumsum(1) + 3
    seen, truth = watched(layer, x), layer(x).detach().numpy()
    centred = truth - truth.mean(0)
    for rank in range(1, 8):
        best = np.square(centred - truncated(centred, rank)).sum()
        found = np.square(fitted(SVD(), layer, rank, seen)(x).detach().numpy() - truth).sum()
        assert best * (1 - 1e-6) <= found <= best * 1.02 + 1e-5


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding=.same.")
def test_the_bias_keeps_the_mean_of_the_outputs(layer: Any) -> None:
    if layer.bias is None:
        return
    x = smooth(*shape_for(layer)) + 2
    seen, axes = watched(layer, x), (0, *range(2, x.ndim))
    for step in (SVD(), SpatialSVD()):
        if step.unfit(layer) is None:
            pair = fitted(step, layer, 1, seen)
            torch.testing.assert_close(pair(x).mean(axes), layer(x).mean(axes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("aware", [True, False])
def test_a_linears_predicted_loss_is_that_of_the_values_it_will_get(bias: bool, aware: bool) -> None:
    """½ E[(g · Δy)²] were g and Δy independent, with Δy what the fitted layer really answers."""
    torch.manual_seed(0)
    layer, x = nn.Linear(9, 6, bias).double(), randn(400, 9).double().cumsum(1) + 2
    step = SVD(data_aware=aware)
    seen = watched(layer, x, gradients=lambda y, _: (y.sin() * torch.linspace(0.1, 2, 6)).sum())
    calls = profile(nn.Sequential(layer), Inputs((x,))).layers["0"].calls
    for option in step.options("0", layer, calls, seen):
        change = (fitted(step, layer, option.form.rank, seen if aware else None)(x) - layer(x)).detach()
        expected = 0.5 * float(torch.trace(seen.gradients.double() @ (change.T @ change / len(x))))
        # The metric in which the best factors are found is damped: it weighs what the data hardly shows a little too.
        assert option.loss == pytest.approx(expected, rel=0.03 if aware else 1e-3, abs=3e-3 if aware else 1e-5)
        assert option.loss >= expected * (1 - 1e-3) - 1e-5


# Prices


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_options_price_is_what_the_layer_costs_once_it_is_there(layer: Any) -> None:
    inputs = Inputs((randn(*shape_for(layer)),))
    before = profile(nn.Sequential(layer), inputs).layers["0"]
    for step in (SVD(), SpatialSVD()):
        if step.unfit(layer) is not None:
            continue
        options = step.options("0", layer, before.calls, None)
        assert [o.form.rank for o in options] == list(range(1, len(options) + 1))
        for option in options:
            after = profile(nn.Sequential(option.form.build(layer)), inputs)
            assert option.cost == after.layers["0"].cost, option
            assert option.cost == after.total


def test_prices_are_aimets_formulas() -> None:
    """Spatial SVD of m→n, kh×kw, stride s: m·r·kh at (H·s_w) × W places, r·n·kw at H × W."""
    m, n, kh, kw, height, width = 6, 8, 3, 5, 10, 12
    conv = nn.Conv2d(m, n, (kh, kw), stride=2, padding=(1, 2))
    calls = profile(nn.Sequential(conv), Inputs((randn(1, m, 2 * height, 2 * width),))).layers["0"].calls
    for option in SpatialSVD().options("0", conv, calls, None):
        r = option.form.rank
        assert option.cost.macs == (m * r * kh * 2 + r * n * kw) * height * width
        assert option.cost.params == m * r * kh + r * n * kw + n


# Settings


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    ).eval()


def task(calibration: bool = True) -> fw.Task:
    x = smooth(64, 3, 8, 8)
    return fw.Task(example=x[:1], calibration=x.split(16) if calibration else ())


def ranks(small: fw.Compressed) -> dict[str, int]:
    return {n: m.rank for n, m in small.model.named_modules() if isinstance(m, ConvPair | LinearPair)}


def test_the_rank_is_taken_as_given() -> None:
    small = fw.compress(net(), SpatialSVD(rank=4), task=task())
    assert ranks(small) == {"0": 4, "2": 4}
    small = fw.compress(net(), SVD(rank={"5": 7, "2": 3}), task=task())
    assert ranks(small) == {"2": 3, "5": 7}


def test_the_first_pattern_that_matches_says_the_rank() -> None:
    small = fw.compress(net(), SVD(rank={"2": 3, "[25]": 9}), task=task(False))
    assert ranks(small) == {"2": 3, "5": 9}


@pytest.mark.parametrize("step", [SVD, SpatialSVD])
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.2])
def test_the_ratio_is_the_most_a_layer_may_cost(step: Any, ratio: float) -> None:
    model, given_task = net(), task(False)
    small = fw.compress(model, step(ratio=ratio), task=given_task)
    before, after = (profile(m, given_task.inputs()).layers for m in (model, small.model))
    assert ranks(small)
    for name, rank in ranks(small).items():
        layer = model.get_submodule(name)
        more = price(step().form(rank + 1).build(layer, "meta"), before[name].calls)
        assert after[name].cost.macs <= ratio * before[name].cost.macs < more.macs


def test_the_ratio_by_pattern() -> None:
    small = fw.compress(net(), SVD(ratio={"5": 0.25}), task=task(False))
    assert ranks(small) == {"5": 384 * 32 // 4 // (384 + 32)}


def test_ranks_are_rounded_up_to_what_the_hardware_likes() -> None:
    small = fw.compress(net(), SVD(rank={"5": 9, "2": 3}, multiple_of=8), task=task(False))
    assert ranks(small) == {"5": 16, "2": 8}
    small = fw.compress(net(), SVD(rank={"5": 9, "2": 3}, multiple_of={"5": 4}), task=task(False))
    assert ranks(small) == {"5": 12, "2": 3}


def test_under_a_budget_too_only_multiples_are_chosen() -> None:
    small = fw.compress(net(), SVD(budget=fw.Budget(macs=0.5), multiple_of={"[02]": 4, "*": 2}), task=task())
    assert ranks(small)
    assert all(rank % (4 if name in "02" else 2) == 0 for name, rank in ranks(small).items())


def test_a_layer_that_would_get_dearer_stays_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    small = fw.compress(model, SVD(ratio=0.5), task=fw.Task(example=randn(1, 64)))
    assert ranks(small) == {"0": 16}
    assert "costs as much as the layer itself" in small.ledger.steps[0].left["2"]
    with pytest.warns(NoEffect, match="costs as much"):
        same = fw.compress(model[2:], SVD(ratio=0.5), task=fw.Task(example=randn(1, 64)))
    assert torch.equal(same.model(torch.ones(1, 64)), model[2:](torch.ones(1, 64)))


def test_what_spatial_svd_cannot_do_is_left_with_the_reason() -> None:
    small = fw.compress(net(), SpatialSVD(ratio=0.5, ignore=("0",)), task=task(False))
    left = small.ledger.steps[0].left
    assert left["0"] == "ignored, as asked"
    assert "factorize.SVD" in left["5"]
    assert set(left) == {"0", "5", "7"}
    model = nn.Sequential(nn.Conv1d(8, 8, 5))
    with pytest.warns(NoEffect, match="no axis 1"):
        fw.compress(model, SpatialSVD(ratio=0.5, axis=1), task=fw.Task(example=randn(1, 8, 9)))


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (SVD(), "nothing says how much"),
        (SVD(rank=3, ratio=0.5), "ratio and rank both"),
        (SVD(rank=0), "at least 1"),
        (SVD(ratio=0.5, multiple_of=0), "at least 1"),
        (SVD(ratio=1.5), "at most 1"),
        (SVD(rank={"nowhere": 3}), "'nowhere' matches none"),
        (SpatialSVD(ratio=0.5, axis=3), "0, 1 or 2"),
        (SVD(ratio="half"), "'half'"),
    ],
)
def test_settings_that_say_nothing_sensible_are_refused(step: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        fw.compress(net(), step, task=task(False))


def test_without_data_a_budget_is_met_too() -> None:
    model, given_task = net(), task(False)
    for step in (SVD, SpatialSVD):
        small = fw.compress(model, step(budget=fw.Budget(macs=0.6)), task=given_task)
        share = profile(small.model, given_task.inputs()).total.macs / profile(model, given_task.inputs()).total.macs
        assert 0.5 < share <= 0.6


# On a trained network


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def steps_of(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> float:
    """Train with plain SGD; returns the accuracy."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )
    assert steps_of(model, *digits(), steps=80, lr=0.05) > 0.95
    return model


@pytest.mark.parametrize("step", [SVD(), SpatialSVD()], ids=lambda step: type(step).__name__)
def test_predicted_losses_order_what_is_measured(trained: nn.Sequential, step: Any) -> None:
    """Over random plans, the predicted rise of the loss and the measured divergence from the original go together."""
    x, _ = digits()
    batches = x[:512].split(128)
    layers = {n: m for n, m in trained.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = {n: m for n, m in layers.items() if step.unfit(m) is None}
    seen = gather(trained, layers, [Inputs((b,)) for b in batches], gradients=classifier_loss(1), effort=100.0)
    rows = profile(trained, Inputs((x[:1],))).layers
    options = {n: step.options(n, m, rows[n].calls, seen[n]) for n, m in layers.items()}
    distance = Divergence(trained, fw.Task(example=x[:1], calibration=batches))
    predicted, measured = [], []
    drawn = np.random.default_rng(0)
    for _ in range(25):
        model, loss, depth = copy.deepcopy(trained), 0.0, drawn.uniform(0.2, 1)
        for name, layer in layers.items():
            choices = options[name]
            option = choices[int(len(choices) * drawn.uniform(0.2, 1) * depth)]
            loss += option.loss
            Replace(name, option.form, step.values(layer, option.form, seen[name])).apply(model)
        predicted.append(loss)
        measured.append(distance(model))
    assert spearmanr(predicted, measured).statistic >= 0.8
    # its scale is rough: only small changes are quadratic
    assert 0.03 < np.median(np.array(predicted) / np.array(measured)) < 30


@pytest.mark.parametrize("step", [SVD, SpatialSVD])
def test_factors_that_come_out_of_whitening_can_be_trained_on(trained: nn.Sequential, step: Any) -> None:
    x, y = digits()
    small = fw.compress(trained, step(budget=fw.Budget(macs=0.35)), task=fw.Task(x[:1], x[:512].split(128)))
    with torch.no_grad():
        before = float((small.model(x).argmax(1) == y).float().mean())
    for module in small.model.modules():
        if isinstance(module, ConvPair | LinearPair):
            sizes = module.first.weight.norm(), module.second.weight.norm()
            assert max(sizes) / min(sizes) < 1.001
    assert steps_of(small.model, x, y, steps=60, lr=0.02) >= max(0.95, before - 0.01)


def test_data_beats_no_data_on_a_trained_network(trained: nn.Sequential) -> None:
    x, _ = digits()
    given_task = fw.Task(x[:1], x[:512].split(128))
    distance = Divergence(trained, given_task)
    for step in (SVD, SpatialSVD):
        aware = fw.compress(trained, step(ratio=0.4, ignore=("11",)), task=given_task)
        plain = fw.compress(trained, step(ratio=0.4, ignore=("11",), data_aware=False), task=given_task)
        assert ranks(aware) == ranks(plain)
        assert distance(aware.model) < distance(plain.model)


def test_forms_are_what_the_names_say() -> None:
    small = fw.compress(net(), SpatialSVD(rank=4), task=task(False))
    assert small.ledger.steps[0].edits[0]["form"] == Separable(4).to_json()
    small = fw.compress(net(), SVD(rank=4), task=task(False))
    assert small.ledger.steps[0].edits[0]["form"] == LowRank(4).to_json()
