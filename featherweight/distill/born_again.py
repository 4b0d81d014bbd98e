"""Born again: the same network, trained anew from what it knew, generation after generation.

Furlanello et al., Born again neural networks, 2018, arxiv.org/abs/1805.04770.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from featherweight.distill.distillation import Distillation
from featherweight.distill.fresh import start_anew
from featherweight.distill.learning import learn
from featherweight.distill.response import Response, unknown_kinds
from featherweight.layers import PerLayer
from featherweight.retraining import Retraining
from featherweight.study import Study
from featherweight.task import Task


@dataclass(frozen=True)
class BornAgain(Retraining):
    """Start from new initial values and learn from the labels and from the network as it was; and again.

    Attributes:
        generations: how many times; each takes `epochs`.
        by: how answers are matched, as in `distill.Response`.
        weight: how much the answers of the generation before count.
        hard: how much the task's own loss counts; None for 1, and for 0 where there is no loss to be told.
        temperature: of the softmax; the paper's 1.
    """

    generations: int = 1
    by: PerLayer[str] | None = None
    weight: float = 1.0
    hard: float | None = None
    temperature: float = 1.0

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if task.train is None and self.trains(model):
            found.append("a network that starts anew needs labels: give Task(train=...)")
        found += unknown_kinds(self.by)
        if self.generations < 1:
            found.append(f"generations is {self.generations}: it must be at least 1")
        for name in ("weight", "hard"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                found.append(f"{name} is {value}: it must be 0 or more")
        return (
            [*found, f"temperature is {self.temperature}: it must be more than 0"] if self.temperature <= 0 else found
        )

    def retrain(self, study: Study) -> Any:
        model, history = study.model, None
        for generation in range(1, self.generations + 1):
            teacher = copy.deepcopy(model)
            kept = start_anew(model)
            if kept and generation == 1:
                study.notes.append(f"kept their values, as nothing says how they would begin: {', '.join(kept)}")
            response = Response(by=self.by, weight=self.weight, temperature=self.temperature)
            example, own = study.task.inputs(), study.task.loss
            with Distillation(model, teacher, response, task_loss=own, hard=self.hard, example=example) as loss:
                history = learn(study, loss, self.epochs, self.options)
            if generation < self.generations:
                study.notes.append(f"generation {generation} scored {study.scorer(model):.4g}")
        return history
