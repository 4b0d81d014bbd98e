"""What goes into a model: every form of it, moved, described, and put back."""

from __future__ import annotations

import json
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import Mixed, make
from torch import Tensor, nn

from featherweight.batch import (
    Inputs,
    as_inputs,
    describe,
    device_of,
    dtype_of,
    mode,
    sketch,
    sketched,
    tensors_in,
)
from featherweight.errors import TaskError

A, B = torch.ones(4, 2), torch.arange(4)
Pair = namedtuple("Pair", "images labels")


@pytest.mark.parametrize(
    ("batch", "like", "args", "kwargs"),
    [
        (A, None, 1, []),
        ((A, B), None, 2, []),
        ([A, B], None, 2, []),
        (Pair(A, B), Inputs((A,)), 1, []),
        ({"a": A, "b": B}, None, 0, ["a", "b"]),
        (UserDict(b=B, a=A, labels=B), Inputs((), {"a": A, "b": B}), 0, ["a", "b"]),
        ("text", None, 1, []),
        (Inputs((A,), {"b": B}), Inputs((A,)), 1, ["b"]),
    ],
)
def test_a_batch_becomes_one_call(batch: Any, like: Inputs | None, args: int, kwargs: list[str]):
    inputs = as_inputs(batch, like)
    assert (len(inputs.args), list(inputs.kwargs)) == (args, kwargs)


@pytest.mark.parametrize(
    ("batch", "like", "message"),
    [
        ((A,), Inputs((A, A)), "a batch has 1 inputs but the example has 2"),
        ({"a": A}, Inputs((), {"a": A, "b": B}), r"a batch has the keys \['a'\] but the example needs \['b'\] too"),
        (A, Inputs((), {"a": A}), r"a batch is a Tensor but the example is a dict with \['a'\]"),
        ({"a": A}, Inputs((A,)), r"a batch is a dict with \['a'\] but the example is positional \(float32\[4, 2\]\)"),
    ],
)
def test_a_batch_unlike_the_example_is_said(batch: Any, like: Inputs, message: str):
    with pytest.raises(TaskError, match=message):
        as_inputs(batch, like)


def test_only_floating_inputs_take_the_models_type():
    model = make(Mixed).to(torch.bfloat16)
    moved = Inputs((A, [B, A]), {"mask": B > 1, "flag": True}).on(model)
    assert moved.args[0].dtype == moved.args[1][1].dtype == torch.bfloat16
    assert (moved.args[1][0].dtype, moved.kwargs["mask"].dtype) == (torch.int64, torch.bool)
    assert moved.kwargs["flag"] is True
    assert Inputs((A,)).on(nn.Identity()).args[0].dtype == torch.float32


def test_words():
    assert str(Inputs((A, None), {"ids": B})) == "float32[4, 2], NoneType, ids=int64[4]"
    assert str(Inputs()) == "nothing"
    assert describe(torch.ones((), dtype=torch.bfloat16)) == "bfloat16[]"


def test_the_batch_size_is_the_first_tensors():
    assert Inputs((None, torch.ones(()), A)).batch_size == 4
    assert Inputs((3,)).batch_size == 1


@dataclass
class Output:
    logits: Tensor
    others: tuple[Tensor, ...]


def test_tensors_are_found_in_order_wherever_they_are():
    one, two, three, four, five = (torch.tensor(n) for n in range(5))
    value = [one, {"x": (two, None)}, OrderedDict(y=three), Output(four, (five,)), UserDict(z=one), "text"]
    assert [int(t) for t in tensors_in(value)] == [0, 1, 2, 3, 4, 0]


def test_mode_puts_every_modules_own_flag_back_whatever_happens():
    model = make(Mixed).train()
    model.second.eval()
    before = [module.training for module in model.modules()]
    seen: list[bool] = []

    def fails() -> None:
        with mode(model, training=False):
            seen.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not any(seen)
    assert [module.training for module in model.modules()] == before


def test_device_and_type_are_the_first_tensors():
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert dtype_of(nn.ReLU()) is None
    model = nn.Module()
    model.register_buffer("ids", B)
    model.register_buffer("values", A.double())
    assert dtype_of(model) == torch.float64


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) * 3 + 7,
        torch.randint(5, 9, (50,), generator=torch.Generator().manual_seed(0)),
        torch.tensor([True, False, True]),
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.randn(40, 2, dtype=torch.bfloat16),
        torch.randn(400, dtype=torch.complex64),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.zeros(0, 3, dtype=torch.int64),
    ],
    ids=describe,
)
def test_a_sketch_draws_inputs_of_the_same_kind_and_range(value: Tensor):
    data = json.loads(
        json.dumps(sketch(Inputs((value,), {"again": value, "flag": True, "name": None})), allow_nan=False)
    )
    drawn, again = sketched(data), sketched(data)
    assert drawn.kwargs["flag"] is True
    assert drawn.kwargs["name"] is None
    (made,) = drawn.args
    assert (made.dtype, made.shape) == (value.dtype, value.shape)
    assert torch.equal(made, again.args[0])
    if value.numel() and not value.is_floating_point() and not value.is_complex():
        assert value.min() <= made.min()
        assert made.max() <= value.max()
    elif value.numel() > 64:
        assert abs(made.mean() - value.mean()) < 0.5
        assert 0.6 < float(made.std() / value.std()) < 1.6


def test_what_cannot_be_drawn_is_left_out():
    assert sketch(Inputs(([A, A],))) == {}
    assert sketched({}).tensors() == []
