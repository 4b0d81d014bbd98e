"""Steps that train: they change values, and leave the form and what constrains the values as they are."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from featherweight.edits import Edit, Leave
from featherweight.layers import matches, unmatched, weighted_layers
from featherweight.step import Stage, Step
from featherweight.study import Study
from featherweight.task import Task
from featherweight.train import History


@dataclass(frozen=True)
class Retraining(Step):
    """A step that trains. It may stand anywhere in a recipe: what earlier steps have made is trained as it is.

    Attributes:
        epochs: how long to train.
        ignore: patterns of layers that keep their values.
        options: what ``task.train`` is given besides, such as ``{"lr": 0.01}``.
    """

    epochs: float = 1
    ignore: tuple[str, ...] = ()
    options: Any = None

    stage: ClassVar[Stage | None] = None

    @staticmethod
    def trains(model: nn.Module) -> bool:
        """Whether there is anything to train."""
        return any(parameter.requires_grad for parameter in model.parameters())

    @abstractmethod
    def retrain(self, study: Study) -> Any:
        """Train ``study.model`` in place; what the training told of itself is returned."""

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            found.append(f"epochs is {self.epochs}: it must be more than 0")
        if self.options is not None and not isinstance(self.options, Mapping):
            found.append(f"options is {self.options!r}: it is a mapping, such as {{'lr': 0.01}}")
        elif task.train is not None:
            found += self._refused(task.train)
        return found + unmatched(self.ignore, [name for name, _ in model.named_modules() if name])

    def _refused(self, train: Any) -> list[str]:
        """What the task's function does not take."""
        try:
            signature = inspect.signature(train)
        except (TypeError, ValueError):  # some callables do not tell
            return []
        try:
            signature.bind(None, self.epochs, **self.given(None), **(self.options or {}))
        except TypeError as error:
            return [f"task.train cannot be called as this step would: {error}. It is to be train(model, epochs, loss)"]
        return []

    def given(self, loss: Any) -> dict[str, Any]:
        """What ``task.train`` is given beside the options: a loss, for steps that have one of their own."""
        return {"loss": loss}

    def edits(self, study: Study) -> Iterator[Edit]:
        """Train, and say which layers were left alone and why; no edits of form."""
        model = study.model
        stays = _owners(model, self.ignore)
        for name, layer in weighted_layers(model).items():
            if _ignored(name, self.ignore):
                yield Leave(name, "ignored, as asked")
            elif not any(p.requires_grad for p in layer.parameters()):
                yield Leave(name, "none of its parameters requires a gradient")
        if not any(p.requires_grad for owner, p in _owned(model) if owner not in stays):
            return
        with _kept(model, stays):
            history = self.retrain(study)
        study.trained = True
        if isinstance(history, History) and history.losses:
            first, last = history.losses[0], history.losses[-1]
            study.notes.append(
                f"trained for {history.steps} updates: the loss was {first:.4g} in the first epoch and {last:.4g} in "
                "the last"
            )


def _ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the module or one that it is in is to be left alone."""
    parts = name.split(".")
    return any(matches(".".join(parts[:n]), patterns) for n in range(1, len(parts) + 1))


def _owners(model: nn.Module, patterns: tuple[str, ...]) -> set[nn.Module]:
    """The modules that are to be left alone."""
    return {module for name, module in model.named_modules() if _ignored(name, patterns)}


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            yield module, parameter


@contextmanager
def _kept(model: nn.Module, stays: set[nn.Module]) -> Iterator[None]:
    """These modules' parameters are not trained inside, and their buffers afterwards are what they were."""
    frozen = [p for owner, p in _owned(model) if owner in stays and p.requires_grad]
    buffers: list[tuple[Tensor, Tensor]] = [(b, b.clone()) for m in stays for b in m.buffers(recurse=False)]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for buffer, before in buffers:
            buffer.copy_(before)
