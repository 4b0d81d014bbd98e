"""Pruning single weights as a user meets it: which go, how many, how much is lost, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Mixed, Residual, Temporal, make, task_of, train
from torch import Tensor, nn

import featherweight as fw
from featherweight import prune
from featherweight.curvature import gather, sweeps
from featherweight.errors import NoEffect, RecipeError
from featherweight.forms import BlockMask, Mask, Pattern, constraints_on, is_layer
from featherweight.prune.wanda import best_of_rows


def pruned(step: Any, model: nn.Module | None = None, **fields: Any) -> fw.Compressed:
    model = make(Mixed) if model is None else model
    return fw.compress(model, step, task=task_of(model, **fields))


def zeros(model: nn.Module) -> dict[str, int]:
    return {n: int((m.weight == 0).sum()) for n, m in model.named_modules() if is_layer(m)}


# Which weights go ---------------------------------------------------------------------------------------------------


def test_the_smallest_go_and_the_others_stay_as_they_are() -> None:
    model = make(Mixed)
    small = pruned(prune.Magnitude(sparsity={"second": 0.75}), model).model
    weight, now = model.second.weight.detach(), small.second.weight.detach()
    limit = weight.abs().flatten().kthvalue(432).values
    assert torch.equal(now, weight * (weight.abs() > limit))
    assert zeros(small) == {"first": 0, "second": 432, "head": 0}


def test_a_threshold_is_a_threshold() -> None:
    model = make(Mixed)
    small = pruned(prune.Magnitude(threshold=0.1), model).model
    for name in ("first", "second", "head"):
        weight = model.get_submodule(name).weight.detach()
        assert torch.equal(small.get_submodule(name).weight, weight * (weight.abs() >= 0.1))


def test_blocks_go_whole_by_sums_or_sums_of_squares() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():  # sums 2 and 2.2, squares 4 and 2.42
        model[0].weight.copy_(torch.tensor([[2.0, 0.0, 1.1, 1.1], [9.0, 9.0, 9.0, 9.0]]))
    x = torch.randn(8, 4)
    given = fw.Task(x[:1], x.split(8))
    by_l1, by_l2 = (
        fw.compress(model, prune.Magnitude(sparsity={"0": 0.25}, score=score, block=(1, 2)), task=given).model[0]
        for score in ("l1", "l2")
    )
    assert by_l1.weight[0].tolist() == pytest.approx([0, 0, 1.1, 1.1])
    assert by_l2.weight[0].tolist() == pytest.approx([2, 0, 0, 0])


def test_scores_of_the_data_see_what_the_loss_sees() -> None:
    """An input that is always zero makes its weights worthless, however large they are."""
    model = make(Mixed)
    with torch.no_grad():
        model.first.weight[:, 3] *= 100
    x = Mixed.data(64)
    x[:, 3] = 0
    given = fw.Task(x[:1], x.split(16))
    for settings in ({"score": "taylor"}, {"score": "fisher"}):
        small = fw.compress(model, prune.Magnitude(sparsity={"first": 1 / 12}, **settings), task=given).model
        assert not small.first.weight[:, 3].any(), settings
        assert zeros(small)["first"] == 24
    for step in (prune.Wanda(sparsity={"first": 1 / 12}), prune.OBS(sparsity={"first": 1 / 12})):
        assert not fw.compress(model, step, task=given).model.first.weight[:, 3].any(), step.name


def test_random_scores_have_no_favourites_and_one_seed() -> None:
    one, other = (pruned(prune.Magnitude(sparsity=0.5, score="random")).model for _ in range(2))
    assert torch.equal(one.second.weight, other.second.weight)
    weight = make(Mixed).second.weight.detach().abs()
    assert float(weight[one.second.weight != 0].sum() / weight.sum()) == pytest.approx(0.5, abs=0.06)


def test_wanda_takes_the_same_from_every_output() -> None:
    small = pruned(prune.Wanda(sparsity=0.5)).model
    assert (small.second.weight == 0).sum(1).tolist() == [12] * 24
    stay = best_of_rows(torch.rand(5, 7), 23)
    assert sorted(stay.sum(1).tolist()) == [4, 4, 5, 5, 5]


@pytest.mark.parametrize("step", [prune.NM, prune.OBS, prune.Wanda, prune.Magnitude], ids=lambda s: s.__name__)
def test_of_every_four_neighbours_two_stay(step: Any) -> None:
    small = pruned(step(n=2, m=4), make(Residual))
    left = small.ledger.steps[0].left
    assert left == {"stem": "its 3 inputs a group are not a multiple of 4"}
    for name in ("one", "two", "down", "head"):
        weight = small.model.get_submodule(name).weight.detach().flatten(2) if name != "head" else None
        weight = small.model.head.weight.detach()[..., None] if weight is None else weight
        runs = (weight != 0).reshape(len(weight), -1, 4, weight.shape[-1])
        assert bool((runs.sum(2) == 2).all()), name
    assert set(small.plan.layers.values()) == {Pattern(2, 4)}


# How much is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Mixed, Temporal])
@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.8}, {"n": 2, "m": 4}], ids=str)
def test_obs_loses_less_than_wanda_less_than_magnitude(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    """In total over the layers, each on the original's own inputs."""
    model = make(kind)
    draw = torch.randn(kind.data(1).shape[1], kind.data(1).shape[1], generator=torch.Generator().manual_seed(1))
    x = torch.einsum("nc...,cd->nd...", kind.data(256), draw) * torch.logspace(-1, 0.5, len(draw)).reshape(
        -1, *[1] * (kind.data(1).ndim - 2)
    )
    given = fw.Task(x[:1], x.split(64))
    layers = {name: m for name, m in model.named_modules() if is_layer(m)}
    seen = gather(model, layers, given.batches(model), effort=1e9)
    lost = {}
    for step in (
        prune.OBS(asymmetric=False, **settings),
        prune.Wanda(asymmetric=False, **settings),
        prune.Magnitude(**settings),
    ):
        small = fw.compress(model, step, task=given).model
        total = 0.0
        for name, layer in layers.items():
            of = sweeps.of_layer(layer, seen[name])
            of = sweeps.Matrix(of.weight, of.gram)
            total += sweeps.loss(of, small.get_submodule(name).weight.detach().double().reshape(of.weight.shape))
        lost[step.name] = total
    assert lost["prune.OBS"] < 0.8 * lost["prune.Wanda"], lost
    assert lost["prune.Wanda"] < lost["prune.Magnitude"], lost


