"""What holds for every step, found by walking the folders: a new technique is tested the day it is written."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import typing
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, assert_same_state, make, task_of, train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import featherweight as fw
from featherweight import distill, factorize, prune, quantize, share, tune
from featherweight import edits as editing
from featherweight.batch import as_inputs
from featherweight.cost.count import profile
from featherweight.curvature import gather
from featherweight.edits import Narrow, remade
from featherweight.errors import NoEffect
from featherweight.factorize.replacing import Replacing
from featherweight.forms import constrained_tensors, constraints_on, released, stored
from featherweight.graph import ModelGraph, couple
from featherweight.layers import layer_names
from featherweight.layerwise import Layerwise
from featherweight.ledger import Ledger
from featherweight.prune.structured import Structured
from featherweight.recipe import every_step
from featherweight.retraining import Retraining
from featherweight.step import Stage, Step

# A drop of nothing is asked for so that all efforts are tried.
pytestmark = pytest.mark.filterwarnings("ignore::featherweight.errors.DropExceeded")

LAYERWISE: dict[str, dict[str, Any]] = {
    "optimal": {"budget": fw.Budget(macs=0.6)},
    "greedy": {"budget": fw.Budget(params=0.7), "select": fw.Greedy(candidates=4)},
    "plain": {"ratio": 0.5},
    "rank": {"rank": 2},
    "without data": {"ratio": 0.5, "data_aware": False},
    "trained": {"ratio": 0.5, "epochs_per_layer": 1, "epochs": 2, "multiple_of": 2},
}
STRUCTURED: dict[str, dict[str, Any]] = {
    "optimal": {"budget": fw.Budget(macs=0.6)},
    "plain": {"ratio": 0.5},
    "trained": {"ratio": 0.5, "score": "lasso", "epochs": 2, "multiple_of": 2},
}
SPARSE: dict[str, dict[str, Any]] = {
    "optimal": {"budget": fw.Budget(params=0.6)},
    "greedy": {"budget": fw.Budget(bytes=0.7), "select": fw.Greedy(candidates=4)},
    "plain": {"sparsity": 0.5},
    "pattern": {"n": 2, "m": 4},
    "trained": {"sparsity": {"*o*": 0.5}, "epochs_per_layer": 1, "epochs": 2},
}
ROUNDED: dict[str, dict[str, Any]] = {
    "optimal": {"budget": fw.Budget(bytes=0.4)},
    "plain": {"bits": 4},
    "grouped": {"bits": {"*": 3}, "symmetric": False, "group": 5},
    "trained": {"bits": 2, "granularity": "tensor", "epochs_per_layer": 1, "epochs": 2},
}
# The settings that every step is tested with. What one is tested with says what a user can rely on. The plain ones
# stand for all where one run is enough.
SETTINGS: dict[type[Step], dict[str, dict[str, Any]]] = {
    factorize.SVD: LAYERWISE,
    factorize.SpatialSVD: {**LAYERWISE, "the other axis": {"ratio": 0.5, "axis": 1}},
    factorize.DepthwiseSeparable: {
        **{name: LAYERWISE[name] for name in ("optimal", "greedy", "without data")},
        "plain": {"ratio": 0.5},
        "terms": {"terms": 1},
        "trained": {"ratio": 0.5, "epochs_per_layer": 1, "epochs": 2},
    },
    prune.Channels: {
        **STRUCTURED,
        "as AIMET": {"ratio": 0.5, "score": "input_l2", "reconstruct": "linear", "positions": 10, "batch_norm": False},
    },
    prune.Filters: {"plain": {"ratio": 0.5}},
    prune.Neurons: {"plain": {"ratio": 0.5}},
    prune.Blocks: {"plain": {"count": 1}, "optimal": {"budget": fw.Budget(params=0.95)}},
    prune.Heads: {name: STRUCTURED[name] for name in ("optimal", "plain")},
    tune.FineTune: {"plain": {}, "longer": {"epochs": 2}},
    distill.Response: {
        "plain": {},
        "dist": {"by": "dist", "standardize": True, "teacher": "before"},
        "decoupled": {"by": "decoupled", "hard": 0.5, "temperature": 2.0},
    },
    distill.Feature: {
        "plain": {},
        "named": {"by": "attention", "layers": {"one_norm": "one_norm"}},
        "overhaul": {"by": "overhaul"},
    },
    distill.Relation: {
        "plain": {},
        "contrastive": {"by": "contrastive", "embedding": 8},
        "alike": {"by": "similarity"},
    },
    distill.Together: {
        "plain": {"kinds": [{"response": {"temperature": 2.0}}, {"feature": {"weight": 0.5}}], "epochs": 2},
    },
    distill.Mutual: {"plain": {}, "with the original": {"peers": "original", "temperature": 2.0}},
    distill.SelfDistill: {"plain": {"heads": 1}},
    distill.BornAgain: {"plain": {}, "again": {"generations": 2, "hard": 0.5}},
    prune.Magnitude: {
        **{name: SPARSE[name] for name in ("greedy", "plain")},
        "gradual": {"sparsity": 0.7, "spread": "erk", "schedule": "gradual", "epochs": 3, "rounds": 2},
        "taylor": {"sparsity": 0.5, "spread": "global", "score": "taylor"},
        "blocks": {"sparsity": 0.5, "score": "l2", "block": (1, 2)},
    },
    prune.NM: {"plain": {"n": 2}},
    prune.Wanda: {name: SPARSE[name] for name in ("plain", "pattern")},
    prune.OBS: {name: SPARSE[name] for name in ("optimal", "plain", "trained")},
    prune.Movement: {"plain": {"epochs": 1, "rounds": 2}},
    share.KMeans: {
        "optimal": {"budget": fw.Budget(bytes=0.3)},
        "plain": {"bits": 2},
        "without data": {"bits": 3, "data_aware": False, "init": "density"},
        "trained": {"bits": {"*": 2}, "channels": 8, "epochs": 1, "feedback": False},
    },
    quantize.GPTQ: {**ROUNDED, "without data": {"bits": 4, "data_aware": False}},
    quantize.AdaRound: {"plain": {"bits": 4, "steps": 30}},
    quantize.BRECQ: {"plain": {"bits": 3, "steps": 10}},
    quantize.Weights: {
        "plain": {"bits": 4},
        "equalized": {"bits": 4, "effort": "equalized", "granularity": "tensor"},
        "in turn": {"bits": 2, "budget": fw.Budget(drop=0.0), "effort": "adaround"},
        "halves": {"bits": "bf16"},
    },
    quantize.Binary: {
        "plain": {},
        "signs alone": {"activations": True, "epochs": 1},
        "trained": {"epochs": 2},
        "optimal": {"budget": fw.Budget(bytes=0.4)},
    },
    quantize.Ternary: {"plain": {}, "without data": {"data_aware": False}},
    quantize.Static: {
        "plain": {},
        "few bits": {"bits": {"*": 4}, "symmetric": False, "activation_bits": 5, "ranges": "percentile"},
    },
    quantize.Dynamic: {"plain": {}},
    quantize.QAT: {
        "plain": {"bits": 4, "activation_bits": 4, "epochs": 2},
        "zero points": {"learn": "lsq+", "distill": True, "epochs": 1, "target": "openvino"},
    },
    quantize.SmoothQuant: {"plain": {}, "strong": {"alpha": 0.8}},
    quantize.RateDistortion: {"plain": {"coarseness": 0.3}, "optimal": {"budget": fw.Budget(bytes=0.4)}},
}
# The networks that each step is tested on: it finds something to change in all of them.
MEETS: dict[type[Step], tuple[str, ...]] = {
    factorize.SVD: ("residual", "transformer", "temporal"),
    factorize.SpatialSVD: ("residual", "temporal"),
    factorize.DepthwiseSeparable: ("residual", "temporal"),
    prune.Channels: ("residual", "transformer"),
    prune.Filters: ("temporal",),
    prune.Neurons: ("transformer",),
    prune.Blocks: ("stacked",),
    prune.Heads: ("attention",),
    tune.FineTune: ("residual", "transformer"),
    distill.Response: ("residual", "temporal"),
    distill.Feature: ("residual", "temporal"),
    distill.Relation: ("residual", "temporal"),
    distill.Together: ("transformer",),
    distill.Mutual: ("residual",),
    distill.SelfDistill: ("residual",),
    distill.BornAgain: ("transformer",),
    prune.Magnitude: ("temporal",),
    prune.NM: ("transformer",),
    prune.Wanda: ("transformer",),
    prune.OBS: ("temporal",),
    prune.Movement: ("transformer",),
    share.KMeans: ("temporal",),
    quantize.GPTQ: ("residual", "transformer"),
    quantize.AdaRound: ("temporal",),
    quantize.BRECQ: ("stacked",),
    quantize.Weights: ("temporal", "attention"),
    quantize.Binary: ("residual", "temporal"),
    quantize.Ternary: ("transformer",),
    quantize.Static: ("residual", "transformer", "temporal"),
    quantize.Dynamic: ("transformer",),
    quantize.QAT: ("residual", "attention"),
    quantize.SmoothQuant: ("attention",),
    quantize.RateDistortion: ("residual", "transformer"),
}
# Steps that leave every layer as large as it was, and store it in fewer bits.
SMALLER_NUMBERS = tuple(step for step in SETTINGS if step.stage is Stage.VALUES)
# Of the first of them, those that keep the model as its graph, in which a folded batch norm is no more.
AS_GRAPHS = (quantize.Static, quantize.Dynamic, quantize.QAT)
# But not in these settings.
NOTHING_IN = {
    (factorize.SpatialSVD, "the other axis", "temporal"),
    (distill.Response, "dist", "temporal"),  # which is no classifier
    (distill.Response, "decoupled", "temporal"),
    (distill.Feature, "named", "temporal"),  # which has no such layer
}

# Settings of which -1 means the last.
COUNTED_FROM_THE_END = {"class_dim", "mask"}

CASES = [
    pytest.param(step, settings, network, id=f"{step.__name__}-{settings}-{network}".replace(" ", "_"))
    for step, table in SETTINGS.items()
    for settings in table
    for network in MEETS[step]
    if (step, settings, network) not in NOTHING_IN
]
KINDS = [pytest.param(*case.values[::2], id=case.id) for case in CASES if case.values[1] == "plain"]
BUDGETS = [
    fw.Budget(macs=0.6),
    fw.Budget(params=0.5),
    fw.Budget(bytes=0.7),
    fw.Budget(energy=0.9),
    fw.Budget(macs=0.7, params=0.5),
    fw.Budget(macs=0.5, bytes=0.8),
]
# What confines weights changes neither their arithmetic nor, where it is their values, their number.
CONFINING = {
    **{step: [fw.Budget(params=0.5, bytes=0.7)] for step in (prune.Magnitude, prune.Wanda, prune.OBS)},
    prune.NM: [fw.Budget(params=0.7)],
    prune.Movement: [],
    share.KMeans: [fw.Budget(bytes=0.2)],
}
every_case = pytest.mark.parametrize(("step", "settings", "network"), CASES)
every_kind = pytest.mark.parametrize(("step", "network"), KINDS)
every_layerwise_case = pytest.mark.parametrize(
    ("step", "settings", "network"), [case for case in CASES if issubclass(case.values[0], Layerwise)]
)
every_layerwise_kind = pytest.mark.parametrize(
    ("step", "network"), [kind for kind in KINDS if issubclass(kind.values[0], Replacing)]
)
every_retraining_case = pytest.mark.parametrize(
    ("step", "settings", "network"), [case for case in CASES if issubclass(case.values[0], Retraining)]
)
every_form_case = pytest.mark.parametrize(
    ("step", "settings", "network"),
    [case for case in CASES if not issubclass(case.values[0], Retraining | quantize.SmoothQuant)],
)
every_structured_case = pytest.mark.parametrize(
    ("step", "settings", "network"), [case for case in CASES if issubclass(case.values[0], Structured)]
)
every_budget = pytest.mark.parametrize(
    ("step", "network", "budget"),
    [
        pytest.param(*kind.values, budget, id=f"{kind.id}-{budget}")
        for kind in KINDS
        for budget in CONFINING.get(kind.values[0], BUDGETS if kind.values[0].stage is Stage.SHAPE else ())
        if "budget" in kind.values[0].__dataclass_fields__
        if (*kind.values, budget.energy) != (factorize.DepthwiseSeparable, "temporal", 0.9)  # its least is 0.958
        if kind.values[0] in CONFINING or issubclass(kind.values[0], Layerwise) or len(budget.costs()) > 1
    ],
)


@dataclass(frozen=True)
class Ran:
    """One run, and what the caller had before it."""

    original: nn.Module
    before: dict[str, Any]
    compressed: fw.Compressed


def look(model: nn.Module) -> dict[str, Any]:
    """All of a model that must stay as it was."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
    }


