"""Quantized weights as a user meets them: what is on a grid, what is lost, what is said of settings."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Mixed, Residual, Temporal, make, task_of, train
from torch import nn

import featherweight as fw
from featherweight import quantize
from featherweight.curvature import sweeps
from featherweight.curvature.rounding import errors
from featherweight.edits import Constrain
from featherweight.errors import DropExceeded, RecipeError
from featherweight.forms import Binary, Grid, LowRank, Mask, Ternary, constraints_on, stored
from featherweight.layerwise import Layerwise
from featherweight.quantize import rounding


def distance(model: nn.Module, original: nn.Module) -> float:
    """How far answers are from the original's, as a share, on data that nothing was calibrated on."""
    x = torch.randn(200, *type(original).data(1).shape[1:], generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        mine, its = model(x), original(x)
    return float((mine - its).norm() / its.norm())


def test_every_weight_is_on_its_grid_and_bytes_are_counted_as_stored():
    model = make(Residual)
    small = fw.compress(model, quantize.GPTQ(bits={"head": 8, "*": 3}), task=task_of(model)).model
    for name, bits in (("one", 3), ("head", 8)):
        layer = small.get_submodule(name)
        (made,) = constraints_on(layer)
        assert made.form == Grid(bits)
        assert int(made.codes(layer.weight).max()) < 2**bits
        assert torch.equal(made.decoded(made.codes(layer.weight)), layer.weight)
        assert torch.equal(made.scale, made.scale.half().float()), "a file holds it in two bytes"
        assert stored(layer, "weight").bytes == -(-layer.weight.numel() * bits // 8) + 4 * layer.weight.shape[0]


@pytest.mark.parametrize("network", [Temporal, Mixed])
def test_more_work_on_the_rounding_loses_less(network):
    model = make(network)
    task = task_of(model, 256)
    steps: dict[str, Layerwise] = {
        "no data": quantize.Weights(bits=3, effort="nearest", data_aware=False, ranges="min-max"),
        "nearest": quantize.Weights(bits=3, effort="nearest"),
        "gptq": quantize.GPTQ(bits=3),
        "adaround": quantize.AdaRound(bits=3, steps=300),
    }
    lost = {name: distance(fw.compress(model, step, task=task).model, model) for name, step in steps.items()}
    assert lost["nearest"] < lost["no data"]
    assert lost["gptq"] < 0.9 * lost["nearest"]
    assert lost["adaround"] < 0.9 * lost["nearest"]


def test_a_row_is_never_rounded_worse_than_to_the_nearest():
    model = make(Temporal)
    task = task_of(model)
    seen = fw.recipe._Run(fw.Recipe(quantize.GPTQ(bits=2)), model, task, 0, None).study()
    layer = seen.original.grouped
    statistics = seen.statistics({"grouped": layer}, 64, gradients=True)["grouped"]
    found = {}
    for step in (quantize.Weights(bits=2, effort="equalized"), quantize.GPTQ(bits=2), quantize.AdaRound(bits=2)):
        of = step.known(layer, statistics)
        assert of.gram is not None
        values, *_ = step.fit(of, Grid(2), layer.weight.shape)
        found[step.name] = float(errors(of.weight, values, of.gram).sum())
    assert found["quantize.GPTQ"] <= found["quantize.Weights"]
    assert found["quantize.AdaRound"] <= found["quantize.Weights"]


@pytest.mark.parametrize("bits", [2, 3])
def test_descent_lowers_what_learning_up_or_down_leaves(bits: int):
    model = make(Temporal)
    seen = fw.recipe._Run(fw.Recipe(quantize.GPTQ(bits=2)), model, task_of(model), 0, None).study()
    layer = seen.original.grouped
    statistics = seen.statistics({"grouped": layer}, 64, gradients=True)["grouped"]
    left = []
    for rounds in (0, 4):
        step = quantize.AdaRound(bits=bits, steps=100, rounds=rounds)
        of = step.known(layer, statistics)
        assert of.gram is not None
        grid = Grid(bits)
        found_scales = rounding.scales(of, grid, layer.weight.shape, "mse")
        scale, shift = (rounding.laid_out(each, grid, layer.weight.shape, of) for each in found_scales)
        found = step.rounded(of, rounding.Lattice(scale, shift, grid.low, grid.high))
        left.append(float(errors(of.weight, found, sweeps.steady(of)).sum()))
    assert left[1] < left[0]


def test_masked_weights_stay_zero_and_factors_are_rounded_too():
    model = make(Mixed)
    mask = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    confined = copy.deepcopy(model)
    form = Mask(int(mask.sum()))
    built = form.build(confined.second)
    constraints_on(built)[-1].get_buffer("mask").copy_(mask)
    Constrain("second", form, built.state_dict()).apply(confined)
    small = fw.compress(confined, quantize.GPTQ(bits=3), task=task_of(model)).model
    assert not small.second.weight[~mask].any()
    assert small.second.weight[mask].count_nonzero() > 0.5 * mask.sum()
    assert stored(small.second, "weight").values == form.kept

    recipe = fw.Recipe(fw.factorize.SVD(rank={"second": 6}), quantize.GPTQ(bits=4))
    result = recipe.run(model, task_of(model))
    assert constraints_on(result.model.second.first)
    assert constraints_on(result.model.second.second)
    assert isinstance(result.model.second, type(LowRank(6).build(model.second)))
    assert result.ledger.steps[-1].left == {}


def test_a_budget_of_bytes_is_met_with_bits_of_each_layers_own():
    model = make(Temporal)
    task = task_of(model, 128)
    fewer, more = (fw.compress(model, quantize.GPTQ(bits=bits), task=task) for bits in (3, 4))
    bytes_ = (fewer.ledger.after.total.bytes + more.ledger.after.total.bytes) // 2
    mixed = fw.compress(model, quantize.GPTQ(budget=fw.Budget(bytes=bytes_)), task=task)
    assert mixed.ledger.after.total.bytes <= bytes_
    assert len({edit.constraint for edit in mixed.edits if isinstance(edit, Constrain)}) > 1
    assert distance(mixed.model, model) < distance(fewer.model, model)
    assert mixed.ledger.steps[0].metric == "bytes"


def test_a_drop_alone_lowers_bytes():
    model = make(Temporal)
    small = fw.compress(model, quantize.Weights(budget=fw.Budget(drop=0.05), effort="nearest"), task=task_of(model))
    (entry,) = small.ledger.steps
    assert entry.after.total.bytes < 0.4 * entry.before.total.bytes
    assert entry.before.score - entry.after.score <= 0.05


def test_efforts_are_tried_in_turn_until_the_drop_is_small_enough():
    model = make(Temporal)
    task = task_of(model)
    first = fw.compress(model, quantize.Weights(bits=4, budget=fw.Budget(drop=0.2)), task=task).ledger.steps[0]
    assert first.notes[-1].startswith("scores by effort: nearest 0.")
    assert first.notes[-1].endswith("nearest was kept")
    with pytest.warns(DropExceeded, match="Weights: no effort kept the drop within 1e-06: it is .*; give more bits"):
        result = fw.compress(model, quantize.Weights(bits=3, budget=fw.Budget(drop=1e-6)), task=task)
    (entry,) = result.ledger.steps
    assert entry.notes[-1].startswith("no effort kept the drop within 1e-06: it is 0.0")
    scores = dict(
        part.split(" ") for part in entry.notes[-2].removeprefix("scores by effort: ").split(";")[0].split(", ")
    )
    assert set(scores) == {"nearest", "equalized", "gptq"}
    assert entry.after.score == pytest.approx(max(map(float, scores.values())), abs=1e-3)


def test_ranges_and_efforts_by_pattern_round_each_layer_as_if_they_were_for_all():
    model = make(Residual)
    task = task_of(model)

    def weights(**chosen: object) -> dict[str, torch.Tensor]:
        step = quantize.Weights(bits=3, asymmetric=False, **chosen)  # type: ignore[arg-type]
        small = fw.compress(model, step, task=task).model
        return {name: small.get_submodule(name).weight.detach() for name in ("one", "down", "head")}

    mixed = weights(ranges={"head": "min-max", "down": "percentile"}, effort={"one": "nearest", "down": "adaround"})
    alone = {
        "one": weights(effort="nearest"),
        "down": weights(effort="adaround", ranges="percentile"),
        "head": weights(ranges="min-max"),  # and gptq, which the others get
    }
    for name, layer in mixed.items():
        assert [other for other, found in alone.items() if torch.equal(found[name], layer)] == [name]
    found = fw.sensitivity(model, task, quantize.GPTQ(ranges={"head": "min-max"}, offer=(3,)), measure=False)
    plain = fw.sensitivity(model, task, quantize.GPTQ(offer=(3,)), measure=False)
    differs = [n for n, points in found.layers.items() if points[0].predicted_loss != plain.layers[n][0].predicted_loss]
    assert differs == ["head"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"bits": 4, "ranges": {"haed": "mse"}}, "the pattern 'haed' matches none of"),
        ({"bits": 4, "effort": {"haed": "gptq"}}, "the pattern 'haed' matches none of"),
        ({"bits": 4, "effort": {"head": "blocks"}}, "effort is {'head': 'blocks'}"),
        ({"bits": 4, "effort": {"*": "nearest"}, "budget": fw.Budget(drop=0.1)}, "effort differs by layer"),
    ],
)
def test_ranges_and_efforts_that_no_layer_can_have_are_refused(chosen, message):
    model = make(Residual)
    with pytest.raises(RecipeError) as found:
        fw.compress(model, quantize.Weights(**chosen), task=task_of(model))
    assert message in str(found.value)


