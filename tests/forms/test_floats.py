"""Smaller floating-point types: their values, codes and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherweight.errors import EditError
from featherweight.forms import Float, Floating, stored
from featherweight.forms.floats import TYPES


@given(
    st.sampled_from(sorted(TYPES)),
    st.sampled_from([0, 1, None]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_codes_give_the_values_back_bit_by_bit(kind, axis, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(4, 3, 2, generator=generator) * 10 ** (seed % 7 - 3)).to(dtype)
    x[1] = 0.0
    made = Floating(x, Float(kind, axis))
    values = made(x)
    codes = made.codes(values)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**made.form.bits
    back = made.decoded(codes)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), values.contiguous().view(torch.uint8))
    assert torch.equal(made(values), values)
    within = {"fp16": 2**-11, "bf16": 2**-8, "e4m3": 2**-4, "e5m2": 2**-3}[kind]
    # Of what is not below the type's range the error is at most half a unit in the last place.
    assert bool(((values - x).abs() <= within * x.abs() + 1e-3 * x.abs().max()).all())


def test_a_cast_is_that_of_pytorch_and_gradients_pass():
    layer = nn.Linear(5, 3)
    weight = layer.weight.detach().clone()
    built = Float("bf16").build(layer)
    assert torch.equal(built.weight, weight.bfloat16().float())
    built.weight.sum().backward()
    assert torch.equal(built.parametrizations.weight.original.grad, torch.ones(3, 5))
    assert stored(built, "weight").bytes == 30
    assert "parametrizations.weight.0.scale" not in built.state_dict()
    eight = Float("e4m3").build(layer)
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert torch.equal(eight.weight, (weight / scale).to(torch.float8_e4m3fn).float() * scale)
    assert stored(eight, "weight").bytes == 15 + 3 * 4


def test_what_is_no_type_is_said():
    with pytest.raises(EditError, match="there is no type 'fp15'; did you mean 'fp16'"):
        Float("fp15").build(nn.Linear(2, 2))
    with pytest.raises(EditError, match="has no axis 3"):
        Float("e4m3", axis=3).build(nn.Linear(2, 2))