def run(step: type[Step], settings: str, network: str) -> Ran:
    model = make(NETWORKS[network])
    model.train()
    next(model.children()).eval()
    first, *_, last = model.parameters()
    first.grad, last.requires_grad = torch.ones_like(first), False
    before = look(model)
    task = task_of(model, train=train)
    return Ran(model, before, fw.compress(model, step(**SETTINGS[step][settings]), task=task))


ran = cache(run)


def answers(model: nn.Module, network: str) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(NETWORKS[network].data(5))


def changed(case: Ran) -> set[str]:
    """The layers that are of another form than before, give fewer outputs, or are gone."""
    now = dict(case.compressed.model.named_modules())
    before = {name: case.original.get_submodule(name) for name in layer_names(case.original)}
    gone = {name for name in before if name not in now}
    kept = {name: layer for name, layer in before.items() if name in now}
    confined = {n for n in kept if constraints_on(now[n])}
    if isinstance(case.compressed.model, ModelGraph):  # which has no layers, only what they hold
        return confined
    other = {n for n, m in kept.items() if type(now[n]) is not type(m) or len(now[n].weight) != len(m.weight)}
    return gone | confined | other


def test_every_step_found_has_settings_to_be_tested_with():
    assert set(every_step().values()) == set(SETTINGS)


