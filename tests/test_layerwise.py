"""What every layer-by-layer step does around its technique: order, fitting to what came before, trials, mending."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.cost.count import profile
from featherweight.edits import Replace
from featherweight.errors import TaskError
from featherweight.factorize import SVD, SpatialSVD
from featherweight.forms import ConvPair, FormModule, LinearPair, LowRank
from featherweight.layerwise import Bench
from featherweight.score import Divergence, Scorer
from featherweight.study import Study


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deep(layers: int = 5, width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, 4)).eval()


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12, momentum=None), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16, momentum=None), nn.ReLU(), nn.Conv2d(16, 16, 3, 2),
        nn.BatchNorm2d(16, momentum=None), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6),
    )  # fmt: skip
    for seed in range(20):
        model(images(32, seed))
    return model.eval()


def images(samples: int, seed: int = 0) -> Tensor:
    return randn(samples, 3, 8, 8, seed=seed).cumsum(2).cumsum(3) / 4


def task(samples: int = 128, **more: Any) -> fw.Task:
    x = images(samples)
    return fw.Task(example=x[:1], calibration=x.split(32), **more)


def study(model: nn.Module, of: fw.Task) -> Study:
    return Study(model, copy.deepcopy(model), of, Scorer(of, model), profile(model, of.inputs()).total)


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_layers_are_fitted_to_what_the_layers_before_have_become() -> None:
    """Fitted to the original's answers on changed inputs, a deep network strays less than fitted to its own inputs."""
    model, x = deep(), randn(512, 24).cumsum(1)
    given = fw.Task(example=x[:1], calibration=x.split(128), loss="mse")
    distance = Divergence(model, given)
    kept, blind = (
        distance(fw.compress(model, SVD(rank=8, asymmetric=asymmetric), task=given).model)
        for asymmetric in (True, False)
    )
    assert kept < 0.9 * blind


def test_the_first_layer_sees_nothing_changed() -> None:
    model, x = deep(), randn(200, 24)
    one, other = (
        fw.compress(model, SVD(rank={"0": 3}, asymmetric=asymmetric), task=fw.Task(x[:1], x.split(50))).model
        for asymmetric in (True, False)
    )
    torch.testing.assert_close(one[0].weight, other[0].weight, rtol=1e-3, atol=1e-5)


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.second, self.first = nn.Linear(24, 4), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def test_layers_are_replaced_in_the_order_they_are_called() -> None:
    x = randn(64, 24)
    small = fw.compress(Backwards(), SVD(rank=2), task=fw.Task(x[:1], x.split(32)))
    assert [edit["layer"] for edit in small.ledger.steps[0].edits] == ["first", "second", "last"]


@pytest.mark.parametrize("step", [SVD(rank=2), SpatialSVD(rank=3), SVD(budget=fw.Budget(macs=0.6))], ids=repr)
def test_a_trial_scores_what_the_result_will_score(step: Any) -> None:
    """Selectors decide by trials: fitted, asymmetric and mended like the result itself."""
    model, x, y = conv_net(), images(64, seed=3), torch.arange(64) % 6
    given = task(evaluate=lambda m: -float(nn.functional.cross_entropy(m(x), y).detach()))
    small = fw.compress(model, step, task=given)
    plan = fw.Plan(step.name, forms(small.model))
    on_the_bench = study(copy.deepcopy(model), given)
    assert Bench(step, on_the_bench).score(plan) == pytest.approx(small.ledger.after.score, abs=1e-6)
    assert equal(on_the_bench.model, model)
    assert equal(on_the_bench.original, model)


def forms(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ConvPair) and module.first_axes:
            found[name] = SpatialSVD().form(module.rank)
        elif isinstance(module, ConvPair | LinearPair):
            found[name] = LowRank(module.rank)
    return found


@pytest.mark.parametrize("aware", [True, False])
def test_a_layers_score_alone_is_that_of_the_network_with_only_it_replaced(aware: bool) -> None:
    model, x, y = conv_net(), images(64, seed=3), torch.arange(64) % 6

    def evaluate(m: nn.Module) -> float:
        return -float(nn.functional.cross_entropy(m(x), y).detach())

    step = SVD(budget=fw.Budget(macs=0.6), data_aware=aware)
    bench = Bench(step, study(copy.deepcopy(model), task(evaluate=evaluate)))
    for name in ("0", "6", "11"):
        option = bench.table.options[name][1]
        by_hand = copy.deepcopy(model)
        values = step.values(bench.layers[name], option.form, bench.statistics[name] if aware else None)
        Replace(name, option.form, values).apply(by_hand)
        assert bench.score_alone(option) == pytest.approx(evaluate(by_hand), abs=1e-5)
    assert equal(bench.study.original, model)


