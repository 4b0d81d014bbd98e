"""Cross-layer equalization: answers stay, ranges come together."""

from __future__ import annotations

import copy

import torch
from networks import Attention, Temporal, make
from torch import nn

from featherweight.batch import as_inputs
from featherweight.quantize.equalization import equalize


class Pairs(nn.Module):
    """Pairs of every kind: through a batch norm, into a grouped convolution, through pooling; ReLU6 is none."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.two = nn.Conv2d(8, 6, 1)
        self.head = nn.Sequential(nn.Linear(6, 10), nn.LeakyReLU(), nn.Linear(10, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.nn.functional.max_pool2d(torch.relu(self.grouped(x)), 2)
        return self.head(torch.nn.functional.relu6(self.two(x)).mean((2, 3)))


def test_answers_stay_and_ranges_meet():
    model = make(Pairs)
    with torch.no_grad():
        model.grouped.weight[:, 0] *= 30  # every even channel is read thirty times as strongly
    before = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found, reason = equalize(model, as_inputs(x[:1]))
    assert reason == ""
    pairs = [("one.weight", "grouped.weight"), ("grouped.weight", "two.weight"), ("head.0.weight", "head.2.weight")]
    assert [(link.first, link.second) for link in found] == pairs
    torch.testing.assert_close(model(x), before(x), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(model.grouped.weight, before.grouped.weight)
    rows = model.head[0].weight.abs().amax(1)
    columns = model.head[2].weight.abs().amax(0)
    torch.testing.assert_close(rows, columns, rtol=0.02, atol=0)
    gain = model.norm.weight.abs() / (model.norm.running_var + model.norm.eps).sqrt()
    reach = model.one.weight.flatten(1).abs().amax(1) * gain
    read = model.grouped.weight.reshape(4, 2, 2, -1).abs().amax((1, 3)).flatten()
    torch.testing.assert_close(reach, read, rtol=0.02, atol=0)


def test_where_nothing_can_be_equalized_the_reason_is_said_and_nothing_changed():
    model = make(Attention)
    before = copy.deepcopy(model.state_dict())
    found, reason = equalize(model, as_inputs(Attention.data(1)))
    assert found == []
    assert reason == "no two layers have only ReLU, pooling or batch norm between them"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_convolutions_in_time_are_equalized_too():
    model = make(Temporal)
    before = copy.deepcopy(model)
    found, _ = equalize(model, as_inputs(Temporal.data(1)))
    assert [(link.first, link.second, link.groups) for link in found] == [
        ("first.weight", "grouped.weight", 2),
        ("grouped.weight", "dilated.weight", 1),
        ("dilated.weight", "last.weight", 1),
    ]
    torch.testing.assert_close(model(Temporal.data(4)), before(Temporal.data(4)), rtol=1e-3, atol=1e-5)
