"""Where constants go: batch norms that take them up are found, whatever else is read is not taken for one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import make, task_of
from torch import nn

import featherweight as fw
from featherweight import factorize, layerwise, prune, quantize, share
from featherweight.batch import as_inputs
from featherweight.constant import moved, norms_behind, turn, with_bias
from featherweight.quantize import rate_distortion


class Normed(nn.Module):
    """Convolutions without biases: before a norm, before one that is called twice, read twice, and with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.read, self.norm_of_read = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.again, self.shared = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.biased, self.norm_of_biased = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 4, 1, bias=False)

    @staticmethod
    def data(count: int) -> torch.Tensor:
        # Far from zero in the mean, as behind a rectifier.
        return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1)) + 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = self.read(x)
        x = F.relu(self.norm_of_read(y) + y)
        x = F.relu(self.shared(self.again(x)))
        x = F.relu(self.norm_of_biased(self.biased(self.shared(x))))
        return self.plain(x).mean((2, 3))


def test_layers_are_turned_where_norms_are_negative_and_the_answers_stay():
    model = make(Normed)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    x, before = Normed.data(16), {k: v.clone() for k, v in model.state_dict().items()}
    right = model(x)
    assert turn(model, ["first", "read", "again", "biased", "plain"], as_inputs(x[:1])) == ["first", "biased"]
    torch.testing.assert_close(model(x), right)
    assert bool((model.norm.weight >= 0).all())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    turned = {"biased.weight", "biased.bias", "norm_of_biased.weight", "norm_of_biased.running_mean"}
    assert changed == {"first.weight", "norm.weight", "norm.running_mean"} | turned
    assert turn(model, ["first"], as_inputs(x[:1])) == []


def test_norms_of_tokens_are_not_taken_for_norms_of_outputs():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x))

    model = Tokens().eval()
    assert norms_behind(model, ["linear"], as_inputs(torch.randn(2, 6))) == {"linear": "norm"}
    assert norms_behind(model, ["linear"], as_inputs(torch.randn(2, 6, 6))) == {}


def trained(kind: type[nn.Module]) -> nn.Module:
    """With norms that know what reaches them."""
    model = make(kind).train()
    with torch.no_grad():
        for _ in range(30):
            model(Normed.data(64))
    return model.eval()


def test_only_a_norm_that_alone_reads_a_layer_without_bias_is_found():
    model = trained(Normed)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert norms_behind(model, layers, as_inputs(Normed.data(2))) == {"first": "norm"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_norm_takes_up_is_as_a_bias_would_be():
    model = trained(Normed)
    x, bias = Normed.data(4), torch.randn(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer = model.norm(model.first(x) + bias[:, None, None])
        moved(model.norm, bias)
        torch.testing.assert_close(model.norm(model.first(x)), answer)


def test_a_layer_with_a_bias_lent_answers_as_before_and_stays_without():
    layer = nn.Conv2d(3, 4, 3, bias=False)
    lent = with_bias(layer)
    assert layer.bias is None
    assert lent.weight is layer.weight
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(lent(x), layer(x))


class Ended(nn.Module):
    """Two convolutions, the second with a norm behind it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last, self.norm = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)

    data = Normed.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.last(F.relu(self.first(x))))


@pytest.mark.parametrize(
    "step",
    [
        quantize.GPTQ(bits=2, ignore=("first",)),
        quantize.AdaRound(bits=2, ignore=("first",)),
        quantize.RateDistortion(coarseness=1.0, ignore=("first",)),
        share.KMeans(bits=2, ignore=("first",)),
        prune.OBS(sparsity=0.6, ignore=("first",)),
        factorize.SVD(rank=2, ignore=("first",)),
    ],
    ids=lambda step: step.name,
)
def test_a_norm_makes_good_what_becomes_of_the_means_in_front_of_it(step, monkeypatch):
    model = trained(Ended)

    def off() -> torch.Tensor:
        # Of so few samples no norm is re-estimated, which would do it too.
        small = fw.compress(model, step, task=task_of(model, 31)).model.eval()
        with torch.no_grad():
            return (small(Ended.data(31)) - model(Ended.data(31))).mean((0, 2, 3)).norm()

    corrected = off()
    for module in (layerwise, rate_distortion):
        monkeypatch.setattr(module, "norms_behind", lambda *_: {})
    assert corrected < 0.6 * off()
