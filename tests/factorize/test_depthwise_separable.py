"""Network decoupling: against brute force, in every kind of convolution, and better with data than without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import NETWORKS, make, task_of
from torch import Tensor, nn

import featherweight as fw
from featherweight import factorize
from featherweight.batch import Inputs
from featherweight.cost.count import profile
from featherweight.curvature.gram import Statistics, gather
from featherweight.edits import Replace
from featherweight.errors import EditError, RecipeError
from featherweight.factorize.depthwise_separable import Decoupling
from featherweight.forms import Depthwise

STEP = factorize.DepthwiseSeparable(terms=1)
CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
    "strided, dilated, without bias": (
        nn.Conv2d(6, 10, 3, stride=2, dilation=2, padding=2, bias=False),
        (2, 6, 11, 11),
    ),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2, padding="same"), (2, 8, 7, 7)),
    "reflecting, of two sizes": (nn.Conv2d(4, 9, (3, 5), padding=(1, 2), padding_mode="reflect"), (2, 4, 9, 9)),
    "in time": (nn.Conv1d(5, 7, 4), (2, 5, 16)),
    "in depth": (nn.Conv3d(3, 9, 2, stride=(1, 2, 1)), (2, 3, 4, 6, 5)),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen_by(layer: nn.Module, x: Tensor) -> Statistics:
    return gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))], effort=1e9)["0"]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_all_terms_together_are_the_convolution(kind):
    layer, shape = CONVOLUTIONS[kind]
    most = min(layer.weight[0, 0].numel(), layer.out_channels // layer.groups)
    form = Depthwise(most)
    made = form.build(layer)
    made.load_state_dict(STEP.values(layer, form, None))
    x = randn(*shape)
    torch.testing.assert_close(made(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.weight, layer.weight, atol=1e-5, rtol=1e-5)
    assert made.second.bias is None if layer.bias is None else torch.equal(made.bias, layer.bias)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("terms", [1, 2])
def test_without_data_each_channel_is_its_own_truncated_svd(kind, terms):
    layer, shape = CONVOLUTIONS[kind]
    made = Depthwise(terms).build(layer)
    made.load_state_dict(STEP.values(layer, Depthwise(terms), None))
    weight = layer.weight.detach()
    per_group = layer.out_channels // layer.groups
    for g in range(layer.groups):
        rows = slice(g * per_group, (g + 1) * per_group)
        for channel in range(weight.shape[1]):
            matrix = weight[rows, channel].reshape(per_group, -1)
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            best = (u[:, :terms] * s[:terms]) @ v[:terms]
            torch.testing.assert_close(made.weight[rows, channel].reshape(per_group, -1), best, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        whole = copy.deepcopy(layer)
        whole.weight.copy_(made.weight)
        torch.testing.assert_close(made(randn(*shape)), whole(randn(*shape)), atol=1e-5, rtol=1e-4)


def test_data_makes_the_output_nearer_than_svd_alone_and_gradient_descent_finds_nothing_much_better():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 3, padding=1, bias=False)
    x = nn.functional.avg_pool2d(randn(32, 6, 18, 18), 2) * torch.tensor([4.0, 1, 1, 0.2, 1, 2])[:, None, None]
    x[:, 1] = 0.8 * x[:, 0] + 0.2 * x[:, 1]  # channels that could make up for one another
    answer = layer(x).detach()

    def error(values: dict[str, Tensor]) -> float:
        made = Depthwise(1).build(layer)
        made.load_state_dict(values)
        with torch.no_grad():
            return float((made(x) - answer).square().mean() / answer.square().mean())

    seen = seen_by(layer, x)
    plain, aware = error(STEP.values(layer, Depthwise(1), None)), error(STEP.values(layer, Depthwise(1), seen))
    known = Decoupling(layer, seen)
    kernels, mixing = known.factors(1)
    alone = known.loss(kernels, known.mixed(kernels, mixing))
    assert aware < 0.8 * plain
    assert aware < alone + 1e-6, "refitting the kernels too does not make it worse"
    assert aware == pytest.approx(known.loss(*known.fitted(1)), rel=1e-3), "the loss told is that of the output"

    found = Depthwise(1).build(layer)
    found.load_state_dict(STEP.values(layer, Depthwise(1), seen))
    optimizer = torch.optim.LBFGS(found.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (found(x) - answer).square().mean() / answer.square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert error(found.state_dict()) > 0.9 * aware


def test_gradients_say_which_outputs_count():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, bias=False)
    x = randn(32, 3, 8, 8)
    seen = seen_by(layer, x)
    seen.gradients = torch.diag(torch.tensor([100.0, *[0.01] * 7]))
    made = Depthwise(1).build(layer)
    errors = []
    for values in (STEP.values(layer, Depthwise(1), seen), STEP.values(layer, Depthwise(1), seen_by(layer, x))):
        made.load_state_dict(values)
        with torch.no_grad():
            errors.append(float((made(x) - layer(x))[:, 0].square().mean()))
    assert errors[0] < 0.1 * errors[1]


def test_both_factors_are_of_one_size():
    layer, _ = CONVOLUTIONS["plain"]
    values = STEP.values(layer, Depthwise(2), None)
    first = values["first.weight"].reshape(6, 2, 9).norm(dim=2)
    second = values["second.weight"].reshape(8, 6, 2).norm(dim=0)
    torch.testing.assert_close(first, second)


def test_a_network_is_rewritten_and_costs_what_a_mobilenet_costs():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Flatten(),
        nn.Linear(1024, 5),
    ]
    model = nn.Sequential(*layers)
    task = fw.Task(randn(1, 32, 4, 4), calibration=randn(64, 32, 4, 4, seed=1).split(16))
    small = fw.compress(model, factorize.DepthwiseSeparable(terms=1), task=task)
    (entry,) = small.ledger.steps
    for name, inputs in (("0", 32), ("2", 64)):
        assert entry.after.layers[name].macs == 16 * inputs * (9 + 64)
        assert entry.after.layers[name].macs / entry.before.layers[name].macs == pytest.approx(1 / 64 + 1 / 9)
    assert "Linear layer has no kernel" in entry.left["4"]
    assert small.plan.layers == {"0": Depthwise(1), "2": Depthwise(1)}


def test_what_is_left_alone_and_why():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    small = fw.compress(model, STEP, task=fw.Task(randn(1, 4, 6, 6), calibration=[randn(8, 4, 6, 6)]))
    left = small.ledger.steps[0].left
    assert "one position" in left["0"]
    assert "depthwise already" in left["1"]
    assert set(left) == {"0", "1"}


def test_terms_by_layer_and_what_they_cannot_be():
    model = make(NETWORKS["residual"])
    small = fw.compress(model, factorize.DepthwiseSeparable(terms={"one": 2, "two": 1}), task=task_of(model))
    assert small.plan.layers == {"one": Depthwise(2), "two": Depthwise(1)}
    with pytest.raises(RecipeError, match="terms is 0: it must be at least 1"):
        fw.compress(model, factorize.DepthwiseSeparable(terms=0), task=task_of(model))
    with pytest.raises(RecipeError, match="give one of budget=, ratio=, select=plan, terms="):
        fw.compress(model, factorize.DepthwiseSeparable(), task=task_of(model))
    far = fw.compress(model, factorize.DepthwiseSeparable(terms={"one": 1, "two": 99}), task=task_of(model))
    assert "99 terms is none of its options" in far.ledger.steps[0].left["two"]


def test_a_form_is_for_convolutions():
    with pytest.raises(EditError, match="defined for Conv layers, not for Linear"):
        Depthwise(1).build(nn.Linear(3, 3))
    assert str(Depthwise(1)) == "depthwise, 1 term"
    assert str(Depthwise(3)) == "depthwise, 3 terms"


def test_prices_are_true_with_a_stride():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    model = nn.Sequential(layer)
    rows = profile(model, Inputs((randn(1, 8, 10, 10),))).layers
    options: Any = STEP.priced("0", layer, rows["0"].calls)
    assert [o.cost.macs for o in options] == [25 * t * (8 * 9 + 8 * 16) for t in range(1, 10)]
    Replace("0", options[1].form, STEP.values(layer, options[1].form, None)).apply(model)
    assert profile(model, Inputs((randn(1, 8, 10, 10),))).layers["0"].cost == options[1].cost
