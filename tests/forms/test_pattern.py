"""Patterns of zeros: what they keep, what they take to store, and what does not fit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherweight.edits import Constrain
from featherweight.errors import EditError
from featherweight.forms import BlockMask, Form, Mask, Pattern, Stored, constraints_on, in_blocks, out_of_blocks, stored
from featherweight.forms.pattern import from_matrices, matrices
from featherweight.prune.sparsity import keep


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_blocks_and_matrices_there_and_back(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    kernel = data.draw(st.sampled_from([(), (3,), (2, 3)]))
    weight = torch.randn(rows * 2, columns * 3, *kernel)
    assert torch.equal(from_matrices(matrices(weight), weight.shape), weight)
    sums = in_blocks(weight, (rows, columns))
    assert sums.shape == (math.prod(kernel), 2, 3)
    # One block by hand.
    place = tuple(size - 1 for size in kernel)
    one = weight[(slice(rows, 2 * rows), slice(2 * columns, 3 * columns), *place)].sum()
    torch.testing.assert_close(sums[-1, 1, 2], one)
    spread = out_of_blocks(sums, (rows, columns), weight.shape)
    assert bool((spread[(slice(rows, 2 * rows), slice(2 * columns, 3 * columns), *place)] == sums[-1, 1, 2]).all())


@given(st.integers(1, 4), st.sampled_from([(4,), (4, 3, 3)]))
@settings(max_examples=20, deadline=None)
def test_of_every_four_inputs_the_highest_n_stay(n: int, rest: tuple[int, ...]) -> None:
    scores = torch.rand(5, 8, *rest[1:])
    stay = keep(scores, Pattern(n, 4))
    runs = stay.reshape(5, 2, 4, -1)
    assert bool((runs.sum(2) == n).all())
    lowest_kept = scores.masked_fill(~stay, 2).reshape(5, 2, 4, -1).min(2).values
    highest_gone = scores.masked_fill(stay, -1).reshape(5, 2, 4, -1).max(2).values
    assert bool((lowest_kept >= highest_gone).all())


def test_patterns_take_fewer_bits_to_place_than_masks() -> None:
    layer = nn.Linear(16, 8, bias=False)
    for form, places in (
        (Mask(64), 128),
        (Pattern(2, 4), 32 * 3),
        (Pattern(1, 2, (2, 2)), 16),
        (BlockMask(8, (2, 4)), 16),
    ):
        built = form.build(layer, "meta")
        assert stored(built, "weight") == Stored(64, 32, places), form


def test_a_pattern_says_what_it_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(EditError, match="its 6 inputs a group are not a multiple of 4"):
        Constrain("0", Pattern(2, 4)).apply(copy.deepcopy(model))
    with pytest.raises(EditError, match="its 4 outputs are not a multiple of 3"):
        Constrain("0", BlockMask(1, (3, 1))).apply(copy.deepcopy(model))
    with pytest.raises(EditError, match="5 of every 4 cannot be kept"):
        Constrain("0", Pattern(5, 4)).apply(copy.deepcopy(model))
    with pytest.raises(EditError, match="a block of 0×1 is none"):
        Constrain("0", BlockMask(1, (0, 1))).apply(copy.deepcopy(model))


def test_a_mask_that_breaks_its_pattern_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    form = Pattern(2, 4)
    built = form.build(model[0])
    mask = constraints_on(built)[-1].get_buffer("mask")
    mask.copy_(torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool))  # as many as it says, but not everywhere
    with pytest.raises(EditError, match="a mask does not keep 2 of every 4 kept"):
        Constrain("0", form, built.state_dict()).apply(model)


def test_forms_survive_json() -> None:
    for form in (BlockMask(3, (2, 1)), Pattern(2, 4), Pattern(1, 2, (4, 1), tensor="bias")):
        assert Form.from_json(form.to_json()) == form
        assert Form.from_json({**form.to_json(), "block": list(form.block)}) == form


def test_a_mask_upon_a_mask_is_one_mask() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    Constrain("0", Mask(20)).apply(model)
    with pytest.raises(EditError, match="a mask keeps 32 of 32 values"):
        constraints_on(model[0])[0].check(torch.Size([4, 8]))
    Constrain("0", Mask(12)).apply(model)
    (only,) = constraints_on(model[0])
    assert only.extra_repr() == "kept=12"
    assert stored(model[0], "weight").values == 12
    Constrain("0", Pattern(1, 4)).apply(model)
    assert len(constraints_on(model[0])) == 2
