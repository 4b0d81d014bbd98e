"""Relation distillation: not what a sample looks like to the teacher, but how samples lie to one another.

Park et al., 2019, arxiv.org/abs/1904.05068 (distances and angles); Tung & Mori, 2019, arxiv.org/abs/1907.09682
(similarity); Peng et al., 2019, arxiv.org/abs/1904.01802 (correlation congruence); Tian et al., 2020,
arxiv.org/abs/1910.10699 (contrastive). Widths need not agree, and outputs may be of other kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from featherweight.distill.offline import Offline
from featherweight.distill.pairing import called, channel_dim, channels_last, pairs, tap_of_inputs
from featherweight.distill.term import Given, Scene, Term
from featherweight.distill.watching import Answer, Look, Tap
from featherweight.errors import TaskError
from featherweight.matching import angles, contrastive, correlation_congruence, distances, similarity_preserving

# The papers' weights, with their means over batches of 64 turned into ours.
DISTANCE, ANGLE, SIMILARITY, CORRELATION, CONTRASTIVE = 25.0, 50.0, 50.0, 2.0, 0.8


@dataclass(frozen=True)
class Relation(Offline):
    """Learn how the batch's samples lie to one another, in what goes into the last layers or in layers of one's choice.

    Among several processes each sees the relations within its own share of a batch.

    Attributes:
        by: how: ``"relational"``, distances and angles (RKD); ``"similarity"``; ``"correlation"``, under a Gaussian
            kernel; ``"contrastive"`` (CRD), with a linear embedding of both that is gone afterwards.
        layers: {student's pattern: teacher's pattern}, or a list of patterns that hold for both; None for what goes
            into the last Linear or Conv layer.
        embedding: how wide the contrastive embedding is.
    """

    by: Literal["relational", "similarity", "correlation", "contrastive"] = "relational"
    layers: Any = None
    embedding: int = 128

    def problems(self, model: Any, task: Any) -> list[str]:
        found = super().problems(model, task)
        return [*found, f"embedding is {self.embedding}: it must be at least 1"] if self.embedding < 1 else found

    def term(self, scene: Scene) -> Term:
        if self.layers is None:
            taps = [(tap_of_inputs(scene.mine), tap_of_inputs(scene.its))]
        else:
            taps = [(Tap(own), Tap(other)) for own, other in pairs(scene.mine, scene.its, self.layers)]
        return _Relations(self, scene, taps)


class _Relations(Term):
    def __init__(self, step: Relation, scene: Scene, taps: Sequence[tuple[Tap, Tap]]) -> None:
        super().__init__()
        self.by = step.by
        self.mine, self.its = tuple(own for own, _ in taps), tuple(other for _, other in taps)
        looks = ((scene.student, scene.mine), (scene.teacher, scene.its))
        self.dims = [tuple(_channel_dim(*looks[side], tap) for side, tap in enumerate(both)) for both in taps]
        self.embeddings = nn.ModuleList()
        if self.by == "contrastive":
            for sides in taps:
                both = zip((scene.student, scene.teacher), (scene.mine, scene.its), sides, strict=True)
                self.embeddings.append(nn.ModuleList(nn.Linear(_width(*of), step.embedding) for of in both))

    def forward(self, student: Answer, teacher: Answer, given: Given) -> Tensor:
        total: Any = 0.0
        for index, (own, other) in enumerate(zip(self.mine, self.its, strict=True)):
            both = zip((student, teacher), (own, other), self.dims[index], strict=True)
            s, t = (_vectors(answer, tap, dim, given.mask) for answer, tap, dim in both)
            if self.by == "relational":
                value = DISTANCE * distances(s, t) + ANGLE * angles(s, t)
            elif self.by == "similarity":
                value = SIMILARITY * similarity_preserving(s, t)
            elif self.by == "correlation":
                value = CORRELATION * correlation_congruence(s, t)
            else:
                embed = self.embeddings[index]
                assert isinstance(embed, nn.ModuleList)
                value = CONTRASTIVE * contrastive(embed[0](s), embed[1](t))
            total = total + value
        return total / len(self.mine)  # type: ignore[no-any-return]


def _width(network: nn.Module, look: Look, tap: Tap) -> int:
    """How many features a tap gives for a sample.

    Raises:
        TaskError: that cannot be told.
    """
    if tap.side == "input":
        layer = network.get_submodule(tap.layer)
        width = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    else:
        call = called(look, tap.layer)
        width = call.given[channel_dim(call.module, call.given)] if call.given and len(call.given) > 1 else None
    if not isinstance(width, int):
        raise TaskError(f"{tap} gives no vectors that could be embedded: give layers=")
    return width


def _channel_dim(network: nn.Module, look: Look, tap: Tap) -> int:
    """Where a tap's features have their channels."""
    module = network.get_submodule(tap.layer)
    if tap.side == "input":
        return 1 if getattr(module, "in_channels", None) else -1
    call = called(look, tap.layer)
    return channel_dim(module, call.given) if call.given and len(call.given) > 1 else -1


def _vectors(answer: Answer, tap: Tap, dim: int, mask: Tensor | None) -> Tensor:
    """One vector a sample: features averaged over what positions there are, padding left out."""
    if tap not in answer.taps:
        raise TaskError(f"{tap} was not called in this batch, though it was on the example")
    features = answer.taps[tap]
    if features.ndim < 2:
        raise TaskError(f"{tap} gives one number a sample, {list(features.shape)}: give layers= that give more")
    features = channels_last(features, dim)
    if features.ndim == 2:
        return features
    if mask is not None and mask.shape == features.shape[:-1]:
        weights = (mask != 0).to(features)[..., None]
        return (features * weights).flatten(1, -2).sum(1) / weights.flatten(1, -2).sum(1).clamp_min(1)
    return features.flatten(1, -2).mean(1)
