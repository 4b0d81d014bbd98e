"""A step: one technique with its settings. Given a model it yields edits, which are data."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

from torch import nn

from featherweight.edits import Edit
from featherweight.ledger import Snapshot
from featherweight.machine import missing
from featherweight.search.budget import Budget
from featherweight.settings import made, mistyped
from featherweight.study import Study
from featherweight.task import Task


class Stage(IntEnum):
    """What a step settles. A later stage never undoes an earlier one, so steps run in this order."""

    SHAPE = 1  # what exists
    MASK = 2  # what is zero
    VALUES = 3  # which numbers
    BYTES = 4  # how they are written


@dataclass(frozen=True)
class Step(ABC):
    """One technique with its settings: a frozen dataclass whose fields are the settings.

    Its stage is None where it settles nothing, such as training: then it may stand anywhere in a recipe.
    """

    stage: ClassVar[Stage | None]

    def __post_init__(self) -> None:
        """Make tuples of the lists, and a budget of the mapping, that recipes give.

        Raises:
            RecipeError, BudgetError: what is given is no budget.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif field.name == "budget" and isinstance(value, Mapping):
                object.__setattr__(self, "budget", made(Budget, value))

    @property
    def name(self) -> str:
        """The step as recipes write it: its folder and its class, such as ``factorize.SVD``."""
        folder = type(self).__module__.split(".")[-2:-1]  # none for a step that a script of the user's own defines
        return ".".join([*folder, type(self).__name__])

    @abstractmethod
    def edits(self, study: Study) -> Iterator[Edit]:
        """The step's edits, one after the other. Each has been made, on ``study.model``, by the time this resumes.

        Args:
            study: the model to work on, its task, and what is known of both.
        """

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        """All that keeps the step from running on this model, a sentence each; looked at before anything slow."""
        found, budget = mistyped(self), getattr(self, "budget", None)
        if found or not isinstance(budget, Budget) or budget.latency is None:
            return found
        if self.stage is not Stage.SHAPE:
            why = "it leaves all shapes as they are, and these runtimes take as long over any values"
            return [f"a latency is no limit for it: {why}; use factorize or prune.Channels, or quantize.Static"]
        lacks = missing(budget.runtime) if budget.runtime in ("onnx", "openvino") else None
        return [] if lacks is None else [f"the latency cannot be measured in {budget.runtime}, which needs {lacks}"]

    def check(self, study: Study) -> None:  # noqa: B027 - most steps have nothing to look at
        """Look at what is only known of the model as it is when the step begins, before anything slow.

        Args:
            study: of the model; what is found out may be left in ``study.worked_out``.
        Raises:
            FeatherweightError: the step cannot be carried out.
        """

    def planned(self, study: Study, before: Snapshot) -> Snapshot | None:
        """Choose as `edits` would, into the study's notes and findings, and change nothing.

        Args:
            study: of the model.
            before: the model as it is.
        Returns:
            What the model would cost; None for a step that chooses nothing beforehand.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as JSON-ready data."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: plain(value)
            for name, value in given.items()
            if value != next(f.default for f in dataclasses.fields(self) if f.name == name)
        }


def plain(value: Any) -> Any:
    """A setting as JSON-ready data: a dataclass as {its name: what differs from the defaults}, a tuple as a list."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        default = {f.name: f.default for f in dataclasses.fields(value)}
        return {type(value).__name__.lower(): {k: plain(v) for k, v in given.items() if v != default[k]}}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return float(value) if isinstance(value, float) else value  # numpy's float is one too, but YAML knows it not
