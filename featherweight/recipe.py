"""A recipe: steps in order. Checked as a whole before anything slow, then run on a copy of the model."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import itertools
import json
import os
import platform
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from featherweight import artifact
from featherweight.artifact import load as load_artifact
from featherweight.batch import copied
from featherweight.compressed import Compressed
from featherweight.cost.count import Profile, profile
from featherweight.edits import Edit, Leave, Replace
from featherweight.errors import (
    ArtifactError,
    EditError,
    FeatherweightError,
    NoEffect,
    RecipeError,
    did_you_mean,
)
from featherweight.export.program import draft
from featherweight.export.worth import beside
from featherweight.files import read_text
from featherweight.ledger import Entry, Ledger, machine
from featherweight.score import Scorer
from featherweight.snapshot import of_profile
from featherweight.step import Step
from featherweight.study import Study
from featherweight.task import Task, fingerprint, no_task

VERBS = ("factorize", "prune", "quantize", "share", "distill", "tune")


@dataclass(frozen=True, init=False)
class Recipe:
    """Steps in order.

    ``Recipe(factorize.SpatialSVD(budget=fw.Budget(macs=0.5)))`` is the whole of it; `load` and `save` keep the same as
    YAML. A step's stage may not come before that of the step above it.
    """

    steps: tuple[Step, ...]

    def __init__(self, *steps: Step) -> None:
        object.__setattr__(self, "steps", tuple(steps))

    # Before anything slow -------------------------------------------------------------------------------------------

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        """All that keeps the recipe from running on this model, a sentence each; nothing is changed."""
        found = [] if self.steps else ["the recipe has no steps"]
        for step in self.steps:
            if not isinstance(step, Step):
                found.append(f"{step!r} is a {type(step).__name__}, not a step")
        found += no_task(task)
        if found:
            return found
        staged = [(step.name, step.stage) for step in self.steps if step.stage is not None]
        for (earlier, settled), (later, settles) in itertools.pairwise(staged):
            if settles < settled:
                found.append(
                    f"{later} settles {settles.name.lower()}, but {earlier} before it has settled "
                    f"{settled.name.lower()}: move {later} above {earlier}"
                )
        found += task.problems(model)
        if isinstance(model, nn.Module):
            for step in self.steps:
                found += [f"{step.name}: {problem}" for problem in step.problems(model, task)]
        return found

    def check(self, model: nn.Module, task: Task) -> None:
        """Raise all problems at once.

        Raises:
            RecipeError: there are any.
        """
        if problems := self.problems(model, task):
            raise RecipeError(problems)

    # Running --------------------------------------------------------------------------------------------------------

    def plan(
        self, model: nn.Module, task: Task, *, seed: int = 0, folder: str | os.PathLike[str] | None = None
    ) -> Ledger:
        """What the recipe would choose, as a ledger without edits; nothing is changed.

        Each step's plan is made for the model as given: what earlier steps will have changed by then is not seen.

        Args:
            model, task, seed, folder: as for `run`.
        """
        self.check(model, task)
        run = _Run(self, model, task, seed, folder)
        before = of_profile(run.profile, None)
        for step in self.steps:
            begun, study = time.monotonic(), run.study()
            after = step.planned(study, before)
            if after is None:
                study.notes.append(f"{step.name} chooses nothing beforehand")
            run.add(step, (), study, before, after or before, time.monotonic() - begun)
        return run.ledger

    def run(
        self, model: nn.Module, task: Task, *, seed: int = 0, folder: str | os.PathLike[str] | None = None
    ) -> Compressed:
        """Carry out all steps on a copy of the model.

        Args:
            model: the network; it is not changed.
            task: what it is for.
            seed: of everything random; the same seed gives the same result.
            folder: keep evaluations and the model after every step there; a run that was stopped goes on from there.
                A folder that holds another model's, task's or recipe's run is begun anew.
        Raises:
            RecipeError: the recipe cannot run; all problems at once.
            TaskError: one of the task's functions failed.
            BudgetError: a budget cannot be met.
        """
        self.check(model, task)
        run = _Run(self, model, task, seed, folder)
        with torch.random.fork_rng(devices=()):
            score = run.resume()
            run.check()
            for index in range(len(run.ledger.steps), len(self.steps)):
                score = run.carry_out(index, score)
        _take_flags(run.model, model)
        return Compressed(run.model, tuple(run.edits), run.ledger, task.inputs())

    # YAML -----------------------------------------------------------------------------------------------------------

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        steps = [{step.name: step.settings()} if step.settings() else step.name for step in self.steps]
        return yaml.safe_dump({"steps": steps}, sort_keys=False, allow_unicode=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            RecipeError: the file cannot be read, or is no recipe; all problems at once.
        """
        try:
            text = read_text(path, "a recipe")
        except ArtifactError as error:
            raise RecipeError([str(error)]) from error
        return Recipe.from_yaml(text)

    @staticmethod
    def from_yaml(text: str) -> Recipe:
        """A recipe from YAML: ``steps:`` with a list of step names, or of {step name: settings}.

        Raises:
            RecipeError: it is no recipe; all problems at once.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError([f"this is not YAML: {error}"]) from error
        if not isinstance(data, Mapping) or set(data) != {"steps"} or not isinstance(data["steps"], list):
            raise RecipeError(["a recipe is a mapping with one key, 'steps', that holds a list"])
        steps: list[Step] = []
        problems: list[str] = []
        for item in data["steps"]:
            try:
                steps.append(_step(item))
            except RecipeError as error:
                problems += error.problems
            except FeatherweightError as error:
                problems.append(f"{next(iter(item))}: {error}")
        if problems:
            raise RecipeError(problems)
        return Recipe(*steps)


def compress(
    model: nn.Module,
    *steps: Step,
    task: Task,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Compressed:
    """Carry out the steps on a copy of the model: ``Recipe(*steps).run(model, task)``.

    Args:
        model: the network; it is not changed.
        steps: what to do, in order.
        task: what the network is for.
        seed, folder: as for `Recipe.run`.
    """
    return Recipe(*steps).run(model, task, seed=seed, folder=folder)


@cache
def every_step() -> Mapping[str, type[Step]]:
    """All steps by the name that recipes call them by, found by walking the verb folders."""
    found: dict[str, type[Step]] = {}
    for verb in VERBS:
        room = importlib.import_module(f"featherweight.{verb}")
        for name in room.__all__:
            kind = getattr(room, name)
            if isinstance(kind, type) and issubclass(kind, Step):
                found[f"{verb}.{name}"] = kind
    return found


def _step(item: Any) -> Step:
    """One step of a recipe's list.

    Raises:
        RecipeError: no such step, or no such settings.
    """
    match item:
        case str(name):
            settings: Mapping[str, Any] = {}
        case Mapping() if len(item) == 1 and isinstance(next(iter(item.values())), Mapping | None):
            name, given = next(iter(item.items()))
            settings = given or {}
        case _:
            raise RecipeError([f"{item!r} is no step: write a name, or a name with settings below it"])
    known = every_step()
    if name not in known:
        raise RecipeError([f"there is no step {name!r}{did_you_mean(str(name), known)}"])
    fields = {f.name for f in dataclasses.fields(known[name])}
    unknown = [
        f"{name} has no setting {key!r}{did_you_mean(str(key), fields)}" for key in settings if key not in fields
    ]
    if unknown:
        raise RecipeError(unknown)
    try:
        return known[name](**settings)
    except TypeError as error:
        raise RecipeError([f"{name}: {error}"]) from error


def _check_called(model: nn.Module, counted: Profile, changes: Iterable[Edit]) -> None:
    """Every replacement takes part in a run of the model, as its profile tells.

    Raises:
        EditError: one does not: the model keeps the old layer in a place of its own and calls that.
    """
    if lost := [edit.layer for edit in changes if isinstance(edit, Replace) and edit.layer in counted.uncalled]:
        raise EditError(
            f"{', '.join(lost)} was replaced, but {type(model).__name__} goes on calling the old layer, which it also "
            "holds where PyTorch does not see it, such as in a plain list: hold layers in nn.ModuleList, or ignore them"
        )


class _Run:
    """A recipe at work: the copy, what was done to it, and where it is kept."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, task: Task, seed: int, folder: str | os.PathLike[str] | None
    ) -> None:
        self.model = copied(model).eval()
        self.recipe, self.original, self.task, self.seed = recipe, model, task, seed
        self.folder = None if folder is None else Path(folder)
        self.edits: list[Edit] = []
        self.scorer = Scorer(task, self.model)
        self.profile = profile(self.model, task.inputs())  # of the model as it is now
        self.start = self.profile.total
        self._checked: Study | None = None
        self.ledger = Ledger(
            model=type(model).__name__,
            fingerprint=fingerprint(model),
            scored_by=self.scorer.name,
            machine=machine(),
            versions={
                "featherweight": version("featherweight"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def study(self) -> Study:
        """A study of the model as it is now."""
        store = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            store = str(self.folder / "evaluations.sqlite")
        reference = copied(self.model)
        study = Study(self.model, reference, self.task, self.scorer, self.start, self.seed, store, given=self.original)
        study.made, study.beside = tuple(self.edits), beside
        study.__dict__["profile"] = self.profile
        return study

    def check(self) -> None:
        """What is only known of the model as it is now, and can still be said before anything slow.

        Raises:
            ArtifactError: the folder could not hold the model.
            RecipeError, BudgetError: the next step cannot be carried out.
        """
        if self.folder is not None:
            artifact.check(self.model)
        following = self.recipe.steps[len(self.ledger.steps) :]
        if following:
            self._checked = self.study()
            following[0].check(self._checked)

    def carry_out(self, index: int, score: float | None) -> float:
        """One step, start to end; returns the score after it."""
        torch.manual_seed(self.seed + index)  # of its own, so that a run taken up again goes on as one in one piece
        step, begun, asked = self.recipe.steps[index], time.monotonic(), self.scorer.count
        study, self._checked = self._checked or self.study(), None
        if score is None:  # nothing was done to it yet
            score = self.scorer.of_original(self.model)
        study.__dict__["original_score"] = score
        before = of_profile(self.profile, score)
        done: list[Edit] = []
        for edit in step.edits(study):
            self.model = study.model = edit.apply(self.model)
            done.append(edit)
        changes = [edit for edit in done if not isinstance(edit, Leave)]
        after_score = self.scorer(self.model) if changes or study.trained else score
        if not changes and not study.trained:
            study.notes.append("nothing was changed")
            reasons = sorted({edit.reason for edit in done if isinstance(edit, Leave)})
            why = "; ".join(reasons) or "no layer it could change"
            warnings.warn(f"{step.name} changed nothing: {why}", NoEffect, stacklevel=4)
        if changes or study.trained:  # what constrained values take depends on them
            self.profile = profile(self.model, self.task.inputs())
        _check_called(self.model, self.profile, changes)
        after = of_profile(self.profile, after_score)
        self.edits += changes
        self.add(step, done, study, before, after, time.monotonic() - begun, self.scorer.count - asked)
        self._keep(index)
        return after_score

    def add(
        self,
        step: Step,
        edits: Iterable[Edit],
        study: Study,
        before: Any,
        after: Any,
        seconds: float,
        evaluations: int = 0,
    ) -> None:
        """Enter a step into the ledger."""
        edits = list(edits)
        entry = Entry(
            step=step.name,
            settings=step.settings(),
            edits=tuple(edit.to_json() for edit in edits if not isinstance(edit, Leave)),
            left={edit.layer: edit.reason for edit in edits if isinstance(edit, Leave)},
            before=before,
            after=after,
            evaluations=evaluations,
            seconds=seconds,
            notes=tuple(study.notes),
            **study.findings,
        )
        self.ledger = dataclasses.replace(self.ledger, steps=(*self.ledger.steps, entry))

    # Keeping what was done, and going on from it --------------------------------------------------------------------

    def _identity(self, steps: int) -> str:
        """What the result of the first `steps` steps depends on, as a hash."""
        settings = [(step.name, step.settings()) for step in self.recipe.steps[:steps]]
        parts = [self.ledger.fingerprint, self.task.fingerprint(), self.seed, settings, version("featherweight")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _keep(self, index: int) -> None:
        if self.folder is None:
            return
        artifact.save(
            self.folder / f"step-{index + 1}.fw", self.model, self.edits, self.ledger, coding="fast", beneath=True
        )
        state = {"steps": index + 1, "identity": self._identity(index + 1)}
        with draft(self.folder / "run.json") as file:
            file.write_text(json.dumps(state), encoding="utf-8")

    def resume(self) -> float | None:
        """Take up the steps that an earlier run of the same recipe finished; returns the score they led to."""
        if self.folder is None or not (self.folder / "run.json").is_file():
            return None
        with contextlib.suppress(ArtifactError, KeyError, ValueError, TypeError):
            state = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            finished = min(int(state["steps"]), len(self.recipe.steps))
            if state["identity"] == self._identity(finished):
                kept = load_artifact(self.folder / f"step-{finished}.fw", copied(self.model))
                self.model, self.edits, self.ledger, _ = kept
                self.profile = profile(self.model, self.task.inputs())
                return self.ledger.after.score
        return None


def _take_flags(working: nn.Module, given: nn.Module) -> None:
    """Give the result the training flags of the caller's model; a new layer, those of the layer it stands for."""
    flags = {name: module.training for name, module in given.named_modules()}
    for name, module in working.named_modules():
        parent = name
        while parent not in flags:
            parent = parent.rpartition(".")[0]
        module.training = flags[parent]
