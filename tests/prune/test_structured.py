"""Structured pruning as a user sees it: what goes, what stays and why, and how near the answers come."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Attention, Mixed, Residual, Transformer, assert_same_state, make, task_of, train
from torch import Tensor, nn

import featherweight as fw
from featherweight import factorize, prune, quantize
from featherweight.cost.count import profile
from featherweight.edits import Narrow, Replace
from featherweight.errors import BudgetError, NoEffect, RecipeError
from featherweight.forms import constrained_tensors
from featherweight.graph import GraphError, couple, narrow
from featherweight.prune.structured import RIDGE, SCORES
from featherweight.score import Divergence


class Wide(nn.Module):
    """Two wide convolutions with a norm and a classifier of two layers: (samples, 3, 6, 6) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.two = nn.Conv2d(24, 32, 3, padding=1)
        self.hidden = nn.Linear(32, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.two(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(5))


class Written(Wide):
    """The same with its width written into the forward: only a captured graph can be narrower."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.two(x)).mean((2, 3)).view(-1, 32)
        return self.head(torch.relu(self.hidden(x)))


class Wider(nn.Module):
    """Convolutions of more channels: (samples, 3, 6, 6) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 40, 3), nn.Conv2d(40, 64, 3)
        self.three, self.head = nn.Conv2d(64, 64, 1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head(torch.relu(self.three(x)).mean((2, 3)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return Wide.data(samples)


class Pair(nn.Module):
    """Two inputs by name, as a dict gives them: (samples, 6) and (samples, 6) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 24), nn.Linear(6, 24)
        self.hidden, self.head = nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        x = torch.relu(self.left(left) - 2 * self.right(right))
        return self.head(torch.relu(self.hidden(x)))

    @staticmethod
    def data(samples: int) -> dict[str, Tensor]:
        both = torch.randn(2, samples, 6, generator=torch.Generator().manual_seed(5))
        return {"right": both[0], "left": both[1], "labels": torch.zeros(samples)}


class WrittenPair(Pair):
    """The same with its width written into the forward: only a captured graph can be narrower."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(left, right - 0 * self.left(left).view(-1, 24).mean(1, keepdim=True))


class Unread:
    """Calibration batches of which only the first may be looked at, for its type and shape."""

    def __iter__(self) -> Iterator[Tensor]:
        yield Wide.data(2)
        raise AssertionError("calibration was read")


def unread(example: Tensor) -> fw.Task:
    """A task that may not be worked on."""
    return fw.Task(example, calibration=Unread(), evaluate=lambda model: 0.0)


def off(original: nn.Module, compressed: fw.Compressed, samples: int = 64) -> float:
    """How far the answers are from the original's, as a share of how far those are spread; on data not seen."""
    data = type(original).data(2 * samples)[samples:]
    with torch.no_grad():
        right, given = (copy.deepcopy(model).eval()(data) for model in (original, compressed.model))
    return float((given - right).norm() / (right - right.mean(0)).norm())


def sizes(compressed: fw.Compressed) -> dict[str, int]:
    """The number of outputs of every layer with a weight."""
    return {n.removesuffix(".weight"): len(p) for n, p in compressed.model.named_parameters() if p.ndim > 1}


def notes(compressed: fw.Compressed) -> str:
    return "\n".join(compressed.ledger.steps[-1].notes)


def planted(*, twins: bool) -> Wide:
    """Of the 24 channels of `one`, the first 6 are always zero; with twins, 6 are those before them once more."""
    model = make(Wide)
    with torch.no_grad():
        model.norm.bias.abs_()  # of the others none is nearly always zero too
        for tensor in (model.norm.weight, model.norm.bias):
            tensor[:6] = 0
        model.one.weight[:6] *= 4  # larger than the others by magnitude: only who looks at the data finds them
        for tensor in (model.one.weight, model.one.bias, *model.norm.parameters(), *model.norm.buffers()):
            if tensor.ndim and twins:
                tensor[12:18] = tensor[6:12]
    return model


# How near the answers come


def test_channels_that_say_nothing_are_found_and_lose_nothing():
    model = planted(twins=False)
    compressed = fw.compress(model, prune.Channels(ratio={"one *": 0.25}, reconstruct=False), task=task_of(model, 64))
    (edit,) = compressed.edits
    assert isinstance(edit, Narrow)
    assert edit.narrowing.kept == {"one channels": tuple(range(6, 24))}
    assert sizes(compressed) == {"one": 18, "two": 32, "hidden": 40, "head": 5}
    assert off(model, compressed) < 1e-5


def test_what_a_channel_said_that_another_says_too_is_taken_over_by_it():
    model = planted(twins=True)
    compressed = fw.compress(model, prune.Channels(ratio={"one *": 0.5}), task=task_of(model, 64))
    (edit,) = compressed.edits
    kept = set(edit.narrowing.kept["one channels"])
    assert not kept & set(range(6))
    assert all(len(kept & {n, n + 6}) == 1 for n in range(6, 12))
    assert off(model, compressed) < 0.02
    alone = fw.compress(model, prune.Channels(ratio={"one *": 0.5}, reconstruct=False), task=task_of(model, 64))
    assert off(model, alone) > 10 * off(model, compressed)
    by_chance = fw.compress(model, prune.Channels(ratio={"one *": 0.5}, score="random"), task=task_of(model, 64))
    assert off(model, by_chance) > 5 * off(model, compressed)


@pytest.mark.parametrize("kind", [Wide, Written, Residual, Attention], ids=lambda kind: kind.__name__)
def test_refitted_layers_bring_the_answers_nearer(kind):
    model = make(kind)
    with_it, without = (
        fw.compress(model, prune.Channels(ratio=0.3, reconstruct=reconstruct), task=task_of(model, 128))
        for reconstruct in (None, False)
    )
    assert sizes(with_it) == sizes(without)
    assert off(model, with_it) < off(model, without)


def reached(model: nn.Module, name: str, batches: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What goes into a layer and comes out of it, position by position, batch by batch: (samples, positions, ...)."""
    layer, found = model.get_submodule(name), []

    def note(module: nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            x, answer = F.unfold(args[0], layer.kernel_size, padding=layer.padding).mT, answer.flatten(2).mT
        else:
            x, answer = args[0][:, None], answer[:, None]
        found.append((x.double(), answer.double()))

    handle = layer.register_forward_hook(note)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return found


@pytest.mark.parametrize("positions", [None, 4])
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("kind", [Wide, Written], ids=lambda kind: kind.__name__)
def test_linear_reconstruction_is_numpys_least_squares(kind, asymmetric, positions):
    model, ratio = make(kind), {"one *": 0.5, "two *": 0.5}
    step = prune.Channels(ratio=ratio, reconstruct="linear", asymmetric=asymmetric, positions=positions)
    compressed = fw.compress(model, step, task=task_of(model, 64))
    tensors, batches = compressed.edits[0].narrowing.tensors, kind.data(64).split(16)
    for name, taps in (("two", 9), ("hidden", 1)):
        width = model.get_submodule(name).weight.shape[1]
        rows, columns = (torch.tensor(tensors[f"{name}.weight"].get(d, range(40))) for d in (0, 1))
        columns = (columns[:, None] * taps + torch.arange(taps)).flatten()
        was = reached(model, name, batches)
        if asymmetric and kind is Wide:  # a captured graph calls no layers
            x = [now for now, _ in reached(compressed.model, name, batches)]
        else:
            x = [then[..., columns] for then, _ in was]
        wanted = [answer[..., rows] for _, answer in was]
        if positions is not None and name == "two":
            generator = torch.Generator().manual_seed(0)
            drawn = [torch.rand(*one.shape[:2], generator=generator).argsort(1)[:, :positions, None] for one in x]
            x, wanted = (
                [one.take_along_dim(at, 1) for one, at in zip(all_, drawn, strict=True)] for all_ in (x, wanted)
            )
        x, wanted = (torch.cat(one).flatten(0, 1) for one in (x, wanted))
        assert len(x) == {("two", None): 64 * 36, ("two", 4): 64 * 4}.get((name, positions), 64)
        prior = model.get_submodule(name).weight.detach().double().reshape(-1, width * taps)[rows][:, columns]
        away, right = x - x.mean(0), wanted - wanted.mean(0)
        ridge = math.sqrt(RIDGE * float(away.square().sum()) / len(columns)) * torch.eye(len(columns)).double()
        tall, answers = (torch.cat(both).numpy() for both in ((away, ridge), (right, ridge @ prior.T)))
        expected = torch.from_numpy(np.linalg.lstsq(tall, answers, rcond=None)[0].T)
        weight, bias = (compressed.model.get_parameter(f"{name}.{part}").detach() for part in ("weight", "bias"))
        torch.testing.assert_close(weight.flatten(1).double(), expected, rtol=2e-3, atol=2e-4)
        constant = wanted.mean(0) - expected @ x.mean(0)
        torch.testing.assert_close(bias.double(), constant, rtol=2e-3, atol=2e-4)


class Unbiased(nn.Module):
    """A convolution whose constants only the norm behind it can take up: (samples, 3, 6, 6) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def before(self, x: Tensor) -> Tensor:
        return self.norm(self.two(torch.relu(self.one(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.before(x)).mean((2, 3)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return Wide.data(samples)


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("positions", [None, 1])
def test_means_alone_are_put_right_by_biases_and_norms(asymmetric, positions):
    model, x = make(Unbiased), Wide.data(64)
    task, settings = task_of(model, 64), {"ratio": {"one *": 0.5}, "batch_norm": False}
    cut = fw.compress(model, prune.Channels(**settings, reconstruct=False), task=task).model
    step = prune.Channels(**settings, reconstruct="bias", asymmetric=asymmetric, positions=positions)
    mended = fw.compress(model, step, task=task).model
    changed = {n for n, t in mended.state_dict().items() if not torch.equal(t, cut.state_dict()[n])}
    # What does not read narrowed inputs needs nothing where the original's own inputs are looked at.
    assert changed == ({"norm.running_mean", "head.bias"} if asymmetric else {"norm.running_mean"})
    with torch.no_grad():
        right, off, now = (m.before(x).mean((0, 2, 3)) for m in (model, cut, mended))
        ends = [m(x).mean(0) for m in (model, mended)]
    exact = positions is None
    assert float((off - right).abs().amax()) > 0.1
    assert torch.allclose(now, right, rtol=1e-4, atol=1e-5) == exact, "a sample's mean is not that of all"
    assert not asymmetric or torch.allclose(*ends, rtol=1e-4, atol=1e-5)


def test_batch_norms_are_re_estimated_unless_that_is_left_out():
    model = make(Unbiased)
    model.norm.momentum = 1.0
    model.train()(Wide.data(64))  # as if it had been trained on such data
    model.eval()
    off, on = (
        fw.compress(model, prune.Channels(ratio={"one *": 0.5}, reconstruct=False, batch_norm=on), task=task_of(model))
        for on in (False, True)
    )
    statistics = {"norm.running_mean", "norm.running_var"}
    before, after = off.model.state_dict(), on.model.state_dict()
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == statistics
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in statistics)


def test_the_units_that_the_loss_misses_least_go():
    model = make(Wide)
    found = {
        score: off(model, fw.compress(model, prune.Channels(ratio=0.5, score=score), task=task_of(model, 128)))
        for score in ("loss", "random")
    }
    assert found["loss"] < 0.8 * found["random"], found


@pytest.mark.parametrize("score", SCORES)
def test_every_score_keeps_as_many(score):
    model = make(Residual)
    compressed = fw.compress(model, prune.Channels(ratio=0.5, score=score), task=task_of(model))
    (entry,) = compressed.ledger.steps
    assert sizes(compressed) == {"stem": 8, "one": 12, "two": 8, "down": 10, "head": 7}
    for choice in entry.choices.values():
        kept, size = map(int, choice.chosen.setting.split(" of "))
        assert kept == size / 2
        losses = [point.predicted_loss for point in choice.curve]
        if score == "loss":
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] == 0
        else:  # scores add up to no loss
            assert set(losses) == {None}
    assert ("Predicted rise of the loss" in str(compressed)) == (score == "loss")


def test_a_score_that_says_nothing_of_a_group_is_replaced_and_that_is_said():
    model = make(Transformer)
    for score, why in (("batch_norm", "no batch norm scales their units"), ("activation", "there are no statistics")):
        compressed = fw.compress(model, prune.Channels(ratio=0.5, score=score), task=task_of(model))
        assert f"ranked by l2, as {why}" in notes(compressed)
    model = make(Residual)
    compressed = fw.compress(model, prune.Channels(ratio=0.5, score="batch_norm"), task=task_of(model))
    assert "ranked by l2, as no batch norm scales their units: down channels" in notes(compressed)


@pytest.mark.parametrize("score", ["l1", "l2", "geometric_median"])
def test_units_that_only_parts_of_a_weight_make_have_scores_too(score):
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.attention = nn.MultiheadAttention(8, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:  # three inputs, so that the weight of the projections is split
            x = self.first(x)
            return self.attention(x.clone(), x.clone(), x.clone(), need_weights=False)[0]

    compressed = fw.compress(make(Cross), prune.Channels(ratio=0.5, score=score), task=fw.Task(torch.randn(1, 3, 6)))
    assert compressed.model.attention.in_proj_weight.shape[0] < 24


# Budgets


@pytest.mark.parametrize("select", ["optimal", "uniform", "between", "global", "classes"])
@pytest.mark.parametrize("budget", [fw.Budget(macs=0.5), fw.Budget(params=0.4), fw.Budget(bytes=0.7)], ids=str)
def test_a_budget_is_met_from_below_and_used_up(budget, select):
    model = make(Wide)
    task = task_of(model)
    compressed = fw.compress(model, prune.Channels(budget=budget, select=select), task=task)
    ((metric, share),) = budget.costs().items()
    before, after = (profile(m, task.inputs()).total.metric(metric) for m in (model, compressed.model))
    assert after <= share * before
    assert after >= 0.99 * share * before or "of the limit" in notes(compressed)


class Joined(nn.Module):
    """Concatenations, as in DenseNet, where many groups get wider at the same share: (samples, 3, 6, 6) → (.., 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.more = nn.ModuleList(nn.Conv2d(16 + 8 * n, 8, 3, padding=1) for n in range(4))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.more:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(x.mean((2, 3)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return Wide.data(samples)


@pytest.mark.parametrize("select", ["measured", "optimal", "uniform", "between", "global", "classes"])
@pytest.mark.parametrize("multiple", [1, {"more.*": 2, "stem*": 3}], ids=["any", "multiples"])
def test_a_budget_is_used_up_until_no_group_fits_a_step_wider(select, multiple):
    model = make(Joined)
    task = task_of(model, 64)
    step = prune.Channels(budget=fw.Budget(macs=0.5), select=select, multiple_of=multiple)
    compressed = fw.compress(model, step, task=task)
    limit = 0.5 * profile(model, task.inputs()).total.macs
    said = [note for note in compressed.ledger.steps[0].notes if "of the limit" in note]
    used = profile(compressed.model, task.inputs()).total.macs / limit
    assert used <= 1
    if used >= 0.99:
        assert not said, "of spreads that were not taken nothing is said"
        return
    assert said == [f"the cost came to {used:.3f} of the limit: no group fits that is a step wider"]
    kept = {name: int(c.chosen.setting.split(" of ")[0]) for name, c in compressed.ledger.steps[0].choices.items()}
    coupling = couple(model, task.inputs())
    for name in kept:
        by = multiple if isinstance(multiple, int) else multiple["stem*" if "stem" in name else "more.*"]
        wider = {**kept, name: min(coupling.group(name).size, kept[name] + by)}
        if wider != kept:
            units = {group: range(width) for group, width in wider.items()}
            assert profile(narrow(model, coupling, units).module, task.inputs()).total.macs > limit


def test_of_the_widths_that_are_tried_out_the_best_are_taken():
    model = make(Wide)
    task = task_of(model, 128)
    away = {
        select: Divergence(model, task)(
            fw.compress(model, prune.Channels(budget=fw.Budget(macs=0.4), select=select), task=task).model
        )
        for select in ("optimal", "between", "uniform")
    }
    chosen = fw.compress(model, prune.Channels(budget=fw.Budget(macs=0.4)), task=task)
    assert Divergence(model, task)(chosen.model) <= min(away.values()) * 1.001
    assert "widths were chosen by measured divergence: optimal" in notes(chosen)


def test_a_threshold_takes_what_loses_no_more_than_it():
    model, threshold = planted(twins=False), 1e-3
    step = prune.Channels(threshold=threshold)
    choices = fw.compress(model, step, task=task_of(model, 64)).ledger.steps[0].choices
    for choice in choices.values():
        lost = [point.predicted_loss for point in choice.curve]
        assert choice.chosen.predicted_loss == max(loss for loss in lost if loss <= threshold)
    assert int(choices["one channels"].chosen.setting.split()[0]) <= 18, "six channels are always zero"


def test_a_threshold_of_scores_takes_what_has_no_more_than_that_share_of_them():
    model, threshold = make(Wide), 0.3
    compressed = fw.compress(model, prune.Channels(threshold=threshold, score="l1"), task=task_of(model))
    worth = (model.hidden.weight.abs().sum(1) + model.head.weight.abs().sum(0)).detach()
    lost = (worth.sort().values / worth.sum()).cumsum(0)
    assert sizes(compressed)["hidden"] == 40 - int((lost <= threshold).sum())


def test_scores_by_gradient_find_what_the_answers_do_not_depend_on():
    model = make(Wide)
    with torch.no_grad():
        model.two.weight[:, ::2] = 0  # nothing reads every other channel of `one`
        model.one.weight[::2] *= 10
    for score in ("taylor", "fisher", "hessian", "input_l2"):
        step = prune.Channels(ratio={"one *": 0.5}, score=score, reconstruct=False)
        (edit,) = fw.compress(model, step, task=task_of(model, 32)).edits
        assert isinstance(edit, Narrow)
        if score == "input_l2":
            assert edit.narrowing.kept["one channels"] == tuple(range(1, 24, 2))
        else:  # weights of a channel that nothing reads have no gradient
            assert set(edit.narrowing.kept["one channels"]) == set(range(1, 24, 2))


@pytest.mark.parametrize("penalty", ["group_lasso", "growing", "slimming"])
def test_a_penalty_drives_units_to_zero_before_they_go(penalty):
    model = make(Wide)
    images = Wide.data(64)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        target = model(images).argmax(1)
    seen = {}

    def train(given: nn.Module, epochs: float, loss=None) -> None:
        optimizer = torch.optim.SGD(given.parameters(), lr=0.02)
        for _ in range(round(60 * epochs)):
            optimizer.zero_grad()
            loss(given(images), target).backward()
            optimizer.step()
        seen["scales"] = given.norm.weight.detach().abs().sort().values
        seen["filters"] = given.two.weight.detach().flatten(1).norm(dim=1).sort().values

    weight = {"group_lasso": 0.5, "growing": 20.0, "slimming": 0.5}[penalty]
    step = prune.Channels(ratio=0.5, score="l2", penalty=penalty, penalty_weight=weight, penalty_epochs=2)
    small = fw.compress(model, step, task=task_of(model, 64, train=train))
    assert sizes(small)["two"] == 16
    if penalty == "slimming":
        assert float(seen["scales"].sum()) < 0.6 * float(before["norm.weight"].abs().sum())
    else:
        was = before["two.weight"].flatten(1).norm(dim=1).sort().values
        assert float(seen["filters"][:16].sum()) < 0.6 * float(was[:16].sum())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_scales_that_were_penalised_decide_unless_another_score_is_given():
    model = make(Wide)
    task = task_of(model, 64, train=lambda *_, **__: None)
    settings = {"ratio": 0.5, "penalty": "slimming"}
    kept = {
        score: fw.compress(model, prune.Channels(score=score, **settings), task=task).edits[0].narrowing.kept
        for score in (None, "batch_norm", "loss")
    }
    assert kept[None] == kept["batch_norm"] != kept["loss"]


def test_a_penalty_without_anything_to_put_it_on_is_an_error():
    model = make(Transformer)
    step = prune.Channels(ratio=0.5, penalty="slimming")
    with pytest.raises(RecipeError, match="the model has no batch norms with scales"):
        fw.compress(model, step, task=task_of(model, train=lambda *_, **__: None))


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
def test_rounds_on_other_schedules_end_at_the_same_widths(schedule):
    model = make(Wide)
    task = task_of(model, 64)
    ends = [
        sizes(fw.compress(model, prune.Channels(ratio=0.5, rounds=3, schedule=kind), task=task))
        for kind in ("cubic", schedule)
    ]
    assert all(abs(ends[0][name] - ends[1][name]) <= 1 for name in ends[0]), ends  # every round gives whole numbers


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_budget_of_a_wider_network_is_used_up_to_a_hundredth(share):
    model = make(Wider)
    task = task_of(model, 32)
    compressed = fw.compress(model, prune.Channels(budget=fw.Budget(macs=share)), task=task)
    before, after = (profile(m, task.inputs()).total.macs for m in (model, compressed.model))
    assert 0.99 * share * before <= after <= share * before


@pytest.mark.parametrize("kind", [Wide, Written])
def test_budgets_of_a_network_with_masks_are_met(kind):
    model = make(kind)
    task = task_of(model)
    masked = fw.compress(model, prune.Magnitude(sparsity=0.5), task=task).model
    before = profile(masked, task.inputs()).total
    compressed = fw.compress(masked, prune.Channels(budget=fw.Budget(macs=0.5, params=0.6)), task=task)
    after = profile(compressed.model, task.inputs()).total
    assert after.macs <= 0.5 * before.macs
    assert after.params <= 0.6 * before.params
    if kind is Wide:  # its own class, masks and all: only what they keep counts
        weights = sum(int(module.weight.count_nonzero()) for _, module, _ in constrained_tensors(compressed.model))
        others = sum(p.numel() for n, p in compressed.model.named_parameters() if not n.endswith("original"))
        assert after.params == weights + others
        coarse = fw.compress(compressed.model, quantize.Weights(bits=4), task=task)
        assert coarse.ledger.after.total.params == after.params


def test_two_budgets_hold_together():
    model = make(Wide)
    task = task_of(model)
    compressed = fw.compress(model, prune.Channels(budget=fw.Budget(macs=0.7, params=0.4)), task=task)
    before, after = (profile(m, task.inputs()).total for m in (model, compressed.model))
    assert after.macs <= 0.7 * before.macs
    assert 0.99 * 0.4 * before.params <= after.params <= 0.4 * before.params


def test_chosen_widths_lose_less_than_the_same_share_of_every_group():
    model = planted(twins=True)
    found = {}
    for select in ("optimal", "uniform"):
        step = prune.Channels(budget=fw.Budget(macs=0.6), select=select)
        compressed = fw.compress(model, step, task=task_of(model, 128))
        (entry,) = compressed.ledger.steps
        found[select] = sum(choice.chosen.predicted_loss for choice in entry.choices.values())
        assert entry.selected_by == select
    assert found["optimal"] < found["uniform"]


def test_a_budget_out_of_reach_is_refused_before_anything_slow():
    model = make(Wide)
    task = unread(Wide.data(1))
    with pytest.raises(BudgetError, match=r"macs ≤ 0\.001 cannot be met: .* macs come to 0\.0\d+ of what they are"):
        fw.compress(model, prune.Channels(budget=fw.Budget(macs=0.001)), task=task)
    with pytest.raises(
        BudgetError, match=r"cannot be met: .* or lower minimum or multiple_of, which hold one channels, "
    ):
        fw.compress(model, prune.Channels(budget=fw.Budget(macs=0.3), minimum=20), task=task)


def test_a_budget_that_is_met_already_changes_nothing():
    model = make(Wide)
    with pytest.warns(NoEffect, match="its cost is better spent as it is"):
        compressed = fw.compress(model, prune.Channels(budget=fw.Budget(macs=1.0)), task=task_of(model))
    assert_same_state(compressed.model, model)


# What may go


def test_a_ratio_for_every_group_of_its_own():
    model = make(Wide)
    compressed = fw.compress(model, prune.Channels(ratio={"one *": 0.5, "hidden*": 0.25}), task=task_of(model))
    assert sizes(compressed) == {"one": 12, "two": 32, "hidden": 30, "head": 5}
    (entry,) = compressed.ledger.steps
    assert entry.left == {"two": "nothing less was asked of it", "head": "it is the network's output"}
    assert {name: choice.chosen.setting for name, choice in entry.choices.items()} == {
        "one channels": "12 of 24",
        "two channels": "as it is",
        "hidden neurons": "30 of 40",
    }


def test_multiples_and_minima_are_kept_and_said():
    model = make(Wide)
    step = prune.Channels(ratio=0.6, multiple_of={"one*": 8, "*": 1}, minimum={"hidden*": 25, "two*": 32})
    compressed = fw.compress(model, step, task=task_of(model))
    assert sizes(compressed) == {"one": 8, "two": 32, "hidden": 25, "head": 5}
    assert compressed.ledger.steps[0].left["two"] == "minimum and multiple_of allow it no other width"
    step = prune.Channels(budget=fw.Budget(macs=0.5), multiple_of=4)
    compressed = fw.compress(model, step, task=task_of(model))
    assert all(size % 4 == 0 for name, size in sizes(compressed).items() if name != "head")


def test_ignored_layers_lose_no_output_nor_does_what_goes_with_them():
    model = make(Residual)
    compressed = fw.compress(model, prune.Channels(ratio=0.5, ignore=("stem",)), task=task_of(model))
    assert sizes(compressed) == {"stem": 16, "one": 12, "two": 16, "down": 10, "head": 7}
    assert compressed.ledger.steps[0].left == {
        "stem": "ignored, as asked",
        "two": "it goes with stem, which is ignored",
        "head": "it is the network's output",
    }


class Normed(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.over = nn.LayerNorm(40)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        return self.head(self.over(self.hidden(torch.relu(self.two(x)).mean((2, 3)))))


def test_norms_over_what_was_kept_are_named_where_they_lose_something():
    model = make(Normed)
    said = "norms take their statistics over what was kept, not over zeros too: over"
    assert said in fw.compress(model, prune.Neurons(ratio=0.5), task=task_of(model)).ledger.steps[0].notes
    assert "statistics over what" not in notes(fw.compress(model, prune.Filters(ratio=0.5), task=task_of(model)))


class Flipped(Wide):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x))).flip(1)
        return self.head(torch.relu(self.hidden(torch.relu(self.two(x)).mean((2, 3)))))


@pytest.mark.parametrize("setting", [{"ratio": 0.5}, {"budget": fw.Budget(macs=0.6)}], ids=str)
def test_a_group_that_fails_the_check_stays_whole_and_the_rest_is_pruned(setting, monkeypatch):
    """Wherever a rule is wrong, as one that calls a shuffle the identity, only what it touches is left."""
    from featherweight.graph.rules import RULES

    monkeypatch.setitem(RULES, "flip", lambda call: call.axes("self"))
    model = make(Flipped)
    compressed = fw.compress(model, prune.Channels(**setting), task=task_of(model))
    made = sizes(compressed)
    assert made["one"] == 24
    assert made["two"] < 32
    assert "would answer otherwise" in compressed.ledger.steps[0].left["one"]
    assert set(compressed.ledger.steps[0].choices) == {"two channels", "hidden neurons"}
    assert compressed.ledger.after.total.macs < 0.6 * compressed.ledger.before.total.macs


@pytest.mark.parametrize(
    ("step", "expected", "left"),
    [
        (prune.Filters, {"one": 12, "two": 16, "hidden": 40}, {"hidden": "what it makes are neurons"}),
        (prune.Neurons, {"one": 24, "two": 32, "hidden": 20}, {"one": "what it makes are channels"}),
        (prune.Channels, {"one": 12, "two": 16, "hidden": 20}, {}),
    ],
)
def test_every_step_has_kinds_of_its_own(step, expected, left):
    model = make(Wide)
    compressed = fw.compress(model, step(ratio=0.5), task=task_of(model))
    assert sizes(compressed) == {**expected, "head": 5}
    for name, reason in left.items():
        assert compressed.ledger.steps[0].left[name] == f"{reason}, which this step leaves alone"


def test_heads_go_whole():
    model = make(Attention)
    compressed = fw.compress(model, prune.Heads(ratio=0.5), task=task_of(model))
    narrowed = compressed.model
    assert (narrowed.inward.weight.shape, narrowed.outward.weight.shape) == ((72, 16), (16, 24))
    assert (narrowed.embed.weight.shape, narrowed.head.weight.shape) == ((16, 8), (3, 16))
    (choice,) = compressed.ledger.steps[0].choices.values()
    assert choice.chosen.setting == "3 of 6"


def test_where_there_is_nothing_of_its_kind_that_is_said():
    model = make(Mixed)
    with pytest.warns(NoEffect, match="prune.Heads changed nothing: .*are neurons, which this step leaves alone"):
        compressed = fw.compress(model, prune.Heads(ratio=0.5), task=task_of(model))
    assert_same_state(compressed.model, model)
    with pytest.warns(NoEffect):
        fw.compress(model, prune.Heads(budget=fw.Budget(macs=1.0)), task=task_of(model))


def test_depthwise_layers_are_narrowed_or_left_with_what_they_go_with():
    class Separable(nn.Sequential):
        def __init__(self) -> None:
            depthwise = nn.Conv2d(16, 16, 3, groups=16)
            super().__init__(nn.Conv2d(3, 16, 3), depthwise, nn.Flatten(), nn.Linear(64, 5))

    def left(**settings: object) -> dict[str, str]:
        step = prune.Channels(ratio=0.5, **settings)
        return dict(fw.compress(make(Separable), step, task=fw.Task(Wide.data(1))).ledger.steps[0].left)

    assert left() == {"3": "it is the network's output"}
    with pytest.warns(NoEffect):
        assert left(ignore=("1",)) == {
            "0": "it goes with 1, which is ignored",
            "1": "ignored, as asked",
            "3": "it is the network's output",
        }


@pytest.mark.parametrize(
    ("build", "step", "said"),
    [
        (
            lambda: nn.Linear(4, 4),
            prune.Channels,
            r"finds nothing to remove \(weight: it is the network's output\), macs come to 1 of what they are; ask for",
        ),
        (lambda: make(Wide), prune.Heads, r"nothing to remove \(one: what it makes are channels, .*macs come to 1 of"),
    ],
    ids=["one layer", "no heads"],
)
def test_a_budget_is_refused_where_there_is_nothing_to_remove(build, step, said):
    model = build()
    example = torch.randn(1, 4) if isinstance(model, nn.Linear) else Wide.data(1)
    with pytest.raises(BudgetError, match=said):
        fw.compress(model, step(budget=fw.Budget(macs=0.5)), task=fw.Task(example))


# Settings that cannot be


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give one of budget=, ratio= and threshold="),
        ({"budget": fw.Budget(macs=0.5), "ratio": 0.5}, "give one of budget=, ratio= and threshold="),
        ({"threshold": -1.0}, "threshold is -1.0: it is what may be lost, 0 or more"),
        ({"threshold": 0.1, "rounds": 2}, "rounds need a budget or a ratio to go towards"),
        ({"ratio": 0.5, "normalize": "sum"}, "normalize is 'sum': use share, none, mean"),
        ({"ratio": 0.5, "schedule": "once"}, "schedule is 'once': use cubic, linear, geometric"),
        ({"ratio": 0.5, "penalty": "l0"}, "penalty is 'l0': use group_lasso, growing, slimming"),
        ({"ratio": 0.5, "penalty": "slimming"}, "penalty needs Task(train=...)"),
        ({"ratio": 0.5, "penalty": "slimming", "penalty_weight": 0.0}, "penalty_weight and penalty_epochs must be"),
        ({"budget": fw.Budget(drop=0.1)}, "is no limit that widths can be chosen by"),
        (
            {"budget": fw.Budget(energy=0.5)},
            "energy is no cost that widths can be chosen by: use macs, params, bytes or",
        ),
        ({"ratio": 1.0}, "ratio is 1.0: it is the share of units to remove, from 0 up to but not 1"),
        ({"ratio": {"one *": -0.5}}, "ratio is -0.5"),
        ({"ratio": 0.5, "score": "l3"}, "score is 'l3': use loss, lasso, l1"),
        ({"ratio": 0.5, "select": "best"}, "select is 'best': use measured, optimal, between, uniform"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of is 0: it must be at least 1"),
        ({"ratio": 0.5, "minimum": {"*": 0}}, "minimum is 0: it must be at least 1"),
        ({"ratio": 0.5, "reconstruct": "lasso"}, "reconstruct is 'lasso', a str: it takes bool or 'linear' or 'bias'"),
        ({"ratio": 0.5, "positions": 0}, "positions is 0: at least one position of every sample is looked at"),
        ({"ratio": 0.5, "reconstruct": False, "positions": 9}, "positions says how layers are fitted, which"),
        ({"ratio": 0.5, "reconstruct": False, "asymmetric": False}, "asymmetric=False says how layers are fitted"),
        ({"ratio": 0.5, "samples": 0}, "samples and rounds must be at least 1"),
        ({"ratio": 0.5, "epochs": -1}, "epochs at least 0"),
        ({"ratio": 0.5, "epochs": 1}, "epochs needs Task(train=...)"),
        ({"ratio": 0.5, "ignore": ("heads",)}, "the pattern 'heads' matches none of 5 layers; did you mean 'head'?"),
        ({"ratio": "half"}, "ratio is 'half', a str: it takes float"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_said_in_words(settings, said):
    model = make(Residual)
    problems = prune.Channels(**settings).problems(model, task_of(model))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    "settings",
    [
        *({"reconstruct": True}, {"reconstruct": "bias"}, {"asymmetric": False}, {"positions": 9}),
        *({"score": score} for score in ("lasso", "activation", "taylor")),
    ],
    ids=str,
)
def test_what_needs_calibration_data_says_so(settings):
    model = make(Residual)
    (problem,) = prune.Channels(ratio=0.5, **settings).problems(model, fw.Task(Residual.data(1)))
    assert "needs calibration data: give Task(calibration=...)" in problem


@pytest.mark.parametrize("setting", ["ratio", "multiple_of", "minimum"])
def test_a_pattern_that_matches_no_group_is_refused_before_anything_slow(setting):
    model = make(Wide)
    value: dict[str, float] = {"tow*": 0.5 if setting == "ratio" else 2}
    task = unread(Wide.data(1))
    with pytest.raises(
        RecipeError, match=r"the pattern 'tow\*' matches none of the groups, which are one channels, two"
    ):
        fw.compress(model, prune.Channels(**{"ratio": 0.5, setting: value}), task=task)


class Branching(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 0:
            x = -x
        return self.head(torch.relu(self.second(x)))


def test_a_model_without_a_graph_is_refused_with_the_line():
    model = make(Branching)
    task = fw.Task(Mixed.data(1), evaluate=lambda model: 0.0)
    said = r"the graph of Branching .* cannot be captured, at test_structured\.py:\d+: its code branches on the values"
    with pytest.raises(GraphError, match=said):
        fw.compress(model, prune.Channels(ratio=0.5), task=task)


def test_without_calibration_data_weights_decide_and_that_is_said():
    model = make(Wide)
    task = fw.Task(Wide.data(4))
    compressed = fw.compress(model, prune.Channels(ratio=0.5), task=task)
    assert "ranked by l2, as there are no statistics of what reads them: one channels, two channels" in notes(
        compressed
    )
    assert "Predicted rise" not in str(compressed)
    by_name = fw.compress(model, prune.Channels(ratio=0.5, score="l2"), task=task)
    assert_same_state(compressed.model, by_name.model)
    assert "ranked by l2" not in notes(by_name)


class Detached(Wide):
    """No gradient comes past the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.norm(self.one(x))))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)).detach())


def test_errors_of_layers_that_no_gradient_reaches_are_no_predicted_losses():
    model = make(Detached)
    compressed = fw.compress(model, prune.Channels(ratio=0.5), task=task_of(model))
    losses = {name: c.chosen.predicted_loss for name, c in compressed.ledger.steps[0].choices.items()}
    assert losses["hidden neurons"] > 0
    assert (losses["one channels"], losses["two channels"]) == (None, None)
    assert "Predicted rise" not in str(compressed)


# Networks out of the ordinary


class Tied(nn.Module):
    """The classifier's weight is the embedding's, and two Linear layers share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 11, bias=False)
        self.embedding = nn.Embedding(11, 16)
        self.head.weight = self.embedding.weight
        self.one = nn.Linear(16, 24)
        self.left = nn.Linear(24, 16)
        self.right = nn.Linear(24, 16)
        self.right.weight = self.left.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = torch.relu(self.one(x))
        return self.head(x + self.left(y) * torch.sigmoid(self.right(y)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randint(0, 11, (samples, 6), generator=torch.Generator().manual_seed(5))


def test_tied_weights_stay_tied_and_are_not_refitted_for_one_of_their_layers():
    model = make(Tied)
    compressed = fw.compress(model, prune.Channels(ratio=0.5), task=task_of(model))
    made = compressed.model
    assert made.head.weight is made.embedding.weight
    assert made.right.weight is made.left.weight
    assert made.head.weight.shape == (11, 8)
    (edit,) = compressed.edits
    rows = edit.narrowing.tensors["head.weight"][1]
    assert torch.equal(made.head.weight, model.head.weight[:, list(rows)]), "the embedding's numbers are its own"
    assert "not refitted, though what they read was narrowed" in notes(compressed)
    assert "that the example calls: left" in notes(compressed)


class Twice(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.second(x)))


def test_a_layer_called_twice_is_narrowed_and_refitted_for_both_calls():
    model = make(Twice)
    with_it, without = (
        fw.compress(model, prune.Neurons(ratio=0.25, reconstruct=reconstruct), task=task_of(model, 128))
        for reconstruct in (True, False)
    )
    assert sizes(with_it) == {"first": 18, "second": 18, "head": 4}
    assert off(model, with_it) < off(model, without)


class Recurrent(nn.Module):
    """An LSTM over tokens and two Linear layers behind its last answer: (samples, 5, 8) → (samples, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 20, batch_first=True)
        self.hidden = nn.Linear(20, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.lstm(x)[0][:, -1])))

    @staticmethod
    def data(samples: int) -> Tensor:
        return Attention.data(samples)


