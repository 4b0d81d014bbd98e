"""Batch-norm statistics and biases after a change: against NumPy's, and left alone where they would not help."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.curvature.gram import Statistics
from featherweight.mend import corrected_bias, reestimate_batch_norm


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )
    for _ in range(30):
        model(randn(16, 2, 6, 6, seed=1))
    return model.eval()


def batches(*sizes: int) -> Callable[[], list[Inputs]]:
    return lambda: [Inputs((randn(size, 2, 6, 6, seed=index) + index,)) for index, size in enumerate(sizes)]


def falling() -> Callable[[nn.Module], float]:
    """A distance that is less every time it is asked for."""
    asked: list[float] = []

    def distance(model: nn.Module) -> float:
        asked.append(-len(asked))
        return asked[-1]

    return distance


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}


NORMS = {"1", "4"}


def test_statistics_become_those_of_what_reaches_the_norms_now() -> None:
    model = net()
    assert reestimate_batch_norm(model, batches(6, 10, 3), falling(), NORMS)
    seen = [model[0](inputs.args[0]).detach().double() for inputs in batches(6, 10, 3)()]
    shares = [size / 19 for size in (6, 10, 3)]
    mean = sum(share * x.mean((0, 2, 3)) for share, x in zip(shares, seen, strict=True))
    variance = sum(share * x.var((0, 2, 3), correction=1) for share, x in zip(shares, seen, strict=True))
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-5)


def test_later_norms_see_what_the_earlier_ones_then_give() -> None:
    """With one batch, outputs are normalised to mean 0 and variance 1 all through."""
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(3)
    assert reestimate_batch_norm(model, batches(20), falling(), NORMS)
    y = model(batches(20)()[0].args[0]).detach()
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=5e-3)
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-2)


def test_it_undoes_what_a_change_of_scale_did() -> None:
    model = net()
    original, like_training = copy.deepcopy(model), [Inputs((randn(16, 2, 6, 6, seed=seed),)) for seed in (1, 2)]
    with torch.no_grad():
        model[0].weight.mul_(0.5)

    def distance(other: nn.Module) -> float:
        return sum(float((other(*i.args) - original(*i.args)).detach().square().sum()) for i in like_training)

    before = distance(model)
    assert reestimate_batch_norm(model, lambda: like_training, distance, NORMS)
    assert distance(model) < 0.25 * before


@pytest.mark.parametrize("after", [0.0, 1.0, math.nan])
def test_what_does_not_come_nearer_is_not_kept(after: float) -> None:
    model = net()
    before, answers = buffers(model), iter([0.0, after])
    assert not reestimate_batch_norm(model, batches(8), lambda _: next(answers), NORMS)
    assert changed(before, model) == set()


def test_only_the_norms_that_are_named_change() -> None:
    model = net()
    before = buffers(model)
    assert reestimate_batch_norm(model, batches(8), falling(), {"4"})
    assert changed(before, model) == {"4.running_mean", "4.running_var"}


@pytest.mark.parametrize("training", [True, False])
def test_only_the_statistics_change(training: bool) -> None:
    model = net().train(training)
    model[4].eval()
    parameters = [p.clone() for p in model.parameters()]
    before, flags = buffers(model), [m.training for m in model.modules()]
    assert reestimate_batch_norm(model, batches(8, 8), falling(), NORMS)
    assert changed(before, model) == {f"{n}.running_{what}" for n in NORMS for what in ("mean", "var")}
    assert [m.training for m in model.modules()] == flags
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("where", ["distance", "data", "model"])
def test_trouble_on_the_way_leaves_the_model_as_it_was(where: str) -> None:
    model = net()
    before, answers = buffers(model), iter([0.0])

    def distance(_: nn.Module) -> float:
        return next(answers) if where == "distance" else 0.0

    def data() -> Any:
        yield from batches(8)()
        if where == "data":
            raise OSError("the disk is gone")
        yield Inputs((randn(8, 5, 6, 6),) if where == "model" else (randn(8, 2, 6, 6),))

    with pytest.raises((StopIteration, OSError, RuntimeError)):
        reestimate_batch_norm(model, data, distance, NORMS)
    assert changed(before, model) == set()
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.1]
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("sizes", [(8, 1), (1, 8), (1, 8, 1)])
def test_a_batch_of_one_sample_is_no_trouble(sizes: tuple[int, ...]) -> None:
    """The last batch of 65 images split by 64: a norm over features refuses to train on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    given = [Inputs((randn(size, 3, seed=index) + index,)) for index, size in enumerate(sizes)]
    assert reestimate_batch_norm(model, lambda: given, falling(), {"1"})
    x = model[0](given[sizes.index(8)].args[0]).detach()
    torch.testing.assert_close(model[1].running_mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, x.var(0), rtol=1e-5, atol=1e-6)


def test_without_a_batch_that_serves_nothing_is_lost() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var.fill_(7)
    before = buffers(model)
    given = [Inputs((randn(1, 3),))] * 3
    reestimate_batch_norm(model, lambda: given, falling(), {"1"})
    assert changed(before, model) == set()


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)], ids=str
)
def test_norms_without_statistics_of_a_population_are_no_matter(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm).eval()
    assert not reestimate_batch_norm(model, batches(8), falling(), {"1"})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_bias_makes_up_for_the_mean(groups: int, kernel: tuple[int, ...]) -> None:
    """E[W x + b] of the original's inputs is what Ŵ x̂ + b̂ comes to on the changed ones, group by group."""
    if groups > 1 and not kernel:
        return
    weight, replaced = randn(6, 4, *kernel, seed=1).double(), randn(6, 4, *kernel, seed=2).double()
    width = weight[0].numel()
    was, now = randn(groups, 50, width, seed=3).double() + 1, randn(groups, 50, width, seed=4).double() - 1
    bias = randn(6, seed=5).double()
    nothing = torch.zeros(groups, width, width)
    answers = torch.stack([(was[g] @ weight.reshape(groups, -1, width)[g].T).mean(0) for g in range(groups)])
    answers += bias.reshape(groups, -1)
    seen = Statistics(nothing, now.mean(1), cross=answers[..., None] * now.mean(1)[:, None], answer_mean=answers)
    found = corrected_bias(weight, bias, replaced, seen)

    def mean(matrix: Tensor, x: Tensor, offset: Tensor) -> Tensor:
        parts = matrix.reshape(groups, -1, width)
        return torch.cat([(x[g] @ parts[g].T).mean(0) for g in range(groups)]) + offset

    torch.testing.assert_close(mean(replaced, now, found), mean(weight, was, bias))
    alone = corrected_bias(weight, bias, replaced, Statistics(nothing, now.mean(1)))
    torch.testing.assert_close(mean(replaced, now, alone), mean(weight, now, bias))


def test_the_bias_keeps_its_type() -> None:
    seen = Statistics(torch.zeros(1, 4, 4), torch.ones(1, 4))
    weight = randn(3, 4).bfloat16()
    assert corrected_bias(weight, torch.zeros(3).bfloat16(), weight, seen).dtype == torch.bfloat16
    assert torch.equal(corrected_bias(weight, torch.ones(3).bfloat16(), weight, seen), torch.ones(3).bfloat16())
