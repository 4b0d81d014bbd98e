"""Response distillation: the student learns to answer what the teacher answers.

Hinton, Vinyals & Dean, Distilling the knowledge in a neural network, 2015, arxiv.org/abs/1503.02531; its refinements by
Zhao et al., 2022 (decoupled), Huang et al., 2022 (DIST) and Sun et al., 2024 (logit standardization), and for what are
no classes the squared error. Plain soft targets are what reproduces best; DIST suits teachers much stronger than the
student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.batch import describe
from featherweight.distill.offline import Offline, each
from featherweight.distill.term import Given, Scene, Term, check_alike, counted
from featherweight.distill.watching import Answer, classes_in
from featherweight.errors import TaskError
from featherweight.layers import PerLayer, for_layer, unmatched
from featherweight.matching import decoupled, relation_of_classes, relative_error, soft_targets, standardized

KINDS = ("soft_targets", "decoupled", "dist", "error")


@dataclass(frozen=True)
class Response(Offline):
    """Learn the teacher's answers, for any outputs: every floating-point tensor among them is matched.

    Attributes:
        by: how: ``"soft_targets"`` (Hinton), ``"decoupled"`` (DKD), ``"dist"`` (DIST), or ``"error"``, the squared
            error as a share of the teacher's spread; by output where it is a mapping from patterns of their names, such
            as ``{"*boxes": "error"}``. None for soft targets of a classifier's logits and the error of all else.
        temperature: of the softmax.
        standardize: give logits mean 0 and deviation 1 before the softmax.
        class_dim: the dimension of logits that holds the classes; None for 1, and for the last of ``.logits``.
    """

    by: PerLayer[str] | None = None
    temperature: float = 4.0
    standardize: bool = False
    class_dim: int | None = None

    def problems(self, model: Any, task: Any) -> list[str]:
        found = super().problems(model, task)
        found += unknown_kinds(self.by)
        return (
            [*found, f"temperature is {self.temperature}: it must be more than 0"] if self.temperature <= 0 else found
        )

    def term(self, scene: Scene) -> Term:
        check_alike(scene)
        names = list(scene.mine.outputs)
        if isinstance(self.by, Mapping) and (wrong := unmatched(self.by, names)):
            raise TaskError("; ".join(wrong).replace("layers", "outputs"))
        dim = classes_in(scene.mine, scene.loss)
        by = {}
        for name, tensor in scene.mine.outputs.items():
            chosen = for_layer(self.by, name, default=None)
            if chosen is None:
                # What a function makes of it does not tell whether a matrix holds logits or numbers.
                if callable(scene.loss) and dim is None and tensor.ndim == 2 and tensor.shape[1] > 1:
                    raise TaskError(
                        f"the task's loss is a function, which does not tell whether {name}, {describe(tensor)}, holds "
                        "logits: give by='soft_targets', or by='error' where it does not"
                    )
                chosen = "error" if dim is None or name not in ("logits", "output", names[0]) else "soft_targets"
            by[name] = chosen
        at = self.class_dim if self.class_dim is not None else (1 if dim is None else dim)
        return _Answers(self, by, at)


def unknown_kinds(by: PerLayer[str] | None) -> list[str]:
    """A sentence for every way of matching that there is not."""
    return [f"by is {kind!r}: use {', '.join(KINDS)}" for kind in each(by) if kind is not None and kind not in KINDS]


class _Answers(Term):
    def __init__(self, step: Response, by: Mapping[str, str], class_dim: int) -> None:
        super().__init__()
        self.step, self.by, self.class_dim = step, by, class_dim

    def forward(self, student: Answer, teacher: Answer, given: Given) -> Tensor:
        total = torch.zeros((), device=next(iter(student.outputs.values())).device)
        for name, kind in self.by.items():
            mine, its = student.outputs[name], teacher.outputs[name]
            if mine.shape != its.shape:
                raise TaskError(f"the student's {name} is {describe(mine)} and the teacher's {describe(its)}")
            if kind == "error":
                shown = (counted(mine, given.mask), counted(its, given.mask)) if mine.ndim > 2 else (mine, its)
                total = total + relative_error(*shown)
                continue
            s, t = (counted(x.movedim(self.class_dim, -1), given.mask) for x in (mine, its))
            if not len(s):  # a batch of nothing but padding
                total = total + s.sum()
                continue
            if self.step.standardize:
                s, t = standardized(s), standardized(t)
            total = total + self._of_logits(kind, s, t, mine, given)
        return total

    def _of_logits(self, kind: str, s: Tensor, t: Tensor, whole: Tensor, given: Given) -> Tensor:
        if kind == "soft_targets":
            return soft_targets(s, t, self.step.temperature)
        if kind == "dist":
            return relation_of_classes(s, t, self.step.temperature)
        labels, target = t.argmax(1), given.target  # the teacher's own where nobody tells the right ones
        places = whole.movedim(self.class_dim, -1).shape[:-1]
        if isinstance(target, Tensor) and not target.is_floating_point() and target.shape == places:
            told = counted(target[..., None], given.mask)[:, 0].to(labels)
            labels = torch.where(told >= 0, told, labels)
        return decoupled(s, t, labels, self.step.temperature)