def test_hidden_units_of_recurrent_layers_go_in_all_their_gates():
    model = make(Recurrent)
    compressed = fw.compress(model, prune.Neurons(ratio=0.25), task=task_of(model, 64))
    narrowed = compressed.model
    assert (narrowed.lstm.hidden_size, narrowed.hidden.weight.shape) == (15, (12, 15))
    assert narrowed.lstm.weight_ih_l0.shape == (60, 8)
    without = fw.compress(model, prune.Neurons(ratio=0.25, reconstruct=False), task=task_of(model, 64))
    assert off(model, compressed) < off(model, without)


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("kind", ["own forward", "transposed", "weight norm"])
def test_layers_that_are_no_plain_ones_are_narrowed_and_keep_their_weights(kind):
    model = make(Wide)
    layers = {
        "own forward": lambda: Doubling(24, 32, 3, padding=1),
        "transposed": lambda: nn.ConvTranspose2d(24, 32, 3, padding=1),
        "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(24, 32, 3, padding=1)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.two = layers[kind]()
    with torch.no_grad():  # nothing is lost with units that are always zero
        model.norm.weight[::2] = 0
        model.norm.bias[::2] = 0
    step = prune.Channels(ratio={"one *": 0.5}, score="batch_norm")
    compressed = fw.compress(model, step, task=task_of(model, 64))
    assert sizes(compressed)["one"] == 12
    assert "not refitted, though what they read was narrowed" in notes(compressed)
    assert off(model, compressed) < 1e-5


def test_what_is_confined_behind_what_is_refitted_stays_as_it_is():
    model, task = make(Wide), task_of(make(Wide), 64)
    masked = fw.compress(model, prune.Magnitude(sparsity=0.5, ignore=("one", "two", "head")), task=task).model
    compressed = fw.compress(masked, prune.Channels(ratio={"one *": 0.5}), task=task).model
    assert not torch.equal(compressed.two.bias, masked.two.bias)
    assert torch.equal(compressed.hidden.weight, masked.hidden.weight)


@pytest.mark.parametrize("kind", ["standardised", "spectral norm"])
def test_what_a_layer_reads_stays_where_its_weights_would_change_without_it(kind):
    model = make(Wide)
    plain = nn.Conv2d(24, 32, 3, padding=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match kind:
            case "standardised":
                model.two = Standardised(24, 32, 3, padding=1)
            case "spectral norm":
                model.two = nn.utils.parametrizations.spectral_norm(plain)
    compressed = fw.compress(model, prune.Channels(ratio=0.5, score="l2"), task=task_of(model, 64))
    left = compressed.ledger.steps[0].left
    assert "the weights that stay would change" in left["one"]
    assert ("two" in left) == (kind == "spectral norm")
    assert compressed.model.one.out_channels == 24
    assert compressed.model.hidden.out_features == 20


def test_a_width_in_the_code_makes_a_graph_which_says_why_and_is_refitted(tmp_path):
    model = make(Written)
    step = prune.Channels(budget=fw.Budget(macs=0.5), select="optimal")
    compressed = fw.compress(model, step, task=task_of(model, 128))
    assert "a captured graph, no longer of its own class: its code has sizes written into it" in notes(compressed)
    (edit,) = compressed.edits
    assert edit.narrowing.form == "graph"
    assert "as a graph: its code has sizes" in edit.describe()
    same = make(Wide)
    module = fw.compress(same, step, task=task_of(same, 128))
    assert sizes(compressed) == sizes(module), "the same network, the same choice"
    assert off(model, compressed) < 2 * off(same, module)


def test_a_graph_says_what_of_the_models_training_is_not_in_it():
    class Trained(Written):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(5, 1, dropout=0.5, batch_first=True)
            self.norm.momentum = None

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if self.training:
                x = x * 2
            return x + self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]

    for kind, said in (
        (
            Trained,
            ("attention is without dropout: attention", "momentum=None stay as they are: norm", "only in training"),
        ),
        (Written, ()),
    ):
        note = fw.compress(make(kind), prune.Channels(ratio=0.5), task=fw.Task(kind.data(1))).ledger.steps[0].notes[-1]
        assert "Lengths of its inputs, the batch's apart, are the example's (float32[1, 3, 6, 6])" in note
        assert [part in note for part in ("without dropout", "momentum=None", "only in training")] == [bool(said)] * 3
        assert all(part in note for part in said)


def test_a_graph_that_takes_one_length_of_batch_says_so_and_refuses_others():
    class Counted(Written):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(0.1 for _ in range(len(x))) / len(x)

    def run(example: int, calibration: tuple[Tensor, ...]) -> fw.Compressed:
        task = fw.Task(Counted.data(example), calibration=calibration)
        return fw.compress(make(Counted), prune.Channels(ratio=0.5), task=task)

    said = "It takes only batches of 4, the example's: its code makes a fixed number of the batch's length"
    assert said in notes(run(4, ()))
    assert said in notes(run(4, Counted.data(32).split(4)))
    with pytest.raises(RecipeError, match=r"takes only batches of 1, as the example is, .* has batches of 16"):
        run(1, Counted.data(32).split(16))


# Run, kept, written


@pytest.mark.parametrize("kind", [Pair, WrittenPair], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("step", [prune.Channels, prune.Neurons])
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "no data"])
def test_inputs_that_are_dicts(kind, step, calibrated, tmp_path):
    model, data = make(kind), kind.data(64)
    example = {name: data[name][:1] for name in ("right", "left")}
    batches = [{name: tensor[i : i + 16] for name, tensor in data.items()} for i in range(0, 64, 16)]
    task = fw.Task(example, calibration=batches if calibrated else ())
    compressed = fw.compress(model, step(budget=fw.Budget(macs=0.6)), task=task)
    assert isinstance(compressed.model, kind) == (kind is Pair)
    assert compressed.model.left.weight.shape[0] < 24
    compressed.save(tmp_path / "pair.fw")
    loaded = fw.load(tmp_path / "pair.fw", into=make(kind, seed=1)).model
    left, right = data["left"], data["right"]
    with torch.no_grad():
        answer = compressed.model(right=right, left=left)
        assert torch.equal(loaded(left=left, right=right), answer)
        assert torch.equal(compressed.model(left, right), answer), "positions are those of the model's own forward"
        assert float((answer - model(left, right)).norm() / answer.norm()) < (0.7 if calibrated else 1.5)