def test_scales_are_of_a_tensor_a_channel_or_a_group_as_asked():
    model = make(Mixed)
    step = quantize.GPTQ(bits=4, granularity={"first": "tensor", "*": "channel"}, group={"second": 10}, symmetric=False)
    small = fw.compress(model, step, task=task_of(model)).model
    shapes = {name: constraints_on(small.get_submodule(name))[0].scale.shape for name in ("first", "second", "head")}
    assert shapes == {"first": (), "second": (24, 3), "head": (4,)}


def test_signs_and_thirds_are_what_they_say_and_survive_training():
    model = make(Mixed)
    task = task_of(model, train=train)
    small = fw.compress(model, quantize.Binary(ignore=("head",), epochs=3), task=task)
    for name in ("first", "second"):
        weight = small.model.get_submodule(name).weight
        (made,) = constraints_on(small.model.get_submodule(name))
        assert made.form == Binary()
        assert torch.equal(weight.abs(), made.scale[:, None].expand_as(weight))
        assert stored(small.model.get_submodule(name), "weight").bytes == weight.numel() // 8 + 4 * len(weight)
    small = fw.compress(model, quantize.Ternary(), task=task)
    (made,) = constraints_on(small.model.second)
    assert made.form == Ternary()
    assert set(made.codes(small.model.second.weight).unique().tolist()) == {0, 1, 2}
    assert torch.equal(made.decoded(made.codes(small.model.second.weight)), small.model.second.weight)


