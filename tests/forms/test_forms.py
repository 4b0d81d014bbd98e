"""Low-rank and separable layers: what they compute, against a convolution that has their product as its kernel."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from featherweight.errors import ArtifactError, EditError
from featherweight.forms import ConvPair, Form, LinearPair, LowRank, Separable

# PyTorch warns that it copies the input for even kernels, the whole convolution as well as the pair.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter drawn anew: forms come with uninitialised values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return module


def dense(layer: Any, pair: Any) -> Any:
    """The layer itself, with the pair's product as its weight and the pair's bias."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.copy_(pair.weight)
        if layer.bias is not None:
            layer.bias.copy_(pair.bias)
    return layer


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Any convolution that PyTorch has, with an input that it takes."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dims))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * dims if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * dims))
    if padding == "numbers":
        padding = draw(st.tuples(*[st.integers(0, 3)] * dims))
    conv = CONVOLUTIONS[dims](
        inputs, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode, dtype=torch.float64
    )
    sizes = draw(st.tuples(*[st.integers(4, 8)] * dims))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = [conv._reversed_padding_repeated_twice[2 * axis : 2 * axis + 2] for axis in reversed(range(dims))]
    assume(all(size + sum(pad) >= span for size, pad, span in zip(sizes, pads, spans, strict=True)))
    assume(all(max(pad) < size for size, pad in zip(sizes, pads, strict=True)))  # reflect and circular need as much
    batch = draw(st.sampled_from([(), (2,)]))
    x = torch.randn(*batch, inputs, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return conv, x


@settings(max_examples=120, deadline=None)
@given(convolutions(), st.integers(1, 4), st.integers(-1, 2))
def test_a_pair_computes_what_its_product_does_for_every_convolution(
    drawn_conv: tuple[nn.Module, Tensor], rank: int, axis: int
) -> None:
    conv, x = drawn_conv
    assume(axis < len(conv.kernel_size))
    form = LowRank(rank) if axis < 0 else Separable(rank, axis)
    pair = drawn(form.build(conv))
    assert pair.weight.shape == conv.weight.shape
    torch.testing.assert_close(pair(x), dense(conv, pair)(x), rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_a_linear_pair_computes_what_its_product_does(
    leading: list[int], inputs: int, outputs: int, rank: int, bias: bool
) -> None:
    layer = nn.Linear(inputs, outputs, bias, dtype=torch.float64)
    pair = drawn(LowRank(rank).build(layer))
    x = torch.randn(*leading, inputs, dtype=torch.float64)
    torch.testing.assert_close(pair(x), F.linear(x, pair.weight, pair.bias), rtol=1e-10, atol=1e-10)
    assert (pair.bias is None) == (not bias)


@pytest.mark.parametrize(("kernel", "padding"), [((4, 2), "same"), ((3, 5), "same"), ((3, 3), "valid")])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_pair_keeps_each_channel_to_itself(kernel: tuple[int, int], padding: str, multiplier: int) -> None:
    conv = nn.Conv2d(3, 3 * multiplier, kernel, padding=padding, groups=3, dtype=torch.float64)
    pair = drawn(Separable(2).build(conv))
    x = torch.randn(1, 3, 7, 8, dtype=torch.float64)
    moved = x.clone()
    moved[:, 1] += 1
    changed = (pair(moved) - pair(x)).abs().amax((0, 2, 3)) > 1e-12
    assert changed.tolist() == [channel // multiplier == 1 for channel in range(3 * multiplier)]
    torch.testing.assert_close(pair(x), dense(conv, pair)(x))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("form", [LowRank(3), Separable(3)], ids=str)
def test_the_type_of_the_layer_is_kept(form: Form, dtype: torch.dtype, tolerance: float) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect").to(dtype)
    pair = drawn(form.build(conv))
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert {p.dtype for p in pair.parameters()} == {dtype} == {pair(x).dtype} == {pair.weight.dtype}
    expected = F.conv2d(F.pad(x.double(), (1, 1, 1, 1), "reflect"), pair.weight.double(), pair.bias.double())
    torch.testing.assert_close(pair(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("layer", "form", "first", "second"),
    [
        (nn.Linear(5, 7), LowRank(2), (2, 5), (7, 2)),
        (nn.Conv2d(4, 6, (3, 5)), LowRank(2), (2, 4, 1, 1), (6, 2, 3, 5)),
        (nn.Conv2d(4, 6, (3, 5)), Separable(2), (2, 4, 3, 1), (6, 2, 1, 5)),
        (nn.Conv2d(4, 6, (3, 5)), Separable(2, axis=1), (2, 4, 1, 5), (6, 2, 3, 1)),
        (nn.Conv2d(4, 6, (3, 5), groups=2), Separable(2), (4, 2, 3, 1), (6, 2, 1, 5)),
        (nn.Conv1d(4, 6, 3), Separable(2), (2, 4, 3), (6, 2, 1)),
        (nn.Conv3d(4, 6, (2, 3, 5)), Separable(2, axis=1), (2, 4, 1, 3, 1), (6, 2, 2, 1, 5)),
    ],
    ids=str,
)
def test_the_factors_run_along_the_axes_that_the_form_says(
    layer: nn.Module, form: Form, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    pair = form.build(layer)
    assert isinstance(pair, LinearPair | ConvPair)
    assert (pair.first.weight.shape, pair.second.weight.shape) == (first, second)
    assert pair.first.bias is None


@pytest.mark.parametrize("form", [LowRank(3), Separable(3), Separable(2, axis=2)], ids=repr)
def test_a_form_survives_json(form: Form) -> None:
    assert Form.from_json(json.loads(json.dumps(form.to_json()))) == form


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"form": "LowRnk", "rank": 1}, "did you mean 'LowRank'"),
        ({"form": "LowRank"}, "rank"),
        ({"form": "LowRank", "rank": 1, "axis": 0}, "axis"),
        ({"rank": 1}, "no form"),
    ],
)
def test_what_is_no_form_is_refused(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        Form.from_json(data)


@pytest.mark.parametrize(
    ("form", "layer"),
    [
        (LowRank(1), nn.Bilinear(2, 2, 2)),
        (LowRank(1), nn.ConvTranspose2d(2, 2, 3)),
        (Separable(1), nn.Linear(2, 2)),
        (Separable(1, axis=2), nn.Conv2d(2, 2, 3)),
        (Separable(1, axis=-1), nn.Conv2d(2, 2, 3)),
    ],
    ids=str,
)
def test_a_layer_that_the_form_is_not_defined_for_is_refused(form: Form, layer: nn.Module) -> None:
    with pytest.raises(EditError, match=r"defined for|axis"):
        form.build(layer)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3)], ids=str)
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, True), (True, False), (False, False)])
def test_what_was_frozen_stays_frozen(layer: nn.Module, weight: bool, bias: bool) -> None:
    layer = copy.deepcopy(layer)
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    trained = {name: p.requires_grad for name, p in LowRank(2).build(layer).named_parameters()}
    assert trained == {"first.weight": weight, "second.weight": weight, "second.bias": bias}


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_the_layers(training: bool) -> None:
    pair = Separable(2).build(nn.Conv2d(4, 4, 3).train(training))
    assert {module.training for module in pair.modules()} == {training}


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, stride=2, padding=1)], ids=str)
def test_it_can_be_built_without_memory(layer: nn.Module) -> None:
    here, nowhere = LowRank(2).build(layer), LowRank(2).build(layer, "meta")
    assert all(p.is_meta for p in nowhere.parameters())
    assert {n: p.shape for n, p in here.named_parameters()} == {n: p.shape for n, p in nowhere.named_parameters()}
    on_meta = LowRank(2).build(copy.deepcopy(layer).to("meta"))
    assert all(p.is_meta for p in on_meta.parameters())


