"""Whatever networks are made of: compressed, each computes what dense layers of the same weights would, or says why.

The reference is the caller's own network with every replaced layer's weight set to its factors' product.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import featherweight as fw
from featherweight import quantize
from featherweight.batch import as_inputs, tensors_in
from featherweight.cost.count import profile
from featherweight.errors import BudgetError, FeatherweightError, NoEffect
from featherweight.factorize import SVD, SpatialSVD
from featherweight.forms import FormModule, is_layer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding=.same."),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype"),
]


@dataclass
class Construct:
    """A network, and what it takes.

    Attributes:
        build: makes the network.
        draw: makes inputs for so many samples: a tensor, a tuple or a dict.
        left: why SVD leaves which layers, as patterns.
        settings: further keywords of the task.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[int], Any]
    left: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


CONSTRUCTS: dict[str, Construct] = {}


def construct(draw: Callable[[int], Any], left: Mapping[str, str] | None = None, **settings: Any) -> Any:
    def named(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CONSTRUCTS[build.__name__] = Construct(build, draw, left or {}, settings)
        return build

    return named


def images(channels: int = 3, size: int = 8, dtype: torch.dtype = torch.float32) -> Callable[[int], Tensor]:
    return lambda n: (torch.randn(n, channels, size, size) + 0.3).to(dtype)


def tokens(width: int = 16, length: int = 5) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, length, width)


class Between(nn.Module):
    """Calls a function of its layers: a forward without a class."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def around(*middle: nn.Module) -> nn.Sequential:
    """A little classifier with something in its middle that takes and gives 12 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), *middle,
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


# Convolutions


@construct(images())
def dilation() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding=2, dilation=2))


@construct(images())
def same_padding() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding="same"), nn.Conv2d(12, 12, 4, padding="same"))


@construct(images())
def reflect_padding() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect"), nn.ReLU())


@construct(images())
def circular_and_replicate_padding() -> nn.Module:
    return around(
        nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular"), nn.Conv2d(12, 12, 5, 2, 2, padding_mode="replicate")
    )


@construct(images())
def groups() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding=1, groups=2))


@construct(images(), {"3": "every option costs"})
def depthwise_separable() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 12, 1))


@construct(images(), {"3": "every option costs"})
def depthwise_with_a_multiplier() -> nn.Module:
    return around(nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.Conv2d(24, 12, 1))


@construct(images())
def strides_and_long_kernels() -> nn.Module:
    return around(nn.Conv2d(12, 12, (5, 1), (2, 1), (2, 0)), nn.Conv2d(12, 12, (1, 5), (1, 2), (0, 2)))


@construct(images(dtype=torch.bfloat16))
def bfloat16() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding=1)).bfloat16()


@construct(images(dtype=torch.float64))
def float64() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding=1)).double()


@construct(lambda n: torch.randn(n, 8, 20))
def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(8, 16, 5, padding=2), nn.BatchNorm1d(16), nn.GELU(), nn.Conv1d(16, 16, 3, 2),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


@construct(lambda n: torch.randn(n, 2, 5, 6, 6))
def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 6),
    )  # fmt: skip


@construct(images(), {"3": "ConvTranspose2d is neither"})
def conv_transpose() -> nn.Module:
    return around(nn.ConvTranspose2d(12, 12, 2, 2), nn.Conv2d(12, 12, 3))


@construct(images())
def no_biases() -> nn.Module:
    return around(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12, affine=False))


@construct(images())
def norms_without_running_statistics() -> nn.Module:
    return around(nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12, track_running_stats=False))


@construct(images())
def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 32), nn.ReLU(),
                         nn.Linear(32, 4))  # fmt: skip


# Graphs


@construct(images())
def squeeze_and_excitation() -> nn.Module:
    def gated(self: Any, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))

    return around(
        Between(gated, conv=nn.Conv2d(12, 12, 3, padding=1), down=nn.Conv2d(12, 6, 1), up=nn.Conv2d(6, 12, 1))
    )


