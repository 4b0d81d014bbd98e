"""What the loss of mutual learning and of self-distillation have in common: more is trained than the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.distill.distillation import part_of
from featherweight.distill.watching import LastCall, classes_in, look
from featherweight.errors import TaskError
from featherweight.task import Loss
from featherweight.train.evaluate import loss_of


class OnlineLoss(ABC):
    """A loss of the student's last call that trains other modules along.

    Args:
        student: the network that is kept.
        others: the modules that are trained with it and are gone afterwards.
        task_loss: of outputs and targets.
    Attributes:
        calls: how often it was asked for.
        parts: the mean of each of its parts so far.
    """

    def __init__(self, student: nn.Module, others: nn.ModuleList, task_loss: Loss | None) -> None:
        self.student, self.others = student, others
        self.task_loss: Loss = "cross_entropy" if task_loss is None else task_loss
        self.calls, self._sums = 0, dict[str, Tensor]()
        self.call = LastCall(student)

    @abstractmethod
    def of(self, outputs: Any, target: Any) -> Tensor:
        """The loss of a batch."""

    def __call__(self, outputs: Any, target: Any) -> Tensor:
        """The loss of the student's last call, its outputs and the loader's target."""
        self.calls += 1
        return self.of(getattr(outputs, "logits", outputs), target)

    def on(self, value: Tensor) -> Tensor:
        """Not to be had: every network needs the target for a loss of its own.

        Raises:
            TaskError: always.
        """
        raise TaskError(
            "this distillation has a loss of its own for every network that it trains, and a training step that "
            "computes one by itself does not say what the targets are: train with loss(outputs, target)"
        )

    def hard(self, outputs: Any, target: Any) -> Tensor:
        """The task's loss."""
        return loss_of(self.task_loss, outputs, target)

    def count(self, name: str, value: Tensor) -> Tensor:
        """Note a part of the loss, and give it back."""
        self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        return value

    @property
    def parts(self) -> dict[str, float]:
        """The mean of each part of the loss so far."""
        return {name: float(total) / max(1, self.calls) for name, total in self._sums.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, what is trained along is a part of the student, so that any function that trains it trains both."""
        try:
            with part_of(self.student, self.others):
                yield
        finally:
            self.close()

    def close(self) -> None:
        """Take all hooks off."""
        self.call.close()


def unknown_loss(student: nn.Module, example: Inputs, task_loss: Loss | None) -> str | None:
    """What to say where nothing tells the loss that networks are to learn by; None where it is known."""
    if task_loss is not None or classes_in(look(student, example, "the student"), None) is not None:
        return None
    return "the network is no classifier, so its loss has to be told: give Task(loss=...)"
