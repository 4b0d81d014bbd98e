"""Recipes: checked as a whole, run on a copy, kept as YAML, taken up again where they were stopped."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from counting import Counting
from networks import Mixed, Residual, Transformer, assert_same_state, make, task_of, train
from torch import nn

import featherweight as fw
from featherweight import factorize, study
from featherweight.edits import Edit
from featherweight.errors import ArtifactError, BudgetError, NoEffect, RecipeError, TaskError
from featherweight.forms import LowRank
from featherweight.search.optimal import Optimal
from featherweight.search.options import Plan
from featherweight.step import Stage, Step
from featherweight.study import Study

HALF = factorize.SVD(ratio=0.5)


@dataclass(frozen=True)
class Values(Step):
    """A step of a later stage."""

    stage: ClassVar[Stage] = Stage.VALUES

    def edits(self, study: Study) -> Iterator[Edit]:
        return iter(())


class Killed(Exception):
    """Stands for whatever ends a process."""


@dataclass(frozen=True)
class Second(factorize.SVD):
    """A step that a test can kill."""

    dies: ClassVar[type[BaseException] | None] = None

    def edits(self, study: Study) -> Iterator[Edit]:
        if self.dies is not None:
            raise self.dies
        yield from super().edits(study)


def said(*steps: Any, model: nn.Module | None = None, **fields: Any) -> tuple[str, ...]:
    """The problems that a recipe raises."""
    model = make(Mixed) if model is None else model
    with pytest.raises(RecipeError) as raised:
        fw.Recipe(*steps).run(model, task_of(model, **fields))
    return raised.value.problems


# Checked before anything slow


def test_later_stages_come_later():
    (problem,) = said(Values(), HALF)
    assert problem == (
        "factorize.SVD settles shape, but Values before it has settled values: move factorize.SVD above Values"
    )
    model = make(Mixed)
    assert fw.Recipe(HALF, HALF, Values(), Values()).problems(model, task_of(model)) == []


def test_all_problems_are_said_at_once_and_nothing_is_asked():
    model = make(Mixed)
    torch.nn.init.constant_(model.head.weight, float("nan"))
    asked: list[nn.Module] = []
    recipe = fw.Recipe(
        Values(),
        factorize.SVD(ratio=1.5, rank=3),
        factorize.SpatialSVD(ratio="high", ignore=("secnd",)),  # type: ignore[arg-type]
        factorize.SVD(ratio={"fist": 0.5}),
    )
    task = task_of(model, evaluate=asked.append, loss="mae")
    with pytest.raises(RecipeError) as raised:
        recipe.run(model, task)
    text = str(raised.value)
    assert "The recipe cannot run (" in text
    for part in (
        "move factorize.SVD above Values",
        "NaN or infinite values in head.weight",
        "loss is 'mae'",
        "factorize.SVD: ratio and rank both say how much to keep: give one of budget=, ratio=, select=plan, rank=",
        "factorize.SVD: ratio is 1.5: it is the share of a layer's MACs to keep, above 0 and at most 1",
        "factorize.SpatialSVD: ratio is 'high', a str: it takes float or {layer pattern: float} or None",
        "factorize.SVD: the pattern 'fist' matches none of 3 layers; did you mean 'first'?",
    ):
        assert part in text
    assert text.count("\n  - ") == len(raised.value.problems)
    assert asked == []


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (factorize.SVD(), "nothing says how much to keep: give one of budget=, ratio=, select=plan, rank="),
        (factorize.SVD(ratio=0.0), "ratio is 0.0: it is the share"),
        (factorize.SVD(ratio={"first": 0.5, "h*": -1.0}), "ratio is -1.0: it is the share"),
        (factorize.SVD(ratio=float("nan")), "ratio is nan: it is the share"),
        (factorize.SVD(ratio=True), "ratio is True, a bool: it takes float"),
        (factorize.SVD(rank=0), "rank is 0: it must be at least 1"),
        (factorize.SVD(rank="four"), "rank is 'four', a str: it takes int"),  # type: ignore[arg-type]
        (factorize.SVD(rank=2.5), "rank is 2.5, a float: it takes int"),  # type: ignore[arg-type]
        (factorize.SVD(ratio=0.5, multiple_of={"first": 0}), "multiple_of is 0: it must be at least 1"),
        (factorize.SVD(ratio=0.5, ignore="first"), "ignore is 'first', a str: it takes a list of str"),  # type: ignore[arg-type]
        (
            factorize.SVD(ratio=0.5, ignore=("secnd",)),
            "the pattern 'secnd' matches none of 3 layers; did you mean 'second'?",
        ),
        (factorize.SVD(budget=0.5), "budget is 0.5, a float: it takes Budget or None"),  # type: ignore[arg-type]
        (
            factorize.SVD(budget=fw.Budget(macs=0.5, drop=0.1), select="greedy"),
            "greedy takes exactly one cost limit, and the budget is macs ≤ 0.5, drop ≤ 0.1: choose with 'optimal'",
        ),
        (factorize.SVD(budget=fw.Budget(macs=0.5), select="gredy"), "select is 'gredy'; did you mean 'greedy'?"),
        (
            factorize.SVD(budget=fw.Budget(macs=0.5), select=3),
            "select is a int: use 'optimal', 'greedy', a selector or a plan",
        ),
        (factorize.SVD(ratio=0.5, samples=0), "samples must be at least 1"),
        (factorize.SVD(ratio=0.5, epochs=-1, epochs_per_layer=0), "epochs at least 0"),
        (factorize.SVD(ratio=0.5, epochs=1), "epochs needs Task(train=...), which the task does not have"),
        (factorize.SVD(ratio=0.5, data_aware="yes"), "data_aware is 'yes', a str: it takes bool or None"),  # type: ignore[arg-type]
        (factorize.SpatialSVD(ratio=0.5, axis=3), "axis is 3: it must be 0, 1 or 2"),
        (factorize.SVD(select=Plan("factorize.SpatialSVD", {})), "the plan is for factorize.SpatialSVD"),
    ],
    ids=lambda value: None if isinstance(value, Step) else value[:40],
)
def test_settings_that_cannot_be_used(step, problem):
    found = said(step)
    assert any(p.startswith(f"{step.name}: ") and problem in p for p in found), found


def test_data_aware_needs_data():
    model = make(Mixed)
    task = fw.Task(Mixed.data(1))
    assert fw.Recipe(factorize.SVD(ratio=0.5, data_aware=True)).problems(model, task) == [
        "factorize.SVD: data_aware needs calibration data: give Task(calibration=...) or leave it out"
    ]


def test_what_is_no_step_no_model_or_no_recipe():
    assert said() == ("the recipe has no steps",)
    assert said([HALF]) == (f"{[HALF]!r} is a list, not a step",)
    assert said(factorize.SVD) == (f"{factorize.SVD!r} is a ABCMeta, not a step",)
    with pytest.raises(RecipeError, match="the model is a function, not an nn"):
        fw.compress(lambda x: x, HALF, task=task_of(make(Mixed)))  # type: ignore[arg-type]


def test_a_model_that_cannot_be_copied_is_said_with_the_rest():
    model = make(Mixed)
    model.lock = threading.Lock()
    task = task_of(make(Mixed))
    with pytest.raises(RecipeError, match=r"Mixed cannot be copied \(TypeError: cannot pickle"):
        fw.compress(model, HALF, task=task)


# YAML


@pytest.mark.parametrize(
    "step",
    [
        factorize.SVD(),
        HALF,
        factorize.SVD(ratio={"first": 0.5, "h*": 0.25}, ignore=("second",), multiple_of=4, epochs=2),
        factorize.SpatialSVD(budget=fw.Budget(macs=0.5, bytes="5 MB", drop=0.01), axis=1),
        factorize.SVD(budget=fw.Budget(macs=0.5), select="greedy"),
        factorize.SVD(budget=fw.Budget(macs=0.5), select=fw.Greedy(candidates=5, monotone=True)),
        factorize.SVD(budget=fw.Budget(drop=0.5), select=Optimal(evaluations=3, metric="bytes")),
        factorize.SVD(select=Plan("factorize.SVD", {"first": LowRank(3), "head": LowRank(1)})),
    ],
)
def test_yaml_goes_both_ways(step, tmp_path):
    recipe = fw.Recipe(step, HALF)
    recipe.save(tmp_path / "recipe.yaml")
    assert fw.Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert list(yaml.safe_load(recipe.to_yaml())) == ["steps"]


def test_yaml_as_one_writes_it():
    text = """
    steps:
      - factorize.SpatialSVD: {budget: {macs: 0.5, bytes: 5 MB}, select: {greedy: {candidates: 4}}}
      - factorize.SVD:
          ratio: {"first": 1, "h*": 0.25}
          ignore: [second]
      - factorize.SVD
    """
    assert fw.Recipe.from_yaml(text) == fw.Recipe(
        factorize.SpatialSVD(budget=fw.Budget(macs=0.5, bytes="5 MB"), select=fw.Greedy(candidates=4)),
        factorize.SVD(ratio={"first": 1, "h*": 0.25}, ignore=("second",)),
        factorize.SVD(),
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps: [", "this is not YAML"),
        ("", "a recipe is a mapping with one key, 'steps', that holds a list"),
        ("- factorize.SVD", "a recipe is a mapping with one key"),
        ("steps: factorize.SVD", "a recipe is a mapping with one key"),
        ("steps: []\nmodel: x", "a recipe is a mapping with one key"),
        ("steps: [3]", "3 is no step: write a name, or a name with settings below it"),
        ("steps: [{factorize.SVD: 0.5}]", "is no step: write a name"),
        ("steps: [{factorize.SVD: {}, factorize.SpatialSVD: {}}]", "is no step: write a name"),
        ("steps: [factorise.SVD]", "there is no step 'factorise.SVD'; did you mean 'factorize.SVD'?"),
        ("steps: [{factorize.SVD: {rato: 0.5}}]", "factorize.SVD has no setting 'rato'; did you mean 'ratio'?"),
        ("steps: [{factorize.SVD: {1: 0.5}}]", "factorize.SVD has no setting 1"),
        ("steps: [{factorize.SVD: {budget: {}}}]", "factorize.SVD: the budget is empty: give at least one limit"),
        (
            "steps: [{factorize.SVD: {budget: {macs: half}}}]",
            "factorize.SVD: macs is 'half': write a number and a unit",
        ),
        ("steps: [{factorize.SVD: {budget: {mac: 0.5}}}]", "'mac'; did you mean 'macs'?"),
        ("steps: [{factorize.SVD: {select: {greedy: {candidate: 3}}}}]", "'candidate'; did you mean 'candidates'?"),
        (
            "steps: [{factorize.SVD: {select: {greedy: {candidates: 1}}}}]",
            "candidates is 1: give a whole number from 2",
        ),
        (
            "steps: [{factorize.SVD: {select: {optimal: {evaluations: many}}}}]",
            "Optimal: evaluations is 'many', a str: it takes int",
        ),
        ("steps: [{factorize.SVD: {select: {step: a, layers: {fc: 3}}}}]", "this is not a plan: of 'fc' it says 3"),
        ("steps: [{factorize.SVD: {select: {step: a, layers: {fc: {form: Low}}}}}]", "there is no form 'Low'"),
    ],
)
def test_yaml_that_is_no_recipe(text, problem):
    with pytest.raises(RecipeError) as raised:
        fw.Recipe.from_yaml(text)
    assert problem in str(raised.value)


def test_all_mistakes_in_a_file_are_said_at_once(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "steps: [factorize.SVDD, {factorize.SVD: {rato: 1, rnk: 2}}, {factorize.SVD: {budget: {macs: 0}}}]"
    )
    with pytest.raises(RecipeError) as raised:
        fw.Recipe.load(tmp_path / "recipe.yaml")
    assert len(raised.value.problems) == 4


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read: No such file or directory"), (b"\x89PNG\r\n\xff", "is not a recipe")]
)
def test_a_file_that_is_no_text_is_named(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        fw.Recipe.load(path)
    (problem,) = raised.value.problems
    assert problem.startswith(f"{path} {said}")


def test_wrong_types_in_yaml_are_found_when_the_recipe_is_checked():
    recipe = fw.Recipe.from_yaml("steps: [{factorize.SVD: {ratio: high, ignore: first}}]")
    model = make(Mixed)
    assert recipe.problems(model, task_of(model)) == [
        "factorize.SVD: ignore is 'first', a str: it takes a list of str",
        "factorize.SVD: ratio is 'high', a str: it takes float or {layer pattern: float} or None",
    ]


# Running


@pytest.mark.parametrize("select", ["optimal", fw.Greedy(candidates=4)], ids=["optimal", "greedy"])
def test_a_plan_changes_nothing_and_is_what_a_run_chooses(select):
    model = make(Residual).train()
    before, task = copy.deepcopy(model), task_of(model)
    recipe = fw.Recipe(factorize.SpatialSVD(budget=fw.Budget(macs=0.6), select=select))
    planned = recipe.plan(model, task)
    assert_same_state(model, before)
    assert model.training
    (entry,) = planned.steps
    assert entry.edits == ()
    compressed = recipe.run(model, task)
    (carried_out,) = compressed.ledger.steps
    assert (entry.before.total, entry.before.score) == (carried_out.before.total, None)
    assert (entry.after.total, entry.after.score) == (carried_out.after.total, None)
    for name, row in carried_out.after.layers.items():
        assert replace(entry.after.layers[name], kind=row.kind) == row
    assert entry.choices == carried_out.choices
    assert (entry.selected_by, entry.metric, entry.notes) == (
        carried_out.selected_by,
        carried_out.metric,
        carried_out.notes,
    )
    assert {n for n, c in entry.choices.items() if c.chosen.setting != "as it is"} == set(compressed.plan.layers)


def test_a_plan_edited_and_run_again():
    model = make(Mixed)
    task = task_of(model)
    chosen = fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.5)), task=task).plan
    edited = chosen.edited({"first": LowRank(2), "second": None})
    again = fw.compress(model, factorize.SVD(select=edited), task=task)
    assert again.plan == edited
    assert isinstance(again.model.second, nn.Linear)
    assert again.ledger.steps[0].selected_by == "manual"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"frist": LowRank(2)}, "the plan names 'frist', which cannot be replaced; did you mean 'first'?"),
        ({"first": LowRank(99)}, "the plan asks for rank 99 of 'first', whose options are rank 1 to rank"),
    ],
)
def test_a_plan_for_another_model_is_refused_before_anything_slow(layers, message):
    asked: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        asked.append(model)
        return 1.0

    problems = said(factorize.SVD(select=Plan("factorize.SVD", layers)), evaluate=evaluate)
    assert message in " ".join(problems)
    assert asked == []


def test_fine_tuning_is_called_after_every_layer_and_at_the_end():
    model = make(Mixed)
    calls: list[tuple[float, int]] = []

    def train(model: nn.Module, epochs: float, loss: object = None) -> None:
        calls.append((epochs, sum(isinstance(m, nn.Linear) for m in model.modules())))
        model.train()

    compressed = fw.compress(
        model, factorize.SVD(ratio=0.5, epochs_per_layer=0.5, epochs=3), task=task_of(model, train=train)
    )
    # Every replaced layer adds one Linear; training comes after the layer is in its place.
    assert calls == [(0.5, 4), (0.5, 5), (0.5, 6), (3, 6)]
    assert not compressed.model.training


def test_a_ratio_for_some_layers_leaves_the_others():
    model = make(Mixed)
    compressed = fw.compress(model, factorize.SVD(ratio={"first": 0.5}), task=task_of(model))
    assert [edit.layer for edit in compressed.edits] == ["first"]
    compressed = fw.compress(model, factorize.SVD(ratio={"first": 0.5, "*": 1.0}), task=task_of(model))
    assert [edit.layer for edit in compressed.edits] == ["first"]


def test_a_ratio_or_rank_that_no_option_has_is_said():
    model = make(Mixed)
    compressed = fw.compress(model, factorize.SVD(ratio={"first": 0.01, "second": 0.5}), task=task_of(model))
    (entry,) = compressed.ledger.steps
    assert "0.01" in entry.left["first"]
    compressed = fw.compress(model, factorize.SVD(rank={"first": 99, "second": 2}), task=task_of(model))
    assert "99" in compressed.ledger.steps[0].left["first"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda model, epochs: 1 / 0, r"train\(model, 1\) raised ZeroDivisionError: division by zero"),
        (
            lambda model, epochs: nn.init.constant_(next(model.parameters()), float("nan")),
            r"train\(model, 1\) left NaN or infinite weights, in first\.first\.weight: lower its learning rate",
        ),
    ],
    ids=["raises", "nan"],
)
def test_training_that_fails_is_said(train, message):
    model = make(Mixed)
    with pytest.raises(TaskError, match=message):
        fw.compress(model, factorize.SVD(ratio=0.5, epochs=1), task=task_of(model, train=train))


def test_a_frozen_model_is_compressed_all_the_same():
    model = make(Residual).requires_grad_(False)
    compressed = fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.6)), task=task_of(model))
    assert compressed.edits
    assert compressed.ledger.steps[0].notes == () or "no gradient" not in compressed.ledger.steps[0].notes[0]
    assert not any(p.requires_grad for p in compressed.model.parameters())


def test_gradients_switched_off_by_the_caller_have_no_say():
    model = make(Mixed)
    step = factorize.SVD(budget=fw.Budget(macs=0.6))
    with torch.no_grad():
        without = fw.compress(model, step, task=task_of(model))
    assert_same_state(without.model, fw.compress(model, step, task=task_of(model)).model)


def test_a_model_that_writes_into_its_buffers_stays_as_it_is():
    model = make(Counting)
    fw.compress(model, HALF, task=task_of(model))
    assert model.calls == 0


def test_layers_that_share_a_weight_are_listed():
    model = make(Mixed)
    model.again = nn.Linear(24, 24)
    model.again.weight = model.second.weight
    compressed = fw.compress(model, HALF, task=task_of(model))
    left = compressed.ledger.steps[0].left
    assert left["second"] == "its weight is shared with again.weight"
    assert compressed.model.again.weight is compressed.model.second.weight


def test_two_steps_follow_each_other_and_shares_are_of_the_original():
    model = make(Residual)
    recipe = fw.Recipe(
        factorize.SpatialSVD(budget=fw.Budget(macs=0.8), ignore=("two",)), factorize.SVD(budget=fw.Budget(macs=0.7))
    )
    compressed = recipe.run(model, task_of(model))
    first, second = compressed.ledger.steps
    assert second.before == first.after
    assert 0.6 < second.after.total.macs / first.before.total.macs <= 0.7
    assert {edit.layer for edit in compressed.edits} >= {"one", "two"}


# Stopped and taken up again


class Counted:
    """An evaluate that counts, and can be told to be interrupted."""

    def __init__(self, after: int | None = None) -> None:
        self.calls, self.after = 0, after

    def __call__(self, model: nn.Module) -> float:
        if self.calls == self.after:
            raise KeyboardInterrupt
        self.calls += 1
        with torch.no_grad():
            return -float(model(type(model).data(8)).square().mean())


@pytest.fixture
def gathered(monkeypatch):
    """How often calibration data was gone through for statistics."""
    calls: list[int] = []
    gather = study.gather
    monkeypatch.setattr(study, "gather", lambda *args, **kwargs: calls.append(1) or gather(*args, **kwargs))
    return calls


@pytest.mark.parametrize("death", [Killed, KeyboardInterrupt])
def test_a_run_goes_on_after_the_last_step_that_was_finished(tmp_path, monkeypatch, gathered, death):
    model, evaluate = make(Mixed), Counted()
    task = task_of(model, evaluate=evaluate, train=train)
    first = factorize.SVD(rank={"first": 3}, epochs=1)
    recipe = fw.Recipe(first, Second(rank={"second": 3}, epochs=2))
    whole = recipe.run(model, task)
    asked, watched = evaluate.calls, len(gathered)
    assert (asked, watched) == (3, 2)

    monkeypatch.setattr(Second, "dies", death)
    with pytest.raises(death):
        recipe.run(model, task, folder=tmp_path)
    monkeypatch.setattr(Second, "dies", None)
    evaluate.calls = 0
    gathered.clear()
    resumed = recipe.run(model, task, folder=tmp_path)
    assert (evaluate.calls, len(gathered)) == (1, 1), "of the second step only"
    assert_same_state(resumed.model, whole.model)
    assert resumed.edits == whole.edits
    assert [entry.after for entry in resumed.ledger.steps] == [entry.after for entry in whole.ledger.steps]

    evaluate.calls = 0
    finished = recipe.run(model, task, folder=tmp_path)
    assert evaluate.calls == 0
    assert_same_state(finished.model, whole.model)


def test_the_record_of_a_run_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model, evaluate = make(Mixed), Counted()
    task = task_of(model, evaluate=evaluate)
    recipe = fw.Recipe(factorize.SVD(rank={"first": 3}), factorize.SVD(rank={"second": 3}))
    whole, write, writes = recipe.run(model, task), Path.write_text, []

    def dies_halfway(path: Path, text: str, **settings: Any) -> int:
        if path.name == "run.json":
            writes.append(path)
            if len(writes) == 2:
                write(path, text[:9], **settings)
                raise Killed
        return write(path, text, **settings)

    monkeypatch.setattr(Path, "write_text", dies_halfway)
    with pytest.raises(Killed):
        recipe.run(model, task, folder=tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 1
    evaluate.calls = 0
    assert_same_state(recipe.run(model, task, folder=tmp_path).model, whole.model)
    assert evaluate.calls == 1, "of the second step only"
    kept = {"run.json", "step-1.fw", "step-2.fw", "evaluations.sqlite"}
    assert {file.name for file in tmp_path.iterdir()} <= {*kept, "evaluations.sqlite-wal", "evaluations.sqlite-shm"}


def test_single_layer_scores_are_not_measured_again(tmp_path):
    model = make(Mixed)
    step = factorize.SVD(budget=fw.Budget(macs=0.5), select=fw.Greedy(candidates=4, lazy=False))
    evaluate = Counted()
    fw.compress(model, step, task=task_of(model, evaluate=evaluate))
    whole, stop = evaluate.calls, 5
    evaluate = Counted(after=stop)
    with pytest.raises(KeyboardInterrupt):
        fw.compress(model, step, task=task_of(model, evaluate=evaluate), folder=tmp_path)
    evaluate = Counted()
    fw.compress(model, step, task=task_of(model, evaluate=evaluate), folder=tmp_path)
    assert evaluate.calls == whole - (stop - 1), "all but the baseline, which is asked first"


@pytest.mark.parametrize("other", ["model", "task", "seed", "settings"])
def test_another_run_in_the_same_folder_starts_anew(tmp_path, other):
    model, evaluate = make(Mixed), Counted()
    task, step, seed = task_of(model, evaluate=evaluate), HALF, 0
    fw.compress(model, step, task=task, folder=tmp_path)
    evaluate.calls = 0
    match other:
        case "model":
            model = make(Mixed, seed=1)
        case "task":
            task = task_of(model, samples=16, evaluate=evaluate)
        case "seed":
            seed = 1
        case "settings":
            step = factorize.SVD(ratio=0.6)
    found = fw.compress(model, step, task=task, seed=seed, folder=tmp_path)
    assert evaluate.calls == 2
    assert_same_state(found.model, fw.compress(model, step, task=task, seed=seed).model)


@pytest.mark.parametrize("damage", ["state", "state that is no mapping", "file", "file is gone"])
def test_a_damaged_folder_is_begun_anew(tmp_path, damage):
    model, evaluate = make(Mixed), Counted()
    task = task_of(model, evaluate=evaluate)
    whole = fw.compress(model, HALF, task=task, folder=tmp_path)
    evaluate.calls = 0
    (kept,) = tmp_path.glob("*.fw")
    match damage:
        case "state":
            (tmp_path / "run.json").write_text('{"steps": 1, "ident')
        case "state that is no mapping":
            (tmp_path / "run.json").write_text("[]")
        case "file":
            kept.write_bytes(kept.read_bytes()[:-3])
        case "file is gone":
            kept.unlink()
    again = fw.compress(model, HALF, task=task, folder=tmp_path)
    assert evaluate.calls == 2
    assert_same_state(again.model, whole.model)


def test_what_could_not_be_kept_is_said_before_anything_slow(tmp_path):
    """A model with state that no file can hold, and a folder to keep it in."""

    class Extra(Mixed):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model, evaluate = make(Extra), Counted()
    with pytest.raises((RecipeError, ArtifactError), match="_extra_state"):
        fw.compress(model, HALF, task=task_of(model, evaluate=evaluate), folder=tmp_path)
    assert evaluate.calls == 0


# Budgets, from end to end


def test_an_infeasible_budget_is_refused_at_once_and_the_one_it_names_can_be_met(gathered):
    model, evaluate = make(Mixed), Counted()
    task = task_of(model, evaluate=evaluate)
    with pytest.raises(
        BudgetError, match=r"macs cannot go below 0\.\d+ of the original's \(\d+\), and 0\.01"
    ) as refused:
        fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.01)), task=task)
    assert evaluate.calls == 0
    assert gathered == []
    words = str(refused.value).split()
    share, number = float(words[4]), int(words[8].strip("(),"))
    for limit in (share, number):
        compressed = fw.compress(model, factorize.SVD(budget=fw.Budget(macs=limit)), task=task)
        assert compressed.ledger.after.total.macs <= number
    with pytest.raises(BudgetError):
        fw.compress(model, factorize.SVD(budget=fw.Budget(macs=share - 0.002)), task=task)


def test_absolute_limits_and_shares_say_the_same():
    model = make(Mixed)
    task = task_of(model)
    whole = fw.compress(model, factorize.SVD(budget=fw.Budget(params=0.6)), task=task)
    params = whole.ledger.before.total.params
    for limit in (round(0.6 * params), f"{0.6 * params / 1000:.6f} k"):
        again = fw.compress(model, factorize.SVD(budget=fw.Budget(params=limit)), task=task)
        assert again.plan == whole.plan


def test_a_budget_that_is_met_already_changes_nothing():
    model = make(Mixed)
    with pytest.warns(NoEffect, match="changed nothing"):
        fw.compress(model, factorize.SVD(budget=fw.Budget(macs=1.0)), task=task_of(model))


def divergence(original: nn.Module, kind: type[nn.Module]):
    """An evaluate that falls smoothly: minus the mean squared error against the original's answers."""
    data = kind.data(64)
    with torch.no_grad():
        right = original(data)

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(data) - right).square().mean() / right.square().mean())

    return evaluate


