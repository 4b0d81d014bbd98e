"""Feature distillation: the student's layers learn what the teacher's give on the way.

Romero et al., FitNets, 2015, arxiv.org/abs/1412.6550 (hints); Zagoruyko & Komodakis, 2017, arxiv.org/abs/1612.03928
(attention transfer); Heo et al., 2019, arxiv.org/abs/1904.01866 (overhaul); Chen et al., Knowledge distillation with
the reused teacher classifier, 2022, arxiv.org/abs/2203.14001 (SimKD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.distill.offline import Offline
from featherweight.distill.pairing import called, channel_dim, channels_last, last_layer, pairs
from featherweight.distill.term import Given, Scene, Term, counted
from featherweight.distill.watching import Answer, Tap
from featherweight.errors import TaskError
from featherweight.matching import attention_transfer, margin, overhaul, relative_error


@dataclass(frozen=True)
class Feature(Offline):
    """Learn what the teacher's layers give. Where widths differ an adapter is learned, and is gone afterwards.

    Attributes:
        by: how: ``"hint"``, the squared error as a share of the teacher's spread; ``"attention"``, where the features
            are strong, whatever their width; ``"overhaul"``, the partial error before ReLUs; ``"simkd"``, the inputs of
            the last layer, whose place the teacher's takes afterwards: both are Linear, and the adapter between them is
            multiplied into it, so that the student keeps its form.
        layers: which learns from which: {student's pattern: teacher's pattern}, or a list of patterns that hold for
            both; None to find pairs by depth and shape.
    """

    by: Literal["hint", "attention", "overhaul", "simkd"] = "hint"
    layers: Any = None

    def problems(self, model: Any, task: Any) -> list[str]:
        found = super().problems(model, task)
        if self.by == "simkd" and self.layers is not None:
            found.append("simkd takes the last layers of both: leave layers= out")
        return found

    def term(self, scene: Scene) -> Term:
        if self.by == "simkd":
            return _Reused(scene)
        found = pairs(scene.mine, scene.its, self.layers, negative=self.by == "overhaul")
        return _Features(self.by, scene, found)


class _Features(Term):
    """Pairs of layers, with an adapter for each that needs one."""

    def __init__(self, by: str, scene: Scene, found: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.by = by
        self.mine = tuple(Tap(own) for own, _ in found)
        self.its = tuple(Tap(other) for _, other in found)
        self.dims: list[tuple[int, int]] = []
        self.adapters = nn.ModuleList()
        for own, other in found:
            s, t = called(scene.mine, own), called(scene.its, other)
            if s.given is None or t.given is None:
                raise TaskError(f"{own if s.given is None else other} gives no tensor that could be matched")
            if len(s.given) != len(t.given):
                raise TaskError(
                    f"{own} of the student gives {list(s.given)} and {other} of the teacher {list(t.given)}: "
                    "pair layers whose answers have as many dimensions"
                )
            dims = channel_dim(s.module, s.given), channel_dim(t.module, t.given)
            widths = s.given[dims[0]], t.given[dims[1]]
            if by == "attention" and len(s.given) < 3:
                raise TaskError(f"{own} gives {list(s.given)}, which has no positions to attend to: use by='hint'")
            self.dims.append(dims)
            same = widths[0] == widths[1] or by == "attention"
            self.adapters.append(nn.Identity() if same else nn.Linear(*widths, bias=False))

    def forward(self, student: Answer, teacher: Answer, given: Given) -> Tensor:
        total: Any = 0.0
        for own, other, dims, adapter in zip(self.mine, self.its, self.dims, self.adapters, strict=True):
            s = adapter(channels_last(_of(student, own), dims[0]))
            t = _resized(channels_last(_of(teacher, other), dims[1]), s)
            if self.by == "attention":
                total = total + attention_transfer(s, t)
                continue
            s, t = counted(s, given.mask), counted(t, given.mask)
            total = total + (relative_error(s, t) if self.by == "hint" else overhaul(s, t, margin(t)))
        return total / len(self.mine)  # type: ignore[no-any-return]


class _Reused(Term):
    """The inputs of the last layers, and afterwards the teacher's last layer in the place of the student's."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        own, other = last_layer(scene.mine), last_layer(scene.its)
        self.own, self.other = own, other
        for who, network, name in (("student", scene.student, own), ("teacher", scene.teacher, other)):
            layer = network.get_submodule(name)
            if not isinstance(layer, nn.Linear) or (who == "student" and parametrize.is_parametrized(layer)):
                raise TaskError(f"simkd needs a plain Linear as last layer, and {name} of the {who} is {layer}")
        head, its = scene.student.get_submodule(own), scene.teacher.get_submodule(other)
        assert isinstance(head, nn.Linear)
        assert isinstance(its, nn.Linear)
        if not all(parameter.requires_grad for parameter in head.parameters()):
            raise TaskError(f"simkd puts another layer in the place of {own}, which is not to be trained")
        if head.out_features != its.out_features or (its.bias is not None and head.bias is None):
            raise TaskError(
                f"simkd puts {other} ({its}) in the place of {own} ({head}): they must give the same outputs"
            )
        self.mine, self.its = (Tap(own, "input"),), (Tap(other, "input"),)
        self.adapter = nn.Linear(head.in_features, its.in_features, bias=head.bias is not None)

    def forward(self, student: Answer, teacher: Answer, given: Given) -> Tensor:
        s, t = self.adapter(_of(student, self.mine[0])), _of(teacher, self.its[0])
        return relative_error(counted(s, given.mask), counted(t, given.mask))

    @torch.no_grad()
    def finish(self, student: nn.Module, teacher: nn.Module) -> None:
        """``W = Wₜ P``, ``b = Wₜ p + bₜ``."""
        head, its = student.get_submodule(self.own), teacher.get_submodule(self.other)
        assert isinstance(head, nn.Linear)
        assert isinstance(its, nn.Linear)
        head.weight.copy_(its.weight.double() @ self.adapter.weight.double())
        if head.bias is not None:
            bias = its.weight.double() @ self.adapter.bias.double()
            head.bias.copy_(bias if its.bias is None else bias + its.bias.double())


def _of(answer: Answer, tap: Tap) -> Tensor:
    if tap not in answer.taps:
        raise TaskError(f"{tap} was not called in this batch, though it was on the example")
    return answer.taps[tap]


def _resized(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's features at the student's positions, averaged: (samples, *positions, channels)."""
    if teacher.shape[1:-1] == student.shape[1:-1]:
        return teacher
    first = teacher.movedim(-1, 1)
    pools: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    pooled: Tensor = pools[first.ndim - 2](first, tuple(student.shape[1:-1]))
    return pooled.movedim(1, -1)
