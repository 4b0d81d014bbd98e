"""How much every layer suffers from every option of a technique: what curvature predicts, and what is measured.

Of activations, whose rounding curvature says nothing of, the divergence of the network's answers is measured instead.
"""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from torch import nn

from featherweight.cost.count import Profile, profile
from featherweight.edits import as_graph
from featherweight.errors import RecipeError
from featherweight.forms.grid import WIDTHS
from featherweight.graph import value_names
from featherweight.layerwise import Layerwise
from featherweight.ledger import Choice, Entry, Ledger, Point, machine
from featherweight.progress import track
from featherweight.quantize import Static, Weights
from featherweight.report import words, write
from featherweight.score import Divergence, Scorer
from featherweight.search.budget import Budget
from featherweight.snapshot import of_profile
from featherweight.study import Study
from featherweight.task import Task, fingerprint, no_task, working_copy


@dataclass(frozen=True)
class Sensitivity:
    """What each layer's options cost and lose, one layer changed at a time.

    Attributes:
        step: the technique.
        metric: the cost that shares are of.
        baseline: the score of the network as it is.
        layers: by layer in calling order, its options by rising cost: share of the layer's cost, predicted rise of the
            loss, and the measured score (None where it was not measured); the layer as it is comes last. Of
            `quantize.Static` they are values, by the names that `activation_bits` has them by.
        left: layers that the technique cannot change, with the reason.
        ledger: the same as a ledger, whose report plots the curves.
        by: what predicts the rise of the loss: ``"curvature"``, or ``"divergence"``, how far the network's own answers
            on the calibration data move: of a classifier in nats a sample, otherwise as a share of their squares.
    """

    step: str
    metric: str
    baseline: float
    layers: Mapping[str, tuple[Point, ...]]
    left: Mapping[str, str]
    ledger: Ledger
    by: str = "curvature"

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        layers = {
            name: [
                {"option": p.setting, "share": p.share, "predicted": p.predicted_loss, "score": p.score} for p in points
            ]
            for name, points in self.layers.items()
        }
        known = {"step": self.step, "metric": self.metric, "baseline": self.baseline, "by": self.by}
        return {**known, "layers": layers, "left": dict(self.left)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write a page with every layer's curve: .html, .md or .json."""
        write(self.ledger, path)

    def __rich__(self) -> RenderableType:
        """The table, for a rich console: layers by options, the measured drop and the predicted rise of the loss."""
        settings = list(dict.fromkeys(p.setting for points in self.layers.values() for p in points[:-1]))
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("layer", overflow="fold")
        for setting in settings:
            table.add_column(setting, justify="right", no_wrap=True)
        for name, points in self.layers.items():
            found = {p.setting: p for p in points}
            table.add_row(words.name(name), *(self._cell(found.get(setting)) for setting in settings))
        lost = "Predicted rise of the loss" if self.by == "curvature" else "Divergence of the answers"
        table.caption = f"{lost}, and how far the score falls from {self.baseline:.4g}."
        return table

    def _cell(self, point: Point | None) -> str:
        if point is None:
            return ""
        measured = "" if point.score is None else f"  {self.baseline - point.score:+.4f}"
        return f"{point.predicted_loss or 0:.1e}{measured}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def sensitivity(
    model: nn.Module,
    task: Task,
    step: Layerwise | Static | None = None,
    *,
    measure: bool = True,
    activation_bits: Sequence[int] | None = None,
    seed: int = 0,
) -> Sensitivity:
    """How much every layer suffers from every option of a technique, one layer changed at a time.

    Of `quantize.Static` it is the activations: how much the network suffers when one value alone is rounded, where and
    in the ranges in which the step would do it, and all weights stay as they are.

    Args:
        model: the network; it is not changed.
        task: what it is for; without an evaluate, the score is agreement on the calibration data.
        step: the technique with its settings; what it says on how much to keep has no say. Weights of 8 to 2 bits,
            rounded to the nearest, by default.
        measure: whether to measure scores beside the predictions, one evaluation for each layer and option.
        activation_bits: the widths that `quantize.Static` is asked about, whose own have no say; 8 and 4 by default.
        seed: of everything random.
    Raises:
        RecipeError: the technique cannot run on this model.
        TaskError: one of the task's functions failed.
    """
    step = Weights(effort="nearest") if step is None else step
    if not isinstance(step, Layerwise | Static):
        raise RecipeError([f"{type(step).__name__} chooses nothing layer by layer"])
    if problems := no_task(task):
        raise RecipeError(problems)
    if isinstance(step, Static):
        widths = (8, 4) if activation_bits is None else activation_bits
        return _of_activations(model, task, step, measure, sorted(set(widths)), seed)
    if activation_bits is not None:
        raise RecipeError([f"activation_bits is {activation_bits}, and {step.name} rounds none: ask quantize.Static"])
    # Any budget: the table is what a selector would read under it.
    unset: dict[str, Any] = {name: None for name in step.ways() if name not in ("budget", "select")}
    whole: dict[str, Any] = {step.metric: 1.0}
    step = replace(step, **unset, budget=Budget(**whole), select="optimal")
    if problems := [*task.problems(model), *step.problems(model, task)]:
        raise RecipeError(problems)
    model = working_copy(model)
    scorer, before = Scorer(task, model), profile(model, task.inputs())
    study = Study(model, model, task, scorer, before.total, seed)
    bench = step._bench(study)
    table, baseline = bench.table, scorer.of_original(model)

    def points(name: str) -> tuple[Point, ...]:
        whole, *options = table.options[name]
        size = whole.cost.metric(step.metric)
        found = []
        for option in [*options, whole]:
            score = baseline if option.form is None else bench.score_alone(option) if measure else None
            found.append(Point(str(option), option.cost.metric(step.metric) / size, option.loss, score))
        return tuple(found)

    layers = {name: points(name) for name in track(table.options, "measuring every layer's options")}
    return _recorded(model, study, before, step.name, step.metric, layers, bench.left)