@construct(images())
def residual_and_concatenation() -> nn.Module:
    def joined(self: Any, x: Tensor) -> Tensor:
        y = self.one(x)
        y += x
        return self.both(torch.cat([y.relu_(), x], 1))

    return around(Between(joined, one=nn.Conv2d(12, 12, 3, padding=1), both=nn.Conv2d(24, 12, 3)))


@construct(images())
def functional_operations() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.interpolate(F.silu(F.max_pool2d(self.conv(x), 2)), scale_factor=2)
        return self.head(F.adaptive_avg_pool2d(x.permute(0, 1, 3, 2), 2).flatten(1))

    return Between(forward, conv=nn.Conv2d(3, 12, 3, padding=1), head=nn.Linear(48, 5))


@construct(images())
def called_twice() -> nn.Module:
    conv = nn.Conv2d(12, 12, 3, padding=1)
    return around(conv, nn.ReLU(), conv)


@construct(lambda n: torch.randn(n, 16))
def called_twice_over_what_it_was_given() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x * 1
        y = self.shared(x)
        x.relu_()
        return self.head(self.shared(x) + y)

    return Between(forward, shared=nn.Linear(16, 16), head=nn.Linear(16, 4))


@construct(lambda n: (torch.randn(n, 16), torch.randn(n, 3, 8, 8)))
def two_inputs() -> nn.Module:
    def forward(self: Any, x: Tensor, image: Tensor) -> Tensor:
        return self.head(F.relu(self.linear(x)) + self.conv(image).mean((2, 3)))

    return Between(forward, linear=nn.Linear(16, 12), conv=nn.Conv2d(3, 12, 3), head=nn.Linear(12, 5))


@construct(lambda n: {"ids": torch.randint(0, 20, (n, 6)), "scale": torch.rand(n, 1, 1)})
def keyword_inputs() -> nn.Module:
    def forward(self: Any, *, scale: Tensor, ids: Tensor) -> Tensor:
        return self.head(input=F.relu(self.hidden(input=self.embedding(ids) * scale)).mean(1))

    return Between(forward, embedding=nn.Embedding(20, 16), hidden=nn.Linear(16, 24), head=nn.Linear(24, 5))


@construct(images())
def dict_output() -> nn.Module:
    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        x = self.conv(x).relu()
        return {"classes": self.head(x.mean((2, 3))), "maps": [self.mask(x)]}

    return Between(forward, conv=nn.Conv2d(3, 12, 3), head=nn.Linear(12, 5), mask=nn.Conv2d(12, 4, 1))


@construct(tokens(), {"lstm": "LSTM is neither"})
def recurrent() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.lstm(x)[0]))[:, -1])

    return Between(forward, lstm=nn.LSTM(16, 16, batch_first=True), hidden=nn.Linear(16, 24), head=nn.Linear(24, 5))


@construct(images())
def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 5, 3, padding=1))


@construct(images(), loss="cross_entropy")
def segmentation_as_a_classifier() -> nn.Module:
    return segmentation()


# Attention


@construct(tokens())
def linear_on_tokens() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


@construct(tokens(), {"self_attn.out_proj": "calls no layer"})
def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


@construct(
    lambda n: {
        "src": torch.randn(n, 5, 16),
        "src_key_padding_mask": torch.arange(5)[None] > torch.arange(n)[:, None] % 5,
    },
    {r"layers.\d.self_attn.out_proj": "calls no layer"},
)
def padded_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


@construct(
    lambda n: (torch.randn(n, 5, 16), torch.randn(n, 4, 16)),
    {r"(en|de)coder.layers.\d.(self|multihead)_attn.out_proj": "calls no layer"},
)
def encoder_and_decoder() -> nn.Module:
    return nn.Transformer(16, 2, 1, 1, 32, batch_first=True)


@construct(tokens(), {"attention.out_proj": "calls no layer"})
def multihead_attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])

    return Between(forward, attention=nn.MultiheadAttention(16, 2, batch_first=True), head=nn.Linear(16, 12))


