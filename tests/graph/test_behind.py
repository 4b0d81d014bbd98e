"""What is known of the way from a layer's answer to the next rectifier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from constructs import IMAGE, Net, example
from torch import nn

from featherweight.graph import Behind, behind, capture


def found(forward, **parts):
    model = Net(forward, **parts).double().eval()
    layers = [name for name, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    return behind(model, capture(model, example(IMAGE)), layers)


def parts(**more):
    return {
        "a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.BatchNorm2d(8),
        "fc": nn.Linear(8, 3), **more,
    }  # fmt: skip


def test_a_norm_and_a_rectifier():
    here = found(lambda s, x: s.fc(F.relu(s.norm(s.b(F.relu6(s.a(x))))).mean((2, 3))), **parts())
    assert here == {"a": Behind("", None, 6.0), "b": Behind("norm", None, math.inf)}


def test_an_identity_shortcut_is_what_goes_into_an_earlier_layer():
    def block(s, x):
        y = F.relu(s.a(x))
        return s.fc(F.relu(s.norm(s.b(y)) + y).mean((2, 3)))

    # what is added is the input of `b` itself, which is no earlier layer's
    assert found(block, **parts()) == {"a": Behind("", None, math.inf)}

    def longer(s, x):
        y = F.relu(s.a(x))
        return s.fc(F.relu(s.norm(s.b(F.relu(s.c(y)))) + y).mean((2, 3)))

    more = parts(c=nn.Conv2d(8, 8, 1))
    assert found(longer, **more)["b"] == Behind("norm", ("c", True), math.inf)


def test_of_two_branches_the_later_one_knows_the_earlier():
    def block(s, x):
        y = F.relu(s.a(x))
        return s.fc(F.relu(s.norm(s.b(y)) + s.other(s.c(y))).mean((2, 3)))

    more = parts(c=nn.Conv2d(8, 8, 1), other=nn.BatchNorm2d(8))
    assert found(block, **more) == {"a": Behind("", None, math.inf), "c": Behind("other", ("norm", False), math.inf)}


def test_answers_that_go_two_ways_or_layers_called_twice_are_left_out():
    assert found(lambda s, x: s.fc((F.relu(y := s.a(x)) + y).mean((2, 3))), **parts()) == {}
    assert found(lambda s, x: s.fc(F.relu(s.b(F.relu(s.b(s.a(x))))).mean((2, 3))), **parts()) == {}
    scaled = found(lambda s, x: s.fc(F.relu(torch.add(s.b(s.a(x)), 1.0, alpha=2)).mean((2, 3))), **parts())
    assert scaled == {}
