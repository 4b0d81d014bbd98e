"""Scores: what evaluate may answer, and agreement with the original where there is no evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from networks import Mixed, Residual, Temporal, make, task_of
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import TaskError
from featherweight.score import Divergence, Scorer, class_dimension

X = Mixed.data(32)


def changed(kind: type[nn.Module], by: float) -> nn.Module:
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


def raises(model: nn.Module) -> float:
    return {}["accuracy"]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (raises, r"evaluate\(model\) raised KeyError: 'accuracy'"),
        (lambda model: float("nan"), r"returned nan: return a finite number, higher is better"),
        (lambda model: float("inf"), r"returned inf: return a finite number"),
        (lambda model: torch.tensor(0.5), r"returned a tensor \(float32\[\]\): return a float, with \.item\(\)"),
        (lambda model: "0.5", r"returned '0\.5', a str: return a float"),
        (lambda model: None, r"returned None, a NoneType: return a float"),
        (lambda model: True, r"returned True, a bool: return a float"),
        (lambda model: (0.5, 3), r"returned \(0\.5, 3\), a tuple: return a float"),
    ],
    ids=["raises", "nan", "inf", "tensor", "str", "none", "bool", "tuple"],
)
def test_what_evaluate_may_not_answer(evaluate, message):
    model = make(Mixed)
    with pytest.raises(TaskError, match=message):
        Scorer(fw.Task(X[:1], evaluate=evaluate), model)(model)


@pytest.mark.parametrize("score", [1, -2.5, np.float32(0.5), np.float64(0.5), np.int64(3)])
def test_what_evaluate_may_answer(score):
    model = make(Mixed)
    scorer = Scorer(fw.Task(X[:1], evaluate=lambda model: score), model)
    assert scorer(model) == float(score)
    assert type(scorer(model)) is float
    assert (scorer.name, scorer.count) == ("evaluate", 2)


def test_evaluate_sees_evaluation_mode_and_flags_are_put_back():
    model = make(Residual).train()
    model.one_norm.eval()
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        seen.extend(module.training for module in model.modules())
        model.train()  # as many an evaluation loop does at its end
        return 1.0

    Scorer(fw.Task(Residual.data(1), evaluate=evaluate), model)(model)
    assert not any(seen)
    assert model.training
    assert not model.one_norm.training


def test_agreement_of_a_classifier_is_the_share_of_equal_classes():
    original, other = make(Mixed), changed(Mixed, 0.05)
    scorer = Scorer(task_of(original), original)
    data = Mixed.data(48)
    equal = float((original(data).argmax(1) == other(data).argmax(1)).double().mean())
    assert 0 < equal < 1
    assert scorer(other) == pytest.approx(equal)
    assert scorer(original) == 1.0
    assert scorer.name == "agreement with the original (top-1)"


def test_the_original_is_not_run_again_to_agree_with_itself():
    original, calls = make(Mixed), []
    original.register_forward_hook(lambda *_: calls.append(1))
    scorer = Scorer(task_of(original), original)
    asked = len(calls)
    assert scorer.of_original(original) == 1.0
    assert len(calls) == asked
    assert scorer.count == 1
    labelled = Scorer(fw.Task(Mixed.data(1), evaluate=lambda model: float(model(Mixed.data(1)).shape[0])), original)
    assert labelled.of_original(original) == 1.0  # what the task says is asked
    assert len(calls) == asked + 1


def test_agreement_of_a_regression_is_one_minus_the_relative_error():
    original, other = make(Temporal), changed(Temporal, 0.02)
    scorer = Scorer(task_of(original), original)
    with torch.no_grad():
        one, two = original(Temporal.data(48)).double(), other(Temporal.data(48)).double()
    assert scorer(other) == pytest.approx(1 - float((two - one).norm() / one.norm()))
    assert scorer(original) == 1.0
    assert scorer.name == "agreement with the original (1 − relative error)"


@dataclass
class Output:
    """An answer as language models give it: what comes before the logits is not what is agreed on."""

    hidden: Tensor
    logits: Tensor


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make(Mixed)

    def forward(self, x: Tensor) -> Output:
        logits = torch.stack([self.inner(x), self.inner(-x)], 1)  # (samples, tokens, classes)
        return Output(x[:, :1] * 1e6, logits)


def test_logits_are_found_wherever_they_stand_in_an_output():
    original, other = Language().eval(), Language().eval()
    torch.nn.init.normal_(other.inner.head.weight, generator=torch.Generator().manual_seed(1))
    scorer = Scorer(fw.Task(X[:1], calibration=X.split(8)), original)
    assert scorer.name.endswith("(top-1)")
    with torch.no_grad():
        one, two = original(X).logits, other(X).logits
    assert scorer(other) == pytest.approx(float((one.argmax(-1) == two.argmax(-1)).double().mean()))
    divergence = Divergence(original, fw.Task(X[:1], calibration=X.split(8)))
    mean = torch.nn.functional.kl_div(
        two.log_softmax(-1).flatten(0, 1), one.log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean"
    )
    assert divergence(other) == pytest.approx(float(mean), rel=1e-5)
    assert divergence(original) == 0.0


@pytest.mark.parametrize(
    ("outputs", "loss", "dimension"),
    [
        (torch.ones(2, 3), None, 1),
        (torch.ones(2, 1), None, None),  # one number a sample is no class
        (torch.ones(2, 3), "mse", None),
        (torch.ones(2, 3), torch.nn.functional.l1_loss, None),
        (torch.ones(2, 3, 4, 4), "cross_entropy", 1),  # segmentation, as torch's cross-entropy has it
        (torch.ones(2, 3, 4, 4), None, None),
        ((torch.ones(2, 3), torch.ones(2, 3)), None, None),
        (Output(torch.ones(2), torch.ones(2, 5, 9)), None, -1),
        (torch.ones(2, 3, dtype=torch.int64), None, None),
        (torch.ones(3), "cross_entropy", None),
    ],
)
def test_what_is_taken_for_a_classifier(outputs: Any, loss: Any, dimension: int | None):
    assert class_dimension(outputs, loss) == dimension


def test_answers_that_are_not_finite_are_said():
    original, broken = make(Temporal), make(Temporal)
    torch.nn.init.constant_(broken.last.bias, float("nan"))
    with pytest.raises(TaskError, match="the score of the model is nan: its answers hold NaN"):
        Scorer(task_of(original), original)(broken)


def test_a_network_that_answers_zero_agrees_only_with_zero():
    original = make(Temporal)
    for parameter in original.last.parameters():
        torch.nn.init.zeros_(parameter)
    scorer = Scorer(task_of(original), original)
    assert (scorer(original), scorer(make(Temporal))) == (1.0, 0.0)
