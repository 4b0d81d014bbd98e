"""Block reconstruction: which blocks there are, and that their answers come nearer."""

from __future__ import annotations

import pytest
import torch
from networks import Residual, Stacked, Transformer, make, task_of
from torch import nn

import featherweight as fw
from featherweight import quantize
from featherweight.batch import as_inputs
from featherweight.forms import constraints_on
from featherweight.layers import layer_names
from featherweight.quantize.brecq import find_blocks


class Chain(nn.Module):
    """Two residual blocks in a Sequential, called with an argument of their own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
            return x + rate * self.b(torch.relu(self.a(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, rate=0.5)
        return self.head(x)

    @staticmethod
    def data(samples: int) -> torch.Tensor:
        return torch.randn(samples, 6, generator=torch.Generator().manual_seed(5))


def test_blocks_are_the_modules_that_hold_a_few_layers():
    model = make(Chain)
    found = find_blocks(model, layer_names(model), as_inputs(Chain.data(1)))
    assert [(block.name, block.layers) for block in found] == [
        ("stem", ("",)),
        ("blocks.0", ("a", "b")),
        ("blocks.1", ("a", "b")),
        ("head", ("1",)),
    ]
    assert found[1].more == ((), {"rate": 0.5})
    stacked = make(Stacked)
    names = [block.name for block in find_blocks(stacked, layer_names(stacked), as_inputs(Stacked.data(1)))]
    assert names == ["stem", *(f"blocks.{i}" for i in range(6)), "head"]
    for network in (Residual, Transformer):  # whose layers no smaller module holds
        flat = make(network)
        found = find_blocks(flat, layer_names(flat), as_inputs(network.data(1)))
        assert {block.name for block in found} == set(layer_names(flat))


@pytest.mark.parametrize(("bits", "steps"), [(3, 300), (4, 120)])
def test_blocks_answer_more_nearly_than_layers_rounded_alone(bits, steps):
    model = make(Chain)
    task = task_of(model, 256)
    rounded = fw.compress(model, quantize.GPTQ(bits=bits), task=task).model
    learnt = fw.compress(model, quantize.BRECQ(bits=bits, steps=steps), task=task).model
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        far = [float((small(x) - model(x)).norm() / model(x).norm()) for small in (rounded, learnt)]
    assert far[1] < far[0]
    for name in layer_names(learnt):
        layer = learnt.get_submodule(name)
        (made,) = constraints_on(layer)
        assert torch.equal(made.decoded(made.codes(layer.weight)), layer.weight)
        assert torch.equal(layer.parametrizations.weight.original, layer.weight)


def test_scales_are_learnt_and_stored_as_short_as_ever():
    model = make(Chain)
    task = task_of(model, 256)
    small = [
        fw.compress(model, way, task=task).model for way in (quantize.GPTQ(bits=3), quantize.BRECQ(bits=3, steps=100))
    ]
    before, after = (
        torch.cat([constraints_on(net.get_submodule(n))[0].scale for n in layer_names(net)]) for net in small
    )
    assert bool((before != after).any())
    assert torch.equal(after.half().float(), after)


def test_biases_keep_the_means_of_the_answers():
    model = make(Chain)
    learnt = fw.compress(model, quantize.BRECQ(bits=3, steps=100), task=task_of(model, 256)).model
    x = Chain.data(256)  # what it was calibrated on
    with torch.no_grad():
        off = learnt(x) - model(x)
    assert float(off.mean(0).norm()) < 0.02 * float(off.norm(dim=1).mean())