@construct(tokens())
def attention_by_hand() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).movedim(2, 0).transpose(2, 3)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Between(forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))


# Weights that are more than weights


@construct(lambda n: torch.randint(0, 20, (n, 6)), {"head": "its weight is shared with embedding.weight"})
def tied_to_an_embedding() -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.embedding(ids))))

    model = Between(forward, embedding=nn.Embedding(20, 16), hidden=nn.Linear(16, 16), head=nn.Linear(16, 20, False))
    model.head.weight = model.embedding.weight  # type: ignore[union-attr]
    return model


@construct(lambda n: torch.randn(n, 16), {"[02]": "its weight is shared with [02].weight"})
def tied_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))
    model[2].weight = model[0].weight
    return model


@construct(images())
def weight_norm() -> nn.Module:
    return around(parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1)))


@construct(images())
def spectral_norm() -> nn.Module:
    return around(parametrizations.spectral_norm(nn.Conv2d(12, 12, 3, padding=1)))


@construct(images(), {"3": "hooks"})
def old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return around(nn.utils.spectral_norm(nn.Conv2d(12, 12, 3, padding=1)), nn.Conv2d(12, 12, 3))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    """Weight standardization, done where convolutions of PyTorch look their weight up."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Named(nn.Linear):
    """A subclass that only has a name."""


@construct(lambda n: torch.randn(n, 16), {"0": "Scaled has a forward of its own"})
def subclasses() -> nn.Module:
    return nn.Sequential(Scaled(16, 16), nn.ReLU(), Named(16, 16), nn.ReLU(), nn.Linear(16, 12))


@construct(images(), {"3": "Standardized has a forward of its own"})
def subclass_of_what_forward_calls() -> nn.Module:
    return around(Standardized(12, 12, 3), nn.Conv2d(12, 12, 3))


@construct(lambda n: torch.randn(n, 16), {"0": "it has hooks"})
def hooks() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    return model


@construct(images())
def frozen() -> nn.Module:
    model = around(nn.Conv2d(12, 12, 3, padding=1))
    model[:4].requires_grad_(False)
    return model


@construct(images())
def in_training() -> nn.Module:
    model = around(nn.Conv2d(12, 12, 3, padding=1), nn.Dropout(0.5)).train()
    model[1].eval()
    return model


@construct(images())
def data_parallel() -> nn.Module:
    return nn.DataParallel(around(nn.Conv2d(12, 12, 3, padding=1)))


@construct(lambda n: torch.randn(n, 16), {"unused": "example never calls it"})
def an_unused_layer() -> nn.Module:
    return Between(
        lambda self, x: self.head(self.used(x).relu()),
        used=nn.Linear(16, 24), unused=nn.Linear(16, 24), head=nn.Linear(24, 5),
    )  # fmt: skip


@construct(images())
def a_weight_that_is_read_elsewhere() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        return self.head(y.mean((2, 3))) + self.conv.weight.square().mean() + self.head.bias.sum()

    return Between(forward, conv=nn.Conv2d(3, 12, 3), head=nn.Linear(12, 10))


@construct(lambda n: torch.ones(n, 16))
def inputs_that_never_change() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))


@construct(lambda n: torch.rand(n, 16))
def units_that_are_never_on() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))
    nn.init.constant_(model[0].bias, -100)  # type: ignore[arg-type]
    return model


@construct(lambda n: torch.randn(n, 16))
def half_zero_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    return model


# The test


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    given = CONSTRUCTS[name]
    model = given.build()
    if name != "in_training":
        model.eval()
    return model


def drawn(name: str, samples: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return CONSTRUCTS[name].draw(samples)


def exactly(model: nn.Module) -> Any:
    """All of a model that a user could miss."""
    tensors = {n: t.clone() for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    grads = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    return tensors, grads, hooks, [m.training for m in model.modules()], [type(m) for m in model.modules()]


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one[0].items(), other[0].items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1]), a[0]
    assert one[1:] == other[1:]


def dense(original: nn.Module, small: nn.Module) -> nn.Module:
    """The original network with the compressed one's values, and factors' products for weights."""
    model = copy.deepcopy(original).eval()
    own = small.state_dict()
    for name, pair in small.named_modules():
        if isinstance(pair, FormModule):
            layer: Any = model.get_submodule(name)
            if parametrize.is_parametrized(layer):  # copies share their class, so it cannot be taken off one of them
                layer = nn.Conv2d(12, 12, 3, padding=1)
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer)
            with torch.no_grad():
                layer.weight.copy_(pair.weight)  # type: ignore[arg-type]
                if layer.bias is not None:
                    layer.bias.copy_(pair.bias)  # type: ignore[arg-type]
            own = {key: value for key, value in own.items() if value.data_ptr() not in pointers(pair)}
    _, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected
    return model


def pointers(module: nn.Module) -> set[int]:
    return {p.data_ptr() for p in module.parameters()}


LIKELY = [
    pytest.param(SVD(budget=fw.Budget(macs=0.7)), True, id="SVD, budget, data"),
    pytest.param(SVD(ratio=0.5), False, id="SVD, ratio"),
    pytest.param(SpatialSVD(budget=fw.Budget(macs=0.7)), False, id="SpatialSVD, budget"),
    pytest.param(SpatialSVD(ratio=0.5), True, id="SpatialSVD, ratio, data"),
]
OTHERS = [
    pytest.param(step.values[0], not step.values[1], id=f"{step.id}, other way", marks=pytest.mark.slow)
    for step in LIKELY
]


@pytest.mark.parametrize(("step", "data"), [*LIKELY, *OTHERS])
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_every_construct_is_compressed_or_says_why_not(name: str, step: Any, data: bool) -> None:
    given, model = CONSTRUCTS[name], made(name)
    example, calibration = drawn(name, 2, 1), [drawn(name, 12, seed) for seed in range(2, 6)] if data else ()
    task = fw.Task(example, calibration, **given.settings)
    before = exactly(model)
    convolutions = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())
    with warnings.catch_warnings():
        if isinstance(step, SpatialSVD) and not convolutions:
            warnings.simplefilter("ignore", NoEffect)
        try:
            small = fw.compress(model, step, task=task)
        except BudgetError as error:  # where what can be replaced is too little of the whole
            assert_same(exactly(model), before)
            least = float(re.search(r"cannot go below ([\d.]+)", str(error))[1])  # type: ignore[index]
            smallest = fw.compress(model, type(step)(rank=1), task=fw.Task(example)).ledger.steps[0]
            assert least == pytest.approx(smallest.after.total.macs / smallest.before.total.macs, abs=1e-3)
            assert least > 0.7
            return

    assert_same(exactly(model), before)
    assert all(bool(torch.isfinite(t).all()) for t in small.model.state_dict().values())

    # It computes what it claims to.
    x = as_inputs(drawn(name, 3, 7))
    reference = dense(model, small.model)
    tolerance = {torch.bfloat16: 0.1, torch.float64: 1e-9}.get(next(model.parameters()).dtype, 2e-4)
    with torch.no_grad():
        compressed = small.model.eval()
        for answer, expected in zip(tensors_in(x.into(compressed)), tensors_in(x.into(reference)), strict=True):
            if name == "padded_encoder":  # padded places hold anything
                there = ~x.kwargs["src_key_padding_mask"]
                answer, expected = answer[there], expected[there]
            assert answer.dtype == expected.dtype
            torch.testing.assert_close(answer, expected, rtol=tolerance, atol=tolerance)

    # Every layer is cheaper, or listed with the reason.
    was, now = (profile(m, task.inputs()) for m in (model, small.model))
    entry = small.ledger.steps[0]
    replaced = {edit["layer"] for edit in entry.edits}
    for layer, module in model.named_modules():
        if is_layer(module):
            assert (layer in replaced) != (layer in entry.left), layer
    if isinstance(step, SVD):
        for pattern, reason in given.left.items():
            matching = [layer for layer in entry.left if re.fullmatch(pattern, layer)]
            assert matching, pattern
            assert all(re.search(reason, entry.left[layer]) for layer in matching)
        assert replaced
    for layer in replaced:
        share = now.layers[layer].cost.macs / was.layers[layer].cost.macs
        assert share <= 0.5 or (step.ratio is None and share < 1)
    if step.budget is not None and replaced:
        assert now.total.macs <= 0.7 * was.total.macs
    assert entry.after.total.macs == now.total.macs
    assert entry.before.total.macs == was.total.macs


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_what_comes_out_is_a_network_like_the_one_that_went_in(name: str) -> None:
    """Training flags, frozen parameters and types are kept; it can be copied, and trained on."""
    model, example = made(name), drawn(name, 2, 1)
    task = fw.Task(example, [drawn(name, 12, seed) for seed in range(2, 6)], **CONSTRUCTS[name].settings)
    small = fw.compress(model, SVD(ratio=0.5), task=task).model
    kept = dict(small.named_modules())
    assert {path: m.training for path, m in model.named_modules() if path in kept} == {
        path: kept[path].training for path, _ in model.named_modules() if path in kept
    }
    parameters = dict(small.named_parameters())
    for path, parameter in model.named_parameters():
        if path in parameters:
            assert parameters[path].requires_grad == parameter.requires_grad
    assert {p.dtype for p in small.parameters()} == {p.dtype for p in model.parameters()}

    inputs, flags = as_inputs(drawn(name, 3, 7)), [m.training for m in small.modules()]
    copied = copy.deepcopy(small)
    for one, other in zip(tensors_in(inputs.into(small.eval())), tensors_in(inputs.into(copied.eval())), strict=True):
        assert torch.equal(one, other)
    for module, flag in zip(small.modules(), flags, strict=True):
        module.training = flag

    if name == "called_twice_over_what_it_was_given":  # PyTorch itself cannot differentiate it
        return
    answers = tensors_in(inputs.into(small.train()))
    sum(t.float().square().mean() for t in answers).backward()  # type: ignore[union-attr]
    replaced = [m for m in small.modules() if isinstance(m, FormModule)]
    assert replaced
    for parameter in (p for m in replaced for p in m.parameters() if p.requires_grad):
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


def test_what_cannot_be_copied_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(FeatherweightError, match=r"cannot be copied .*lock"):
        fw.compress(model, SVD(ratio=0.5), task=fw.Task(torch.randn(1, 8)))


def test_weights_that_a_hook_computes_are_left_alone_with_the_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch has a newer weight norm
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(40, 8)
    model(x)
    left = fw.compress(model, SVD(ratio=0.5), task=fw.Task(x[:1])).ledger.steps[0].left
    assert left == {"0": "it has hooks, which a replacement would lose"}
    left = fw.compress(model, quantize.Static(), task=fw.Task(x[:1], calibration=[x])).ledger.steps[0].left
    assert left["0"] == "no operation takes it as it is: it is read in parts, or computed with first"


def test_an_encoder_takes_no_nested_tensors_once_a_layer_of_its_own_is_replaced() -> None:
    """They serve the fused operations only, which would take the layers' dense weights past the layers."""
    encoder = made("padded_encoder")
    assert encoder.use_nested_tensor
    small = fw.compress(
        encoder, SVD(ratio={"layers.1.linear2": 0.5}), task=fw.Task(drawn("padded_encoder", 2, 1))
    ).model
    assert not small.use_nested_tensor
    assert not small.layers[1].activation_relu_or_gelu
    assert small.layers[0].activation_relu_or_gelu  # that one is whole, and stays fast


def test_a_layer_that_a_module_holds_twice_is_replaced_in_both_places() -> None:
    small = fw.compress(made("called_twice"), SVD(ratio=0.5), task=fw.Task(drawn("called_twice", 2, 1))).model
    assert isinstance(small[3], FormModule)
    assert small[3] is small[5]
