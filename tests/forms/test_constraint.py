"""Constraints: what they confine, how they stack, train, are priced, stored in files and given to other runtimes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mixed, make
from torch import Tensor, nn

from featherweight import artifact
from featherweight import edits as editing
from featherweight.batch import as_inputs
from featherweight.cost.count import price, profile
from featherweight.edits import Constrain, Replace, from_json, remade
from featherweight.errors import ArtifactError, EditError
from featherweight.export import export
from featherweight.forms import (
    Constrained,
    Constraint,
    LowRank,
    Mask,
    Stored,
    constrained_tensors,
    constraints_on,
    released,
    stored,
)
from featherweight.ledger import Ledger


class Halved(Constrained):
    """Values rounded to halves."""

    def forward(self, original: Tensor) -> Tensor:
        return (original * 2).round() / 2

    def stored(self, before: Stored) -> Stored:
        return replace(before, bits=5.0, beside=before.beside + 3)


@dataclass(frozen=True)
class Halves(Constraint):
    """For the tests."""

    def parametrization(self, tensor: Tensor) -> Constrained:
        return Halved()

    def __str__(self) -> str:
        return "halves"


def masked(layer: nn.Module, mask: Tensor, tensor: str = "weight") -> tuple[Mask, dict[str, Tensor]]:
    """A mask as its form, and the layer's values with it."""
    form = Mask(int(mask.sum()), tensor=tensor)
    built = form.build(layer)
    constraints_on(built, tensor)[-1].get_buffer("mask").copy_(mask)
    return form, built.state_dict()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_masked_tensor_is_zero_where_the_mask_says_and_trains_elsewhere(data):
    layer = data.draw(st.sampled_from([nn.Linear(5, 4), nn.Conv1d(2, 3, 3), nn.Embedding(6, 3)]))
    weight = layer.weight.detach().clone()
    mask = torch.rand(weight.shape) < data.draw(st.floats(0, 1))
    model = nn.Sequential(copy.deepcopy(layer))
    form, values = masked(layer, mask)
    Constrain("0", form, values).apply(model)
    assert torch.equal(model[0].weight, weight * mask)
    model[0].weight.square().sum().backward()
    (beneath,) = [p for n, p in model.named_parameters() if n.endswith("original")]
    torch.testing.assert_close(beneath.grad, 2 * weight * mask)
    with torch.no_grad():
        beneath.sub_(1.0)
    assert not model[0].weight[~mask].any()


def test_constraints_stack_and_say_what_is_stored():
    model = nn.Sequential(nn.Linear(8, 4))
    weight = model[0].weight.detach().clone()
    mask = torch.arange(32).reshape(4, 8) % 4 == 0
    Constrain("0", *masked(model[0], mask)).apply(model)
    assert stored(model[0], "weight") == Stored(8, 32, 32)  # a bit for every place
    Constrain("0", Halves()).apply(model)
    assert torch.equal(model[0].weight, (weight * mask * 2).round() / 2)
    assert [type(c).__name__ for c in constraints_on(model[0])] == ["Masked", "Halved"]
    taken = stored(model[0], "weight")
    assert taken == Stored(8, 5, 35)
    assert taken.bytes == 10  # 75 bits
    row = profile(model, as_inputs(torch.randn(1, 8))).layers["0"]
    assert row.cost.params == 8 + 4
    assert row.cost.bytes == 10 + 4 * 4
    assert row.cost.macs == 32
    assert row.cost.activation_bytes == 16, "confining a weight writes no activations"


def test_a_form_is_priced_as_the_layer_that_it_makes():
    layer = nn.Conv2d(3, 8, 3)
    row = profile(nn.Sequential(layer), as_inputs(torch.randn(1, 3, 6, 6))).layers["0"]
    form, values = masked(layer, torch.rand(8, 3, 3, 3) < 0.25)
    model = nn.Sequential(copy.deepcopy(layer))
    Constrain("0", form, values).apply(model)
    after = profile(model, as_inputs(torch.randn(1, 3, 6, 6))).layers["0"]
    assert price(form.build(layer, "meta"), row.calls) == after.cost
    assert after.kind == "Conv2d"