@pytest.mark.parametrize("drop", [0.02, 0.2])
@pytest.mark.parametrize("kind", [Residual, Transformer], ids=lambda kind: kind.__name__)
def test_a_drop_is_kept_to_as_measured(kind, drop):
    model = make(kind)
    evaluate = divergence(model, kind)
    compressed = fw.compress(model, factorize.SVD(budget=fw.Budget(drop=drop)), task=task_of(model, evaluate=evaluate))
    assert evaluate(model) - evaluate(compressed.model) <= drop
    (entry,) = compressed.ledger.steps
    assert entry.before.score - entry.after.score <= drop
    assert entry.after.total.macs < entry.before.total.macs
    assert any("measured drop" in note and f"allowed {drop:.4g}" in note for note in entry.notes)
    assert entry.evaluations <= 2 + Optimal().evaluations


def test_a_budget_and_a_drop_that_both_hold():
    model = make(Residual)
    evaluate = divergence(model, Residual)
    task = task_of(model, evaluate=evaluate)
    compressed = fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.8, drop=0.9)), task=task)
    (entry,) = compressed.ledger.steps
    assert entry.after.total.macs <= 0.8 * entry.before.total.macs
    assert entry.before.score - entry.after.score <= 0.9


def test_a_budget_and_a_drop_that_cannot_both_hold_name_the_nearest():
    model = make(Residual)
    evaluate = divergence(model, Residual)
    task = task_of(model, evaluate=evaluate)
    least = fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.3)), task=task).ledger
    drop = (least.before.score - least.after.score) / 3
    with pytest.raises(BudgetError, match=r"at macs ≤ 0\.3, drop ≤ .* the score drops by .*: the nearest budget") as no:
        fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.3, drop=drop)), task=task)
    share = float(str(no.value).rpartition("macs=")[2])
    assert 0.3 < share < 1
    compressed = fw.compress(model, factorize.SVD(budget=fw.Budget(macs=share, drop=drop)), task=task)
    assert evaluate(model) - evaluate(compressed.model) <= drop


def test_the_ledger_of_a_run_is_json(tmp_path):
    model = make(Mixed)
    compressed = fw.compress(model, HALF, task=task_of(model))
    compressed.ledger.save(tmp_path / "ledger.json")
    data = json.loads((tmp_path / "ledger.json").read_text())
    assert data["model"] == "Mixed"
    assert data["scored_by"] == "agreement with the original (top-1)"
    assert data["versions"]["featherweight"] == fw.__version__
