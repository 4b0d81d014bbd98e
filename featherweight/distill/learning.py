"""Training with a loss of ours by the task's own function, and what can go wrong with that."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featherweight.errors import TaskError
from featherweight.mend import finetune
from featherweight.study import Study
from featherweight.task import Task
from featherweight.train import fit


class Learning(Protocol):
    """A loss of a student's last call that keeps account of itself."""

    calls: int

    @property
    def parts(self) -> dict[str, float]:
        """The mean of each of its parts so far."""

    def attached(self) -> AbstractContextManager[None]:
        """Inside, all that it trains is part of the student."""

    def __call__(self, outputs: Any, target: Any) -> Tensor:
        """The loss of a batch."""


def learn(study: Study, loss: Learning, epochs: float, options: Any) -> Any:
    """Train the study's model by the loss: with the task's function, or without one on the calibration inputs.

    Returns:
        What the training told of itself.
    Raises:
        TaskError: the function failed, or never asked for the loss, or a part of that became NaN.
    """
    task = study.task
    with loss.attached():
        try:
            if task.train is not None:
                history = finetune(study.model, task, epochs, loss, options)
            else:
                study.notes.append("trained on the calibration inputs, without labels")
                history = fit(study.model, unlabelled(task, study.model), epochs, loss, **(options or {}))
        except TaskError as error:
            bad = [name for name, mean in loss.parts.items() if not math.isfinite(mean)]
            if not bad:
                raise
            raise TaskError(f"{error}. Of the loss, {' and '.join(bad)} became NaN or infinite") from error
    if not loss.calls:
        raise TaskError(
            "train(model, epochs, loss) never asked for the loss that it was given, so nothing was distilled: compute "
            "loss(outputs, target) in it"
        )
    parts = ", ".join(f"{name} {mean:.4g}" for name, mean in loss.parts.items())
    study.notes.append(f"the loss's parts, on average over the training and before weighting: {parts}")
    return history


def unlabelled(task: Task, model: nn.Module) -> list[Any]:
    """The calibration batches as `fit` takes them, with targets that say nothing."""
    batches: list[Any] = []
    for inputs in task.batches(model):
        nothing = torch.zeros(inputs.batch_size)
        batches.append({**inputs.kwargs, "labels": nothing} if inputs.kwargs else (*inputs.args, nothing))
    return batches
