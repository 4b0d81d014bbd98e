"""Limits of latency: what is searched, what is measured, what is said, and who refuses them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import Residual, make, task_of
from torch import nn

import featherweight as fw
from featherweight import factorize, prune, quantize, share
from featherweight.batch import Inputs
from featherweight.cost.count import profile
from featherweight.cost.latency import Latency
from featherweight.errors import BudgetError, RecipeError
from featherweight.search.timed import PROBES, Timed, largest
from featherweight.step import Step

OVERHEAD = 0.2  # of the original's time, whatever its network has left


def latency(ms: float) -> Latency:
    return Latency(ms, 0.9 * ms, 1.1 * ms, 30)


def timed(share: float, ms: float, original: float = 10.0) -> Timed:
    return Timed(share, latency(ms), latency(original))


def macs(model: nn.Module, example: Inputs) -> int:
    return profile(model, example).total.macs


class Fake:
    """Times by arithmetic: an overhead, and the rest in proportion to the multiply-accumulates."""

    def __init__(self) -> None:
        self.runtimes: list[str] = []
        self.models: list[nn.Module] = []

    def __call__(self, original: nn.Module, example: Inputs, runtime: str) -> Callable[[nn.Module], Any]:
        self.runtimes.append(runtime)
        whole = macs(original, example)

        def times(model: nn.Module) -> tuple[Latency, Latency]:
            self.models.append(model)
            return latency(10 * self.share(model, example, whole)), latency(10.0)

        return times

    @staticmethod
    def share(model: nn.Module, example: Inputs, whole: int) -> float:
        return OVERHEAD + (1 - OVERHEAD) * macs(model, example) / whole


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    clock = Fake()
    monkeypatch.setattr("featherweight.recipe.beside", clock)
    return clock


# The search ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    least=st.floats(0.01, 0.9),
    power=st.floats(0.2, 4),
    overhead=st.floats(0, 0.9),
    limit=st.floats(0.02, 1),
    noise=st.lists(st.floats(0.95, 1.05), min_size=PROBES, max_size=PROBES),
    guess=st.none() | st.floats(0, 1),
)
def test_what_is_found_keeps_to_the_limit_and_what_is_not_names_the_nearest(
    least: float, power: float, overhead: float, limit: float, noise: list[float], guess: float | None
):
    budget, tried = fw.Budget(latency=limit), list[Timed]()

    def probe(share: float) -> Timed:
        assert least <= share <= 1
        tried.append(timed(share, 10 * (overhead + (1 - overhead) * share**power) * noise[len(tried)]))
        return tried[-1]

    try:
        found = largest(budget, probe, least, 1.0, guess)
    except BudgetError as error:
        nearest = min(t.taken.median_ms for t in tried)
        assert tried[-1].share == least  # not before the cheapest was looked at
        assert nearest > 10 * limit
        named = float(re.search(r"below ([\d.e-]+) of the original's", str(error))[1])
        assert nearest / 10 <= named * (1 + 1e-9) <= nearest / 10 * 1.02
    else:
        keep = [t for t in tried if t.taken.median_ms <= 10 * limit]
        assert found[-1] in keep
        assert found[-1].share == max(t.share for t in keep)
        assert sorted(found, key=tried.index) == tried
    assert len(tried) <= PROBES


@settings(max_examples=100, deadline=None)
@given(least=st.floats(0.01, 0.5), overhead=st.floats(0, 0.9), limit=st.floats(0.05, 0.99))
def test_where_time_is_an_overhead_and_a_share_most_of_the_limit_is_used(least: float, overhead: float, limit: float):
    assume(overhead + (1 - overhead) * least <= limit)
    found = largest(fw.Budget(latency=limit), lambda s: timed(s, 10 * (overhead + (1 - overhead) * s)), least, 1.0)
    assert 0.97 <= found[-1].taken.median_ms / 10 / limit <= 1 or found[-1].share < least + 0.02


def test_a_network_that_keeps_to_the_limit_is_measured_once():
    assert len(largest(fw.Budget(latency="11 ms"), lambda s: timed(s, 10 * s), 0.1, 1.0)) == 1


# In steps -----------------------------------------------------------------------------------------------------------


def ratio(small: Any, model: nn.Module, task: fw.Task) -> float:
    return Fake.share(small.model, task.inputs(), macs(model, task.inputs()))


@pytest.mark.parametrize(
    ("step", "limits"),
    [
        (factorize.SVD, {"latency": 0.7}),
        (factorize.SVD, {"latency": "7 ms", "runtime": "torch"}),
        (factorize.SpatialSVD, {"latency": 0.6, "params": 0.9}),
        (factorize.SpatialSVD, {"latency": 0.7, "drop": 1.0}),
        (factorize.DepthwiseSeparable, {"latency": 0.7}),
        (prune.Channels, {"latency": 0.5}),
        (prune.Channels, {"latency": "6000 us", "params": 0.8}),
        (prune.Filters, {"latency": 0.7, "runtime": "openvino"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
@pytest.mark.parametrize("samples", [0, 16])
def test_a_latency_is_kept_and_used_up(step: Any, limits: dict[str, Any], samples: int, fake: Fake):
    model = make(Residual)
    task = task_of(model, samples) if samples else fw.Task(Residual.data(1))
    small = fw.compress(model, step(budget=fw.Budget(**limits)), task=task)
    limit = fw.Budget(**limits).milliseconds(10.0) / 10
    cost, whole = small.ledger.after.total, small.ledger.before.total
    assert 0.9 * limit <= ratio(small, model, task) <= limit or cost.params / whole.params > 0.85 * limits["params"]
    assert cost.params <= limits.get("params", 1.0) * whole.params
    assert fake.runtimes == [limits.get("runtime", "onnx")]
    (note,) = [note for note in small.ledger.steps[0].notes if note.startswith("latency in ")]
    taken, asked = re.search(r": ([\d.]+) ms .* at most ([\d.]+) ms were asked for", note).groups()
    assert float(taken) == pytest.approx(10 * ratio(small, model, task), rel=1e-3)
    assert float(asked) == pytest.approx(10 * limit)


def test_greedy_chooses_by_the_macs_that_a_latency_leaves(fake: Fake):
    model = make(Residual)
    task = task_of(model, 16)
    small = fw.compress(
        model, factorize.SpatialSVD(budget=fw.Budget(latency=0.7), select=fw.Greedy(candidates=5)), task=task
    )
    assert small.ledger.steps[0].selected_by == "greedy"
    assert 0.6 <= ratio(small, model, task) <= 0.7
    with pytest.raises(
        BudgetError, match=r"latency cannot go below 0\.\d+ of the original's \([\d.]+ ms of 10 ms in onnx"
    ):
        fw.compress(model, factorize.SpatialSVD(budget=fw.Budget(latency=0.01), select="greedy"), task=task)
    with pytest.raises(RecipeError, match=r"exactly one cost limit, and the budget is params ≤ 0\.5, latency"):
        fw.compress(model, factorize.SVD(budget=fw.Budget(latency=0.7, params=0.5), select="greedy"), task=task)


@pytest.mark.parametrize("step", [factorize.SVD, prune.Channels, prune.Blocks])
def test_the_nearest_that_can_be_met_is_named_and_can_be_met(step: Any, fake: Fake):
    model = make(Residual) if step is not prune.Blocks else tower()
    task = task_of(model, 16) if step is not prune.Blocks else fw.Task(torch.randn(1, 8))
    with pytest.raises(BudgetError, match="latency cannot go below") as raised:
        fw.compress(model, step(budget=fw.Budget(latency=OVERHEAD)), task=task)
    nearest = float(re.search(r"below ([\d.]+) of", str(raised.value))[1])
    small = fw.compress(model, step(budget=fw.Budget(latency=nearest)), task=task)
    assert ratio(small, model, task) <= nearest


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.act = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.inner(x))


def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)), nn.Linear(8, 3)).eval()


def test_blocks_go_until_the_latency_is_kept(fake: Fake):
    model, task = tower(), fw.Task(torch.randn(1, 8))
    small = fw.compress(model, prune.Blocks(budget=fw.Budget(latency=0.6)), task=task)
    assert ratio(small, model, task) <= 0.6
    assert len(small.ledger.steps[0].edits) == 3  # with two gone it would be a little above
    assert len(fake.models) == 4


def test_shares_are_of_what_the_recipe_was_given(fake: Fake):
    model = make(Residual)
    task = task_of(model, 16)
    steps = (prune.Channels(budget=fw.Budget(macs=0.7)), factorize.SpatialSVD(budget=fw.Budget(latency=0.6)))
    small = fw.compress(model, *steps, task=task)
    assert 0.55 <= ratio(small, model, task) <= 0.6


def test_a_drop_at_the_latency_is_refused_as_at_any_other_limit(fake: Fake):
    model, x = make(Residual), Residual.data(64)
    answers = model(x).detach()
    task = fw.Task(x[:1], x.split(32), evaluate=lambda m: -float((m(x).detach() - answers).norm()))
    budget = fw.Budget(latency=0.4, drop=0)
    wanted = r"latency ≤ 0\.4 in onnx, drop ≤ 0: that latency takes 0\.2\d* of the original's MACs; .* score drops by"
    with pytest.raises(BudgetError, match=wanted):
        fw.compress(model, factorize.SVD(budget=budget), task=task)


def test_nothing_to_make_faster_is_an_error(fake: Fake):
    model = make(Residual)
    for step in (factorize.SVD, prune.Channels):
        with pytest.raises(BudgetError, match=r"latency ≤ 0\.5 in onnx cannot be met: .* finds nothing to"):
            fw.compress(model, step(budget=fw.Budget(latency=0.5), ignore=["*"]), task=task_of(model))


@pytest.mark.parametrize(
    "step", [quantize.Weights, quantize.GPTQ, quantize.RateDistortion, share.KMeans, prune.Magnitude, prune.NM]
)
def test_steps_that_change_no_shapes_refuse_a_latency(step: type[Step]):
    model = make(Residual)
    recipe = fw.Recipe(step(budget=fw.Budget(latency=0.5)))
    (problem,) = recipe.problems(model, task_of(model))
    assert "a latency is no limit for it: it leaves all shapes as they are" in problem
    assert "use factorize or prune.Channels, or quantize.Static" in problem


def test_rounds_and_missing_runtimes_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = make(Residual)
    for more in ({"latency": 0.5}, {"latency": 0.5, "drop": 0.1}):
        (problem,) = fw.Recipe(prune.Channels(budget=fw.Budget(**more), rounds=3)).problems(model, task_of(model))
        assert "a latency is met at once, in no rounds" in problem
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "openvino" else find(n, *a))
    recipe = fw.Recipe(factorize.SVD(budget=fw.Budget(latency=0.5, runtime="openvino")))
    (problem,) = recipe.problems(model, task_of(model))
    assert "cannot be measured in openvino, which needs openvino, not installed here: pip install" in problem


def test_a_recipe_keeps_its_latency(tmp_path):
    recipe = fw.Recipe(
        prune.Channels(budget=fw.Budget(latency="4 ms", runtime="openvino")),
        factorize.SVD(budget=fw.Budget(latency=0.5, macs=0.7, drop=0.01)),
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert fw.Recipe.load(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(RecipeError, match="latency is '4 parsecs': write a number and a unit, such as '4 ms'"):
        fw.Recipe.from_yaml("steps: [{factorize.SVD: {budget: {latency: 4 parsecs}}}]")


# For real -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("step", [factorize.SVD, prune.Neurons])
def test_what_a_runtime_takes_is_within_the_limit_that_is_recorded(step: Any, runtime: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 768)).eval()
    budget = fw.Budget(latency=0.8, runtime=runtime)
    small = fw.compress(model, step(budget=budget), task=fw.Task(torch.randn(64, 768)))
    (note,) = [note for note in small.ledger.steps[0].notes if note.startswith(f"latency in {runtime} on ")]
    taken, original, asked = re.search(
        r": ([\d.]+) ms .* in turn with ([\d.]+) ms .* at most ([\d.]+) ms were asked for", note
    ).groups()
    assert float(taken) <= float(asked) * 1.001  # both are rounded
    assert float(asked) == pytest.approx(0.8 * float(original), rel=2e-3)
    assert small.ledger.after.total.macs < small.ledger.before.total.macs
