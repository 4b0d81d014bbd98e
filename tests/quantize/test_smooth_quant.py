"""SmoothQuant: answers stay, outliers of the inputs go into the weights."""

from __future__ import annotations

import pytest
import torch
from networks import Temporal, make
from torch import Tensor, nn

import featherweight as fw
from featherweight import quantize
from featherweight.errors import NoEffect, RecipeError
from featherweight.quantize.smooth_quant import smoothing


class Block(nn.Module):
    """A layer norm that three Linear layers read, and one that is also added to something."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = (self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y)
        z = self.other(y)
        return z + self.out(z)


def inputs(samples: int) -> Tensor:
    return torch.randn(samples, 5, 8, generator=torch.Generator().manual_seed(0))


def task(samples: int = 64) -> fw.Task:
    x = inputs(samples)
    return fw.Task(x[:2], calibration=x.split(8))


def test_answers_stay_and_outliers_move():
    model = make(Block)
    with torch.no_grad():
        model.norm.weight[2] = 40.0
    small = fw.compress(model, quantize.SmoothQuant(), task=task(16))
    (entry,) = small.ledger.steps
    assert entry.edits == ()
    assert entry.left == {"out": "something else reads the layer norm in front of it too"}
    assert entry.notes == ("layers smoothed behind 1 layer norm: k, q, v",)
    x = inputs(16)
    torch.testing.assert_close(small.model(x), model(x), rtol=1e-4, atol=1e-5)
    was, now = (net.norm(x).detach().abs().amax((0, 1)) for net in (model, small.model))
    columns = torch.stack([model.get_parameter(f"{n}.weight").detach().abs().amax(0) for n in "qkv"]).amax(0)
    torch.testing.assert_close(now, was / (was.sqrt() / columns.sqrt()))
    assert float(now.max() / now.min()) < 0.3 * float(was.max() / was.min())
    assert torch.equal(small.model.other.weight, model.other.weight), "what else reads it would see other values"


def test_a_channel_that_is_never_there_stays_as_it_is():
    scale = smoothing(torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert scale.tolist() == [2.0, 1.0, 1.0]


def test_pytorchs_attention_is_smoothed_and_static_ranges_lose_less_for_it():
    """Outliers in a few channels, as large language models have them."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for block in model.layers:
            for norm, linear in ((block.norm1, block.self_attn.in_proj_weight), (block.norm2, block.linear1.weight)):
                norm.weight[[1, 6]] *= 60
                linear[:, [1, 6]] /= 60
    noise = []
    x = inputs(64)
    for steps in ((quantize.Static(headroom=False),), (quantize.SmoothQuant(), quantize.Static(headroom=False))):
        small = fw.compress(model, *steps, task=task())
        with torch.no_grad():
            noise.append(float((small.model(x) - model(x)).square().mean() / model(x).square().mean()))
    assert noise[1] < 0.1 * noise[0]  # 10 dB
    left = small.ledger.steps[0].left
    assert {name.split(".", 2)[2] for name in left} == {"self_attn.out_proj", "linear2"}


def test_root_mean_squares_are_layer_norms_too_and_what_is_ignored_keeps_its_norm():
    class Net(nn.Sequential):
        pass

    model = Net(nn.RMSNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    small = fw.compress(model, quantize.SmoothQuant(ignore=("3",)), task=task())
    assert not torch.equal(small.model[1].weight, model[1].weight)
    assert torch.equal(small.model[3].weight, model[3].weight)
    assert small.ledger.steps[0].left == {"3": "ignored, as asked"}


def test_what_cannot_be_smoothed_has_its_reason():
    model = make(Temporal)
    with pytest.warns(NoEffect, match="only Linear layers behind a layer norm are smoothed"):
        fw.compress(model, quantize.SmoothQuant(), task=fw.Task(Temporal.data(2)))
    shared = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    gridded = fw.compress(shared, quantize.Weights(bits=4, ignore=("1",)), task=task()).model
    with pytest.warns(NoEffect):
        small = fw.compress(gridded, quantize.SmoothQuant(), task=task())
    assert small.ledger.steps[0].left == {
        "1": "the layer norm in front of it has no gain of its own",
        "3": "an earlier step has settled its values: 4 bits",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alpha": 1.5}, "alpha is 1.5: it must be from 0 to 1"), ({"ignore": ("oot",)}, "'oot'.*did you mean 'out'")],
)
def test_settings_that_cannot_be_are_said(settings, message):
    with pytest.raises(RecipeError, match=message):
        fw.compress(make(Block), quantize.SmoothQuant(**settings), task=task())