@pytest.mark.parametrize("kind", [Temporal, Mixed])
def test_both_ways_of_obs_keep_what_they_should(kind: type[nn.Module]) -> None:
    for exact in (True, False):
        small = pruned(prune.OBS(sparsity=0.6, exact=exact), make(kind))
        (entry,) = small.ledger.steps
        for name, form in small.plan.layers.items():
            assert isinstance(form, Mask)
            assert int((small.model.get_submodule(name).weight != 0).sum()) == form.kept, name
        assert entry.after.score > 0.7


# How many go ----------------------------------------------------------------------------------------------------------


def test_a_share_is_laid_over_the_layers_by_each_rule() -> None:
    model = make(Mixed)
    sizes = {"first": 288, "second": 576, "head": 96}
    for spread in ("global", "erk", "lamp", "optimal"):
        gone = zeros(pruned(prune.Magnitude(sparsity=0.5, spread=spread), model).model)
        assert sum(gone.values()) == pytest.approx(480, abs=2 if spread != "optimal" else 20), spread
        assert {n: round(gone[n] / sizes[n], 2) for n in sizes} != dict.fromkeys(sizes, 0.5), spread


def test_budgets_choose_by_the_curvature() -> None:
    for step in (prune.Magnitude(budget=fw.Budget(params=0.5)), prune.OBS(budget=fw.Budget(bytes=0.5))):
        (entry,) = pruned(step).ledger.steps
        metric = next(iter(step.budget.costs()))
        assert 0.47 < getattr(entry.after.total, metric) / getattr(entry.before.total, metric) <= 0.5
    small = pruned(prune.NM(m=4, budget=fw.Budget(params=0.7)))
    assert {form.n for form in small.plan.layers.values()} <= {1, 2, 3}
    drop = pruned(prune.Magnitude(budget=fw.Budget(drop=0.1), select=fw.Optimal(metric="params")))
    assert drop.ledger.steps[0].after.score >= drop.ledger.steps[0].before.score - 0.1