@every_case
def test_the_callers_model_is_untouched(step, settings, network):
    case = ran(step, settings, network)
    before, after = case.before, look(case.original)
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for name, gradient in before["gradients"].items():
        now = after["gradients"][name]
        assert now is None if gradient is None else torch.equal(now, gradient), name
    for part in ("modules", "parameters", "training", "hooks"):
        assert after[part] == before[part], part
    held = [{t.data_ptr() for t in model.state_dict().values()} for model in (case.original, case.compressed.model)]
    assert not held[0] & held[1], "the result must not hold the caller's tensors"


@every_form_case
def test_something_was_changed_and_every_layer_accounted_for(step, settings, network):
    case = ran(step, settings, network)
    (entry,) = case.compressed.ledger.steps
    assert entry.edits
    metric = "bytes" if step.stage is Stage.VALUES else "params"
    assert getattr(entry.after.total, metric) < getattr(entry.before.total, metric)
    assert changed(case) | set(entry.left) >= set(layer_names(case.original))
    assert not changed(case) & set(entry.left)
    assert all(entry.left.values()), "a layer that stays has a reason"


@every_retraining_case
def test_values_were_changed_and_the_form_was_not(step, settings, network):
    case = ran(step, settings, network)
    (entry,) = case.compressed.ledger.steps
    assert entry.edits == ()
    assert entry.left == {}
    assert entry.after.total == entry.before.total
    model, original = case.compressed.model, case.original
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks], "hooks are taken off"
    before, after = dict(original.named_parameters()), dict(model.named_parameters())
    assert list(before) == list(after)
    for name, parameter in before.items():
        assert after[name].shape == parameter.shape, name
    stays = {name for name, parameter in before.items() if torch.equal(parameter, after[name])}
    frozen = {name for name, parameter in before.items() if not parameter.requires_grad}
    assert frozen <= stays
    # But for a bias that the answers do not depend on, and a last layer behind the features that are learned.
    assert len(stays - frozen - {"last.weight"}) <= 1, stays
    told = "the loss's parts" in " ".join(entry.notes)
    assert told != (step is tune.FineTune)


