"""What attention's projections see, against the same attention written with layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.batch import as_inputs
from featherweight.curvature.gram import Statistics, gather, regression_loss
from featherweight.curvature.products import multiplied
from featherweight.forms import Mask
from featherweight.layers import weighted_layers


class Attention(nn.Module):
    """PyTorch's, called with samples first and asked for its answer alone."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=batch_first)

    def forward(self, *given: Tensor) -> Tensor:
        if not self.inner.batch_first:
            x = given[0].transpose(0, 1)
            given = (x, x, x) if given[0] is given[1] else tuple(each.transpose(0, 1) for each in given)
        made: Tensor = self.inner(*given, need_weights=False)[0]
        return made if self.inner.batch_first else made.transpose(0, 1)


class ByHand(nn.Module):
    """The same attention, its projections layers: of queries, keys and values in one, or one for each."""

    def __init__(self, of: nn.MultiheadAttention, whole: bool) -> None:
        super().__init__()
        weights, biases = [of.in_proj_weight], [of.in_proj_bias]
        if not whole:
            weights, biases = weights[0].chunk(3), biases[0].chunk(3)  # type: ignore[assignment]
        self.projections = nn.ModuleList(nn.Linear(16, len(weight)) for weight in weights)
        self.out = nn.Linear(16, 16)
        with torch.no_grad():
            for layer, weight, bias in zip(
                [*self.projections, self.out], [*weights, of.out_proj.weight], [*biases, of.out_proj.bias], strict=True
            ):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)

    def forward(self, *given: Tensor) -> Tensor:
        if len(self.projections) == 1:
            made = self.projections[0](given[0]).chunk(3, -1)
        else:
            made = [layer(x) for layer, x in zip(self.projections, given, strict=True)]
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in made)
        answer: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return answer


def tokens(length: int, seed: int) -> Tensor:
    return torch.randn(8, length, 16, generator=torch.Generator().manual_seed(seed))


def of_all(model: nn.Module, *given: Tensor) -> dict[str, Statistics]:
    layers = weighted_layers(model, inside=True)
    return gather(model, layers, [as_inputs(given)], gradients=regression_loss, effort=1e9)  # type: ignore[arg-type]


def assert_same(found: Statistics, wanted: Statistics) -> None:
    assert torch.allclose(found.gram, wanted.gram, atol=1e-5)
    assert torch.allclose(found.mean, wanted.mean, atol=1e-5)
    assert found.gradients is not None
    assert wanted.gradients is not None
    matters = found.gradients * found.positions
    assert torch.allclose(
        matters, wanted.gradients * wanted.positions, rtol=1e-3, atol=1e-4 * float(matters.abs().max())
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_sees_what_layers_would(batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention(batch_first).eval(), tokens(5, 1)
    found, wanted = of_all(model, x, x, x), of_all(ByHand(model.inner, whole=True), x)
    assert_same(found["inner.in_proj_weight"], wanted["projections.0"])
    assert_same(found["inner.out_proj"], wanted["out"])


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_with_inputs_of_their_own_are_groups(batch_first: bool) -> None:
    torch.manual_seed(0)
    model, given = Attention(batch_first).eval(), (tokens(5, 1), tokens(7, 2), tokens(7, 3))
    found, wanted = of_all(model, *given)["inner.in_proj_weight"], of_all(ByHand(model.inner, whole=False), *given)
    assert found.gradients is not None
    for third in range(3):
        rows = slice(16 * third, 16 * third + 16)
        part = Statistics(
            found.gram[third : third + 1], found.mean[third : third + 1], found.gradients[rows, rows],
            positions=found.positions,
        )  # fmt: skip
        assert_same(part, wanted[f"projections.{third}"])


def test_keys_that_are_the_values_share_their_inputs() -> None:
    torch.manual_seed(0)
    model, memory = Attention(True).eval(), tokens(7, 2)
    found = of_all(model, tokens(5, 1), memory, memory)["inner.in_proj_weight"]
    assert torch.allclose(found.gram[0], tokens(5, 1).flatten(0, 1).T @ tokens(5, 1).flatten(0, 1) / 40, atol=1e-5)
    for third in (1, 2):
        assert torch.allclose(found.gram[third], memory.flatten(0, 1).T @ memory.flatten(0, 1) / 56, atol=1e-5)


def test_weights_that_something_is_on_are_known_again() -> None:
    torch.manual_seed(0)
    model, x = Attention(True).eval(), tokens(5, 1)
    plain = of_all(model, x, x, x)
    Mask(768, tensor="in_proj_weight").put_on(model.inner)
    masked = of_all(model, x, x, x)
    assert masked.keys() == plain.keys() == {"inner.in_proj_weight", "inner.out_proj"}
    assert_same(masked["inner.in_proj_weight"], plain["inner.in_proj_weight"])


def test_a_run_tells_which_rows_are_multiplied_at_once() -> None:
    model = nn.ModuleDict({"used": nn.MultiheadAttention(4, 2), "unused": nn.MultiheadAttention(4, 2)})
    model.forward = lambda x, y: model["used"](x, y, y)[0]  # type: ignore[method-assign]
    linear = F.linear
    found = multiplied(
        model, weighted_layers(model, inside=True), as_inputs((torch.ones(3, 2, 4), torch.ones(5, 2, 4)))
    )
    assert found == {"used.in_proj_weight": {(0, 4), (4, 12)}, "used.out_proj": {(0, 4)}}
    assert F.linear is linear
