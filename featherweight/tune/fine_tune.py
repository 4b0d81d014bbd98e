"""Fine-tuning: a few epochs with the task's own data and loss.

What every method of compression is held against, and healed by. Le & Hua, Network pruning that matters, 2021,
arxiv.org/abs/2105.03193, on learning rates: a large one that falls heals better than a small one that stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from featherweight.mend import finetune
from featherweight.retraining import Retraining
from featherweight.study import Study
from featherweight.task import Task


@dataclass(frozen=True)
class FineTune(Retraining):
    """Train with ``task.train``."""

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if task.train is None and self.trains(model):
            found.append("there is nothing to train with: give Task(train=...)")
        return found

    def given(self, loss: Any) -> dict[str, Any]:
        return {}

    def retrain(self, study: Study) -> Any:
        return finetune(study.model, study.task, self.epochs, options=self.options)