def test_two_values_fitted_to_the_data_lose_less_than_means_of_magnitudes():
    model = make(Mixed)
    task = task_of(model, 256)
    plain = fw.compress(model, quantize.Binary(data_aware=False), task=fw.Task(task.example))
    fitted = fw.compress(model, quantize.Binary(), task=task)
    weight = model.first.weight.detach()
    assert torch.allclose(plain.model.first.weight, weight.abs().mean(1, keepdim=True) * torch.where(weight < 0, -1, 1))
    assert distance(fitted.model, model) < 0.8 * distance(plain.model, model)


def test_what_is_quantized_already_is_left_with_its_reason():
    model = make(Mixed)
    once = fw.compress(model, quantize.GPTQ(bits={"first": 4}), task=task_of(model))
    assert once.ledger.steps[0].left["second"] == "nothing was asked of it"
    twice = fw.compress(once.model, quantize.GPTQ(bits=3), task=task_of(model))
    assert twice.ledger.steps[0].left == {"first": "an earlier step has settled its values: 4 bits"}


def test_a_channel_that_is_zero_or_constant_and_a_single_sample_are_no_trouble():
    model = make(Mixed)
    with torch.no_grad():
        model.first.weight[0], model.first.weight[1] = 0.0, 0.25
    data = Mixed.data(1)
    for step in (quantize.GPTQ(bits=4), quantize.AdaRound(bits=4, steps=20), quantize.Binary(), quantize.Ternary()):
        small = fw.compress(model, step, task=fw.Task(data, [data])).model
        assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
        if not isinstance(step, quantize.Binary):
            assert not small.first.weight[0].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "bits has 9: it is 1 to 8 or 16"),
        ({"bits": "bf61"}, "bits has 'bf61', which is no type; did you mean 'bf16'?"),
        ({"bits": {"nope": 4}}, "the pattern 'nope' matches none of 3 layers"),
        ({"bits": 4, "group": -1}, "group is -1: it must be at least 1, or 0"),
        ({"bits": 4, "budget": fw.Budget(bytes=0.5)}, "budget and bits both say how much to keep"),
        ({}, "nothing says how much to keep: give one of budget=, bits=, select=plan"),
        ({"bits": 1, "group": 16}, "group is 16 for 'first', and has no say with weights of 1 bit: give 2 to 8 or"),
        ({"bits": {"head": "ternary", "*": 4}, "group": 8}, "group is 8 for 'head', and has no say with weights of 3"),
        ({"bits": 4, "group": 8, "granularity": {"second": "tensor"}}, "for 'second', whose granularity is 'tensor'"),
        ({"bits": "bf16", "symmetric": False}, "symmetric is False for 'first', and has no say with weights of bf16"),
        ({"bits": 4, "granularity": "row"}, "granularity is 'row', a str: it takes 'channel' or 'tensor'"),
        ({"bits": 4, "ranges": "widest"}, "ranges is 'widest'"),
    ],
)
def test_settings_that_cannot_be_are_said(settings, message):
    model = make(Mixed)
    with pytest.raises(RecipeError) as caught:
        fw.compress(model, quantize.Weights(**settings), task=task_of(model))
    assert message in str(caught.value)


