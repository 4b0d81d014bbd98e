"""Uniform grids: what they give, their gradients, their codes, and the scales that are found for them."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mixed, make
from torch import Tensor, nn

from featherweight import artifact
from featherweight.edits import Constrain
from featherweight.errors import EditError
from featherweight.forms import Grid, Gridded, Mask, constraints_on, stored
from featherweight.forms.grid import between, fake_quantized, least_error, min_max, percentile, short
from featherweight.ledger import Ledger

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    axis = draw(st.sampled_from([0, 1, -1, None]))
    group = draw(st.integers(0, 5)) if axis is not None else 0
    bits = draw(st.sampled_from([2, 3, 4, 8, 16]))
    return Grid(bits, symmetric=draw(st.booleans()), signed=draw(st.booleans()), axis=axis, group=group)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-4, 4))
    if draw(st.booleans()):
        x[0] = draw(st.sampled_from([0.0, 3.0, -2e-5]))  # a channel that is constant
    return x.to(draw(st.sampled_from(TYPES)))


@given(grids(), tensors())
@settings(max_examples=150, deadline=None)
def test_codes_give_the_values_back_bit_by_bit(form, x):
    made = Gridded(x, form)
    values = made(x)
    codes = made.codes(values)
    assert values.dtype == x.dtype
    assert values.shape == x.shape
    assert codes.dtype == torch.int64
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**form.bits
    back = made.decoded(codes)
    assert back.dtype == x.dtype
    assert torch.equal(back.view(torch.uint8), values.contiguous().view(torch.uint8))
    assert torch.equal(made(values), values)


@given(grids(), tensors())
@settings(max_examples=100, deadline=None)
def test_values_are_the_nearest_of_the_grid(form, x):
    form, x = replace(form, bits=min(form.bits, 4)), x.float()
    made = Gridded(x, form)
    values = made(x)
    scale = form.spread(made.scale.detach(), x.shape).expand(x.shape)
    shift = form.spread(made.zero_point, x.shape).expand(x.shape).float()
    levels = torch.stack([(q - shift) * scale for q in range(form.low, form.high + 1)])
    nearest = (levels - x).abs().amin(0)
    torch.testing.assert_close((values - x).abs(), nearest, rtol=1e-4, atol=1e-5 * float(x.abs().max() + 1e-30))
    # Zero is a value of every grid.
    assert not made(torch.zeros_like(x)).any()


def test_every_scale_has_the_values_that_it_should():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert Grid(8, axis=None).rows(x).shape == (24,)
    assert torch.equal(Grid(8, axis=1).rows(x)[2], torch.tensor([8.0, 9, 10, 11, 20, 21, 22, 23]))
    rows = Grid(8, axis=0, group=5).rows(x)
    assert torch.equal(rows[0, 2], torch.tensor([10.0, 11, 0, 0, 0]))
    for form in (Grid(8, axis=None), Grid(8, axis=1), Grid(8, axis=-1, group=4), Grid(8, axis=0, group=5)):
        scale, _ = min_max(form.rows(x), form)
        each = form.spread(scale, x.shape).expand(x.shape)
        rows = form.rows(each, fill=torch.nan)
        assert torch.equal(rows.nan_to_num(0), scale[..., None].expand(rows.shape) * ~rows.isnan())


def test_a_masked_tensor_stays_masked_and_takes_what_is_left():
    layer = nn.Linear(8, 4)
    mask = torch.arange(32).reshape(4, 8) % 3 == 0
    form = Mask(int(mask.sum()))
    model = nn.Sequential(layer)
    Constrain("0", form).apply(model)
    constraints_on(layer)[0].get_buffer("mask").copy_(mask)
    Constrain("0", Grid(4, symmetric=False)).apply(model)
    assert not layer.weight[~mask].any()
    assert layer.weight[mask].any()
    taken = stored(layer, "weight")
    assert (taken.values, taken.bits, taken.beside) == (form.kept, 4, 32 + 4 * (32 + 8))


def test_gradients_are_those_of_the_papers():
    # Esser et al., equation 3: the scale's is q − x/s within the range, q at its ends; x's is 1 within, 0 outside.
    x = torch.tensor([0.26, 0.9, 5.0, -5.0], requires_grad=True)
    scale, shift = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    made = fake_quantized(x, scale, shift, -4, 3, gradient_share=0.5)
    torch.testing.assert_close(made, torch.tensor([0.5, 1.0, 1.0, -2.5]))
    made.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 10.0, 0.0, 0.0]))
    expected = 1 * (1 - 0.52) + 10 * (2 - 1.8) + 100 * (3 - 1) + 1000 * (-4 - 1)
    torch.testing.assert_close(scale.grad, torch.tensor(0.5 * expected))
    torch.testing.assert_close(shift.grad, torch.tensor(0.5 * (100 + 1000) * -0.5))


def test_a_scale_learns_where_it_is_asked_to():
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    made = Grid(3).put_on(layer)
    assert isinstance(made, Gridded)
    target, x = layer.weight.detach().clone(), torch.randn(64, 16)
    with torch.no_grad():
        made.scale.mul_(3)
    made.learn()

    def error() -> Tensor:
        return ((layer.weight - target) @ x.T).square().mean()

    before = float(error().detach())
    optimizer = torch.optim.Adam([made.growth], 0.03)
    for _ in range(50):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    after = error().detach()
    assert float(after) < 0.5 * before
    made.settle()
    assert torch.equal(error().detach(), after)
    assert not [name for name in made.state_dict() if "growth" in name]


@given(st.sampled_from([2, 3]), st.booleans(), st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_scales_of_least_error_are_nearly_the_best_there_are(bits, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, weights = torch.randn(3, 12, generator=generator), torch.rand(3, 12, generator=generator)
    form = Grid(bits, symmetric=symmetric)

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        made = fake_quantized(rows, scale[..., None], zero_point[..., None], form.low, form.high)
        return ((made - rows).square() * weights).sum(-1)

    found = error(*least_error(rows, form, weights))
    assert bool((found <= error(*min_max(rows, form)) + 1e-6).all())
    shifts = range(form.low, form.high + 1) if not symmetric else [0]
    best = torch.full((3,), torch.inf)
    for scale, shift in itertools.product(torch.linspace(0.02, 4, 300), shifts):
        best = torch.minimum(best, error(scale.expand(3), torch.tensor(shift).expand(3)))
    assert bool((found <= 2.5 * best + 1e-6).all())
    if symmetric:  # of a few values a range between two that are tried may be the best: all rows together tell
        assert float(found.sum()) <= 1.15 * float(best.sum())


def test_percentiles_cut_both_ends_off_and_pass_over_what_fills_a_group():
    values = torch.linspace(-1, 1, 2001)
    rows = torch.stack([values, torch.cat([values[:1001], torch.full((1000,), torch.nan)])])
    scale, _ = percentile(rows, Grid(8, symmetric=False), 0.9)
    torch.testing.assert_close(scale[0], torch.tensor(1.8 / 255))
    torch.testing.assert_close(scale[1], torch.tensor(0.95 / 255))
    assert percentile(torch.full((2, 3), torch.nan), Grid(8))[0].tolist() == [1, 1]


def test_a_range_of_nothing_but_zero_has_a_scale():
    scale, zero_point = between(torch.zeros(2), torch.zeros(2), Grid(8, symmetric=False, signed=False))
    assert scale.tolist() == [1, 1]
    assert zero_point.tolist() == [0, 0]


def test_a_file_keeps_scales_and_codes(tmp_path: Path):
    model = make(Mixed)
    edits = [Constrain("first", Grid(4, group=5)), Constrain("second", Grid(8, symmetric=False, axis=None))]
    for edit in edits:
        edit.apply(model)
    artifact.save(tmp_path / "small.fw", model, edits, Ledger("Mixed", "", ""))
    loaded, again, *_ = artifact.load(tmp_path / "small.fw", make(Mixed, seed=1))
    assert again == edits
    assert torch.equal(loaded(Mixed.data(3)), model(Mixed.data(3)))
    half = copy.deepcopy(loaded).half()
    (made,) = constraints_on(half.first)
    assert torch.equal(made.decoded(made.codes(half.first.weight)), half.first.weight)


def test_what_cannot_be_a_grid_is_said():
    layer = nn.Linear(4, 3)
    for form, message in (
        (Grid(9), "a grid has 2 to 8 bits or 16, not 9"),
        (Grid(8, axis=2), r"a tensor of shape \(3, 4\) has no axis 2"),
        (Grid(8, axis=None, group=4), "groups need an axis"),
        (Grid(8, group=-1), "a group cannot hold -1 values"),
    ):
        with pytest.raises(EditError, match=message):
            form.build(layer)
    built = Grid(8).build(layer)
    values = built.state_dict()
    values["parametrizations.weight.0.scale"] = torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(EditError, match="the scales of a grid of 8 bits must be positive"):
        Constrain("0", Grid(8), values).apply(nn.Sequential(layer))
    assert str(Grid(4, symmetric=False, axis=1, group=32)) == "4 bits along axis 1 in groups of 32, affine"


@given(st.floats(-30, 20), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_short_scales_are_those_of_float16_where_it_has_as_many_bits(exponent, seed):
    scale = 2.0**exponent * (1 + torch.rand(64, generator=torch.Generator().manual_seed(seed)))
    made = short(scale, Grid(8))
    assert bool(((made - scale).abs() <= scale / 2048).all())
    normal = (scale >= 2.0**-14) & (scale <= 65504)
    assert torch.equal(made[normal], made[normal].half().float())
    assert torch.equal(short(scale, Grid(16)), scale), "65535 steps of a scale that is off by 1/2048 are off by 32"
