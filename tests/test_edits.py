"""Edits: data that changes a model's form, in every place that holds the layer, and says where it does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from networks import Mixed, Temporal, make
from torch import nn

from featherweight import edits as editing
from featherweight.batch import as_inputs
from featherweight.edits import Leave, Narrow, Replace
from featherweight.errors import ArtifactError, EditError
from featherweight.forms import LinearPair, LowRank, Separable
from featherweight.graph import Narrowing, couple, narrow


def test_a_replaced_layer_has_the_values_given():
    model = make(Mixed)
    values = {"first.weight": torch.ones(1, 24), "second.weight": torch.ones(24, 1), "second.bias": torch.zeros(24)}
    edit = Replace("second", LowRank(1), values)
    edit.apply(model)
    assert isinstance(model.second, LinearPair)
    assert torch.equal(model.second.weight, torch.ones(24, 24))
    assert edit.describe() == "second: rank 1"


def test_a_layer_is_replaced_wherever_the_model_holds_it():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer, layer])}), layer)
    Replace("0", LowRank(1)).apply(model)
    assert isinstance(model[0], LinearPair)
    assert model[0] is model[2] is model[1]["a"] is model[1]["b"][0] is model[1]["b"][1]
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["0.first", "0.second"]


def test_edits_survive_json():
    for edit in (Replace("a.b", LowRank(3)), Replace("c", Separable(2, 1)), Leave("d", "ignored, as asked")):
        assert editing.from_json(json.loads(json.dumps(edit.to_json()))) == edit
    assert Leave("d", "because").describe() == "d: left as it is (because)"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "this is not an edit that this version knows"),
        ({"edit": "Remove", "layer": "a"}, "this is not an edit that this version knows"),
        (
            {"edit": "Replace", "layer": "a", "form": {"form": "LowRang", "rank": 1}},
            "no form 'LowRang'; did you mean 'LowRank'",
        ),
        ({"edit": "Replace", "layer": "a", "form": {"form": "LowRank"}}, r"has the fields \['rank'\], not \[\]"),
        ({"edit": "Replace", "layer": "a", "form": {"form": "LowRank", "rank": 1}, "why": 1}, "not an edit"),
    ],
)
def test_data_that_is_no_edit_is_refused(data, message):
    with pytest.raises(ArtifactError, match=message):
        editing.from_json(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Replace("secnd", LowRank(1)), "Mixed has no layer 'secnd'; did you mean 'second'"),
        (Replace("second", Separable(1)), "a separable form is defined for Conv layers, not for Linear"),
        (Replace("", LowRank(1)), "not for Mixed"),
    ],
)
def test_an_edit_that_does_not_fit_says_why_and_changes_nothing(edit, message):
    model = make(Mixed)
    before = list(model.named_modules())
    with pytest.raises(EditError, match=message):
        edit.apply(model)
    assert list(model.named_modules()) == before


def test_a_model_that_is_one_layer_has_no_place_for_another():
    with pytest.raises(EditError, match=r"the model itself is one layer: wrap it in nn\.Sequential"):
        Replace("", LowRank(1)).apply(nn.Linear(3, 3))


def test_an_axis_that_the_kernel_does_not_have():
    with pytest.raises(EditError, match="axis 1 is not among the 1 axes of the kernel"):
        Replace("first", Separable(1, 1)).apply(make(Temporal))


def test_a_layer_is_replaced_once():
    model = make(Mixed)
    Replace("second", LowRank(1)).apply(model)
    with pytest.raises(EditError, match="'second' is a LinearPair already: it was replaced before"):
        Replace("second", LowRank(2)).apply(model)


def test_values_of_another_rank_are_refused_and_the_layer_stays():
    model = make(Mixed)
    layer = model.second
    with pytest.raises(EditError, match=r"'second'.*rank 2"):
        Replace("second", LowRank(2), {"first.weight": torch.ones(1, 24)}).apply(model)
    assert model.second is layer


class Written(Mixed):
    """`Mixed` with a width written into its forward: only a captured graph can be narrower."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)).view(-1, 24))))


def narrowing(model: nn.Module) -> Narrowing:
    """Every third neuron of both hidden layers."""
    coupling = couple(model, as_inputs(Mixed.data(2)))
    return narrow(model, coupling, {group.name: range(0, group.size, 3) for group in coupling.groups}).narrowing


@pytest.mark.parametrize("kind", [Mixed, Written], ids=lambda kind: kind.__name__)
def test_a_narrowed_model_has_the_values_of_what_stays_and_the_model_itself_is_as_it_was(kind):
    model = make(kind)
    edit = Narrow(narrowing(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    narrowed = edit.apply(model)
    assert narrowed is not model
    assert isinstance(narrowed, kind) == (kind is Mixed)
    assert torch.equal(narrowed.get_parameter("second.weight"), model.second.weight[::3, ::3])
    assert torch.equal(narrowed.get_parameter("head.bias"), model.head.bias)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [Mixed, Written], ids=lambda kind: kind.__name__)
def test_a_narrowing_survives_json_and_is_replayed_on_a_fresh_model(kind):
    model = make(kind)
    edit = Narrow(narrowing(model))
    again = editing.from_json(json.loads(json.dumps(edit.to_json())))
    assert again == edit
    narrowed = edit.apply(model)
    fresh = editing.replay(make(kind, seed=1), [again, Leave("head", "because")])
    fresh.load_state_dict(narrowed.state_dict())
    x = Mixed.data(5)
    assert torch.equal(fresh(x), narrowed(x))


def test_a_narrowing_says_its_groups_and_why_it_is_a_graph():
    assert Narrow(narrowing(make(Mixed))).describe() == "2 groups narrowed"
    said = Narrow(narrowing(make(Written))).describe()
    assert said.startswith("2 groups narrowed, as a graph: its code has sizes written into it")


@pytest.mark.parametrize("kind", [Mixed, Written], ids=lambda kind: kind.__name__)
def test_a_narrowing_of_another_model_is_refused(kind):
    edit = Narrow(narrowing(make(kind)))
    for other in (make(Temporal), nn.Sequential(nn.Linear(12, 4))):
        with pytest.raises(EditError):
            edit.apply(other)


@pytest.mark.parametrize(
    "data",
    [
        {"edit": "Narrow"},
        {"edit": "Narrow", "narrowing": {}},
        {"edit": "Narrow", "narrowing": {"form": "module"}},
        {"edit": "Narrow", "narrowing": {}, "layer": "a"},
    ],
    ids=str,
)
def test_data_that_is_no_narrowing_is_refused(data):
    with pytest.raises(ArtifactError, match=r"not a narrowing|not an edit"):
        editing.from_json(data)
