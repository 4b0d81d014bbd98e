"""Second moments of what layers see: against float64 sums over patches that an identity kernel cuts out."""

from __future__ import annotations

import copy
import gc
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gather_on_processes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.curvature.gram import (
    ROWS_A_COLUMN,
    TEMPERATURE,
    Statistics,
    _take,
    classifier_loss,
    gather,
    gather_paired,
    paired_rows,
    patches,
    regression_loss,
)
from featherweight.curvature.lockstep import Lockstep
from featherweight.errors import TaskError

EVERYTHING = 1e9  # an effort that is enough to look at every position
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows_of(layer: Any, x: Tensor) -> Tensor:
    """The layer's input vectors, (groups, rows, d) in float64: a convolution with one-hot kernels cuts them out."""
    x = x.detach()
    if isinstance(layer, nn.Linear):
        return x.double().reshape(1, -1, x.shape[-1])
    x = x if x.ndim == len(layer.kernel_size) + 2 else x[None]
    width = layer.weight[0].numel()
    one_hot = (
        torch.eye(width, dtype=torch.float64)
        .reshape(width, *layer.weight.shape[1:])
        .repeat(layer.groups, *[1] * (layer.weight.ndim - 1))
    )
    cut = copy.deepcopy(layer)._conv_forward(x.double(), one_hot, None)  # (samples, groups · width, *positions)
    return cut.unflatten(1, (layer.groups, width)).movedim(0, 2).flatten(2).transpose(1, 2)