@pytest.mark.parametrize("step", [quantize.Binary, quantize.Ternary])
def test_signs_have_no_groups(step):
    model = make(Mixed)
    with pytest.raises(RecipeError, match="group is 16 for 'first', and has no say"):
        fw.compress(model, step(group=16), task=task_of(model))
    # Where a budget chooses, the grids on offer have them.
    assert step(group=16, budget=fw.Budget(bytes=0.5)).problems(model, task_of(model)) == []


def test_inputs_become_signs_too_where_asked(tmp_path):
    model = make(Temporal)
    task = task_of(model, train=train)
    step = quantize.Binary(ignore=("first", "last"), activations=True, epochs=1)
    small = fw.compress(model, step, task=task)
    (entry,) = small.ledger.steps
    assert entry.left == {"first": "ignored, as asked", "last": "ignored, as asked"}
    grouped = small.model.grouped
    seen = []
    grouped.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(1))
    grouped(x)
    expected = x.abs().mean((1, 2), keepdim=True) * torch.where(x < 0, -1, 1)
    torch.testing.assert_close(seen[0], expected)
    assert constraints_on(grouped.layer)[0].form == Binary()
    small.save(tmp_path / "small.fw")
    again = fw.load(tmp_path / "small.fw", into=make(Temporal, seed=1)).model
    assert torch.equal(again(Temporal.data(2)), small.model(Temporal.data(2)))


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_plain_rounding_where_it_is_better_under_the_damping_asked_for(seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 12, generator=draw) @ torch.randn(12, 12, generator=draw)
    of = sweeps.Matrix(torch.randn(1, 64, 12, generator=draw).double(), (x.T @ x / 40)[None].double())
    form, shape = Grid(2), torch.Size([64, 12])
    for damping in (1e-4, 1.0, 100.0):
        step = quantize.GPTQ(bits=2, ranges="min-max", damping=damping, rounds=0)
        found, scale, shift = step.fit(of, form, shape)
        each, zero = (rounding.laid_out(t, form, shape, of) for t in (scale, shift))
        plain = rounding.Lattice(each, zero, form.low, form.high).nearest(of.weight)
        gram = sweeps.steady(of, damping)
        assert bool((errors(of.weight, found, gram) <= errors(of.weight, plain, gram)).all())
