"""Depth pruning: whole blocks, and branches inside them, that the network can do without.

Fan et al., Reducing transformer depth on demand with structured dropout, 2020, arxiv.org/abs/1909.11556, and Men et
al., ShortGPT, 2024, arxiv.org/abs/2403.03853, remove whole layers; which ones is decided here by what the answers lose
on calibration data, measured, and measured again in the light of what has gone already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.batch import copied, mode
from featherweight.cost.count import Profile, profile
from featherweight.edits import Edit, Leave, Replace
from featherweight.errors import BudgetError
from featherweight.forms import FormModule, Removed, is_layer
from featherweight.layers import layer_names, matches, unmatched
from featherweight.ledger import Choice, Point
from featherweight.mend import MENDING_SAMPLES, finetune, reestimate_batch_norm
from featherweight.progress import track
from featherweight.score import Divergence
from featherweight.search.budget import Budget
from featherweight.search.timed import Stopwatch, Timed, missed, told
from featherweight.step import Stage, Step
from featherweight.study import Study
from featherweight.task import Task

METRICS = ("macs", "params", "bytes", "energy")


@dataclass(frozen=True)
class Blocks(Step):
    """Remove whole blocks: modules whose answer has the shape of their input, so that either can stand for it.

    One block after the other goes, always the one whose removal moves the answers on the calibration data (the example,
    where there is none) least for what it saves. Of a block its input takes the place; of a branch, whose result is
    added to something, zeros do: both are tried.

    Attributes:
        budget: what the whole network may cost, in shares of what the recipe was given.
        count: how many blocks to remove, instead of a budget.
        ignore: patterns of modules to leave alone.
        samples: how many calibration samples to look at.
        epochs: of fine-tuning with ``task.train`` afterwards.
    """

    budget: Budget | None = None
    count: int | None = None
    ignore: tuple[str, ...] = ()
    samples: int = 512
    epochs: float = 0

    stage: ClassVar[Stage] = Stage.SHAPE

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if (self.budget is None) == (self.count is None):
            found.append("give one of budget= and count=, which say how much to keep or how many blocks to remove")
        if self.budget is not None and self.budget.drop is not None:
            found.append("a drop is no limit that blocks can be chosen by yet: give a cost or a latency")
        if self.count is not None and self.count < 1:
            found.append(f"count is {self.count}: at least one block goes")
        if self.epochs and task.train is None:
            found.append("epochs needs Task(train=...), which the task does not have")
        if self.samples < 1 or self.epochs < 0:
            found.append("samples must be at least 1, and epochs at least 0")
        return found + unmatched(self.ignore, [name for name, _ in model.named_modules() if name])

    def edits(self, study: Study) -> Iterator[Edit]:
        """Remove block after block, then mend batch norms."""
        able, left = removable(study.original, study.task, self.ignore)
        chosen = self._chosen(study, able)
        for name in layer_names(study.original):
            within = [block for block in (*able, *left) if name.startswith(f"{block}.")]
            if not any(block in chosen for block in within):
                free = [block for block in within if block in able]
                why = "the block it is in stays" if free else "it is in no block that could go"
                ignored = any(matches(part, self.ignore) for part in (name, *within))
                left[name] = "ignored, as asked" if ignored else why
        yield from (Leave(name, reason) for name, reason in left.items())
        yield from (Replace(name, form, {}) for name, form in chosen.items())
        if not chosen:
            return
        norms = [name for name, module in study.model.named_modules() if isinstance(module, _BatchNorm)]
        samples = sum(inputs.batch_size for inputs in study.task.batches(study.model, self.samples))
        if study.task.has_calibration and samples >= MENDING_SAMPLES:
            divergence = Divergence(study.original, study.task, self.samples)
            reestimate_batch_norm(
                study.model, partial(study.task.batches, study.model, self.samples), divergence, norms
            )
        if self.epochs:
            finetune(study.model, study.task, self.epochs)

    def _chosen(self, study: Study, able: Sequence[str]) -> dict[str, Removed]:
        """What goes, in the order in which it was chosen; the choice goes into the study's findings.

        Raises:
            BudgetError: it cannot be met.
        """
        limits = {} if self.budget is None else self.budget.limits({m: study.start.metric(m) for m in METRICS})
        budget = self.budget if self.budget is not None and self.budget.latency is not None else None
        watch, timed = None if budget is None else Stopwatch.of(study, budget), list[Timed]()
        metric = next(iter(limits), "macs")
        going = _Going(study, able, metric, self.samples)

        def met() -> bool:
            if self.count is not None:
                return len(going.removed) >= self.count
            if any(going.cost.metric(m) > limit for m, limit in limits.items()):
                return False
            if budget is None or watch is None:
                return True
            share = going.cost.metric("macs") / (study.start.metric("macs") or 1.0)
            timed.append(watch.time(share, repr(going.removed), lambda: made(study.original, going.removed)))
            return timed[-1].used(budget) <= 1

        while not (done := met()) and (name := going.next()) is not None:
            going.remove(name)
        if budget is not None and timed:
            if not done:
                raise missed(budget, timed)
            study.notes.append(told(budget, tuple(timed)))
        if not done and self.count is None:
            metric = next(m for m, limit in limits.items() if going.cost.metric(m) > limit)
            raise BudgetError(
                f"{self.budget} cannot be met by removing blocks: without any of them {metric} still come to "
                f"{going.cost.metric(metric) / study.profile.total.metric(metric):.4g} of what they were"
            )
        used = max((going.cost.metric(m) / limit for m, limit in limits.items()), default=1.0)
        if used < 0.99:
            study.notes.append(f"the cost came to {used:.3f} of the limit: blocks go as wholes")
        if not done:
            study.notes.append(f"only {len(going.removed)} blocks could be removed")
        kept = Point("as it is", 1.0, 0.0)
        choices = {}
        for name, alone in going.alone.items():
            gone = Point(str(going.removed.get(name, alone.form)), 0.0, alone.loss)
            choices[name] = Choice(gone if name in going.removed else kept, (gone, kept))
        study.findings.update(choices=choices, metric=metric, selected_by="greedy")
        return going.removed


@dataclass(frozen=True)
class _Trial:
    """What the network would be without one block more.

    Attributes:
        form: what takes the block's place.
        loss: the divergence from the original then.
        price: the loss it adds for the share of the cost it saves.
        beside: how many blocks had gone before.
    """

    form: Removed
    loss: float
    price: float
    beside: int


class _Going:
    """Blocks that go one after the other, the one that is missed least first."""

    def __init__(self, study: Study, able: Sequence[str], metric: str, samples: int) -> None:
        self.study, self.metric = study, metric
        self.removed: dict[str, Removed] = {}
        self.cost, self.loss = study.profile.total, 0.0
        self.divergence = Divergence(study.original, study.task, samples)
        self.alone = {name: self._try(name) for name in track(able, "measuring what every block is worth")}
        self._trials = dict(self.alone)

    def next(self) -> str | None:
        """The block whose removal loses least for what it saves; None where none is left."""
        gone = [f"{name}." for name in self.removed]
        self._trials = {n: t for n, t in self._trials.items() if not f"{n}.".startswith(tuple(gone))}
        while self._trials:
            name = min(self._trials, key=lambda n: self._trials[n].price)
            if self._trials[name].beside == len(self.removed):
                return name
            # Blocks are missed the more the more have gone, so that only the cheapest need be looked at again.
            self._trials[name] = self._try(name)
        return None

    def remove(self, name: str) -> None:
        """Let a block go, and with it what has gone inside it already."""
        inside = {n: f for n, f in self.removed.items() if not n.startswith(f"{name}.")}
        self.removed, self.loss = {**inside, name: self._trials[name].form}, self._trials[name].loss
        self.cost = self._without({}).total

    def _without(self, more: Mapping[str, Removed]) -> Profile:
        return profile(made(self.study.original, {**self.removed, **more}), self.study.task.inputs())

    def _try(self, name: str) -> _Trial:
        tried = {}
        for form in (Removed(), Removed(zeros=True)):
            tried[form] = self.divergence(made(self.study.original, {**self.removed, name: form}))
        form = min(tried, key=lambda f: tried[f])
        saved = self.cost.metric(self.metric) - self._without({name: form}).total.metric(self.metric)
        share = max(saved / max(self.study.profile.total.metric(self.metric), 1.0), 1e-9)
        return _Trial(form, tried[form], (max(tried[form] - self.loss, 0.0) + 1e-12) / share, len(self.removed))


def removable(model: nn.Module, task: Task, ignore: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """Modules that can be removed, in calling order, and those with layers inside that cannot, with the reason.

    Args:
        model: the network.
        task: whose example is run.
        ignore: patterns of modules to leave alone.
    """
    able: list[str] = []
    left: dict[str, str] = {}
    calls: dict[str, int] = {}
    order: list[tuple[str, str | None]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            given = args[0] if args else None
            reason = None
            if not isinstance(given, Tensor) or not isinstance(output, Tensor):
                reason = "it does not give one tensor for one"
            elif given.shape != output.shape or given.dtype != output.dtype:
                reason = f"it makes {list(output.shape)} of {list(given.shape)}"
            order.append((name, reason))

        return hook

    parts = {
        name: module
        for name, module in model.named_modules()
        if name and module._modules and not isinstance(module, FormModule) and any(map(is_layer, module.modules()))
    }
    handles = [module.register_forward_hook(watch(name)) for name, module in parts.items()]
    try:
        with torch.no_grad(), mode(model, training=False):
            task.inputs().on(model).into(model)
    finally:
        for handle in handles:
            handle.remove()
    for name, reason in sorted(order, key=lambda item: list(parts).index(item[0])):
        if matches(name, ignore):
            left[name] = "ignored, as asked"
        elif calls[name] > 1:
            left[name] = "it is called more than once"
        elif reason is not None:
            left[name] = reason
        else:
            able.append(name)
    for name in list(able):
        try:
            with torch.no_grad(), mode(trial := made(model, {name: Removed()}), training=False):
                task.inputs().on(trial).into(trial)
        except Exception as error:  # what is around it may read anything of it
            able.remove(name)
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            left[name] = f"the network does not run without it: {said}"
    return able, left


def made(model: nn.Module, removed: Mapping[str, Removed]) -> nn.Module:
    """A copy of a model without some of its modules."""
    trial = copied(model)
    for name, form in removed.items():
        trial = Replace(name, form, {}).apply(trial)
    return trial