@pytest.mark.parametrize("kind", [Wide, Written], ids=lambda kind: kind.__name__)
def test_files_exports_and_training_of_both_forms(kind, tmp_path):
    model = make(kind)
    model.two.bias.requires_grad_(False)
    task = task_of(model, 64, train=train)
    compressed = fw.compress(model, prune.Channels(ratio=0.5), task=task)
    assert [n for n, p in compressed.model.named_parameters() if not p.requires_grad] == ["two.bias"]
    x = kind.data(7)
    with torch.no_grad():
        answer = compressed.model(x)
    compressed.save(tmp_path / "small.fw")
    loaded = fw.load(tmp_path / "small.fw", into=make(kind, seed=1))
    with torch.no_grad():
        assert torch.equal(loaded.model(x), answer)
    assert list(loaded.edits) == list(compressed.edits)
    assert compressed.export("onnx", tmp_path / "small.onnx", [x]).difference < 1e-4
    assert compressed.export("torch_export", tmp_path / "small.pt2", [x]).difference < 1e-4
    copied = copy.deepcopy(compressed.model).train()
    copied(x).square().mean().backward()
    assert all(p.grad is not None for p in copied.parameters() if p.requires_grad)


def test_pruned_then_factorized():
    model = make(Residual)
    half, rest = fw.Budget(macs=0.6), fw.Budget(macs=0.4)
    task = task_of(model, 64)
    compressed = fw.compress(model, prune.Channels(budget=half), factorize.SpatialSVD(budget=rest), task=task)
    first, second = compressed.ledger.steps
    assert 0.57 * first.before.total.macs < first.after.total.macs <= 0.6 * first.before.total.macs
    assert second.before == first.after
    assert second.after.total.macs <= 0.4 * first.before.total.macs, "shares are of what the recipe was given"
    assert [type(edit) for edit in compressed.edits] == [Narrow, *[Replace] * (len(compressed.edits) - 1)]