def moments(rows: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E[other rowsᵀ] and E[rows]."""
    other = rows if other is None else other
    return torch.einsum("gnd,gne->gde", other, rows) / rows.shape[1], rows.mean(1)


def assert_near(one: Tensor | None, other: Tensor, tolerance: float = 1e-5) -> None:
    assert one is not None
    assert one.shape == other.shape
    scale = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


@st.composite
def layers_and_inputs(draw: st.DrawFn) -> tuple[Any, Tensor]:
    if draw(st.integers(0, 3)) == 0:
        layer: Any = nn.Linear(draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        shape = draw(st.lists(st.integers(1, 4), max_size=3))
        return layer, randn(*shape, layer.in_features, seed=3) + 1
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    kernel, dilation = (draw(st.tuples(*[st.integers(1, top)] * dims)) for top in (4, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", 0, 1, 2]))
    stride = 1 if padding == "same" else draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    layer = CONVOLUTIONS[dims](inputs, outputs, kernel, stride, padding, dilation, groups, padding_mode=mode)
    sizes = draw(st.tuples(*[st.integers(4, 7)] * dims))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = [layer._reversed_padding_repeated_twice[2 * axis : 2 * axis + 2] for axis in reversed(range(dims))]
    assume(all(size + sum(pad) >= span for size, pad, span in zip(sizes, pads, spans, strict=True)))
    assume(all(max(pad) < size for size, pad in zip(sizes, pads, strict=True)))
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return layer, randn(*batch, inputs, *sizes, seed=4) + 0.5


# What is gathered


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@settings(max_examples=80, deadline=None)
@given(layers_and_inputs())
def test_inputs_of_every_layer_are_summed_as_by_hand(drawn: tuple[Any, Tensor]) -> None:
    layer, x = drawn
    found = gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))], effort=EVERYTHING)["0"]
    rows = rows_of(layer, x)
    gram, mean = moments(rows)
    assert_near(found.gram, gram)
    assert_near(found.mean, mean)
    assert found.rows == rows.shape[1]
    centred = rows - rows.mean(1, keepdim=True)
    assert_near(found.centred().gram, moments(centred)[0])


def test_patches_are_a_view() -> None:
    conv, x = nn.Conv2d(4, 4, 3, groups=2), randn(2, 4, 6, 6)
    assert patches(conv, x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@settings(max_examples=60, deadline=None)
@given(layers_and_inputs(), st.sampled_from(["plain", "channels last", "expanded", "sliced"]))
def test_chosen_positions_are_those_of_the_layers_input_however_it_lies_in_memory(
    drawn: tuple[Any, Tensor], layout: str
) -> None:
    layer, x = drawn
    if layout == "channels last":
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    elif layout == "expanded":
        x = x[..., :1].expand_as(x)
    elif layout == "sliced":
        x = torch.stack([x + 1, x, x - 1], -1)[..., 1]
    rows = rows_of(layer, x)
    chosen = torch.randint(rows.shape[1], (7,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_take(layer, patches(layer, x), chosen).double(), rows[:, chosen])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_inputs_of_any_type_are_summed_in_float32(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(4, 3).to(dtype), randn(50, 4).to(dtype)
    found = gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))])["0"]
    assert_near(found.gram, moments(rows_of(layer, x))[0], 1e-6)
    assert found.gram.dtype == torch.float32


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def inputs_of(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """What goes into each layer, layer after layer, with nothing done in place."""
    found = {}
    model = copy.deepcopy(model).eval()
    for name, layer in model.named_children():
        found[name] = x
        x = layer(x.clone())
    return found


def weighted(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def test_a_stream_of_batches_is_as_good_as_one() -> None:
    model, x = conv_net(), randn(11, 2, 6, 6)
    layers = weighted(model)
    by_two = gather(model, layers, (Inputs((part,)) for part in x.split(2)), effort=EVERYTHING)
    for name, seen in inputs_of(model, x).items():
        if name in layers:
            gram, mean = moments(rows_of(layers[name], seen))
            assert_near(by_two[name].gram, gram)
            assert_near(by_two[name].mean, mean)


class Twice(nn.Module):
    """Calls one layer twice and writes into what it was given in between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.shared(x)
        x.relu_()
        return self.last(self.shared(input=x) + y)


def test_all_calls_of_a_layer_count() -> None:
    torch.manual_seed(0)
    model, x = Twice(), randn(20, 4)
    layers: dict[str, Any] = {"shared": model.shared, "last": model.last}
    found = gather(model, layers, [Inputs((x,))], gradients=watched)
    both = torch.cat([x, x.relu()])
    assert_near(found["shared"].gram, moments(rows_of(model.shared, both))[0])
    # the predicted loss is a sum over output positions: two calls are two of them
    plain = gather(model, layers, [Inputs((x,))])
    assert (plain["shared"].positions, plain["last"].positions) == (2, 1)


@pytest.mark.parametrize(
    ("layer", "shape", "positions"),
    [
        (nn.Linear(4, 3), (5, 4), 1),
        (nn.Linear(4, 3), (5, 7, 4), 7),
        (nn.Linear(4, 3), (5, 7, 2, 4), 14),
        (nn.Conv2d(4, 3, 3), (5, 4, 6, 7), 20),
        (nn.Conv1d(4, 3, 3, 2), (5, 4, 7), 3),
    ],
    ids=str,
)
def test_positions_are_counted_by_sample(layer: Any, shape: tuple[int, ...], positions: float) -> None:
    for effort in (EVERYTHING, 0.0):
        found = gather(nn.Sequential(layer), {"0": layer}, [Inputs((randn(*shape),))] * 3, effort=effort)
        assert found["0"].positions == positions


def test_tokens_that_are_flattened_on_the_way_are_still_positions() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model = Flat()
    found = gather(model, {"layer": model.layer}, [Inputs((randn(5, 7, 4),))])
    assert found["layer"].positions == 7


# A random part of the positions


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 2, 3, padding=1), nn.Linear(12, 2)], ids=str)
def test_a_random_part_of_the_positions_stands_for_all(layer: Any) -> None:
    x = randn(4, 3, 6, 6) if isinstance(layer, nn.Conv2d) else randn(4, 30, 12)
    x = x + torch.linspace(0, 2, x.shape[-2]).view(-1, 1)  # positions differ
    rows = rows_of(layer, x)
    gram, mean = moments(rows)
    tries = 300
    found = [
        gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))], effort=1.0, seed=seed)["0"] for seed in range(tries)
    ]
    assert all(4 <= s.rows < rows.shape[1] / 2 for s in found)
    grams, means = (torch.stack([getattr(s, name).double() for s in found]) for name in ("gram", "mean"))
    for tried, truth in ((grams, gram), (means, mean)):
        error = (tried.mean(0) - truth) / (tried.std(0) / math.sqrt(tries) + 1e-9)
        assert float(error.abs().max()) < 5  # standard errors, of several hundred figures
        assert float(error.square().mean()) == pytest.approx(1.0, abs=0.6)


