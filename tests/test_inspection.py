"""Looking at a model, and at two of them side by side: the numbers, the words, and the model that stays as it was."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from counting import Counting
from networks import make, task_of
from torch import Tensor, nn

import featherweight as fw
from featherweight import factorize
from featherweight.errors import TaskError
from featherweight.report import write
from featherweight.report.table import text


class Mixed(nn.Module):
    """Layers that can be replaced, and one of every kind that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.again = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.again.weight
        self.memory = nn.GRU(8, 5, batch_first=True)
        self.spare = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.relu(self.tied(self.again(self.again(self.first(x)))))
        x = self.head(self.memory(x)[0][:, -1])
        return x if scale is None else x * scale


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Mixed()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(32, 4, 6, generator=torch.Generator().manual_seed(1))


def test_every_layer_has_its_costs(model: nn.Module, inputs: Tensor) -> None:
    layers = fw.inspect(model, inputs[:1]).profile.layers
    assert layers["first"].cost.macs == 4 * 6 * 8  # 4 positions
    assert layers["first"].cost.params == 6 * 8 + 8
    assert layers["again"].cost.macs == 2 * 4 * 8 * 8  # called twice
    assert layers["head"].cost.bytes == 4 * (5 * 3 + 3)
    assert layers["memory"].cost.macs == 4 * 3 * 5 * (8 + 5)


def test_totals_are_those_of_the_model(model: nn.Module, inputs: Tensor) -> None:
    total = fw.inspect(model, inputs[:1]).profile.total
    assert total.params == sum(p.numel() for p in model.parameters())  # the shared weight once
    eight = fw.inspect(model, inputs[:8]).profile.total
    assert eight.macs == 8 * total.macs
    assert eight.params == total.params


def test_what_cannot_be_replaced_has_a_reason(model: nn.Module, inputs: Tensor) -> None:
    found = fw.inspect(model, inputs[:1])
    assert found.fixed["memory"] == "a GRU is neither a Linear nor a Conv layer"
    assert "shared with tied.weight" in found.fixed["again"]
    assert "shared with again.weight" in found.fixed["tied"]
    assert "never calls it" in found.fixed["spare"]
    assert set(found.fixed) == {"memory", "again", "tied", "spare"}
    assert found.profile.uncalled == ("spare",)


def test_the_table_tells_it(model: nn.Module, inputs: Tensor) -> None:
    lines = str(fw.inspect(model, inputs[:1])).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert lines[0].split() == ["layer", "kind", "parameters", "MACs", "share", "bytes", "activations", "energy"]
    assert rows["first"][1:4] == ["Linear", "56", "192"]
    assert rows["total"][1] == "Mixed"
    assert "100%" in rows["total"]
    assert "Costs of one call on float32[1, 4, 6]." in str(lines)
    assert "  memory: a GRU is neither a Linear nor a Conv layer" in lines
    assert "Never called by the example: spare" in lines
    assert rows["first"][4] == f"{100 * 192 / fw.inspect(model, inputs[:1]).profile.total.macs:.1f}%"


def test_what_was_not_counted_is_named() -> None:
    class Scan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(x)

    found = fw.inspect(Scan(), torch.eye(3)[None])
    assert found.profile.total.uncounted
    assert f"Not counted: {', '.join(found.profile.total.uncounted)}" in str(found)


@pytest.mark.parametrize("given", ["tensor", "tuple", "dict", "task"])
def test_an_example_is_whatever_the_model_takes(model: nn.Module, inputs: Tensor, given: str) -> None:
    scale = torch.ones(3)
    example = {
        "tensor": inputs[:1],
        "tuple": (inputs[:1], scale),
        "dict": {"x": inputs[:1], "scale": scale},
        "task": fw.Task(example={"x": inputs[:1]}),
    }[given]
    found = fw.inspect(model, example)
    assert found.profile.layers["first"].cost.macs == 192
    assert "float32[1, 4, 6]" in found.example