@every_case
def test_the_same_seed_gives_the_same_result(step, settings, network):
    torch.rand(3)  # the caller's own random numbers have no say
    state = torch.random.get_rng_state()
    again = run(step, settings, network).compressed
    assert torch.equal(torch.random.get_rng_state(), state), "nor are they disturbed"
    first = ran(step, settings, network).compressed
    assert again.edits == first.edits
    assert_same_state(again.model, first.model)


@every_case
def test_settings_survive_yaml_and_json(step, settings, network):
    recipe = fw.Recipe(step(**SETTINGS[step][settings]), step(**SETTINGS[step]["plain"]))
    assert fw.Recipe.from_yaml(recipe.to_yaml()) == recipe
    # JSON is YAML too.
    items = [{s.name: json.loads(json.dumps(s.settings()))} for s in recipe.steps]
    assert fw.Recipe.from_yaml(json.dumps({"steps": items})) == recipe


@pytest.mark.parametrize("step", SETTINGS, ids=lambda step: step.__name__)
def test_numbers_that_mean_nothing_are_refused(step):
    model = make(NETWORKS[MEETS[step][0]])
    task, sound = task_of(model, train=train), step(**SETTINGS[step]["plain"])
    assert sound.problems(model, task) == []
    for name, hint in typing.get_type_hints(step).items():
        kinds = {hint, *typing.get_args(hint)}
        numbers = [number for number, kind in ((-1, int), (-1, float), (math.nan, float)) if kind in kinds]
        for number in numbers if name not in COUNTED_FROM_THE_END else ():
            assert replace(sound, **{name: number}).problems(model, task), f"{name} may be {number}"


