"""How much every layer suffers from every option of a technique: what curvature predicts, and what is measured."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from torch import nn

from featherweight.cost.count import profile
from featherweight.errors import RecipeError
from featherweight.layerwise import Layerwise
from featherweight.ledger import Choice, Entry, Ledger, Point, machine
from featherweight.progress import track
from featherweight.quantize import Weights
from featherweight.report import words, write
from featherweight.score import Scorer
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
            loss, and the measured score (None where it was not measured); the layer as it is comes last.
        left: layers that the technique cannot change, with the reason.
        ledger: the same as a ledger, whose report plots the curves.
    """

    step: str
    metric: str
    baseline: float
    layers: Mapping[str, tuple[Point, ...]]
    left: Mapping[str, str]
    ledger: Ledger

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        layers = {
            name: [
                {"option": p.setting, "share": p.share, "predicted": p.predicted_loss, "score": p.score} for p in points
            ]
            for name, points in self.layers.items()
        }
        known = {"step": self.step, "metric": self.metric, "baseline": self.baseline}
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
        table.caption = f"Predicted rise of the loss, and how far the score falls from {self.baseline:.4g}."
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
    model: nn.Module, task: Task, step: Layerwise | None = None, *, measure: bool = True, seed: int = 0
) -> Sensitivity:
    """How much every layer suffers from every option of a technique, one layer changed at a time.

    Args:
        model: the network; it is not changed.
        task: what it is for; without an evaluate, the score is agreement on the calibration data.
        step: the technique with its settings; what it says on how much to keep has no say. Weights of 8 to 2 bits,
            rounded to the nearest, by default.
        measure: whether to measure scores beside the predictions, one evaluation for each layer and option.
        seed: of everything random.
    Raises:
        RecipeError: the technique cannot run on this model.
        TaskError: one of the task's functions failed.
    """
    step = Weights(effort="nearest") if step is None else step
    if not isinstance(step, Layerwise):
        raise RecipeError([f"{type(step).__name__} chooses nothing layer by layer"])
    if problems := no_task(task):
        raise RecipeError(problems)
    # Any budget: the table is what a selector would read under it.
    unset: dict[str, Any] = {name: None for name in step.ways() if name not in ("budget", "select")}
    step = replace(step, **unset, budget=Budget(**{step.metric: 1.0}), select="optimal")
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
    at = of_profile(before, baseline)
    choices = {name: Choice(curve[-1], curve) for name, curve in layers.items()}
    entry = Entry(
        "sensitivity", {"step": step.name}, (), dict(bench.left), at, at,
        choices=choices, metric=step.metric, evaluations=scorer.count, seconds=scorer.seconds,
    )  # fmt: skip
    ledger = Ledger(type(model).__name__, fingerprint(model), scorer.name, (entry,), machine=machine())
    return Sensitivity(step.name, step.metric, baseline, layers, dict(bench.left), ledger)
