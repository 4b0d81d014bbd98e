"""What all distillation from teachers that stand still has in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featherweight.batch import device_of
from featherweight.distill.distillation import Distillation
from featherweight.distill.learning import learn
from featherweight.distill.term import Scene, Term
from featherweight.errors import TaskError
from featherweight.retraining import Retraining
from featherweight.step import plain
from featherweight.study import Study
from featherweight.task import Task, fingerprint, working_copy

if TYPE_CHECKING:
    from featherweight.distill.together import Together

# Settings of the training as a whole, which a sum of kinds has once.
SHARED = ("epochs", "ignore", "options", "teacher", "hard", "mask", "cache")
NAMED = ("original", "before")


@dataclass(frozen=True)
class Offline(Retraining):
    """Train the network on what a teacher answers, and on the labels too.

    Steps of this kind add up: ``distill.Response() + distill.Feature()`` learns both in one training.

    Attributes:
        teacher: who is learned from: ``"original"``, the network that the recipe was given; ``"before"``, the network
            as it was before this step; a network, or a list of several.
        weight: how much this knowledge counts in the loss.
        hard: how much the task's own loss counts; None for 1, and for 0 where there is no loss to be told or the task
            cannot train: the calibration inputs are then learned from, without labels.
        mask: the input, by name or by place, that says where outputs count, such as padding's ``attention_mask``.
        cache: a folder for the teacher's answers, so that of the same inputs it is asked once. Not for data that is
            augmented anew each epoch, which is refused.
    """

    teacher: Any = "original"
    weight: float = 1.0
    hard: float | None = None
    mask: str | int | None = "attention_mask"
    cache: str | None = None

    @abstractmethod
    def term(self, scene: Scene) -> Term:
        """This knowledge, made ready for a student and a teacher."""

    def terms(self) -> Sequence[Offline]:
        """What the loss is made of: this step alone, for most."""
        return (self,)

    def __add__(self, other: Offline) -> Together:
        from featherweight.distill.together import Together

        if not isinstance(other, Offline):
            return NotImplemented
        shared = {name: getattr(self, name) for name in SHARED}
        default: dict[str, Any] = {f.name: f.default for f in fields(Offline)}
        kinds = []
        for kind in (*self.terms(), *other.terms()):
            # What holds for all is said once; what differs stays, for `problems` to find.
            same = [name for name in SHARED if getattr(kind, name) == shared[name]]
            kinds.append(replace(kind, **{name: default[name] for name in same}))
        return Together(kinds=tuple(kinds), **shared)

    def settings(self) -> dict[str, Any]:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "teacher"}
        default = {f.name: f.default for f in fields(self)}
        said = {name: plain(value) for name, value in given.items() if value != default[name]}
        if self.teacher != "original":
            several = isinstance(self.teacher, tuple)
            said["teacher"] = [said_of(teacher) for teacher in self.teacher] if several else said_of(self.teacher)
        return said

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        named = self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
        wrong = [t for t in named if t not in NAMED and not isinstance(t, nn.Module)]
        found += [f"teacher is {t!r}: it is 'original', 'before', a network or a list of networks" for t in wrong]
        if not named:
            found.append("teacher is an empty list: give at least one network")
        for name in ("weight", "hard"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                found.append(f"{name} is {value}: it must be 0 or more")
        if task.train is None and not task.has_calibration and self.trains(model):
            found.append("there is nothing to learn from: give Task(train=...), or calibration data")
        if task.train is None and self.hard:
            found.append(f"hard is {self.hard}, but without Task(train=...) there are no labels: leave it out")
        if not found and self.trains(model):
            with torch.random.fork_rng(devices=()):  # adapters draw their first values
                found += self._misfits(model, task)
        return found

    def _misfits(self, model: nn.Module, task: Task) -> list[str]:
        """What is wrong between the network as given and networks that are named as its teachers."""
        named = self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
        teachers = [t for t in named if isinstance(t, nn.Module)]
        try:
            student = working_copy(model)
            others = [working_copy(t) for t in teachers] or [working_copy(model)]
            self._loss(student, others, task, None).close(finish=False)
        except TaskError as error:
            return [] if str(error).startswith("the student, a") else [str(error)]  # the task says that
        return []

    def check(self, study: Study) -> None:
        """Look at teacher and student as they are now.

        Raises:
            TaskError: they do not fit each other, or a pattern matches no layer.
        """
        if self.trains(study.model):
            self._loss(study.model, self._teachers(study), study.task, None).close(finish=False)

    def retrain(self, study: Study) -> Any:
        with self._loss(study.model, self._teachers(study), study.task, self.cache) as loss:
            return learn(study, loss, self.epochs, self.options)

    def _loss(self, student: nn.Module, teachers: Sequence[nn.Module], task: Task, cache: str | None) -> Distillation:
        hard = 0.0 if task.train is None else self.hard
        return Distillation(
            student,
            teachers,
            self,
            task_loss=task.loss,
            hard=hard,
            example=task.inputs(),
            mask=self.mask,
            cache=cache,
        )

    def _teachers(self, study: Study) -> list[nn.Module]:
        """Copies of the teachers, on the student's device: even a forward may write into buffers."""
        known = {"original": study.given or study.original, "before": study.original}
        named = self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
        found = [known[teacher] if isinstance(teacher, str) else teacher for teacher in named]
        return [working_copy(teacher).to(device_of(study.model)) for teacher in found]


def said_of(teacher: Any) -> Any:
    """A teacher as JSON-ready data; a network only by what it is, for nothing can bring it back."""
    if isinstance(teacher, nn.Module):
        return f"a {type(teacher).__name__}, {fingerprint(teacher)[:16]}"
    return teacher


def each(setting: Any) -> Iterator[Any]:
    """The values of a setting that may be a mapping from patterns."""
    yield from setting.values() if isinstance(setting, dict) else [setting]