@every_case
def test_a_fresh_model_loads_the_file_and_gives_the_same_answers(step, settings, network, tmp_path):
    case = ran(step, settings, network)
    size = case.compressed.save(tmp_path / "small.fw", ledger=True)
    assert size == (tmp_path / "small.fw").stat().st_size
    loaded = fw.load(tmp_path / "small.fw", into=make(NETWORKS[network], seed=1))
    assert torch.equal(answers(loaded.model, network), answers(case.compressed.model, network))
    # A file keeps what tensors are confined to, and not what lies beneath.
    assert_same_state(released(loaded.model), released(case.compressed.model))
    assert list(loaded.edits) == list(case.compressed.edits)
    assert loaded.ledger.steps == case.compressed.ledger.steps
    assert loaded.example.tensors()[0].shape == case.compressed.example.tensors()[0].shape


@every_case
def test_edits_replayed_on_a_fresh_model_give_the_same_answers(step, settings, network):
    case = ran(step, settings, network)
    written = json.loads(json.dumps([edit.to_json() for edit in case.compressed.edits]))
    fresh = make(NETWORKS[network], seed=1)
    fresh = editing.replay(fresh, [editing.from_json(edit) for edit in written])
    fresh.load_state_dict(case.compressed.model.state_dict())
    assert torch.equal(answers(fresh, network), answers(case.compressed.model, network))


@every_case
def test_costs_in_the_ledger_are_those_of_the_models(step, settings, network):
    case = ran(step, settings, network)
    (entry,) = case.compressed.ledger.steps
    for model, said in ((case.original, entry.before), (case.compressed.model, entry.after)):
        confined = [(m.parametrizations[t], stored(m, t)) for _, m, t in constrained_tensors(model)]
        inside = {id(t) for stack, _ in confined for t in (*stack.parameters(), *stack.buffers())}
        kept = {
            id(t): t for t in (*model.parameters(), *model.state_dict(keep_vars=True).values()) if id(t) not in inside
        }
        plain = [t for t in kept.values() if isinstance(t, nn.Parameter)]
        assert said.total.params == sum(p.numel() for p in plain) + sum(taken.values for _, taken in confined)
        held = sum(t.numel() * t.element_size() for t in kept.values()) + sum(taken.bytes for _, taken in confined)
        assert said.total.bytes == held
        with torch.no_grad(), FlopCounterMode(display=False) as counter:  # PyTorch's own
            copy.deepcopy(model).eval()(NETWORKS[network].data(1))
        assert 2 * said.total.macs == counter.get_total_flops()
        assert sum(row.params for row in said.layers.values()) == said.total.params
    inside = tuple(f"{edit['layer']}." for edit in entry.edits if "layer" in edit)  # of a block that went as a whole
    kinds = {name: row.kind for name, row in entry.before.layers.items() if not name.startswith(inside)}
    # A graph has no modules: what it does between its layers is one row.
    left = {name for name in kinds if step not in AS_GRAPHS or name in layer_names(case.original)}
    assert left <= set(entry.after.layers)


