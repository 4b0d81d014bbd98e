"""Rate-distortion: budgets met by the file itself, errors weighed, masks respected, and what cannot be is said."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Mixed, Residual, make, task_of

import featherweight as fw
from featherweight.curvature.sweeps import matrix
from featherweight.edits import Constrain
from featherweight.errors import BudgetError, RecipeError
from featherweight.forms import Grid, Mask, constraints_on
from featherweight.quantize import RateDistortion
from featherweight.quantize.rate_distortion import Price, cheapest, curvature, refitted, rounded


@pytest.mark.parametrize("budget", ["1.1 kB", 0.33], ids=str)
def test_bytes_are_met_by_the_file_as_it_is_written(tmp_path, budget):
    model = make(Mixed)
    small = fw.compress(model, RateDistortion(budget=fw.Budget(bytes=budget)), task=task_of(model))
    limit = 1100 if budget == "1.1 kB" else 0.33 * small.ledger.before.total.bytes
    size = small.save(tmp_path / "small.fw", ledger=False)
    assert 0.9 * limit < size <= limit
    again = fw.load(tmp_path / "small.fw", into=make(Mixed, seed=1)).model
    assert torch.equal(again(Mixed.data(4)), small.model.eval()(Mixed.data(4)))
    # The record stays out where it would break the budget, unless it is asked for.
    assert small.save(tmp_path / "small.fw") <= limit
    with fw.open(tmp_path / "small.fw") as file:
        assert (file.ledger is None) is (budget == "1.1 kB") or file.bytes <= limit
    assert small.save(tmp_path / "whole.fw", ledger=True) > size + 300


def test_a_drop_is_kept_to_and_used():
    model = make(Mixed)
    answers = model(Mixed.data(200)).detach()

    def evaluate(network):
        with torch.no_grad():
            return -float((network(Mixed.data(200)) - answers).square().mean() / answers.square().mean())

    task = task_of(model, evaluate=evaluate)
    small = fw.compress(model, RateDistortion(budget=fw.Budget(drop=0.01)), task=task)
    assert 0.0005 < -evaluate(small.model) <= 0.01
    with pytest.raises(BudgetError, match=r"at 1,600 bytes the score falls by .*, and drop is 1e-09"):
        fw.compress(model, RateDistortion(budget=fw.Budget(bytes=1600, drop=1e-9)), task=task)


def test_masked_values_stay_zero_and_what_becomes_zero_is_held_there():
    model = make(Mixed)
    form = Mask(300)
    form.put_on(model.second).mask.view(-1)[300:] = False
    small = fw.compress(model, RateDistortion(coarseness=1.0, strength=2.0), task=task_of(model))
    weight = small.model.second.weight
    masks = [c for c in constraints_on(small.model.second) if hasattr(c, "mask")]
    assert len(masks) == 1
    assert torch.equal(masks[0].mask, weight != 0)
    assert masks[0].kept == int((weight != 0).sum()) < 300
    assert not weight.view(-1)[300:].any()


def test_batch_norms_are_folded_only_where_asked():
    model = make(Residual)
    for fold in (True, False):
        small = fw.compress(model, RateDistortion(coarseness=0.01, fold=fold), task=task_of(model)).model
        assert bool(small.stem_norm.running_mean.any()) is not fold
        difference = (small(Residual.data(8)) - model(Residual.data(8))).norm() / model(Residual.data(8)).norm()
        assert difference < 0.05


def test_norms_whose_statistics_are_far_apart_keep_their_answers():
    """As in mobile networks: channels that hardly move have folded weights a thousand times those of the others."""
    model = make(Residual)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("stem", "one", "two"):
            layer = model.get_submodule(name)
            layer.weight.mul_(10 ** torch.empty(layer.out_channels, 1, 1, 1).uniform_(-1, 1, generator=drawn))
            layer.weight[0] *= 1e-5
        for _ in range(200):
            model.train()(Residual.data(64))
    model.eval()
    reference = model(Residual.data(32)).detach()
    small = fw.compress(model, RateDistortion(coarseness=0.01), task=task_of(model)).model
    assert (small(Residual.data(32)) - reference).norm() < 0.02 * reference.norm()


def test_a_weight_wider_than_any_grid_is_left_as_it_is():
    model = make(Residual)
    norm = model.stem_norm
    with torch.no_grad():
        norm.running_var.fill_(1.0)
        norm.running_var[0], norm.weight[0] = 1e-12, 1e3
    small = fw.compress(model, RateDistortion(coarseness=0.002), task=task_of(model)).model
    assert not hasattr(small.stem_norm, "parametrizations")


def test_a_price_is_what_the_entropy_says():
    numbers = torch.zeros(1, 40, 50, dtype=torch.float64)
    numbers[0, :20, :25] = torch.randint(-2, 3, (20, 25), generator=torch.Generator().manual_seed(0)).double()
    price = Price.learned(numbers)
    taken = float(price.bits(numbers).sum())
    ideal = 500 * math.log2(5)
    assert 0.9 * ideal < taken < 1.6 * ideal + 100, "rows and columns that are empty cost hardly anything"
    assert price.zero[0, 30, 40] < 0.1 < 1 < price.zero[0, 3, 3]


def test_the_cheapest_number_is_the_least_of_all_numbers():
    drawn = torch.Generator().manual_seed(1)
    whole = 3 * torch.randn(1, 6, 7, generator=drawn, dtype=torch.float64)
    matters = torch.rand(1, 6, 7, generator=drawn, dtype=torch.float64) + 0.1
    price = Price.learned(whole.round())
    found = cheapest(whole, matters, 0.2, price)
    for candidate in range(-12, 13):
        other = torch.full_like(whole, candidate)
        # Numbers further away than the two around the value are never looked at: they may only be cheaper by rarity.
        near = ((other - whole).abs() < 1) | (other == 0)
        cost = 0.5 * matters * (whole - other).square() + 0.2 * price.bits(other)
        mine = 0.5 * matters * (whole - found).square() + 0.2 * price.bits(found)
        assert (mine <= cost + 1e-9)[near].all()


def test_curvature_decides_what_is_rounded_away_and_the_step_makes_up_for_shrinking():
    layer, drawn = torch.nn.Linear(30, 20), torch.Generator().manual_seed(0)
    weight = torch.randn(20, 30, generator=drawn)
    of = matrix(weight, 1, None)
    matters = curvature(of).clone()
    matters[..., :15] *= 100
    numbers = rounded(of, matters, 1.0, 20.0, feedback=False)
    assert (numbers[..., :15] == 0).double().mean() < (numbers[..., 15:] == 0).double().mean() - 0.2
    step = refitted(of, numbers, matters, 1.0)
    error = [float((matters.mean(-1, keepdim=True) * (of.weight - numbers * s).square()).sum()) for s in (step, 1.0)]
    assert error[0] <= error[1]
    assert (rounded(of, matters, 1.0, 0.0, feedback=True) == of.weight.round()).all()
    assert layer.weight.numel() == 600


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing says how coarse steps are to be"),
        ({"coarseness": 0.1, "budget": fw.Budget(bytes=0.5)}, "budget and coarseness both say"),
        ({"coarseness": 100.0}, "coarseness is 100: it lies between"),
        ({"budget": fw.Budget(macs=0.5)}, "the budget limits macs, which steps do not change"),
        ({"coarseness": 0.1, "ignore": ("frist",)}, "the pattern 'frist' matches none of"),
        ({"coarseness": 0.1, "strength": -1.0}, "strength must be at least 0"),
    ],
)
def test_settings_that_cannot_be_are_said(settings, message):
    model = make(Mixed)
    with pytest.raises(RecipeError, match=message):
        fw.compress(model, RateDistortion(**settings), task=task_of(model))


def test_what_cannot_be_done_is_said_with_what_can():
    model = make(Mixed)
    with pytest.raises(BudgetError, match=r"a file of 100 bytes is too small: the smallest found has \d+"):
        fw.compress(model, RateDistortion(budget=fw.Budget(bytes=100)), task=task_of(model))
    with torch.no_grad():
        model.second.weight.zero_()
    Constrain("head", Grid(8)).apply(model)
    small = fw.compress(model, RateDistortion(coarseness=0.2), task=task_of(model))
    left = small.ledger.steps[0].left
    assert left["second"] == "all of its weights are zero"
    assert left["head"] == "an earlier step has settled its values: 8 bits"
