"""Runs that wait at a layer see what runs from the start would see, whatever the model does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.curvature.lockstep import Lockstep, Waiting


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """Additions, an in-place activation, and code between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = x + self.act(self.second(x))
        return self.head(self.act(self.third(x)).mean((2, 3)))


LAYERS = ("first", "second", "third", "head")


def network(kind: type[nn.Module] = Residual) -> Any:
    torch.manual_seed(0)
    return kind()


def batches(*sizes: int) -> list[Inputs]:
    return [Inputs((randn(size, 3, 4, 4, seed=seed),)) for seed, size in enumerate(sizes)]


def expected(model: nn.Module, name: str, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """What goes into and comes out of a layer in an ordinary run."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append((args[0].clone(), output.clone()))

    handle = model.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        inputs.into(model.eval())
    handle.remove()
    return seen


def shrunk(model: nn.Module, name: str) -> None:
    """Another layer in a layer's place."""
    layer = copy.deepcopy(model.get_submodule(name))
    with torch.no_grad():
        layer.weight.mul_(0.5)
    model.set_submodule(name, layer)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.lists(st.sampled_from(LAYERS), unique=True, min_size=1),
    st.integers(0, 4),
)
def test_layers_see_what_they_would_in_runs_of_their_own(sizes: list[int], chosen: list[str], limit: int) -> None:
    """For any layers in calling order, each replaced once it was seen, and however many runs may wait."""
    original, changed, given_ = network(), network(), batches(*sizes)
    held = {"first": 2.0, "second": 1.0, "third": 2.0}  # the fewest runs may wait at one layer, more at the next
    room = 2 * max(sizes) * limit
    lockstep = Lockstep(original, changed, given_, sample_bytes=lambda name: held.get(name, 1.0), memory_limit=room)
    for name in sorted(chosen, key=LAYERS.index):
        found = list(lockstep.at(name))
        assert len(found) == len(sizes)
        for (x, answer), inputs in zip(found, given_, strict=True):
            torch.testing.assert_close(x, expected(changed, name, inputs)[0][0])
            torch.testing.assert_close(answer, expected(original, name, inputs)[0][1])
        shrunk(changed, name)
    for answers, model in zip(lockstep.answers(), (original, changed), strict=True):
        for answer, inputs in zip(answers, given_, strict=True):
            torch.testing.assert_close(answer, inputs.into(model).detach())


def test_a_layer_that_lies_before_is_run_once() -> None:
    model, counted = network(), []
    model.first.register_forward_hook(lambda *_: counted.append(1))
    runs = Waiting(model, batches(2, 2), through=True)
    for name in LAYERS:
        list(runs.at(name, 1, 2))
    runs.answers()
    assert len(counted) == 2


@pytest.mark.parametrize("again", [Lockstep.close, Lockstep.restart])
@pytest.mark.parametrize("name", ["second", "third"])
def test_a_layer_that_has_changed_before_is_seen_by_runs_that_begin_anew(
    again: Callable[[Lockstep], None], name: str
) -> None:
    original, changed, given_ = network(), network(), batches(2)
    lockstep = Lockstep(original, changed, given_)
    list(lockstep.at("second"))
    with torch.no_grad():
        changed.first.weight.mul_(0.1)
    again(lockstep)
    [(x, answer)] = lockstep.at(name)
    torch.testing.assert_close(x, expected(changed, name, given_[0])[0][0])
    torch.testing.assert_close(answer, expected(original, name, given_[0])[0][1])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(x).relu_()).relu_())


def test_a_layer_that_is_called_twice_is_seen_twice_and_runs_go_on_from_before_it() -> None:
    original, changed, given_ = network(Twice), network(Twice), [Inputs((randn(3, 4),))]
    lockstep = Lockstep(original, changed, given_)
    found = list(lockstep.at("shared", calls=2))
    for (x, answer), (went, came) in zip(found, expected(original, "shared", given_[0]), strict=True):
        torch.testing.assert_close(x, went)
        torch.testing.assert_close(answer, came)
    shrunk(changed, "shared")
    [(x, _)] = lockstep.at("last")
    torch.testing.assert_close(x, expected(changed, "last", given_[0])[0][0])


class Branching(nn.Module):
    """Goes one way or the other, by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.left(x) if float(x.detach()[0, 0]) > 0 else self.right(x))


def test_batches_may_go_different_ways() -> None:
    x = torch.ones(2, 4)
    lockstep = Lockstep(network(Branching), network(Branching), [Inputs((x,)), Inputs((-x,))])
    for name, count in (("left", 1), ("right", 1), ("last", 2)):
        assert len(list(lockstep.at(name))) == count


class Ambient(nn.Module):
    """Switches gradients and precision on and off as it runs, around its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
        return self.second(x.float())


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_what_a_forward_switches_on_does_not_leak(limit: int) -> None:
    given_ = [Inputs((randn(2, 4),)), Inputs((randn(3, 4),))]
    lockstep = Lockstep(network(Ambient), network(Ambient), given_, memory_limit=limit)
    types = []
    for name in ("first", "second"):
        types.append({answer.dtype for _, answer in lockstep.at(name)})
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert types == [{torch.bfloat16}, {torch.float32}]
    lockstep.close()
    assert torch.is_grad_enabled()


class Inference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.second(self.first(x))


def test_inference_mode_inside_a_forward_does_not_leak() -> None:
    lockstep = Lockstep(network(Inference), network(Inference), [Inputs((randn(2, 4),))] * 2)
    for name in ("first", "second"):
        assert len(list(lockstep.at(name))) == 2
        assert not torch.is_inference_mode_enabled()


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        raise RuntimeError("broken in the middle")


def test_an_error_of_the_model_is_the_callers() -> None:
    model = network(Breaking)
    lockstep = Lockstep(model, network(Breaking), [Inputs((randn(2, 4),))])
    assert len(list(lockstep.at("first"))) == 1
    with pytest.raises(RuntimeError, match="in the middle"):
        list(lockstep.at("second"))
    assert "forward" not in vars(model.second)


def test_fused_attention_is_on_again_afterwards() -> None:
    lockstep = Lockstep(network(), network(), batches(2, 2))
    assert torch.backends.mha.get_fastpath_enabled()
    for name in LAYERS:
        list(lockstep.at(name))
    lockstep.answers()
    assert torch.backends.mha.get_fastpath_enabled()
