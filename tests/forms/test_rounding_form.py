"""Activations on a grid: values, gradients, and ranges found at every call."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import ArtifactError, EditError
from featherweight.forms import Rounded, Rounding


def rounded(form: Rounding, scale: float, zero_point: float = 0.0) -> Rounded:
    made = Rounded(form)
    made.set_range(torch.tensor(scale), torch.tensor(zero_point))
    return made


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 7, 8]),
    signed=st.booleans(),
    scale=st.floats(1e-3, 10),
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
)
def test_values_are_those_of_torchs_own_rounding(bits, signed, scale, values):
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    scale = float(torch.tensor(scale))
    x = torch.tensor(values)
    found = rounded(Rounding(bits, signed=signed), scale, low + 1)(x)
    # Away from the middle between two steps, where torch multiplies by the scale's inverse and so rounds otherwise.
    clear = ((x / scale).frac().abs() - 0.5).abs() > 1e-3
    expected = torch.fake_quantize_per_tensor_affine(x, scale, low + 1, low, high)
    torch.testing.assert_close(found[clear], expected[clear])


def test_the_gradients_are_those_of_learned_steps_in_proportion():
    form = Rounding(2, symmetric=True, signed=True)
    module = rounded(form, 0.5)
    module.learn("lsq")
    x = torch.tensor([[-3.0, -0.3, 0.2, 0.4, 5.0]], requires_grad=True)
    (module(x) * 0.1).sum().backward()
    assert x.grad.tolist() == [[0, pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 0]]
    # Esser et al., equation 3: −v/s + round(v/s) within the range, its end outside; then 1/√(values · Q).
    inside = sum(round(v / 0.5) - v / 0.5 for v in (-0.3, 0.2, 0.4))
    assert module.growth.grad.item() == pytest.approx(math.tanh(0.1 * (-2 + inside + 1) / 5**0.5 / 0.5), rel=1e-5)


def test_pact_learns_from_what_is_cut_off_alone():
    module = rounded(Rounding(2), 1.0)
    module.learn("pact")
    x = torch.tensor([0.2, 1.4, 2.9, 3.5, 9.0], requires_grad=True)
    module(x).sum().backward()
    assert module.growth.grad.item() == pytest.approx(math.tanh(2 / 3))  # two values are cut off at α = 3 · scale
    assert x.grad.tolist() == [1, 1, 1, 0, 0]
    ended = rounded(Rounding(2), 1.0, 3.0)
    ended.learn("pact")
    ended(torch.linspace(-4, 1, 7).requires_grad_()).sum().backward()
    assert ended.growth is None, "an upper end that is 0"


@settings(max_examples=20, deadline=None)
@given(
    how=st.sampled_from(["lsq", "lsq+", "pact"]),
    scale=st.floats(1e-6, 1e3),
    slope=st.floats(-1e6, 1e6),
    optimizer=st.sampled_from(["SGD", "Adam"]),
)
def test_no_gradient_makes_a_step_negative_or_moves_it_by_more_than_the_rate(how, scale, slope, optimizer):
    module = rounded(Rounding(8), scale, 100.0)
    module.learn(how)
    made = getattr(torch.optim, optimizer)([p for p in module.parameters() if p.requires_grad], lr=0.05)
    (module(scale * torch.linspace(-300, 300, 32)) * slope).sum().backward()
    made.step()
    module.settle()
    assert abs(math.log(module.scale.item() / scale)) <= 0.0501
    assert abs(module.zero_point.item() - 100) <= 20  # a 20th of the range, and of the step


def test_what_was_learned_is_kept_and_the_zero_point_is_a_whole_number_within_the_grid():
    x = torch.linspace(-1, 3, 17)
    for by, zero_point in ((0.1, 4), (9.0, 0), (-9.0, 15)):
        module = rounded(Rounding(4), 0.25, 5.0)
        module.learn("lsq+")
        module.growth.data.fill_(-0.1)
        module.offset.data.fill_(by)
        before = module(x)
        module.settle()
        assert module.scale.item() == pytest.approx(0.25 * math.exp(-0.1))
        assert module.zero_point.item() == zero_point
        assert torch.equal(module(x), before)
        assert set(module.state_dict()) == {"scale", "zero_point"}


def test_an_offset_that_is_learned_finds_the_range_that_a_step_alone_cannot():
    x = 2 + 3 * torch.randn(512, generator=torch.Generator().manual_seed(0))
    errors = {}
    for how in ("lsq", "lsq+"):
        for optimizer, rate in ((torch.optim.Adam, 0.01), (torch.optim.SGD, 0.05)):
            module = rounded(Rounding(4), 0.8, 10.0)
            module.learn(how)
            made = optimizer([p for p in module.parameters() if p.requires_grad], lr=rate)
            for _ in range(200):
                made.zero_grad()
                (module(x[None]) - x).square().mean().backward()
                made.step()
            module.settle()
            errors[how, optimizer] = float((module(x) - x).square().mean())
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        assert errors["lsq+", optimizer] < 0.8 * errors["lsq", optimizer]


def test_a_dynamic_range_is_that_of_the_call():
    module = Rounded(Rounding(dynamic=True))
    assert list(module.state_dict()) == []
    x = torch.tensor([-1.0, 0.0, 0.5, 3.0])
    # As ONNX's DynamicQuantizeLinear is defined.
    scale = (x.max() - x.min()) / 255
    zero_point = (-x.min() / scale).round()
    torch.testing.assert_close(module(x), ((x / scale).round() + zero_point - zero_point) * scale)
    for odd in (torch.zeros(3), torch.zeros(0), torch.tensor([2, 5])):
        assert torch.equal(module(odd), odd)


def test_a_rounding_survives_json_and_others_are_refused():
    form = Rounding(4, signed=True, symmetric=True)
    assert Rounding.from_json(form.to_json()) == form
    for wrong in ({"bits": 8}, {**form.to_json(), "bits": 9}, {**form.to_json(), "signed": 1}):
        with pytest.raises(ArtifactError, match="not a rounding that this version knows"):
            Rounding.from_json(wrong)
    with pytest.raises(EditError, match="2 to 8 bits or 16, not 9"):
        Rounded(Rounding(9))
