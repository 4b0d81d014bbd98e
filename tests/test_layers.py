"""Finding layers, settings by pattern, and the reasons why a layer cannot be touched."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from featherweight.layers import for_layer, layer_names, matches, obstacles, unmatched, weighted_layers


def test_the_first_pattern_that_matches_wins() -> None:
    setting = {"layer1.*": 1, "*.conv?": 2, "*": 3}
    assert [for_layer(setting, name, 0) for name in ("layer1.conv1", "layer2.conv1", "layer2.conv10", "fc")] == [
        1, 2, 3, 3,
    ]  # fmt: skip
    assert for_layer({"fc": 1}, "conv", default=7) == 7
    assert for_layer(5, "anything", default=7) == 5


def test_patterns_are_those_of_file_names_and_know_their_case() -> None:
    assert matches("block.3.fc", ["head", "block.?.*"])
    assert not matches("block.13.fc", ["block.?.fc"])
    assert not matches("Head", ["head"])
    assert not matches("block.3.fc", [])


def test_a_pattern_that_matches_nothing_is_named_with_what_comes_near() -> None:
    (said,) = unmatched(["layer1.conv1", "layr1.conv1"], ["layer1.conv1", "layer2.conv2"])
    assert "'layr1.conv1' matches none of 2 layers" in said
    assert "did you mean 'layer1.conv1'" in said


def model() -> Any:
    return nn.ModuleDict(
        {
            "conv": nn.Conv3d(2, 2, 1),
            "norm": nn.BatchNorm3d(2),
            "up": nn.ConvTranspose1d(2, 2, 2),
            "rnn": nn.GRU(2, 2),
            "cell": nn.LSTMCell(2, 2),
            "pair": nn.Bilinear(2, 2, 2),
            "fc": nn.Linear(2, 2),
            "embedding": nn.Embedding(2, 2),
        }
    )


def test_layers_are_found_by_kind() -> None:
    assert layer_names(model()) == ["conv", "fc"]
    assert list(weighted_layers(model())) == ["conv", "up", "rnn", "cell", "pair", "fc"]
    assert list(weighted_layers(nn.Linear(2, 2))) == []  # a model that is a layer has no place to put another


def test_a_layer_under_two_names_is_one_layer() -> None:
    shared = nn.Linear(2, 2)
    both = nn.ModuleDict({"one": shared, "other": shared})
    assert layer_names(both) == ["one"]
    assert obstacles(both, ["one"], ()) == {}


def reasons(given: nn.Module, ignore: tuple[str, ...] = ()) -> dict[str, str]:
    return obstacles(given, list(weighted_layers(given)), ignore)


def test_kinds_that_no_technique_knows_are_named() -> None:
    found = reasons(model())
    assert set(found) == {"up", "rnn", "cell", "pair"}
    assert found["up"] == "a ConvTranspose1d is neither a Linear nor a Conv layer"


def test_what_is_ignored_is_listed_as_such() -> None:
    assert reasons(model(), ("f*", "rnn"))["fc"] == reasons(model(), ("rnn",))["rnn"] == "ignored, as asked"


def test_a_layer_that_is_never_called_cannot_be_judged() -> None:
    given = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert "never calls it" in obstacles(given, ["1"], ())["0"]
    assert "1" not in obstacles(given, ["1"], ())


def test_an_attentions_output_is_never_called() -> None:
    """PyTorch hands its weight to a function of its own: a replacement would be passed by."""
    given = nn.MultiheadAttention(4, 2)
    called: list[str] = []
    given.out_proj.register_forward_hook(lambda *_: called.append("out_proj"))
    given(*[torch.ones(3, 1, 4)] * 3)
    given.out_proj._forward_hooks.clear()
    (reason,) = obstacles(nn.Sequential(given), called, ()).values()
    assert "multiplies by it and calls no layer" in reason


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


class OnlyNamed(nn.Conv2d):
    pass


def test_a_forward_of_its_own_is_left() -> None:
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    given = nn.Sequential(OwnForward(2, 2), OwnConvForward(2, 2, 1), OnlyNamed(2, 2, 1), patched, nn.Conv1d(2, 2, 1))
    found = reasons(given)
    assert set(found) == {"0", "1", "3"}
    assert found["1"].startswith("OwnConvForward has a forward of its own")


@pytest.mark.parametrize(
    "hook",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.spectral_norm(layer),
    ],
)
def test_hooks_are_left(hook: Any) -> None:
    given = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hook(given[0])
    assert reasons(given) == {"0": "it has hooks, which a replacement would lose"}


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_layers_are_layers(wrap: Any) -> None:
    given = nn.Sequential(wrap(nn.Linear(4, 4)), wrap(nn.Conv2d(4, 4, 1)))
    assert layer_names(given) == ["0", "1"]
    assert reasons(given) == {}


def test_shared_parameters_are_named_on_both_sides() -> None:
    given = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "one": nn.Linear(4, 4)})
    given["other"] = nn.Linear(4, 4)
    given["head"].weight = given["embedding"].weight
    given["other"].bias = given["one"].bias
    assert reasons(given) == {
        "head": "its weight is shared with embedding.weight",
        "one": "its bias is shared with other.bias",
        "other": "its bias is shared with one.bias",
    }


def test_a_parameter_of_the_model_itself_can_be_shared_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.also = self.layer.weight

    assert reasons(Model()) == {"layer": "its weight is shared with also"}


def test_a_parametrized_layer_under_two_names_shares_with_nobody() -> None:
    shared = parametrizations.weight_norm(nn.Linear(4, 4))
    assert reasons(nn.ModuleDict({"one": shared, "other": shared})) == {}


def test_where_values_are_changed_every_tensor_that_stays_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.position = nn.Embedding(5, 4), nn.Parameter(torch.ones(3, 4))
            self.attention, self.norm = nn.MultiheadAttention(4, 2), nn.LayerNorm(4)
            self.rnn, self.normed = nn.GRU(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))

    model = Model()
    called = ["rnn", "normed"]
    assert set(obstacles(model, called, ())) == {"attention.out_proj", "rnn"}
    found = obstacles(model, called, ("pos*",), inside=True)
    assert set(found) == {"words", "position", "rnn"}
    assert found["words"] == "an Embedding is neither a Linear nor a Conv layer"
    assert found["position"] == "ignored, as asked"
    assert "belongs to no Linear or Conv layer" in obstacles(model, called, (), inside=True)["position"]


def test_attention_whose_weights_are_not_read_where_they_are_is_left() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x @ self.in_proj_weight.T.double().float()

    model = nn.ModuleDict({"own": Own(4, 2), "one": nn.MultiheadAttention(4, 2), "two": nn.MultiheadAttention(4, 2)})
    parametrizations.orthogonal(model["one"], "in_proj_weight")
    model["two"].in_proj_weight = nn.Parameter(torch.randn(12, 4))
    model["two"].also = model["two"].in_proj_weight
    found = obstacles(model, (), (), inside=True)
    assert "Own has a forward of its own" in found["own.in_proj_weight"]
    assert found["own.in_proj_weight"] == found["own.out_proj"]
    assert "a parametrization of your own is on it" in found["one.in_proj_weight"]
    assert "its weight is shared with two.also" in found["two.in_proj_weight"]
    assert set(found) == {"own.in_proj_weight", "own.out_proj", "one.in_proj_weight", "two.in_proj_weight"}


def test_weights_that_are_no_real_numbers_are_left() -> None:
    assert reasons(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))) == {"0": "its weight is complex64"}