@every_layerwise_case
def test_a_chosen_option_costs_what_the_table_said(step, settings, network):
    case = ran(step, settings, network)
    (entry,) = case.compressed.ledger.steps
    assert {edit["layer"].removesuffix(".layer") for edit in entry.edits} <= set(entry.choices)
    for name, choice in entry.choices.items():
        before, after = (getattr(moment.layers[name], entry.metric) for moment in (entry.before, entry.after))
        assert choice.chosen.share * before == pytest.approx(after, rel=1e-12), name
        assert choice.chosen in choice.curve


@every_structured_case
def test_a_chosen_width_is_what_the_layers_have(step, settings, network):
    case = ran(step, settings, network)
    (entry,) = case.compressed.ledger.steps
    groups = couple(case.original, as_inputs(NETWORKS[network].data(1))).groups
    assert set(entry.choices) == {group.name for group in groups if group.kind in step.kinds}
    (edit,) = case.compressed.edits
    assert isinstance(edit, Narrow)
    now = case.compressed.model.state_dict()
    for group in groups:
        kept = len(edit.narrowing.kept.get(group.name, range(group.size)))
        if group.name not in entry.choices:
            assert kept == group.size
            continue
        choice = entry.choices[group.name]
        assert choice.chosen.setting == ("as it is" if kept == group.size else f"{kept} of {group.size}")
        assert choice.chosen in choice.curve
        for site in group.sites:
            if len(site.indices) == case.original.state_dict()[site.tensor].shape[site.dim]:
                assert now[site.tensor].shape[site.dim] * group.size == len(site.indices) * kept, site