def _of_activations(
    model: nn.Module, task: Task, step: Static, measure: bool, widths: Sequence[int], seed: int
) -> Sensitivity:
    """What every activation that the step rounds costs when it alone is rounded."""
    if not widths:
        raise RecipeError(["activation_bits is empty: give widths, or leave it out"])
    if unknown := [bits for bits in widths if bits not in WIDTHS]:
        raise RecipeError([f"activation_bits has {unknown[0]}: it can be 2 to 8, or 16"])
    if problems := [*task.problems(model), *step.problems(model, task)]:
        raise RecipeError(problems)
    model = working_copy(model)
    scorer, before = Scorer(task, model), profile(model, task.inputs())
    graph = as_graph(copy.deepcopy(model), task.inputs().on(model))
    study = Study(graph, model, task, scorer, before.total, seed)
    edits, left = step.each_alone(study, widths)
    size = {name: node.meta["val"].element_size() for node, name in value_names(graph).items()}
    divergence, baseline = Divergence(model, task, step.samples), study.original_score
    layers = {}
    for name, each in track(edits.items(), "rounding every activation alone", total=len(edits)):
        points = []
        for bits, edit in zip(widths, each, strict=True):
            rounded = edit.apply(copy.deepcopy(graph))
            score = scorer(rounded) if measure else None
            points.append(Point(f"{bits} bits", bits / (8 * size[name]), divergence(rounded), score))
        layers[name] = (*points, Point("as it is", 1.0, 0.0, baseline))
    return _recorded(model, study, before, step.name, "bytes", layers, left, "divergence")


def _recorded(
    model: nn.Module,
    study: Study,
    before: Profile,
    step: str,
    metric: str,
    layers: Mapping[str, tuple[Point, ...]],
    left: Mapping[str, str],
    by: str = "curvature",
) -> Sensitivity:
    """What was found, and its ledger."""
    scorer, baseline = study.scorer, study.original_score
    at = of_profile(before, baseline)
    choices = {name: Choice(curve[-1], curve) for name, curve in layers.items()}
    entry = Entry(
        "sensitivity", {"step": step}, (), dict(left), at, at,
        choices=choices, metric=metric, notes=tuple(study.notes), evaluations=scorer.count, seconds=scorer.seconds,
    )  # fmt: skip
    ledger = Ledger(type(model).__name__, fingerprint(model), scorer.name, (entry,), machine=machine())
    return Sensitivity(step, metric, baseline, layers, dict(left), ledger, by)