def test_a_half_precision_model_is_priced_as_it_is(inputs: Tensor) -> None:
    found = fw.inspect(nn.Linear(6, 8).to(torch.bfloat16), inputs[:1])
    assert found.profile.total.bytes == 2 * (6 * 8 + 8)
    assert found.example == "bfloat16[1, 4, 6]"


def test_the_model_stays_as_it_is(model: nn.Module, inputs: Tensor) -> None:
    model.train()
    model.head.eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    other = copy.deepcopy(model)
    fw.inspect(model, inputs[:1])
    fw.compare(model, other, fw.Task(inputs[:1], calibration=inputs.split(8)))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_inputs_that_do_not_fit_are_named(model: nn.Module) -> None:
    with pytest.raises(TaskError, match=r"float32\[1, 4, 7\]"):
        fw.inspect(model, torch.randn(1, 4, 7))


# Two models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_its_own_equal(model: nn.Module, inputs: Tensor) -> None:
    ledger = fw.compare(model, model, fw.Task(inputs[:1], calibration=inputs.split(8)))
    assert ledger.before == ledger.after
    assert ledger.after.score == 1.0
    assert ledger.scored_by == "agreement with the original (top-1)"
    assert "No layer changed." in text(ledger)


def test_comparing_with_what_compress_made_says_what_compress_said(inputs: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    task = fw.Task(inputs[:1], calibration=inputs.split(8))
    small = fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.6)), task=task)
    ledger = fw.compare(model, small.model, task)
    assert ledger.before == small.ledger.before
    assert ledger.after == small.ledger.after
    assert ledger.fingerprint == small.ledger.fingerprint
    assert ledger.steps[0].evaluations == 2


def test_the_task_s_own_score_is_asked_of_both(model: nn.Module, inputs: Tensor) -> None:
    other = copy.deepcopy(model)
    other.head = nn.Identity()
    scores = {nn.Linear: 0.9, nn.Identity: 0.7}
    ledger = fw.compare(model, other, fw.Task(inputs[:1], evaluate=lambda network: scores[type(network.head)]))
    assert (ledger.before.score, ledger.after.score) == (0.9, 0.7)
    assert ledger.before.total.macs - ledger.after.total.macs == 5 * 3
    assert "score 90.0 % → 70.0 %" in text(ledger)


def test_models_that_write_into_their_buffers_stay_as_they_are() -> None:
    model, other = make(Counting), make(Counting, seed=1).train()
    fw.compare(model, other, task_of(model), runtimes=["torch"])
    assert (model.calls, other.calls) == (0, 0)
    assert not model.training
    assert other.training


def test_a_model_that_cannot_be_copied_is_not_compared(model: nn.Module, inputs: Tensor) -> None:
    other = copy.deepcopy(model)
    other.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TaskError, match=r"Mixed cannot be copied .*: make it work with copy\.deepcopy"):
        fw.compare(model, other, fw.Task(inputs[:1]))


def test_both_are_timed_where_asked(model: nn.Module, inputs: Tensor) -> None:
    task = fw.Task(inputs[:2])
    assert fw.compare(model, model, task).timings == ()
    timings = fw.compare(model, model, task, runtimes=["torch"]).timings
    assert [(timing.network, timing.runtime, timing.batch_size) for timing in timings] == [
        ("before", "torch", 2),
        ("after", "torch", 2),
    ]
    assert all(0 < timing.lower_ms <= timing.median_ms <= timing.upper_ms for timing in timings)


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_a_comparison_can_be_reported(model: nn.Module, inputs: Tensor, tmp_path: Path, suffix: str) -> None:
    other = copy.deepcopy(model)
    other.memory, other.head = nn.GRU(8, 2, batch_first=True), nn.Linear(2, 3)
    ledger = fw.compare(model, other, fw.Task(inputs[:1], calibration=inputs.split(8)))
    write(ledger, tmp_path / f"report{suffix}")
    assert "memory" in (tmp_path / f"report{suffix}").read_text(encoding="utf-8")