def test_a_plan_of_any_counts_can_be_carried_out() -> None:
    plan = fw.Plan("prune.Magnitude", {"first": Mask(17), "head": BlockMask(5, (2, 2))})
    small = pruned(prune.Magnitude(select=plan, block=(2, 2)))
    assert zeros(small.model) == {"first": 288 - 17, "second": 0, "head": 96 - 20}


# In rounds ------------------------------------------------------------------------------------------------------------


def counted(calls: list[tuple[int, float]]) -> Any:
    """A training that notes how many zeros it starts from."""

    def trained(model: nn.Module, epochs: float, loss: object = None) -> None:
        calls.append((sum(zeros(model).values()), epochs))
        train(model, epochs)

    return trained


def test_gradually_more_goes_and_in_the_end_all_of_it() -> None:
    calls: list[tuple[int, float]] = []
    step = prune.Magnitude(sparsity=0.8, schedule="gradual", rounds=4, epochs=2)
    small = pruned(step, train=counted(calls))
    gone = [zeros for zeros, _ in calls]
    assert gone == sorted(gone)
    assert [epochs for _, epochs in calls] == [0.5] * 4
    assert gone[0] > 0.5 * gone[-1], "much early"
    assert sum(zeros(small.model).values()) == gone[-1] == round(0.8 * 960)
    # Trained weights and biases are the result's.
    assert not torch.equal(small.model.first.bias, make(Mixed).first.bias)


def test_rounds_end_where_the_score_has_dropped_too_far() -> None:
    calls: list[tuple[int, float]] = []

    def score(model: nn.Module) -> float:
        return 1.0 if sum(zeros(model).values()) < 0.65 * 960 else 0.2

    step = prune.Magnitude(sparsity=0.9, schedule="iterative", rounds=5, epochs=1, max_drop=0.1)
    small = pruned(step, train=counted(calls), evaluate=score)
    (entry,) = small.ledger.steps
    assert entry.after.score == 1.0
    assert any("the one before is kept" in note for note in entry.notes)
    assert 0 < sum(zeros(small.model).values()) < 0.65 * 960
    assert len(calls) < 5
    assert {
        name: Mask(m.weight.numel() - zeros(small.model)[name])
        for name, m in make(Mixed).named_modules()
        if is_layer(m)
    } == dict(small.plan.layers)


def test_pruning_again_goes_on_from_the_mask() -> None:
    once = pruned(prune.Magnitude(sparsity=0.5))
    twice = fw.compress(once.model, prune.OBS(sparsity=0.7), task=task_of(make(Mixed)))
    for name in ("first", "second", "head"):
        before, after = once.model.get_submodule(name).weight, twice.model.get_submodule(name).weight
        assert not after[before == 0].any()
        assert len(constraints_on(twice.model.get_submodule(name))) == 1
    with pytest.warns(NoEffect, match="as many of its weights are zero already"):
        fw.compress(once.model, prune.Magnitude(sparsity=0.3), task=task_of(make(Mixed)))


# Movement -------------------------------------------------------------------------------------------------------------


