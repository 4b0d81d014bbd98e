"""Self-distillation: a network's shallow layers learn from its deepest, through heads that are gone afterwards.

Zhang et al., Be your own teacher: improve the performance of convolutional neural networks via self distillation, 2019,
arxiv.org/abs/1905.08094. No teacher is needed; what is learned is a network that knows more, earlier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs, describe, device_of
from featherweight.distill.learning import learn
from featherweight.distill.online import OnlineLoss
from featherweight.distill.pairing import called, channel_dim, channels_last, shallow, tap_of_inputs
from featherweight.distill.watching import Look, Tap, Watch, classes_in, look
from featherweight.errors import TaskError
from featherweight.matching import relative_error, soft_targets
from featherweight.retraining import Retraining
from featherweight.study import Study
from featherweight.task import Loss, Task


@dataclass(frozen=True)
class SelfDistill(Retraining):
    """Train a classifier with heads on layers on the way, which learn from the labels and from the last one.

    Attributes:
        heads: how many, at the ends of the stages before the last or evenly spread; or patterns of layers.
        alpha: how much of a head's loss is what the last classifier says, the rest being the labels.
        hint: how much it counts that heads see what the last classifier sees.
        temperature: of the softmax.
    """

    heads: int | tuple[str, ...] = 3
    alpha: float = 0.3
    hint: float = 0.03
    temperature: float = 3.0

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if task.train is None and self.trains(model):
            found.append("heads learn from labels: give Task(train=...)")
        if not self.heads or (isinstance(self.heads, int) and self.heads < 1):
            found.append(f"heads is {self.heads!r}: it must be at least 1, or patterns of layers")
        if not 0 <= self.alpha <= 1:
            found.append(f"alpha is {self.alpha}: it is a share, 0 to 1")
        if not (math.isfinite(self.hint) and self.hint >= 0) or not self.temperature > 0:
            found.append("hint must be 0 or more, and temperature more than 0")
        return found

    def check(self, study: Study) -> None:
        """Find where heads can stand.

        Raises:
            TaskError: nowhere, or the network is no classifier.
        """
        if self.trains(study.model):
            self._loss(study).close()

    def retrain(self, study: Study) -> Any:
        loss = self._loss(study)
        study.notes.append(f"heads stood on {', '.join(str(tap) for tap in loss.taps)}")
        return learn(study, loss, self.epochs, self.options)

    def _loss(self, study: Study) -> SelfLoss:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(study.seed)
            return SelfLoss(study.model, self, study.task.inputs(), study.task.loss)


class SelfLoss(OnlineLoss):
    """The task's loss, and for every head ``(1 − α) · its own + α · from the last classifier + hint``.

    Args:
        student: a classifier, (samples, classes).
        step: the settings.
        example: inputs of one call.
        task_loss: of outputs and targets; None for cross entropy.
    Raises:
        TaskError: there is nowhere for a head to stand, or the network is no classifier.
    """

    def __init__(self, student: nn.Module, step: SelfDistill, example: Inputs, task_loss: Loss | None = None) -> None:
        seen = look(student, example, "the student")
        logits = next(iter(seen.outputs.values()), None)
        classifier = callable(task_loss) or classes_in(seen, task_loss) is not None
        if logits is None or logits.ndim != 2 or len(seen.outputs) > 1 or not classifier:
            given = ", ".join(describe(t) for t in seen.outputs.values()) or "nothing"
            raise TaskError(
                f"heads are for classifiers, whose one output is (samples, classes): this one gives {given}"
            )
        self.step = step
        self.taps = _places(seen, step.heads)
        self.last = tap_of_inputs(seen)
        layer = student.get_submodule(self.last.layer)
        width = getattr(layer, "in_features", None)
        if width is None:
            raise TaskError(f"heads learn from what goes into a last Linear layer, and {self.last.layer} is {layer}")
        heads = [_Head(seen, tap.layer, width, logits.shape[1]) for tap in self.taps]
        super().__init__(student, nn.ModuleList(heads).to(device_of(student)), task_loss)
        self._watch = Watch(student, [*self.taps, self.last])

    def of(self, outputs: Any, target: Any) -> Tensor:
        """The sum of all classifiers' losses."""
        self.call.take()
        seen, step = self._watch.take(), self.step
        total = self.count("the task's loss", self.hard(outputs, target))
        if self.last not in seen or any(tap not in seen for tap in self.taps):
            raise TaskError("a layer that a head stands on was not called in this batch, though it was on the example")
        wise, deep = outputs.detach().float(), seen[self.last].detach()
        for tap, head in zip(self.taps, self.others, strict=True):
            embedding, logits = head(seen[tap])
            own = self.count("the heads' task's loss", self.hard(logits, target))
            soft = self.count("what heads learn from the last", soft_targets(logits, wise, step.temperature))
            near = self.count("how far heads see other things", relative_error(embedding, deep))
            total = total + (1 - step.alpha) * own + step.alpha * soft + step.hint * near
        return total

    def close(self) -> None:
        super().close()
        self._watch.close()


class _Head(nn.Module):
    """A bottleneck to the width of the last layer's inputs, the mean over positions, and a classifier."""

    def __init__(self, seen: Look, layer: str, width: int, classes: int) -> None:
        super().__init__()
        call = called(seen, layer)
        assert call.given is not None
        self.dim = channel_dim(call.module, call.given)
        self.widen = nn.Linear(call.given[self.dim], width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(samples, *positions and channels) → (samples, width), (samples, classes)."""
        x = self.widen(channels_last(features, self.dim))
        shape = x.shape
        x = self.norm(x.flatten(0, -2)).reshape(shape).relu()
        x = x if x.ndim == 2 else x.flatten(1, -2).mean(1)
        return x, self.classify(x)


def _places(seen: Look, heads: int | Sequence[str]) -> list[Tap]:
    return [Tap(name) for name in shallow(seen, heads)]
