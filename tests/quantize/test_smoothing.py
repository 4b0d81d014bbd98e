"""SmoothQuant: answers stay, outliers of the inputs go into the weights."""

from __future__ import annotations

import copy

import torch
from networks import Temporal, Transformer, make
from torch import nn

from featherweight.batch import as_inputs
from featherweight.quantize.smoothing import smooth, smoothing


class Block(nn.Module):
    """A layer norm that three Linear layers read, and one that is also added to something."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = (self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y)
        z = self.other(y)
        return z + self.out(z)


def test_answers_stay_and_outliers_move():
    model = make(Block)
    with torch.no_grad():
        model.norm.weight[2] = 40.0
    before = copy.deepcopy(model)
    x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))
    found, reason = smooth(model, as_inputs(x[:2]), [as_inputs(part) for part in x.split(8)])
    assert reason == ""
    assert [fan.linears for fan in found] == [("q.weight", "k.weight", "v.weight")]
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
    was, now = (net.norm(x).detach().abs().amax((0, 1)) for net in (before, model))
    columns = torch.stack([before.get_parameter(f"{n}.weight").detach().abs().amax(0) for n in "qkv"]).amax(0)
    torch.testing.assert_close(now, was / (was.sqrt() / columns.sqrt()))
    assert float(now.max() / now.min()) < 0.3 * float(was.max() / was.min())
    assert torch.equal(model.other.weight, before.other.weight), "what else reads it would see other values"


def test_a_channel_that_is_never_there_stays_as_it_is():
    scale = smoothing(torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert scale.tolist() == [2.0, 1.0, 1.0]


def test_where_there_is_nothing_to_smooth_the_reason_is_said():
    for network in (Temporal, Transformer):
        model = make(network)
        found, reason = smooth(model, as_inputs(network.data(2)), [as_inputs(network.data(4))])
        assert found == []
        assert reason == "no layer norm is read by Linear layers alone"