@every_layerwise_kind
def test_every_option_costs_after_it_is_applied_what_it_said_before(step, network):
    model = make(NETWORKS[network])
    example = as_inputs(NETWORKS[network].data(1))
    rows = profile(model, example).layers
    statistics = gather(model, {n: model.get_submodule(n) for n in layer_names(model)}, [example])
    technique = step(budget=CONFINING[step][0]) if step in CONFINING else step(**SETTINGS[step]["plain"])
    assert isinstance(technique, Layerwise)
    metric, priced = technique.metric, 0
    for name in layer_names(model):
        layer = model.get_submodule(name)
        if technique.unfit(layer) is not None:
            continue
        options = technique.priced(name, layer, rows[name].calls)
        costs = [option.cost.metric(metric) for option in options]
        assert costs == sorted(costs)
        seen = statistics.get(name) if getattr(step, "needs_data", False) else None
        for option in {options[0], options[len(options) // 2], options[-1]} if options else ():
            changed = copy.deepcopy(model)
            remade(model, name, option.form, technique.values(layer, option.form, seen)).apply(changed)
            found = profile(changed, example).layers[name].cost
            assert found == option.cost, (name, str(option))
            priced += 1
    assert priced


@every_case
def test_the_ledger_survives_json(step, settings, network):
    ledger = ran(step, settings, network).compressed.ledger
    written = json.dumps(ledger.to_json(), allow_nan=False)
    assert Ledger.from_json(json.loads(written)) == ledger


@every_budget
def test_a_budget_is_met_from_below_and_used_up(step, network, budget):
    model = make(NETWORKS[network])
    task = task_of(model, 16)
    compressed = fw.compress(model, step(budget=budget), task=task)
    (entry,) = compressed.ledger.steps
    before, after = (profile(m, task.inputs()).total for m in (model, compressed.model))
    used = {m: after.metric(m) / (share * before.metric(m)) for m, share in budget.costs().items()}
    assert max(used.values()) <= 1 + 1e-9, used
    short = [note for note in entry.notes if "of the limit" in note]
    assert max(used.values()) >= 0.99 or short, used


@every_kind
def test_nothing_to_do_is_said(step, network):
    model = make(NETWORKS[network])
    with pytest.warns(NoEffect, match=f"{step.__name__} changed nothing: .*ignored, as asked"):
        compressed = fw.compress(
            model, step(**SETTINGS[step]["plain"], ignore=("*",)), task=task_of(model, train=train)
        )
    (entry,) = compressed.ledger.steps
    assert "nothing was changed" in entry.notes
    assert entry.edits == ()
    assert set(entry.left.values()) == {"ignored, as asked"}
    assert set(entry.left) >= set(layer_names(model))
    assert entry.before == entry.after
    assert_same_state(compressed.model, model)


@pytest.mark.parametrize("step", SETTINGS, ids=lambda step: step.__name__)
def test_a_network_without_any_layer_is_no_mistake(step):
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    task = fw.Task(torch.randn(1, 3, 4), train=lambda *given, **named: None)
    with pytest.warns(NoEffect, match="changed nothing"):
        compressed = fw.compress(model, step(**SETTINGS[step]["plain"]), task=task)
    assert compressed.ledger.steps[0].left == {}


@every_case
def test_the_result_can_be_trained_and_copied(step, settings, network):
    original = ran(step, settings, network)
    model = copy.deepcopy(original.compressed.model)
    assert torch.equal(answers(model, network), answers(original.compressed.model, network))
    model.train()
    model(NETWORKS[network].data(4)).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trained)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.optim.SGD(trained, lr=0.01).step()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@every_case
def test_what_was_frozen_or_in_training_still_is(step, settings, network):
    case = ran(step, settings, network)
    made = dict(case.compressed.model.named_modules())
    for name, module in case.original.named_modules():
        if name in made or step not in (prune.Blocks, *AS_GRAPHS):
            assert made[name].training == module.training, name
    frozen = [name for name, p in case.original.named_parameters() if not p.requires_grad]
    assert frozen == ["last.bias" if network == "temporal" else "head.bias"]
    # What lies beneath a codebook has no say any more, and grids learn nothing by themselves.
    beneath = ".parametrizations.weight.original" if step is share.KMeans else "(none)"
    silent = (beneath, ".scale", ".zero_point")
    trained = [(name, p) for name, p in case.compressed.model.named_parameters() if not name.endswith(silent)]
    now_frozen = {
        name.replace(".parametrizations.", ".").removesuffix(".original") for name, p in trained if not p.requires_grad
    }
    assert now_frozen <= {*frozen, "head.second.bias", "last.second.bias", "head.layer.bias", "last.layer.bias"}
    assert len(now_frozen) == 1


@every_kind
def test_the_result_can_be_exported_by_torch(step, network):
    model = copy.deepcopy(ran(step, "plain", network).compressed.model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own, about its own
        program = torch.export.export(model, (NETWORKS[network].data(3),))
    torch.testing.assert_close(program.module()(NETWORKS[network].data(3)), model(NETWORKS[network].data(3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_kind
def test_type_and_device_stay(step, network, dtype, tmp_path):
    model = make(NETWORKS[network]).to(dtype)
    task = task_of(model, 16, train=train)
    compressed = fw.compress(model, step(**SETTINGS[step]["plain"]), task=task)
    floating = [t for t in (*compressed.model.parameters(), *compressed.model.buffers()) if t.is_floating_point()]
    names = (*compressed.model.named_parameters(), *compressed.model.named_buffers())
    grids = {id(t) for name, t in names if name.endswith((".scale", ".zero_point"))}  # exact whatever the model's type
    assert {t.dtype for t in floating if id(t) not in grids} == {dtype}
    assert {t.device for t in floating} == {torch.device("cpu")}
    compressed.save(tmp_path / "small.fw")
    loaded = fw.load(tmp_path / "small.fw", into=make(NETWORKS[network], seed=1).to(dtype))
    assert_same_state(released(loaded.model), released(compressed.model))


def test_a_fresh_process_gives_the_same_answers(tmp_path: Path):
    case = ran(factorize.SpatialSVD, "optimal", "residual")
    case.compressed.save(tmp_path / "small.fw")
    torch.save(answers(case.compressed.model, "residual"), tmp_path / "answers.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "import featherweight as fw; from networks import Residual\n"
        "model = fw.load(sys.argv[2] + '/small.fw', into=Residual()).model\n"
        "with torch.no_grad(): found = model(Residual.data(5))\n"
        "assert torch.equal(found, torch.load(sys.argv[2] + '/answers.pt')), 'other answers'\n"
        "assert not [name for name in sys.modules if name.startswith('onnx')]"
    )
    place = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, place, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