def test_the_seed_decides_which_positions() -> None:
    conv, x = nn.Conv2d(3, 2, 3), [Inputs((randn(4, 3, 8, 8),))]
    one, same, other = (gather(nn.Sequential(conv), {"0": conv}, x, seed=seed)["0"].gram for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_effort_bounds_the_work() -> None:
    conv, x = nn.Conv2d(8, 4, 3, padding=1), [Inputs((randn(8, 8, 8, 8),))]
    for effort in (0.5, 2.0, 8.0):
        found = gather(nn.Sequential(conv), {"0": conv}, x, effort=effort)["0"]
        layer_macs, gram_macs = 8 * 64 * 4 * 72, found.rows * 72 * 72
        assert gram_macs == pytest.approx(effort * layer_macs, rel=0.05)


# Gradients


def test_gradients_are_those_of_each_samples_loss_at_each_position() -> None:
    model, x, labels = conv_net(), randn(5, 2, 6, 6), torch.tensor([0, 2, 1, 1, 0])
    layers = weighted(model)

    def known(outputs: Tensor, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="sum")

    found = gather(model, layers, [Inputs((x,))], gradients=known)
    expected: dict[str, list[Tensor]] = {name: [] for name in layers}
    reference = copy.deepcopy(model).eval().double()
    for sample, label in zip(x.double(), labels, strict=True):
        outputs, y = {}, sample[None]
        for name, layer in reference.named_children():
            y = layer(y.clone())
            if name in layers:
                y.retain_grad()
                outputs[name] = y
        F.cross_entropy(y, label[None]).backward()
        for name, output in outputs.items():
            assert output.grad is not None
            expected[name].append(output.grad.flatten(2).transpose(1, 2)[0] if output.ndim == 4 else output.grad)
    for name, parts in expected.items():
        rows = torch.cat(parts)
        assert_near(found[name].gradients, rows.T @ rows / len(rows), 1e-6)
        assert found[name].gradient_rows == len(rows)


def coherence(model: nn.Module, name: str, x: Tensor, seed: int = 0) -> float:
    """‖Σ g xᵀ‖² over Σ ‖g xᵀ‖², g and x at a sample's positions, by autograd sample by sample."""
    reference = copy.deepcopy(model).eval().double()
    layer: Any = reference.get_submodule(name)
    together = apart = 0.0
    # The signs that the whole batch draws do not matter here: what is compared has one answer to watch.
    for sample in x.double():
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            output.retain_grad()
            seen.append(((args[0] if args else kwargs["input"]).detach(), output))  # noqa: B023

        handle = layer.register_forward_hook(keep, with_kwargs=True)
        reference.zero_grad()
        watched(reference(sample[None])).backward()
        handle.remove()
        together += float(layer.weight.grad.square().sum())
        for into, output in seen:
            rows = rows_of(layer, into)  # (groups, positions, d)
            assert output.grad is not None
            g = output.grad.flatten(2)[0].T if output.ndim == 4 else output.grad.reshape(-1, output.shape[-1])
            g = g.reshape(len(g), len(rows), -1).transpose(0, 1)
            apart += float((g.square().sum(-1) * rows.square().sum(-1)).sum())
    return together / apart


def watched(outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A loss with the same gradient for every sample: a plain sum of squares."""
    return outputs.double().square().sum()


TIED = nn.Linear(7, 7)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, padding="valid", padding_mode="circular"), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()
        ),
        nn.Sequential(nn.Flatten(2), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 40), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(72, 7), nn.Tanh(), TIED, nn.Tanh(), TIED),
    ],
    ids=["pooled", "grouped", "tokens", "tied"],
)
def test_positions_count_as_often_as_their_gradients_add_up(network: nn.Module) -> None:
    x = randn(8, 2, 6, 6) + 2  # what all positions share adds up
    layers = weighted(network)
    plain = gather(network, layers, [Inputs((x,))])
    found = gather(network, layers, [Inputs((x,))], gradients=watched)
    for name in layers:
        expected = plain[name].positions * coherence(network, name, x[:2])
        assert found[name].positions == pytest.approx(expected, rel=1e-3)
    if isinstance(network[2], nn.AdaptiveAvgPool2d):
        assert found["0"].positions > 3 * plain["0"].positions


def test_a_classifiers_gradients_are_the_true_fisher() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), randn(6, 3)
    p = (layer(x).detach().double() / TEMPERATURE).softmax(1)
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    found = gather(
        nn.Sequential(layer), {"0": layer}, [Inputs((x.repeat(5000, 1),))], gradients=classifier_loss(1), seed=5
    )
    assert_near(found["0"].gradients, fisher, 0.01)


@pytest.mark.parametrize("class_dim", [1, -1])
def test_classes_may_lie_in_any_dimension(class_dim: int) -> None:
    """A token or pixel classifier: the gradient at a position is that of the position's own label."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), randn(2000, 5, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"answer": self.layer(x).movedim(-1, class_dim)}

    model = Model()
    found = gather(model, {"layer": layer}, [Inputs((x,))], gradients=classifier_loss(class_dim))["layer"]
    p = (layer(x).detach().double() / TEMPERATURE).softmax(-1).flatten(0, 1)
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    assert_near(found.gradients, fisher, 0.015)


def test_a_regressions_gradients_are_of_half_the_relative_squared_error() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), randn(20000, 3)
    found = gather(nn.Sequential(layer), {"0": layer}, [Inputs((x,))], gradients=regression_loss)["0"]
    # d²/dy² of ½ ‖y − y₀‖² / E‖y₀‖²
    assert_near(found.gradients * layer(x).square().sum(1).mean(), torch.eye(4), 0.04)


def test_gradients_need_no_trainable_parameter() -> None:
    model, x = conv_net().requires_grad_(False), randn(3, 2, 6, 6)
    found = gather(model, weighted(model), [Inputs((x,))], gradients=classifier_loss(1))
    assert all(s.gradients is not None and bool(s.gradients.any()) for s in found.values())


def test_a_layer_that_the_loss_does_not_reach_has_no_gradients() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.aside = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(x), self.aside(x)

    model = Aside()
    layers: dict[str, Any] = {"head": model.head, "aside": model.aside}
    found = gather(model, layers, [Inputs((randn(4, 3),))], gradients=classifier_loss(1))
    assert found["head"].gradients is not None
    assert found["aside"].gradients is None


# Two networks


def paired(
    original: nn.Module, changed: Any, name: str, batches: list[Inputs], calls: int = 1, effort: float = EVERYTHING
) -> Statistics:
    lockstep, layer = Lockstep(original, changed, batches), original.get_submodule(name)
    found = gather_paired(layer, lockstep.at(name, calls), samples=lockstep.samples, effort=effort)  # type: ignore
    assert found is not None
    return found


def test_a_changed_network_is_compared_with_the_original() -> None:
    original, x = conv_net(), randn(7, 2, 6, 6)
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed[0].weight.mul_(0.8)
        changed[0].bias.add_(0.1)
    layer: Any = original[2]
    found = paired(original, changed, "2", [Inputs((part,)) for part in x.split(3)])
    was, now = (rows_of(layer, inputs_of(model, x)["2"]) for model in (original, changed))
    weight, bias = layer.weight.detach().to(was), layer.bias.detach().to(was)
    was = was @ weight.reshape(len(was), -1, was.shape[-1]).mT + bias.reshape(len(was), 1, -1)  # its answers
    cross, _ = moments(now, was)
    gram, mean = moments(now)
    for one, other in ((found.gram, gram), (found.mean, mean), (found.cross, cross), (found.answer_mean, was.mean(1))):
        assert_near(one, other)
    centred = found.centred()
    assert_near(centred.gram, moments(now - now.mean(1, keepdim=True))[0])
    assert_near(centred.cross, moments(now - now.mean(1, keepdim=True), was - was.mean(1, keepdim=True))[0])


def test_the_same_positions_are_looked_at_in_both() -> None:
    original, x = conv_net(), [Inputs((randn(7, 2, 6, 6),))]
    found = paired(original, copy.deepcopy(original), "0", x, effort=0.5)
    assert found.rows < 7 * 36
    layer: Any = original[0]
    centred, weight = found.centred(), layer.weight.detach().flatten(1)[None]
    assert_near(centred.cross, weight @ centred.gram)
    assert_near(found.answer_mean, (weight @ found.mean[..., None])[..., 0] + layer.bias.detach())


def test_no_more_rows_are_looked_at_than_a_fit_can_use() -> None:
    model, x = conv_net(), [Inputs((part,)) for part in randn(90, 2, 6, 6).split(30)]
    found = paired(model, copy.deepcopy(model), "0", x)
    width = found.gram.shape[-1]
    assert found.rows == ROWS_A_COLUMN * width < 90 * 36


@pytest.mark.parametrize("positions", [1, 5, 99])
def test_as_many_positions_of_every_sample_are_looked_at_as_asked(positions: int) -> None:
    model = nn.Conv2d(1, 1, 1)
    x = torch.arange(4.0)[:, None, None, None] + torch.rand(4, 1, 3, 3) / 2  # the whole part says which sample it is
    pairs = [(part, model(part)) for part in x.split(2)]
    found = gather_paired(model, pairs, samples=4, positions=positions)
    rows = paired_rows(model, [(part, (answer,)) for part, answer in pairs], samples=4, positions=positions)
    assert found is not None
    assert rows is not None
    taken, (answers,) = rows
    assert found.rows == len(taken) == 4 * min(positions, 9)
    assert torch.equal(taken.flatten().floor().long().bincount(), torch.full((4,), min(positions, 9)))
    assert len(taken.unique()) == len(taken), "none is taken twice"
    torch.testing.assert_close(answers, model.weight.detach().flatten(1) * taken + model.bias.detach())  # type: ignore


def test_what_is_written_into_an_input_later_is_not_seen() -> None:
    torch.manual_seed(0)
    model, x = Twice(), randn(20, 4)
    found = paired(model, copy.deepcopy(model), "shared", [Inputs((x,))], calls=2)
    assert_near(found.gram, moments(rows_of(model.shared, torch.cat([x, x.relu()])))[0])


# The caller's model


def state(model: nn.Module) -> Any:
    hooks = [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    parameters = [(p.requires_grad, p.grad is None, p._version, p.detach().clone()) for p in model.parameters()]
    return hooks, [m.training for m in model.modules()], parameters, [b.clone() for b in model.buffers()]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken in the middle")


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken: bool) -> None:
    model = conv_net().train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    if broken:
        model.insert(4, Broken())
    other, fused = copy.deepcopy(model), torch.backends.mha.get_fastpath_enabled()
    before, other_before = state(model), state(other)
    x = [Inputs((randn(3, 2, 6, 6),))] * 2
    grad_mode = torch.is_grad_enabled()

    def watch(run: Callable[[], Any]) -> None:
        if broken:
            with pytest.raises(RuntimeError, match="in the middle"):
                run()
        else:
            run()

    watch(lambda: gather(model, weighted(model), x, gradients=classifier_loss(1)))
    watch(lambda: gather(model, weighted(model), x))
    lockstep = Lockstep(model, other, x)
    assert len(list(lockstep.at("2"))) == 2
    watch(lockstep.answers)
    lockstep.close()
    assert same(state(model), before)
    assert same(state(other), other_before)
    assert torch.is_grad_enabled() == grad_mode
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_random_numbers_of_the_process_are_not_used_up() -> None:
    model, x = conv_net(), [Inputs((randn(3, 2, 6, 6),))]
    before = torch.get_rng_state()
    gather(model, weighted(model), x, gradients=classifier_loss(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_answers_and_inputs_of_the_run_are_the_models_own() -> None:
    """Neither probes nor hooks may change what the model computes, in-place operations behind a layer included."""
    model, x = conv_net().eval(), randn(3, 2, 6, 6)
    expected, kept, seen = model(x), x.clone(), []

    def loss(outputs: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(outputs.detach())
        return outputs.sum()

    gather(model, weighted(model), [Inputs((x,))], gradients=loss)
    assert torch.equal(seen[0], expected)
    assert torch.equal(x, kept)


# Memory


def test_what_does_not_fit_in_memory_lies_in_a_file_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, x = conv_net(), [Inputs((part,)) for part in randn(6, 2, 6, 6).split(2)]
    inside = gather(model, weighted(model), x, gradients=classifier_loss(1))
    outside = gather(model, weighted(model), x, gradients=classifier_loss(1), memory_limit=0)
    for name, one in inside.items():
        other = outside[name]
        assert torch.equal(one.gram, other.gram)
        assert torch.equal(one.centred().gram, other.centred().gram)
    assert not list(tmp_path.iterdir())
    mapped = lambda: Path("/proc/self/maps").read_text().count("featherweight-gram-")  # noqa: E731
    if Path("/proc/self/maps").exists():
        assert mapped() == len(outside)
        del outside, other
        gc.collect()
        assert mapped() == 0


def test_some_may_fit_and_some_not() -> None:
    model, x = conv_net(), [Inputs((randn(6, 2, 6, 6),))]
    whole = gather(model, weighted(model), x)
    for limit in (4 * 18 * 18, 4 * 18 * 18 + 1, 10_000):
        part = gather(model, weighted(model), x, memory_limit=limit)
        assert all(torch.equal(whole[name].gram, part[name].gram) for name in whole)


# Trouble


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    model, x = conv_net(), randn(3, 2, 6, 6)
    x[1, 0, 2, 2] = bad
    with pytest.raises(TaskError, match=r"'0' holds NaN or infinite"):
        gather(model, weighted(model), [Inputs((x,))], effort=EVERYTHING)


def test_gradients_that_are_not_finite_are_named() -> None:
    model, x = conv_net(), randn(3, 2, 6, 6)
    with pytest.raises(TaskError, match=r"gradient at '\d' holds NaN or infinite"):
        gather(model, weighted(model), [Inputs((x,))], gradients=lambda outputs, _: (outputs * math.nan).sum())


def test_a_layer_that_is_not_called_has_no_statistics() -> None:
    model = conv_net()
    unused = nn.Linear(2, 2)
    assert "unused" not in gather(model, {**weighted(model), "unused": unused}, [Inputs((randn(3, 2, 6, 6),))])
    assert gather_paired(model[0], [], samples=0) is None  # type: ignore[arg-type]


# Encoders of PyTorch's own


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("gradients", [None, regression_loss])
def test_the_fused_encoder_shows_its_layers(gradients: Any) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padded = randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    layers: dict[str, Any] = {n: m for n, m in encoder.named_modules() if n.endswith(("linear1", "linear2"))}
    inputs = [Inputs((x,), {"src_key_padding_mask": padded})]
    found = gather(encoder, layers, inputs, gradients=gradients, effort=EVERYTHING)
    assert set(found) == set(layers)
    first = encoder.layers[0]
    attended = first.self_attn(x, x, x, key_padding_mask=padded)[0]
    seen = first.norm1(x + attended)
    assert_near(found["layers.0.linear1"].gram, moments(rows_of(first.linear1, seen.detach()))[0])
    again = paired(encoder, copy.deepcopy(encoder), "layers.0.linear1", inputs)
    assert_near(again.gram, moments(rows_of(first.linear1, seen.detach()))[0])


# Several processes


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    with socket.socket() as found:  # a port nobody listens on
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = Path(__file__).with_name("gather_on_processes.py")
    running = []
    for rank in range(2):
        told = {"RANK": rank, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        command = [sys.executable, str(script), str(tmp_path)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in running:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()

    alone = gather_on_processes.all_statistics()
    fields = ("gram", "mean", "cross", "answer_mean", "gradients")
    with torch.serialization.safe_globals([Statistics]):
        both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one in both:
        assert set(one) == set(alone)
        for name, expected in alone.items():
            for field in ("rows", "gradient_rows", "samples"):
                assert getattr(one[name], field) == getattr(expected, field), (name, field)
            assert one[name].positions == pytest.approx(expected.positions)
            for field in fields:
                there = getattr(expected, field)
                assert (getattr(one[name], field) is None) == (there is None), (name, field)
                if there is not None:
                    assert_near(getattr(one[name], field), there)
    for name, first in both[0].items():  # both must go on alike, so to the last bit
        for field in fields:
            if getattr(first, field) is not None:
                assert torch.equal(getattr(first, field), getattr(both[1][name], field))
