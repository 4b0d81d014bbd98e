"""Codebooks: values out of tables, exact codes, gradients that are sums, prices, and what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight import artifact
from featherweight.edits import Constrain, from_json
from featherweight.errors import EditError
from featherweight.forms import Codebook, Mask, Shared, Stored, constraints_on, released, stored
from featherweight.ledger import Ledger


def with_codes(layer: nn.Module, form: Codebook, seed: int = 0) -> dict[str, Tensor]:
    """The layer's state with random tables and indices."""
    built = form.build(layer)
    shared = constraints_on(built)[-1]
    assert isinstance(shared, Shared)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shared.centroids.copy_(torch.randn(shared.centroids.shape, generator=draw))
        shared.indices.copy_(torch.randint(form.size + form.zero, shared.indices.shape, generator=draw))
    return built.state_dict()


FORMS: list[tuple[Any, Codebook]] = [
    (nn.Linear(6, 4), Codebook(4)),
    (nn.Linear(6, 4), Codebook(3, zero=True)),
    (nn.Conv2d(4, 6, 3), Codebook(8, channels=2)),
    (nn.Conv1d(4, 5, 2), Codebook(2, channels=2, zero=True)),
    (nn.Linear(6, 8), Codebook(4, product=True)),
    (nn.Linear(40, 30), Codebook(256, zero=True)),
    (nn.Linear(6, 8), Codebook(1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("layer", "form"), FORMS, ids=lambda value: str(value)[:24])
def test_codes_decode_to_the_same_values(layer: nn.Module, form: Codebook, dtype: torch.dtype) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    Constrain("0", form, with_codes(model[0], form)).apply(model)
    value = model[0].weight.detach()
    shared = constraints_on(model[0])[-1]
    codes = shared.codes(value)
    assert codes is not None
    assert codes.dtype == torch.int64
    assert codes.shape == value.shape
    assert 0 <= int(codes.min()) <= int(codes.max()) < form.size + form.zero
    assert torch.equal(shared.decoded(codes), value)
    assert len(value.unique()) <= (form.size + form.zero) * form.tables(value.shape)


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_centroids_gradient_is_the_sum_of_its_weights(seed: int, zero: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    form = Codebook(3, zero=zero)
    Constrain("0", form, with_codes(model[0], form, seed)).apply(model)
    slope = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    (model[0].weight * slope).sum().backward()
    shared = constraints_on(model[0])[-1]
    by_hand = torch.stack([slope[shared.indices == code + zero].sum() for code in range(3)])
    torch.testing.assert_close(shared.centroids.grad[0, :, 0], by_hand)
    assert model[0].parametrizations.weight.original.grad is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_trains_tables_and_leaves_indices(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    form = Codebook(4)
    Constrain("0", form, with_codes(model[0], form)).apply(model)
    before = copy.deepcopy(model.state_dict())
    updates = optimizer(model.parameters(), lr=0.1)
    model(torch.randn(3, 5)).square().sum().backward()
    updates.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.parametrizations.weight.0.centroids", "0.bias"}
    assert len(model[0].weight.unique()) <= 4


def test_vectors_share_one_index() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2))
    form = Codebook(4, vector=4)
    Constrain("0", form, with_codes(model[0], form)).apply(model)
    shared = constraints_on(model[0])[-1]
    weight = model[0].weight.detach().reshape(3, 2, 4)
    assert torch.equal(weight, shared.centroids[0][shared.indices.long()])
    assert shared.codes(model[0].weight) is None, "an index is not one number a value"
    assert stored(model[0], "weight") == Stored(24, 0.5, 4 * 4 * 32)


def test_what_is_stored() -> None:
    plain, masked = nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(16, 8))
    Constrain("0", Codebook(16)).apply(plain)
    assert stored(plain[0], "weight") == Stored(128, 4, 16 * 32)
    Constrain("0", Mask(20)).apply(masked)
    Constrain("0", Codebook(4, zero=True)).apply(masked)
    assert stored(masked[0], "weight") == Stored(20, 2, 128 + 4 * 32), "the mask says where zeros are"
    Constrain("0", Codebook(4, zero=True)).apply(alone := nn.Sequential(nn.Linear(16, 8)))
    assert stored(alone[0], "weight") == Stored(128, 3, 4 * 32), "five codes take three bits"


def test_zeros_stay_zero_whatever_the_tables_become(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    mask = Mask(16)
    built = mask.build(model[0])
    keep = torch.arange(32).reshape(4, 8) % 2 == 0
    constraints_on(built)[0].get_buffer("mask").copy_(keep)
    edits = [Constrain("0", mask, built.state_dict())]
    edits[0].apply(model)
    form = Codebook(4, zero=True)
    values = with_codes(model[0], form)
    values["parametrizations.weight.1.indices"] = (values["parametrizations.weight.1.indices"].clamp_min(1) * keep).to(
        torch.uint8
    )
    edits.append(Constrain("0", form, values))
    edits[1].apply(model)
    with torch.no_grad():
        constraints_on(model[0])[1].centroids.add_(7)
    assert not model[0].weight[~keep].any()
    assert bool(model[0].weight[keep].all())
    assert torch.equal(released(model)[0].weight, model[0].weight)
    artifact.save(tmp_path / "small.fw", model, edits, Ledger("Sequential", "", ""))
    again, read, *_ = artifact.load(tmp_path / "small.fw", nn.Sequential(nn.Linear(8, 4)))
    assert read == [from_json(edit.to_json()) for edit in edits] == edits
    assert torch.equal(again[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Codebook(0), "a table has 1 to 256 centroids, not 0"),
        (Codebook(257), "a table has 1 to 256 centroids, not 257"),
        (Codebook(2, vector=4), "6 weights an output do not divide into vectors of 4"),
        (Codebook(2, vector=0), "6 weights an output do not divide into vectors of 0"),
        (Codebook(2, channels=2, product=True), "tables are by channels or by place, not both"),
        (Codebook(32), "32 centroids are more than the 24 values that share a table"),
        (Codebook(16, channels=2), "16 centroids are more than the 12 values that share a table"),
    ],
)
def test_what_does_not_fit_is_said(form: Codebook, said: str) -> None:
    with pytest.raises(EditError, match=said):
        Constrain("0", form).apply(nn.Sequential(nn.Linear(6, 4)))


def test_an_index_without_a_centroid_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    form = Codebook(4)
    values = with_codes(model[0], form)
    values["parametrizations.weight.0.indices"][0, 0] = 9
    with pytest.raises(EditError, match="an index of 9 is into 4 codes: 4 centroids"):
        Constrain("0", form, values).apply(model)
