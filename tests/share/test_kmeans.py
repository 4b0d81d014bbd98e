"""Weight sharing as a user meets it: as many values as asked, zeros kept, budgets met, tables trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import Mixed, Temporal, make, task_of, train
from torch import nn

import featherweight as fw
from featherweight import prune, share
from featherweight.errors import NoEffect, RecipeError
from featherweight.forms import Codebook, Shared, constraints_on, released
from featherweight.score import Divergence


def shared(step: share.KMeans, model: nn.Module | None = None, **fields: Any) -> fw.Compressed:
    model = make(Mixed) if model is None else model
    return fw.compress(model, step, task=task_of(model, **fields))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_layer_has_so_many_values(bits: int) -> None:
    small = shared(share.KMeans(bits={"second": bits})).model
    assert len(small.second.weight.unique()) == 2**bits
    assert small.first.weight.unique().numel() == 288
    # And a plain model for other runtimes has the very same ones.
    assert torch.equal(released(small).second.weight, small.second.weight)


def test_tables_by_outputs_and_by_place() -> None:
    by_outputs = shared(share.KMeans(bits=2, channels=6, feedback=False)).model
    for rows in by_outputs.second.weight.split(6):
        assert len(rows.unique()) <= 4
    assert len(by_outputs.second.weight.unique()) > 4
    by_place = shared(share.KMeans(bits=1, vector=6, product=True)).model
    vectors = by_place.second.weight.detach().reshape(24, 4, 6)
    assert all(len(vectors[:, place].unique(dim=0)) <= 2 for place in range(4))


def test_the_curvature_and_feedback_each_help() -> None:
    model = make(Temporal)
    given = task_of(model, 96)
    distance = Divergence(model, given)
    plain, weighed, fed_back = (
        distance(fw.compress(model, share.KMeans(bits=3, **settings), task=given).model)
        for settings in ({"data_aware": False}, {"feedback": False}, {})
    )
    assert fed_back < weighed
    assert fed_back < 0.7 * plain


def test_pruned_weights_stay_zero_through_sharing_and_training() -> None:
    model = make(Mixed)
    given = task_of(model, train=train)
    recipe = fw.Recipe(prune.Magnitude(sparsity=0.6), share.KMeans(bits=2, epochs=3))
    small = recipe.run(model, given).model
    for layer in (small.first, small.second):
        mask, table = constraints_on(layer)
        assert not layer.weight[~mask.get_buffer("mask")].any()
        assert isinstance(table, Shared)
        assert table.form.zero
        assert len(layer.weight.unique()) <= 5


def test_training_moves_tables_alone() -> None:
    model = make(Mixed)
    still, moved = (
        fw.compress(model, share.KMeans(bits=2, epochs=epochs), task=task_of(model, train=train)).model
        for epochs in (0, 2)
    )
    before, after = constraints_on(still.second)[0], constraints_on(moved.second)[0]
    assert torch.equal(before.get_buffer("indices"), after.get_buffer("indices"))
    assert not torch.equal(before.get_parameter("centroids"), after.get_parameter("centroids"))


def test_a_budget_of_bytes_chooses_bits_layer_by_layer() -> None:
    model = make(Mixed)
    small = shared(share.KMeans(budget=fw.Budget(bytes=0.2)), model)
    (entry,) = small.ledger.steps
    assert entry.after.total.bytes <= 0.2 * entry.before.total.bytes
    sizes = {form.size for form in small.plan.layers.values() if isinstance(form, Codebook)}
    assert sizes <= {2**bits for bits in range(1, 9)}
    # The same plan again, by hand.
    again = shared(share.KMeans(select=small.plan), model)
    assert again.edits == small.edits


def test_vectors_keep_zeros_only_where_whole_ones_are() -> None:
    model = make(Mixed)
    given = task_of(model)
    whole = fw.Recipe(prune.Magnitude(sparsity=0.5, block=(1, 2)), share.KMeans(bits=2, vector=2)).run(model, given)
    assert sum(edit["edit"] == "Constrain" for edit in whole.ledger.steps[1].edits) >= 2
    zeros = whole.model.second.weight == 0
    assert int(zeros.sum()) == 288
    with pytest.warns(NoEffect, match="single zeros would not stay zero in vectors of 2"):
        fw.Recipe(prune.Magnitude(sparsity=0.5), share.KMeans(bits=2, vector=2)).run(model, given)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "nothing says how much to keep: give one of budget=, bits="),
        ({"bits": 0}, "bits is 0: it must be from 1 to 8"),
        ({"bits": {"first": 9}}, "bits is 9: it must be from 1 to 8"),
        ({"bits": 2, "vector": 0}, "vector is 0: it must be at least 1"),
        ({"bits": 2, "rounds": 0}, "rounds is 0: it must be at least 1"),
        ({"bits": 2, "init": "lineal"}, "init is 'lineal'"),
        ({"bits": 2, "product": True, "channels": 4}, "give one of them"),
        ({"bits": {"fist": 2}}, "the pattern 'fist' matches none"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        shared(share.KMeans(**settings))


def test_more_centroids_than_values_and_other_layers_that_stay() -> None:
    model = make(Mixed)
    with torch.no_grad():
        model.second.weight.zero_()
    small = shared(share.KMeans(bits={"first": 3, "second": 3, "head": 7}), model)
    left = small.ledger.steps[0].left
    assert left["second"] == "all of its weights are zero"
    assert left["head"].startswith("128 centroids")
    again = fw.compress(small.model, share.KMeans(bits={"head": 3}), task=task_of(model))
    assert again.ledger.steps[0].left["first"] == "an earlier step has settled its values: 8 centroids"


def test_damaged_and_empty_weights() -> None:
    model = make(Mixed)
    with torch.no_grad():
        model.first.weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"NaN or infinite values in first\.weight"):
        shared(share.KMeans(bits=2), model)
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Sequential(nn.Linear(12, 0), nn.Linear(0, 24), nn.ReLU(), nn.Linear(24, 4))
    x = torch.randn(16, 12)
    small = fw.compress(empty, share.KMeans(bits=2), task=fw.Task(x[:1], x.split(8)))
    assert small.ledger.steps[0].left["0"] == small.ledger.steps[0].left["1"] == "its weight is empty"


def test_the_same_seed_and_a_copy_give_the_same() -> None:
    model = make(Mixed)
    one, other = (shared(share.KMeans(bits=3, init="k-means++"), copy.deepcopy(model)) for _ in range(2))
    assert torch.equal(one.model.second.weight, other.model.second.weight)
