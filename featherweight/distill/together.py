"""Several kinds of knowledge in one training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from featherweight.distill.feature import Feature
from featherweight.distill.offline import SHARED, Offline
from featherweight.distill.relation import Relation
from featherweight.distill.response import Response
from featherweight.distill.term import Scene, Term
from featherweight.errors import RecipeError, did_you_mean
from featherweight.task import Task

KINDS: Mapping[str, type[Offline]] = {"response": Response, "feature": Feature, "relation": Relation}


@dataclass(frozen=True)
class Together(Offline):
    """The sum of several kinds, each with its weight: what ``distill.Response() + distill.Feature()`` is.

    Teacher, epochs and all else that concerns the training are this step's; of its parts only their own settings count.

    Attributes:
        kinds: the parts, such as ``[distill.Response(), distill.Feature(weight=0.5)]``; in YAML
            ``[{response: {temperature: 2}}, {feature: {weight: 0.5}}]``.
    """

    kinds: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.kinds if isinstance(self.kinds, Sequence) and not isinstance(self.kinds, str) else (self.kinds,)
        object.__setattr__(self, "kinds", tuple(_kind(item) for item in given))

    def terms(self) -> Sequence[Offline]:
        return tuple(self.kinds)

    def term(self, scene: Scene) -> Term:
        raise NotImplementedError("a sum is taken apart into its terms")

    def settings(self) -> dict[str, Any]:
        parts = [{type(kind).__name__.lower(): kind.settings()} for kind in self.kinds]
        return {**super().settings(), "kinds": parts}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        if wrong := [kind for kind in self.kinds if not isinstance(kind, Offline) or isinstance(kind, Together)]:
            return [f"kinds holds {wrong[0]!r}: give distill.Response, Feature or Relation"]
        if not self.kinds:
            return ["kinds is empty: give what to learn, such as [distill.Response(), distill.Feature()]"]
        default = {f.name: f.default for f in fields(Offline)}
        found = [
            f"{name} is {value!r} in {kind.name}, and {getattr(self, name)!r} for all together: give it once"
            for kind in self.kinds
            for name in SHARED
            if (value := getattr(kind, name)) is not default[name] and value != getattr(self, name)
        ]
        if self.weight != 1.0:
            found.append("weight is of a part: give it there")
        if found:
            return found
        shared = {name: getattr(self, name) for name in SHARED}
        for kind in self.kinds:
            problems = replace(kind, **shared).problems(model, task)
            found += [f"{kind.name}: {problem}" for problem in problems]
        return found or super().problems(model, task)


def _kind(item: Any) -> Any:
    """One part, from YAML or as it is.

    Raises:
        RecipeError: there is no such kind, or it has no such setting.
    """
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping):
        return item
    if len(item) != 1 or next(iter(item)) not in KINDS:
        hint = did_you_mean(str(next(iter(item), "")), KINDS)
        raise RecipeError([f"{dict(item)} is no kind of knowledge{hint or f': use {sorted(KINDS)}'}"])
    name, settings = next(iter(item.items()))
    known = {f.name for f in fields(KINDS[name])}
    if unknown := [
        f"{name} has no {key!r}{did_you_mean(str(key), known)}" for key in settings or {} if key not in known
    ]:
        raise RecipeError(unknown)
    return KINDS[name](**(settings or {}))
