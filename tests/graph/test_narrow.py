"""Narrowing: both forms, training on, plain data both ways, and errors."""

from __future__ import annotations

import copy
import json

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from constructs import (
    CONSTRUCTS,
    IMAGE,
    TOKENS,
    Net,
    assert_equals_masked,
    conv,
    example,
    half,
    head,
    masked,
    randomised,
    some,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featherweight.batch import Inputs
from featherweight.errors import ArtifactError
from featherweight.graph import GraphError, Narrowing, couple, narrow, verify


def fixed_view() -> nn.Module:
    """A width written into the forward: only the graph form can narrow it."""
    return Net(
        lambda s, x: s.fc(s.drop(s.h(F.adaptive_avg_pool2d(s.a(x), 2).view(-1, 32)))),
        a=conv(3, 8), h=nn.Linear(32, 6), drop=nn.Dropout(0.5), fc=nn.Linear(6, 3))  # fmt: skip


def test_the_users_class_is_kept_where_it_can_be():
    build, shape, _ = CONSTRUCTS["grouped"]
    model, _, narrowed = half(build(), shape)
    assert narrowed.narrowing.form == "module"
    assert type(narrowed.module) is type(model)
    layer = narrowed.module.d[0]
    assert (layer.in_channels, layer.out_channels, layer.groups) == (
        layer.weight.shape[1] * 2,
        layer.weight.shape[0],
        2,
    )
    assert narrowed.module.a[1].num_features == narrowed.module.a[0].out_channels
    assert narrowed.error is not None
    assert narrowed.error < 1e-12


def test_the_model_itself_is_left_as_it_is():
    model = randomised(fixed_view())
    before = copy.deepcopy(model.state_dict())
    coupling = couple(model, example(IMAGE))
    for form in (None, "graph"):
        narrowed = narrow(model, coupling, some(coupling), form=form).module
        with torch.no_grad():
            for tensor in narrowed.parameters():
                tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_graph_form_has_the_models_names_takes_any_batch_and_says_why():
    model, _, narrowed = half(fixed_view(), IMAGE)
    assert narrowed.narrowing.form == "graph"
    assert "its code has sizes written into it" in narrowed.narrowing.why
    assert [n for n, _ in narrowed.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert narrowed.module(torch.randn(7, 3, 8, 8).double()).shape == (7, 3)


def test_the_graph_form_trains():
    torch.manual_seed(0)
    _, _, narrowed = half(fixed_view(), IMAGE)
    module, x = narrowed.module, torch.randn(16, 3, 8, 8).double()
    assert torch.equal(module(x), module(x))
    mean = module.get_buffer("a.1.running_mean").clone()
    module.train()
    assert not torch.equal(module(x), module(x)), "dropout is on"
    assert not torch.equal(module.get_buffer("a.1.running_mean"), mean), "statistics are gathered"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = module(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_graph_form_can_be_narrowed_again():
    _, _, first = half(fixed_view(), IMAGE)
    coupling = couple(first.module, example(IMAGE))
    second = narrow(first.module, coupling, some(coupling, seed=1))
    assert_equals_masked(first.module, example(IMAGE), second)
    assert sum(p.numel() for p in second.module.parameters()) < sum(p.numel() for p in first.module.parameters())


def test_the_mode_is_the_models():
    build, shape, _ = CONSTRUCTS["flatten"]
    model = build().train()
    coupling = couple(model, example(shape))
    for form in ("module", "graph"):
        assert narrow(model, coupling, {"h neurons": [0, 1]}, form=form).module.training
    assert not narrow(model.eval(), coupling, {"h neurons": [0, 1]}, form="graph").module.training


@pytest.mark.parametrize(
    "name", ["shared keys and rotary halves", "parts by slices", "a constant index", "recurrent", "grouped"]
)
def test_a_narrowing_rebuilds_the_model_from_plain_data(name):
    build, shape, _ = CONSTRUCTS[name]
    _, _, narrowed = half(build(), shape)
    data = json.loads(json.dumps(narrowed.narrowing.to_json()))
    again = Narrowing.from_json(data)
    assert again == narrowed.narrowing
    fresh = again.apply(build().double().eval())
    fresh.load_state_dict(narrowed.module.state_dict())
    x = example(shape, seed=5).args[0]
    assert torch.equal(fresh(x), narrowed.module(x))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_pytorchs_averaged_model_is_narrowed_and_goes_on_averaging(form):
    model = randomised(conv(3, 8).append(nn.Flatten()).append(nn.Linear(512, 3)))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)
    coupling = couple(model, example(IMAGE))
    made = narrow(model, coupling, {"0 channels": range(3)}, form=form)
    narrowed = made.narrowing.apply(average)
    assert isinstance(narrowed, AveragedModel)
    assert narrowed.n_averaged == 1
    assert average.module.get_parameter("0.weight").shape[0] == 8
    with torch.no_grad():
        made.module.get_parameter("0.weight").add_(1.0)
    narrowed.update_parameters(made.module)
    change = narrowed.module.get_parameter("0.weight") - average.module.get_parameter("0.weight")[:3]
    assert torch.allclose(change, torch.full_like(change, 0.25))
    wrapped = AveragedModel(model)  # and one that was itself coupled
    itself = narrow(wrapped, couple(wrapped, example(IMAGE)), {"module.0 channels": range(3)}, form=form)
    assert itself.narrowing.apply(wrapped).get_parameter("module.0.weight").shape[0] == 3


def test_data_that_is_no_narrowing_is_refused():
    build, shape, _ = CONSTRUCTS["flatten"]
    _, _, narrowed = half(build(), shape)
    data = narrowed.narrowing.to_json()
    for broken in ({}, {**data, "form": "code"}, {**data, "extra": 1}, {**data, "tensors": {"a": {"x": [0]}}},
                   {**data, "kept": {"a": ["0"]}}, {**data, "attributes": {"a": {"forward": "evil"}}}):  # fmt: skip
        with pytest.raises(ArtifactError, match="not a narrowing"):
            Narrowing.from_json(broken)


def test_a_narrowing_of_another_model_is_refused():
    build, shape, _ = CONSTRUCTS["flatten"]
    _, _, narrowed = half(build(), shape)
    with pytest.raises(GraphError, match="has no tensor"):
        narrowed.narrowing.apply(nn.Linear(3, 3))
    other = CONSTRUCTS["grouped"][0]()
    with pytest.raises(GraphError, match=r"made for another model|has no tensor"):
        narrowed.narrowing.apply(other)


def test_nothing_left_of_a_part_is_an_error_that_names_the_group():
    model = randomised(random_network(["slice", "conv"]))
    coupling = couple(model, example(IMAGE))
    with pytest.raises(
        GraphError, match=r"nothing would be left of a dimension of slice_.*keep more of group 'stem.0 chan"
    ):
        narrow(model, coupling, {"stem.0 channels": [6, 7]})


def test_a_form_that_cannot_be_is_an_error():
    model = randomised(fixed_view())
    coupling = couple(model, example(IMAGE))
    with pytest.raises(GraphError, match="cannot be narrowed in module form: its code has sizes written into it"):
        narrow(model, coupling, some(coupling), form="module")


def test_a_wrong_rule_is_caught_and_the_group_named(monkeypatch):
    """The answers are compared whatever the rules say: one that calls a shuffle the identity does not get through."""
    from featherweight.graph.rules import RULES

    monkeypatch.setitem(RULES, "flip", lambda call: call.axes("self"))
    model = randomised(Net(lambda s, x: head(s, s.b(s.a(x).flip(1))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 3)))
    coupling = couple(model, example(IMAGE))
    with pytest.raises(GraphError, match=r"without some of group 'a.0 channels'"):
        narrow(model, coupling, {"b.0 channels": [0, 1], "a.0 channels": [0, 1, 5]})


class Spectral(nn.Module):
    """A Fourier layer: complex weights mix channels frequency by frequency."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 6, 1), nn.Conv1d(6, 2, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 5, dtype=torch.complex64))

    def forward(self, x):
        y = self.stem(x)
        mixed = torch.einsum("bif,iof->bof", torch.fft.rfft(y), self.weight)
        return self.head(self.last(y + torch.fft.irfft(mixed, n=8)).relu())


@pytest.mark.parametrize("form", ["module", "graph"])
def test_complex_parameters_are_checked_in_double_too(form):
    torch.manual_seed(0)
    model = Spectral().eval()
    x = torch.randn(2, 3, 8)
    coupling = couple(model, Inputs((x,)))
    narrowed = narrow(model, coupling, {"last channels": [0, 2, 5]}, form=form)
    assert narrowed.error < 1e-12
    assert narrowed.module.weight.dtype == torch.complex64
    assert torch.allclose(narrowed.module(x), masked(model, narrowed.narrowing)(x), atol=1e-5)


def test_answers_that_are_complex_are_compared():
    class Phases(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x):
            return self.b(self.a(x).relu()) * self.phase

    model, x = Phases().eval(), torch.randn(2, 4)
    narrowed = narrow(model, couple(model, Inputs((x,))), {"a neurons": [0, 3]})
    assert verify.distance(*(verify.answers(m, Inputs((x,))) for m in (narrowed.module, model))) > 1e-3
    assert narrowed.error < 1e-12


STEPS = (
    "conv",
    "grouped",
    "depthwise",
    "residual",
    "cat",
    "halves",
    "norm",
    "gate",
    "shuffle",
    "slice",
    "pool",
    "group norm",
)


def random_network(steps: list[str]) -> nn.Module:
    """A network of these steps, each of which leaves a number of channels that 4 divides."""
    width, parts, plan = 8, {}, []
    parts["stem"] = conv(3, 8)
    for i, step in enumerate(steps):
        name = f"{step.replace(' ', '_')}{i}"
        made = width
        if step == "conv":
            made = 12 if width == 8 else 8
            parts[name] = conv(width, made)
        elif step == "grouped":
            parts[name] = conv(width, width, groups=2)
        elif step == "depthwise":
            parts[name] = conv(width, width, groups=width)
        elif step in ("residual", "gate"):
            parts[name] = conv(width, width, 1)
        elif step == "cat":
            parts[name] = conv(width, 4)
            made = width + 4
        elif step == "halves":
            parts[name] = conv(width // 2, width // 2)
        elif step == "norm":
            parts[name] = nn.InstanceNorm2d(width, affine=True)
        elif step == "group norm":
            parts[name] = nn.GroupNorm(2, width)
        plan.append((step, name, width))
        width = made
        if width > 24:
            parts[f"cut{i}"] = conv(width, 8, 1)
            plan.append(("conv", f"cut{i}", width))
            width = 8
    parts["fc"] = nn.Linear(width, 3)

    def forward(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = s.stem(x)
        for step, name, _ in plan:
            layer = getattr(s, name, None)
            if step in ("conv", "grouped", "depthwise", "norm", "group norm"):
                x = layer(x)
            elif step == "residual":
                x = x + layer(x)
            elif step == "gate":
                x = x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
            elif step == "cat":
                x = torch.cat([layer(x), x], 1)
            elif step == "halves":
                one, two = x.chunk(2, 1)
                x = torch.cat([one, layer(two)], 1)
            elif step == "shuffle":
                n, c, h, w = x.shape
                x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            elif step == "slice":
                x = torch.cat([x[:, 4:], x[:, :4]], 1)
            else:
                x = F.avg_pool2d(x, 3, 1, 1)
        return head(s, x)

    return Net(forward, **parts)


@settings(max_examples=20, deadline=None)
@hypothesis.example(["slice", "halves", "depthwise", "slice", "norm", "residual"], 839, 0.6)  # its answers tell nothing
@given(
    st.lists(st.sampled_from([step for step in STEPS if step not in ("group norm",)]), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from([0.3, 0.6, 0.9]),
)
def test_random_networks_narrowed_at_random_answer_as_masked(steps, seed, share):
    model = randomised(random_network(steps), seed)
    coupling = couple(model, example(IMAGE))
    # Moved and shuffled often enough, all channels go together.
    assume(coupling.groups or "nothing would be left" in str(coupling.frozen["stem.0.weight", 0]))
    assert coupling.unknown == ()
    try:
        narrowed = narrow(model, coupling, some(coupling, seed, share))
    except GraphError as error:  # of few units, a part may lose all: that is refused
        assume("nothing would be left" not in str(error))
        raise
    assert_equals_masked(model, example(IMAGE), narrowed)


def test_tokens_that_no_sample_uses_may_stay():
    build, shape, _ = CONSTRUCTS["token and position"]
    _, _, narrowed = half(build(), shape)
    assert shape == TOKENS
    assert narrowed.module.position.shape[1] == 7


class Windowed(nn.Module):
    """Of the last tokens those in a window; its numbers are as large as its width, whatever they say."""

    def __init__(self, *, window: str = "window", classes: bool = False) -> None:
        super().__init__()
        self.width = self.window = self.classes = 16
        self._window, self._classes = window, classes
        self.embed, self.qkv = nn.Linear(10, 16), nn.Linear(16, 48)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, -getattr(self, self._window) :]
        q, k, v = self.qkv(self.embed(x)).split(self.width, 2)
        made = self.head((q * 0.3 + k.relu()) * v)
        if self._classes:
            chosen = F.one_hot(x.argmax(-1) + 6, self.classes).to(x)
            made = made + chosen.sum(-1, keepdim=True)
        return made.mean(1)


@pytest.mark.parametrize("classes", [False, True])
def test_only_numbers_that_are_the_width_change(classes):
    model = randomised(Windowed(classes=classes))
    coupling = couple(model, example(TOKENS))
    narrowed = narrow(model, coupling, some(coupling))
    assert narrowed.narrowing.form == "module"
    assert narrowed.narrowing.attributes[""] == {"width": 8}
    longer = example((2, 16, 10), seed=1)
    expected = masked(model, narrowed.narrowing)(*longer.args)
    assert torch.allclose(narrowed.module(*longer.args), expected, rtol=1e-9, atol=1e-10)


def test_a_number_that_is_the_width_and_something_else_leaves_only_the_graph():
    model = randomised(Windowed(window="width"))
    coupling = couple(model, example(TOKENS))
    narrowed = narrow(model, coupling, some(coupling))
    assert narrowed.narrowing.form == "graph"
    assert "says a width is used for something else too (test_narrow.py:" in narrowed.narrowing.why
    assert narrowed.narrowing.why.endswith("with width rewritten")
    assert_equals_masked(model, example(TOKENS), narrowed)


def test_attributes_are_found_on_the_meta_device_too():
    model = Windowed(classes=True).to("meta")
    inputs = Inputs((torch.empty(TOKENS, device="meta"),))
    coupling = couple(model, inputs)
    narrowing = narrow(model, coupling, some(coupling)).narrowing
    assert (narrowing.form, narrowing.attributes[""]) == ("module", {"width": 8})