def test_building_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    LowRank(2).build(nn.utils.skip_init(nn.Conv2d, 4, 6, 3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
    ids=lambda wrap: wrap.__name__,
)
def test_a_parametrized_layer_gives_the_sizes_and_what_is_trained(wrap: Any) -> None:
    layer = wrap(nn.Linear(6, 6)).requires_grad_(False)
    layer.bias.requires_grad_(True)
    pair = LowRank(2).build(layer)
    assert {name: p.requires_grad for name, p in pair.named_parameters()} == {
        "first.weight": False,
        "second.weight": False,
        "second.bias": True,
    }


def pairs() -> list[Any]:
    return [
        pytest.param(LowRank(2), nn.Linear(4, 6), (3, 4), id="Linear"),
        pytest.param(LowRank(2), nn.Conv2d(4, 6, 3, 2, 1), (2, 4, 7, 7), id="Conv2d"),
        pytest.param(Separable(2), nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 7), id="even same"),
        pytest.param(Separable(2), nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 7), id="Conv1d"),
        pytest.param(Separable(2, 1), nn.Conv3d(4, 4, 3, groups=2), (1, 4, 5, 5, 5), id="Conv3d"),
    ]


@pytest.mark.parametrize(("form", "layer", "shape"), pairs())
def test_a_deep_copy_is_a_layer_of_its_own(form: Form, layer: nn.Module, shape: tuple[int, ...]) -> None:
    pair = drawn(form.build(layer))
    x, other = torch.randn(shape), copy.deepcopy(pair)
    assert torch.equal(other(x), pair(x))
    before = pair(x)
    drawn(other, seed=1)
    assert torch.equal(pair(x), before)
    assert not torch.equal(other(x), before)
    assert str(other) == str(pair)


@pytest.mark.parametrize(("form", "layer", "shape"), pairs())
def test_torch_export_and_compile_take_it(form: Form, layer: nn.Module, shape: tuple[int, ...]) -> None:
    pair, x = drawn(form.build(layer)).eval(), torch.randn(shape)
    exported = torch.export.export(pair, (x,)).module()
    torch.testing.assert_close(exported(x), pair(x))
    compiled = torch.compile(pair, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), pair(x))


@pytest.mark.parametrize(("form", "layer", "shape"), pairs())
def test_its_values_load_into_another_of_its_form(form: Form, layer: nn.Module, shape: tuple[int, ...]) -> None:
    pair, other = drawn(form.build(layer)), form.build(layer)
    other.load_state_dict(pair.state_dict())
    x = torch.randn(shape)
    assert torch.equal(other(x), pair(x))


def test_gradients_flow_through_the_product() -> None:
    pair = drawn(Separable(2).build(nn.Conv2d(2, 3, 3, dtype=torch.float64)))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    one = torch.autograd.grad(pair(x).square().sum(), list(pair.parameters()))
    other = torch.autograd.grad(F.conv2d(x, pair.weight, pair.bias).square().sum(), list(pair.parameters()))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
