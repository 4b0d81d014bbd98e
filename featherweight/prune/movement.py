"""Movement pruning: weights that training moves towards zero go, whatever their size.

Sanh et al., Movement pruning: adaptive sparsity by fine-tuning, 2020, section 4, arxiv.org/abs/2005.07683. Every weight
has a score S that is trained along with it. The mask is that of the highest scores, and gradients pass straight through
it: dL/dS = dL/dŴ · W, so a score falls where the weight is pulled towards zero.

For fine-tuning on another task than the weights were trained for, where their size says little. Where the task stays,
`prune.Magnitude` with a schedule reaches as far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.batch import copied
from featherweight.edits import Edit, Leave, remade
from featherweight.errors import RecipeError
from featherweight.forms import Mask, Masked, beneath, is_layer, layer_at, place
from featherweight.forms.constraint import with_own_class
from featherweight.layers import layer_names, matches, obstacles, settled, unmatched
from featherweight.mend import finetune
from featherweight.prune import schedules, spreads
from featherweight.prune.sparsity import keep
from featherweight.step import Stage, Step
from featherweight.study import Study
from featherweight.task import Task


@dataclass(frozen=True)
class Movement(Step):
    """Learn which weights go while the model is fine-tuned.

    Attributes:
        sparsity: the share of weights that goes, 0 to below 1.
        epochs: of fine-tuning with ``task.train``, over all rounds; the scores are among the model's parameters then.
        rounds: how often the mask becomes sparser, by the cubic schedule; nothing goes in the first.
        spread: ``"uniform"`` (the same share of every layer) or ``"global"`` (the lowest scores wherever they are).
        ignore: patterns of layers to leave alone.
    """

    sparsity: float = 0.5
    epochs: float = 3
    rounds: int = 10
    spread: Literal["uniform", "global"] = "uniform"
    ignore: tuple[str, ...] = ()

    stage: ClassVar[Stage] = Stage.MASK

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if not 0 <= self.sparsity < 1:
            found.append(f"sparsity is {self.sparsity}: it is the share of weights that goes, from 0 to below 1")
        if self.rounds < 2:
            found.append(f"rounds is {self.rounds}: it must be at least 2, for nothing goes in the first")
        if not self.epochs > 0:
            found.append(f"epochs is {self.epochs}: scores are learned by training, so it must be above 0")
        names = layer_names(model, inside=True)
        if task.train is None and any(not matches(name, self.ignore) for name in names):
            found.append("movement pruning trains: give Task(train=...)")
        return found + unmatched(self.ignore, names)

    def edits(self, study: Study) -> Iterator[Edit]:
        layers = self._layers(study)
        left = layers.pop("", {})
        yield from (Leave(name, reason) for name, reason in left.items())
        if not layers:
            return
        model = copied(study.model)
        moving = {name: _put_scores(*_place(model, name)) for name in layers}
        for done in range(self.rounds):
            share = schedules.cubic(done, final=self.sparsity, end=self.rounds - 1)
            self._choose(moving, share)
            finetune(model, study.task, self.epochs / self.rounds)
        self._choose(moving, self.sparsity)
        for name, scored in moving.items():
            if not bool(scored.mask.any()):
                raise RecipeError([f"{self.name}: nothing would be left of {name!r}: let less go, or ignore it"])
        for name, scored in moving.items():
            module, tensor = _place(model, name)
            _take_scores_off(module, tensor)
            form = Mask(int(scored.mask.sum()), tensor=tensor)
            cast(Masked, form.put_on(module)).mask.copy_(scored.mask)
            with torch.no_grad():
                beneath(module, tensor).mul_(scored.mask)
            yield remade(model, name, replace(form, tensor="weight"), layer_at(model, name).state_dict())
        study.model.load_state_dict(model.state_dict())

    def _layers(self, study: Study) -> dict[str, dict[str, str]]:
        """The layers to prune, by name; under "" those that cannot be, with the reason."""
        original, rows = study.original, study.profile.layers
        left = obstacles(original, [n for n, row in rows.items() if row.calls], self.ignore, inside=True)
        found: dict[str, dict[str, str]] = {}
        for name in layer_names(original, inside=True):
            layer = layer_at(original, name)
            if name in left or not is_layer(layer):
                continue
            if (reason := settled(layer)) is not None:
                left[name] = reason
            elif spreads.uniform([layer.weight.numel()], self.sparsity)[0] >= int(layer.weight.count_nonzero()):
                left[name] = "as many of its weights are zero already"
            else:
                found[name] = {}
        return {**found, "": left}

    def _choose(self, moving: dict[str, Scored], share: float) -> None:
        sizes, scores = [s.mask.numel() for s in moving.values()], [s.scores.detach() for s in moving.values()]
        kept = spreads.over_all(scores, share) if self.spread == "global" else spreads.uniform(sizes, share)
        for scored, count in zip(moving.values(), kept, strict=True):
            scored.mask.copy_(keep(scored.scores.detach().masked_fill(scored.gone, -torch.inf), Mask(count)))


class Scored(nn.Module):
    """Gives the weights that the mask keeps, and lets gradients through to weights and scores.

    Args:
        like: the weight.
    """

    mask: Tensor
    gone: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(like))
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool))
        self.register_buffer("gone", like == 0)  # what an earlier mask holds at zero stays there

    def forward(self, original: Tensor) -> Tensor:
        """Any shape → the same."""
        # The value is the mask's; the gradient of the scores is that of a factor of 1 + S − S.
        through = self.mask.to(original.dtype) + self.scores - self.scores.detach()
        return original * through


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a layer's weight, and the tensor's name there."""
    owner, tensor = place(model, name)
    return model.get_submodule(owner), tensor


def _put_scores(module: nn.Module, tensor: str) -> Scored:
    scored = Scored(getattr(module, tensor).detach())
    with_own_class(module, tensor)
    parametrize.register_parametrization(module, tensor, scored, unsafe=True)
    return scored


def _take_scores_off(module: nn.Module, tensor: str) -> None:
    """Take the topmost parametrization off, and leave those beneath as they are."""
    held = module.parametrizations[tensor]  # type: ignore[index]
    if len(held) == 1:
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    else:
        del held[len(held) - 1]  # type: ignore[union-attr]