def test_layers_inside_a_replaced_one_can_be_confined():
    model = make(Mixed)
    Replace("second", LowRank(6)).apply(model)
    before = profile(model, as_inputs(Mixed.data(1))).layers["second"].cost
    form, values = masked(model.second.first, torch.rand(6, 24) < 0.5)
    Constrain("second.first", form, values).apply(model)
    after = profile(model, as_inputs(Mixed.data(1))).layers["second"].cost
    assert before.params - after.params == 6 * 24 - form.kept
    assert [name for name, *_ in constrained_tensors(model)] == ["second.first"]


def test_a_file_keeps_masks_and_replays_them(tmp_path: Path):
    model = make(Mixed)
    edits = [Constrain("first", *masked(model.first, torch.rand(24, 12) < 0.5)), Constrain("first", Halves())]
    for edit in edits:
        edit.apply(model)
    artifact.save(tmp_path / "small.fw", model, edits, Ledger("Mixed", "", ""))
    loaded, again, *_ = artifact.load(tmp_path / "small.fw", make(Mixed, seed=1))
    assert again == edits
    assert torch.equal(loaded(Mixed.data(3)), model(Mixed.data(3)))
    assert [from_json(edit.to_json()) for edit in edits] == edits


def test_other_runtimes_are_given_plain_weights(tmp_path: Path):
    model = make(Mixed)
    assert released(model) is model
    Constrain("second", *masked(model.second, torch.rand(24, 24) < 0.3)).apply(model)
    plain = released(model)
    assert set(plain.state_dict()) == set(make(Mixed).state_dict())
    assert torch.equal(plain(Mixed.data(4)), model(Mixed.data(4)))
    assert constraints_on(model.second), "the model itself stays as it is"
    check = export(model, as_inputs(Mixed.data(2)), "torch_export", tmp_path / "model.pt2")
    assert check.difference < 1e-6
    assert check.bytes < 4 * sum(p.numel() for p in plain.parameters()) + 40_000, "weights are written once"


def test_what_does_not_fit_is_said():
    model = make(Mixed)
    with pytest.raises(EditError, match="Linear has no floating-point tensor 'wieght'"):
        Constrain("first", Mask(3, tensor="wieght")).apply(model)
    form, values = masked(model.first, torch.ones(24, 12, dtype=torch.bool))
    with pytest.raises(EditError, match="a mask keeps 288 of 288 values, where its form says 3"):
        Constrain("first", replace(form, kept=3), values).apply(copy.deepcopy(model))
    with pytest.raises(EditError, match="the values for 'first' are not those of 288 values kept"):
        Constrain("first", form, {"weight": model.first.weight}).apply(copy.deepcopy(model))
    with pytest.raises(ArtifactError, match="not an edit"):
        from_json({"edit": "Constrain", "layer": "first", "constraint": LowRank(2).to_json()})


def test_the_right_edit_is_made_of_a_form():
    assert remade(nn.Module(), "a", Mask(3)) == Constrain("a", Mask(3))
    assert remade(nn.Module(), "a", LowRank(3)) == Replace("a", LowRank(3))
    assert remade(nn.Module(), "a", Mask(3)).describe() == "a: 3 values kept"
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    assert remade(attention, "a.in_proj_weight", Mask(3)) == Constrain("a", Mask(3, tensor="in_proj_weight"))
    assert remade(attention, "a.in_proj_weight", Mask(3)).describe() == "a.in_proj_weight: 3 values kept"
    assert remade(attention, "a.out_proj", Mask(3)) == Constrain("a.out_proj", Mask(3))
    assert editing.replay(make(Mixed), []).first.weight.shape == (24, 12)