def test_factorized_then_pruned(tmp_path):
    model = make(Residual)
    task = task_of(model, 64)
    steps = factorize.SpatialSVD(ratio=0.5), prune.Channels(ratio=0.25, ignore=("down",))
    compressed = fw.compress(model, *steps, task=task)
    (_, entry) = compressed.ledger.steps
    assert entry.left == {"down": "ignored, as asked", "head": "it is the network's output"}
    pair = compressed.model.down
    assert (pair.first.out_channels, pair.second.out_channels) == (12, 20), "an ignored layer is ignored in its parts"
    assert compressed.model.one.second.out_channels == 18
    compressed.save(tmp_path / "small.fw")
    loaded = fw.load(tmp_path / "small.fw", into=make(Residual, seed=1))
    with torch.no_grad():
        assert torch.equal(loaded.model(Residual.data(3)), compressed.model(Residual.data(3)))


@pytest.mark.parametrize("kind", [Wide, Written], ids=lambda kind: kind.__name__)
def test_a_plan_chooses_the_same_and_changes_nothing(kind):
    model = make(kind)
    before = copy.deepcopy(model.state_dict())
    recipe = fw.Recipe(prune.Channels(budget=fw.Budget(macs=0.5)))
    planned, done = recipe.plan(model, task_of(model)), recipe.run(model, task_of(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    (said,), (made,) = planned.steps, done.ledger.steps
    assert said.choices == made.choices
    assert said.after.total == made.after.total
    assert said.edits == ()


@pytest.mark.parametrize("kind", [Wide, Written], ids=lambda kind: kind.__name__)
def test_a_run_goes_on_behind_the_narrowing(kind, tmp_path):
    model = make(kind)
    task = task_of(model)
    steps = prune.Channels(ratio=0.5), prune.Neurons(ratio=0.5)
    whole = fw.compress(model, *steps, task=task)
    fw.compress(model, steps[0], task=task, folder=tmp_path)
    kept = fw.compress(model, steps[0], task=task, folder=tmp_path)
    again = fw.compress(model, *steps, task=task, folder=tmp_path)
    assert again.ledger.steps[0] == kept.ledger.steps[0], "it was not done again: even its seconds are the same"
    assert_same_state(again.model, whole.model)
    assert again.edits == whole.edits
    x = kind.data(3)
    with torch.no_grad():
        assert torch.equal(again.model(x), whole.model(x))


def test_fine_tuning_runs_after_the_narrowing():
    model = make(Wide)
    widths = []

    def tune(given: nn.Module, epochs: float, loss: object = None) -> None:
        widths.append((given.one.out_channels, epochs))
        with torch.no_grad():
            given.head.bias.add_(1)

    task = task_of(model, train=tune)
    plain, tuned = (fw.compress(model, prune.Channels(ratio=0.5, epochs=epochs), task=task) for epochs in (0, 2))
    assert widths == [(12, 2)]
    assert torch.equal(tuned.model.head.bias, plain.model.head.bias + 1)


def test_rounds_end_within_the_budget(tmp_path):
    model = make(Wide)
    step = prune.Channels(budget=fw.Budget(macs=0.4), rounds=3)
    compressed = fw.compress(model, step, task=task_of(model, 64))
    (entry,) = compressed.ledger.steps
    assert 0.9 * 0.4 * entry.before.total.macs < entry.after.total.macs <= 0.4 * entry.before.total.macs
    assert [type(edit) for edit in compressed.edits] == [Narrow] * 3
    compressed.save(tmp_path / "small.fw")
    loaded = fw.load(tmp_path / "small.fw", into=make(Wide, seed=1))
    with torch.no_grad():
        assert torch.equal(loaded.model(Wide.data(3)), compressed.model(Wide.data(3)))


@pytest.mark.parametrize("setting", [{"ratio": 0.97}, {"budget": fw.Budget(macs=0.2)}], ids=str)
@pytest.mark.parametrize("kind", [Wide, Written, Residual], ids=lambda kind: kind.__name__)
def test_the_record_of_rounds_says_the_width_at_the_end_of_that_at_the_start(kind, setting):
    model = make(kind)
    compressed = fw.compress(model, prune.Channels(rounds=4, **setting), task=task_of(model))
    (entry,) = compressed.ledger.steps
    was = {name: len(p) for name, p in model.named_parameters()}
    now = {name: len(p) for name, p in compressed.model.named_parameters()}
    for name, choice in entry.choices.items():
        weight = f"{name.split()[0]}.weight"
        kept, size = now[weight], was[weight]
        assert choice.chosen.setting == ("as it is" if kept == size else f"{kept} of {size}")
        assert choice.chosen.predicted_loss is None
        assert (choice.chosen.share < 1) == (kept < size)
    assert any(choice.chosen.setting != "as it is" for choice in entry.choices.values())


def test_the_record_of_rounds_says_nothing_of_a_round_that_was_not_made():
    model = make(Wide)
    task = task_of(model, evaluate=lambda given: sum(p.numel() for p in given.parameters()) / 10_000)
    step = prune.Channels(budget=fw.Budget(params=0.2, drop=0.5), rounds=4)
    compressed = fw.compress(model, step, task=task)
    (entry,), made = compressed.ledger.steps, sizes(compressed)
    was = {"one": 24, "two": 32, "hidden": 40, "head": 5}
    for name, choice in entry.choices.items():
        kept, size = made[name.split()[0]], was[name.split()[0]]
        assert choice.chosen.setting == ("as it is" if kept == size else f"{kept} of {size}")
    assert set(entry.left) == {name for name, size in was.items() if made[name] == size}


def test_rounds_end_before_more_than_the_drop_is_lost():
    model = make(Wide)
    task = task_of(model, 64, evaluate=lambda given: sum(p.numel() for p in given.parameters()) / 10_000)
    step = prune.Channels(budget=fw.Budget(params=0.2, drop=0.5), rounds=4)
    compressed = fw.compress(model, step, task=task)
    (entry,) = compressed.ledger.steps
    assert 0 < entry.before.score - entry.after.score <= 0.5
    assert "ended after round" in notes(compressed)
    assert sum(p.numel() for p in compressed.model.parameters()) > 0.2 * entry.before.total.params


def test_settings_survive_yaml():
    recipe = fw.Recipe(
        prune.Channels(budget=fw.Budget(macs=0.5, bytes="2 MB"), ignore=("stem", "head*"), multiple_of={"one*": 8}),
        prune.Filters(ratio={"conv*": 0.5}, score="lasso", reconstruct=False),
        prune.Neurons(ratio=0.25, minimum=4, samples=64, epochs=1.5),
        prune.Heads(ratio=0.5, select="uniform"),
        prune.Channels(ratio=0.5, score="loss", penalty="slimming"),
    )
    again = fw.Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.steps[0].ignore == ("stem", "head*")


@pytest.mark.parametrize("kind", [Wide, Written], ids=lambda kind: kind.__name__)
def test_reports_say_what_was_narrowed(kind, tmp_path):
    model = make(kind)
    compressed = fw.compress(model, prune.Channels(budget=fw.Budget(macs=0.5)), task=task_of(model))
    for name in ("report.html", "report.md", "report.json"):
        compressed.report(tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert kind.__name__ in text
        assert "hidden neurons" in text
    assert "prune.Channels" in str(compressed)


class Experts(nn.Module):
    """Weights that no layer holds, in products of all kinds, and a table of positions: (samples, 6, 10) → 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.route, self.head = nn.Linear(10, 12), nn.Linear(12, 2), nn.Linear(12, 3)
        self.position = nn.Parameter(torch.randn(1, 32, 12))
        self.into, self.out_of = nn.Parameter(torch.randn(2, 12, 8)), nn.Parameter(torch.randn(2, 8, 12))
        self.one, self.two = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8, 12))
        self.scale, self.size = nn.Parameter(torch.rand(12, 6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position[:, : x.shape[1]]
        hidden = torch.einsum("bti,eif->ebtf", x, self.into).relu()
        made = torch.einsum("ebtf,efo,bte->bto", hidden, self.out_of, self.route(x).softmax(-1))
        tokens = x.flatten(0, 1)
        x = x + made + torch.mm(torch.mm(tokens, self.one).relu(), self.two).view(x.shape)
        return self.head(x * (self.scale * self.size).sum(1)).mean(1)

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 6, 10, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("score", SCORES)
def test_units_of_weights_that_no_layer_holds_are_scored_and_go(score):
    model = make(Experts)
    compressed = fw.compress(model, prune.Channels(ratio=0.5, score=score), task=task_of(model))
    shapes = {name: tuple(p.shape) for name, p in compressed.model.named_parameters()}
    assert shapes["into"] == (2, 6, 4)
    assert shapes["two"] == (4, 6)
    assert shapes["scale"] == (6, 3)
    assert shapes["position"] == (1, 32, 6)
    assert compressed.model(Experts.data(2).repeat(1, 2, 1)).shape == (2, 3)


class Apart(nn.Module):
    """Weights that no Linear or Conv layer holds, some of which can be narrowed: (samples, 4) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.bounded = nn.EmbeddingBag(20, 12), nn.Embedding(20, 12, max_norm=1.0)
        self.into, self.hidden = nn.Parameter(torch.randn(12, 10)), nn.Linear(10, 8)
        self.inner = nn.ParameterDict({"out": torch.randn(8, 5), "unused": torch.randn(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = (self.bag(x) + self.bounded(x[:, 0])) @ self.into
        return self.hidden(x.relu()).relu() @ self.inner["out"]


@pytest.mark.parametrize(
    ("ratio", "also"),
    [
        (0.5, {}),
        ({"hidden *": 0.5}, {"into": "nothing less was asked of it"}),
        ({"into *": 0.5}, {"hidden": "nothing less was asked of it", "inner.out": "it is the network's output"}),
    ],
    ids=["all", "hidden", "into"],
)
def test_tensors_of_no_layer_that_were_not_narrowed_are_left_with_the_reason(ratio, also):
    model = make(Apart)
    compressed = fw.compress(model, prune.Channels(ratio=ratio), task=fw.Task(torch.randint(0, 20, (3, 4))))
    left = compressed.ledger.steps[0].left
    assert "embedding_bag" in left["bag"]
    assert "embedding_renorm" in left["bounded"]
    rest = {name: reason for name, reason in left.items() if name not in ("bag", "bounded")}
    assert rest == {"inner.unused": "the example does not use it", **also}


class Halved(nn.Module):
    """A width in an attribute, as large as another number: (samples, 3, 6, 6) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.width = self.window = 16
        self.one, self.head = nn.Conv2d(3, 32, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.one(x[..., -self.window :]).split(self.width, 1)
        return self.head((value * gate.sigmoid()).mean((2, 3)))


def test_notes_say_which_attributes_were_rewritten():
    model = make(Halved)
    compressed = fw.compress(model, prune.Channels(ratio=0.5), task=fw.Task(Wide.data(1)))
    assert (compressed.model.width, compressed.model.window) == (8, 16)
    assert notes(compressed).endswith(
        "the model's own class was kept, with attributes that say a width rewritten: width 16 → 8"
    )


class Gram(nn.Module):
    """A classifier of products of channels, whose columns each read two: (samples, 3, 6, 6) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Conv2d(3, 12, 3), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x)).flatten(2)
        return self.head(torch.bmm(x, x.transpose(1, 2)).flatten(1))

    @staticmethod
    def data(samples: int) -> Tensor:
        return Wide.data(samples)


@pytest.mark.parametrize("score", ["loss", "lasso", "activation"])
def test_channels_that_are_read_in_pairs_are_ranked_without_statistics_of_readers(score):
    model = make(Gram)
    compressed = fw.compress(model, prune.Channels(ratio=0.5, score=score), task=task_of(model))
    assert sizes(compressed)["one"] == 6
    assert compressed.model.head.weight.shape == (5, 36)
    assert "ranked by l2, as there are no statistics of what reads them: one channels" in notes(compressed)


@pytest.mark.parametrize("schedule", ["cubic", "linear", "geometric"])
@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_a_ratio_is_met_in_any_number_of_rounds(rounds: int, schedule: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    step = prune.Channels(ratio=0.5, score="l2", reconstruct=False, rounds=rounds, schedule=schedule)
    small = fw.compress(model, step, task=fw.Task(torch.randn(4, 8)))
    widths = [layer.out_features for layer in small.model if isinstance(layer, nn.Linear)]
    assert widths == [8, 4, 3]
    notes = small.ledger.steps[0].notes
    assert len(set(notes)) == len(notes)
    assert all(note.startswith("round ") for note in notes if rounds > 1)


@pytest.mark.parametrize("settings", [{"rounds": 2, "epochs": 1}, {"penalty": "group_lasso"}], ids=str)
def test_the_older_weight_norm_is_copied_whatever_was_run_before(settings: dict[str, Any]):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch has a newer one
        convs = [nn.utils.weight_norm(nn.Conv2d(*width, 3)) for width in ((3, 8), (8, 8))]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model, x = nn.Sequential(convs[0], nn.ReLU(), convs[1], *head), torch.randn(16, 3, 8, 8)
    model(x)  # with gradients, as in training
    loader = [(x, torch.arange(16) % 5)]
    task = fw.Task.from_loaders(loader, loader, lr=0.01)
    small = fw.compress(model, prune.Channels(ratio=0.5, **settings), task=task)
    assert small.model[0].weight_v.shape[0] == 4