def test_only_norms_behind_the_first_replaced_layer_are_estimated_anew() -> None:
    model = conv_net()
    small = fw.compress(model, SVD(rank={"3": 1}, data_aware=False), task=task()).model
    assert torch.equal(small[1].running_var, model[1].running_var)
    assert not torch.equal(small[4].running_var, model[4].running_var)
    assert not torch.equal(small[7].running_var, model[7].running_var)
    assert [small[i].num_batches_tracked for i in (1, 4, 7)] == [20, 20, 20]
    seen = small[3](small[2](small[1](small[0](images(128)))))
    torch.testing.assert_close(small[4].running_mean, seen.mean((0, 2, 3)).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("calibration", [0, 16])
def test_too_few_samples_say_nothing_of_a_norm(calibration: int) -> None:
    model, x = conv_net(), images(16)
    small = fw.compress(model, SVD(rank=2), task=fw.Task(x[:1], x[:calibration].split(8) if calibration else ())).model
    for index in (1, 4, 7):
        assert torch.equal(small[index].running_var, model[index].running_var)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_next_to_no_data_does_no_harm(samples: int, asymmetric: bool) -> None:
    """A sample or two say nothing of most directions: those must stay about as without data, not go to zero."""
    model, x, fresh = deep(3), randn(samples, 24), randn(500, 24, seed=1)
    given = fw.Task(x[:1], [x], loss="mse")
    truth = model(fresh).detach()

    def error(step: SVD) -> float:
        answer = fw.compress(model, step, task=given).model(fresh).detach()
        return float((answer - truth).square().sum() / truth.square().sum())

    aware, plain = error(SVD(rank=11, asymmetric=asymmetric)), error(SVD(rank=11, data_aware=False))
    assert aware < max(0.5, 3 * plain)


def test_samples_bounds_what_is_looked_at() -> None:
    asked: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            for index in range(10):
                asked.append(index)
                yield images(8, seed=index)

    given = fw.Task(images(1), Loader(), evaluate=lambda model: 0.0)
    fw.compress(conv_net(), SpatialSVD(rank=2, samples=20), task=given)
    assert set(asked) == {0, 1, 2}


def test_a_run_neither_uses_nor_disturbs_the_processs_random_numbers() -> None:
    model, given = conv_net(), task()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(fw.compress(model, SVD(budget=fw.Budget(macs=0.5)), task=given).model)
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(*results)


class Quantile(torch.autograd.Function):
    """An operation without a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise NotImplementedError("no derivative was written for Quantile")


class Underivable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Quantile.apply(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [Underivable(), nn.Module()], ids=["no derivative", "whole numbers"])
def test_where_no_gradient_can_be_had_outputs_are_weighed_and_that_is_said(last: nn.Module) -> None:
    if not isinstance(last, Underivable):
        last.forward = lambda x: x.argmax(1)  # type: ignore[assignment]
    model = nn.Sequential(*deep(2), last)
    x = randn(64, 24)
    small = fw.compress(model, SVD(budget=fw.Budget(macs=0.6)), task=fw.Task(x[:1], x.split(32)))
    assert any("no gradient" in note for note in small.ledger.steps[0].notes)
    assert any(isinstance(m, FormModule) for m in small.model.modules())


@pytest.mark.parametrize("when", range(3))
def test_trouble_in_the_middle_leaves_the_model_alone(when: int) -> None:
    model, x = conv_net(), images(64)
    model.train()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    calls = 0

    def evaluate(m: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls > when:
            raise ValueError("the disk is full")
        return 0.5

    step = SVD(budget=fw.Budget(macs=0.6, drop=0.0))
    with pytest.raises(TaskError, match="disk is full"):
        fw.compress(model, step, task=fw.Task(x[:1], x.split(32), evaluate=evaluate))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_predicted_losses_of_a_plan_add_up_to_what_was_minimised() -> None:
    """No other plan of the table within the budget is predicted to lose less: tried one exchange at a time."""
    model, given = conv_net(), task()
    step = SVD(budget=fw.Budget(macs=0.55))
    bench = Bench(step, study(copy.deepcopy(model), given))
    plan = step.choose(bench).plan
    table, limit = bench.table, 0.55 * bench.table.start.macs
    assert table.cost(plan).macs <= limit
    for name, options in table.options.items():
        for option in options:
            other = plan.edited({name: option.form})
            if table.cost(other).macs <= limit:
                assert table.loss(other) >= table.loss(plan) - 1e-12