def test_scores_are_the_gradients_of_the_paper() -> None:
    """With weights that are not trained, S = −lr Σ dL/dŴ · W, and the mask is that of the highest."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    weight = model[0].weight.detach().clone()
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    by_hand = torch.zeros_like(weight)

    def trained(given: nn.Module, epochs: float, loss: object = None) -> None:
        scores = [p for name, p in given.named_parameters() if name.endswith("scores")]
        updates = torch.optim.SGD(scores, lr=0.1)
        updates.zero_grad()
        (given(x) - y).square().mean().backward()
        now = given[0].weight.detach()
        slope = torch.autograd.grad(((x @ (leaf := now.clone().requires_grad_()).T) - y).square().mean(), leaf)[0]
        by_hand.sub_(0.1 * slope * weight)
        updates.step()

    given = fw.Task(x[:1], x.split(16), train=trained)
    small = fw.compress(model, prune.Movement(sparsity=0.5, epochs=1, rounds=3), task=given).model
    stay = torch.zeros(24, dtype=torch.bool)
    stay[by_hand.flatten().topk(12).indices] = True
    assert torch.equal(small[0].weight != 0, stay.reshape(4, 6))
    assert torch.equal(small[0].weight[stay.reshape(4, 6)], weight[stay.reshape(4, 6)])


def test_movement_over_a_mask_and_over_all_layers() -> None:
    once = pruned(prune.Magnitude(sparsity=0.3)).model
    small = fw.compress(once, prune.Movement(sparsity=0.5, epochs=1, rounds=2), task=task_of(make(Mixed), train=train))
    assert zeros(small.model) == {"first": 144, "second": 288, "head": 48}
    assert not small.model.second.weight[once.second.weight == 0].any()
    over_all = pruned(prune.Movement(sparsity=0.5, epochs=1, rounds=2, spread="global"), train=train)
    assert sum(zeros(over_all.model).values()) == 480


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            prune.Magnitude(),
            "nothing says how much to keep: give one of budget=, sparsity=, n=, select=plan, threshold=",
        ),
        (prune.Magnitude(sparsity=1.0), "sparsity is 1.0: it is the share of weights that goes, from 0 to below 1"),
        (prune.OBS(sparsity=-0.1), "sparsity is -0.1"),
        (prune.Wanda(sparsity={"*": 0.5}, spread="erk"), "spread='erk' lays one share over all layers"),
        (prune.Magnitude(sparsity=0.5, n=2), "sparsity and n both say how much to keep"),
        (prune.NM(n=5), "n is 5: of every 4 at least 1 and at most 4 stay"),
        (prune.NM(n=1, m=1), "m is 1: n of every m stay, so it is at least 2"),
        (prune.NM(n=1, block=(0, 1)), r"block is \(0, 1\): it is \(outputs, inputs\), each at least 1"),
        (prune.Magnitude(threshold=0.0), "threshold is 0.0"),
        (prune.Magnitude(threshold=0.1, block=(2, 1)), "threshold is about single weights, and block is"),
        (prune.Magnitude(sparsity=0.5, schedule="gradual"), "schedule='gradual' trains: give epochs="),
        (prune.Magnitude(sparsity=0.5, max_drop=0.1), "max_drop ends an iterative schedule"),
        (prune.Movement(sparsity=0.5), r"movement pruning trains: give Task\(train=...\)"),
        (prune.Movement(sparsity=0.5, rounds=1), "rounds is 1: it must be at least 2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_make_no_sense(step: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        pruned(step)


@pytest.mark.parametrize(
    "step", [prune.Wanda(sparsity=0.5), prune.OBS(n=2), prune.Magnitude(sparsity=0.5, score="fisher")]
)
def test_without_data_those_that_need_it_say_so(step: Any) -> None:
    with pytest.raises(RecipeError, match=r"give Task\(calibration=...\)"):
        fw.compress(make(Mixed), step, task=fw.Task(Mixed.data(1)))


def test_a_mask_that_would_empty_a_layer() -> None:
    model = make(Mixed)
    with torch.no_grad():
        model.head.weight.mul_(1e-3)
    for step in (prune.Magnitude(threshold=0.01), prune.Magnitude(sparsity=0.5, spread="global")):
        with pytest.raises(
            RecipeError, match=r"nothing would be left of 'head': let less go, or ignore=\('head',\) it"
        ):
            pruned(step, model)


def test_damaged_and_empty_weights() -> None:
    model = make(Mixed)
    with torch.no_grad():
        model.second.weight[1, 2] = float("inf")
    with pytest.raises(RecipeError, match=r"NaN or infinite values in second\.weight"):
        pruned(prune.Magnitude(sparsity=0.5), model)
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Sequential(nn.Linear(12, 0), nn.Linear(0, 24), nn.ReLU(), nn.Linear(24, 4))
    x: Tensor = torch.randn(16, 12)
    small = fw.compress(empty, prune.Magnitude(sparsity=0.5), task=fw.Task(x[:1], x.split(8)))
    assert small.ledger.steps[0].left["0"] == small.ledger.steps[0].left["1"] == "its weight is empty"


def test_values_that_were_settled_are_left_alone() -> None:
    from featherweight import share

    once = fw.compress(make(Mixed), share.KMeans(bits={"first": 2, "second": 2}), task=task_of(make(Mixed)))
    again = fw.compress(once.model, prune.Magnitude(sparsity=0.5), task=task_of(make(Mixed)))
    assert again.ledger.steps[0].left["first"] == "an earlier step has settled its values: 4 centroids"
    assert set(again.plan.layers) == {"head"}
