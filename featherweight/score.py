"""The score of a model: the task's evaluate, or agreement with the original."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs, describe, mode, tensors_in
from featherweight.errors import TaskError
from featherweight.task import Loss, Task, first_line


class Scorer:
    """Asks the task for the score of models, checks every answer, and counts the asking.

    Attributes:
        name: what the score is.
        count: evaluations so far.
        seconds: wall time spent in them.
    """

    def __init__(self, task: Task, original: nn.Module) -> None:
        """Args:
        task: where evaluate comes from; without it, agreement with the original.
        original: the model to agree with.
        """
        self.task, self.count, self.seconds = task, 0, 0.0
        self._reference: list[list[Tensor]] = []
        self._classes: int | None = None
        self.name = "evaluate"
        if task.evaluate is None:
            raw = self._answers(original)
            self._classes = class_dimension(raw[0], task.loss)
            self._reference = [self._compared(answer) for answer in raw]
            kind = "top-1" if self._classes is not None else "1 − relative error"
            self.name = f"agreement with the original ({kind})"

    def __call__(self, model: nn.Module) -> float:
        """The model's score, higher is better.

        Raises:
            TaskError: evaluate raised, or returned something that is no finite number.
        """
        return self._score(model, lambda: [self._compared(answer) for answer in self._answers(model)])

    def of_original(self, original: nn.Module) -> float:
        """The score of the original as it came; agreement has its answers already.

        Raises:
            TaskError: as any other score.
        """
        return self._score(original, lambda: self._reference)

    def _score(self, model: nn.Module, answers: Callable[[], list[list[Tensor]]]) -> float:
        begun = time.perf_counter()
        with mode(model, training=False):
            score = self._agreement(answers()) if self.task.evaluate is None else self._evaluate(model)
        if not math.isfinite(score):
            raise TaskError(f"the score of the model is {score}: its answers hold NaN or infinite values")
        self.count += 1
        self.seconds += time.perf_counter() - begun
        return score

    def _evaluate(self, model: nn.Module) -> float:
        assert self.task.evaluate is not None
        try:
            score = self.task.evaluate(model)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(f"evaluate(model) raised {type(error).__name__}: {first_line(error)}") from error
        if isinstance(score, Tensor):
            raise TaskError(f"evaluate(model) returned a tensor ({describe(score)}): return a float, with .item()")
        if isinstance(score, bool) or not isinstance(score, numbers.Real):
            raise TaskError(f"evaluate(model) returned {score!r}, a {type(score).__name__}: return a float")
        if not math.isfinite(score):
            raise TaskError(f"evaluate(model) returned {score}: return a finite number, higher is better")
        return float(score)

    def _answers(self, model: nn.Module) -> list[Any]:
        with torch.no_grad(), mode(model, training=False):
            return [inputs.into(model) for inputs in self.task.batches(model)]

    def _compared(self, answer: Any) -> list[Tensor]:
        """What of an answer agreement looks at: a classifier's logits, otherwise every tensor."""
        return tensors_in(answer) if self._classes is None else [logits_of(answer)]

    def _agreement(self, answers: Sequence[Sequence[Tensor]]) -> float:
        if self._classes is not None:
            dim = self._classes
            equal = [a[0].argmax(dim) == r[0].argmax(dim) for a, r in zip(answers, self._reference, strict=True)]
            return float(torch.cat([e.flatten() for e in equal]).double().mean())
        wrong = whole = 0.0
        for answer, reference in zip(answers, self._reference, strict=True):
            for a, r in zip(answer, reference, strict=True):
                wrong += float((a.double() - r.double()).square().sum())
                whole += float(r.double().square().sum())
        return 1.0 - math.sqrt(wrong / whole) if whole else float(wrong == 0.0)


class Divergence:
    """How far a model's answers on the calibration data are from the original's; no labels needed.

    For a classifier the Kullback–Leibler divergence from the original's distribution, in nats a sample (a token, a
    pixel); otherwise the squared error as a share of the original's answers.
    """

    def __init__(
        self, original: nn.Module, task: Task, samples: int | None = None, answers: Sequence[Any] | None = None
    ) -> None:
        """Args:
        original: the model whose answers are right.
        task: where calibration batches come from; the example where it has none.
        samples: how many to look at; None for all.
        answers: the original's, batch by batch, where they are known already.
        """
        self._batches: Callable[[], Iterator[Inputs]] = lambda: task.batches(original, samples)
        raw = list(self._answers(original)) if answers is None else answers
        self._classes = class_dimension(raw[0], task.loss)
        self._reference = [tensors_in(answer) if self._classes is None else [logits_of(answer)] for answer in raw]

    def __call__(self, model: nn.Module) -> float:
        """The divergence of a model's answers, 0 for the original's own."""
        return self.of(self._answers(model))

    def of(self, answers: Iterable[Any]) -> float:
        """The divergence of answers, batch by batch."""
        wrong = whole = 0.0
        for answer, reference in zip(answers, self._reference, strict=True):
            if self._classes is not None:
                pair = (*reference, logits_of(answer))
                _check_alike(pair[1], pair[0])
                right, given = (t.movedim(self._classes, -1).double().log_softmax(-1) for t in pair)
                wrong += float((right.exp() * (right - given)).sum())
                whole += right[..., 0].numel()
            else:
                for a, r in zip(tensors_in(answer), reference, strict=True):
                    _check_alike(a, r)
                    wrong += float((a.double() - r.double()).square().sum())
                    whole += float(r.double().square().sum())
        return wrong / whole if whole else float(wrong > 0)

    def _answers(self, model: nn.Module) -> Iterator[Any]:
        for inputs in self._batches():
            with torch.no_grad(), mode(model, training=False):
                answer = inputs.into(model)
            yield answer


def _check_alike(given: Tensor, right: Tensor) -> None:
    """See that two answers can be compared number by number.

    Raises:
        TaskError: they cannot.
    """
    if given.shape != right.shape:
        raise TaskError(
            f"the compressed network answers {tuple(given.shape)} to a batch and the original {tuple(right.shape)}: "
            "shapes that depend on values cannot be compared; compress the part of the model whose shapes do not"
        )


def class_dimension(outputs: Any, loss: Loss | None) -> int | None:
    """The dimension along which a classifier's outputs hold its classes; None for what is no classifier.

    Args:
        outputs: one answer of the model.
        loss: the task's loss; None to tell from the outputs alone.
    """
    tensors = tensors_in(outputs)
    if not tensors or not (logits := logits_of(outputs)).is_floating_point() or logits.ndim < 2:
        return None
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return -1
    if loss == "cross_entropy":
        return 1
    if loss is None and len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] > 1:
        return 1
    return None


def logits_of(outputs: Any) -> Tensor:
    """The ``.logits`` of a model's outputs where they have them, otherwise their first tensor."""
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else tensors_in(outputs)[0]
