"""What every structured pruning has in common: coupled groups of slices, a width for each, and the mending after.

Groups of slices that go together (`graph.couple`) → what each width of each group loses → widths under a budget → the
narrowed network, held against the masked original → the layers behind refitted to the original's answers.

Li et al., Pruning filters for efficient convnets, 2017, arxiv.org/abs/1608.08710 (what to remove); He et al., Channel
pruning for accelerating very deep neural networks, 2017, arxiv.org/abs/1707.06168 (LASSO and reconstruction); Fang et
al., DepGraph, 2023, arxiv.org/abs/2301.12900 (coupled groups); Frantar et al., Optimal brain compression, 2022,
arxiv.org/abs/2208.11580 (the second-order removal that is the default).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from featherweight.batch import copied, mode
from featherweight.constant import moved, norms_behind
from featherweight.cost.cost import Cost
from featherweight.cost.count import Profile, profile
from featherweight.curvature import rectified
from featherweight.curvature.gram import (
    ROWS_A_KEPT_COLUMN,
    ROWS_NUMBERS,
    Statistics,
    gather_paired,
    paired_rows,
)
from featherweight.curvature.lockstep import Lockstep, Reached
from featherweight.curvature.selection import Consumer, greedy_elimination, lasso
from featherweight.curvature.solve import damp, least_squares
from featherweight.edits import Edit, Leave, Narrow
from featherweight.errors import BudgetError, RecipeError, first_few
from featherweight.forms import Layer, is_layer
from featherweight.graph import (
    Behind,
    Group,
    ModelGraph,
    Narrowed,
    Narrowing,
    Site,
    Unfaithful,
    behind,
    couple,
    left_behind,
    narrow,
    norms_over_kept,
)
from featherweight.layers import PerLayer, apart, for_layer, matches, obstacles, unmatched, weighted_layers
from featherweight.ledger import Choice, Point, Snapshot
from featherweight.mend import MENDING_SAMPLES, corrected_bias, finetune, reestimate_batch_norm
from featherweight.progress import track
from featherweight.prune import schedules, scores
from featherweight.prune.units import bills, columns, joint, members, reader, slices, telling
from featherweight.score import Divergence
from featherweight.search.budget import Budget
from featherweight.search.optimal import rounded_up
from featherweight.search.timed import Stopwatch, Timed, largest, told
from featherweight.search.widths import Bill, Curve, alike, between, filled, least_loss, nearest, ranked, ranked_within
from featherweight.snapshot import of_profile
from featherweight.step import Stage, Step
from featherweight.study import Study
from featherweight.task import Task
from featherweight.train.evaluate import loss_of

# By tensor and dimension, which indices stay.
Stays: TypeAlias = Mapping[str, Sequence[npt.NDArray[np.bool_]]]

SCORES = (
    *("loss", "lasso", "l1", "l2", "random", "batch_norm", "geometric_median", "activation"),
    *("taylor", "fisher", "hessian", "input_l2"),
)
GRADIENT_SCORES = ("taylor", "fisher", "hessian")
# Samples whose gradients are taken one by one.
GRADIENT_SAMPLES = 64
MEASURED = {"optimal": least_loss, "between": between, "uniform": alike}
SELECTORS = ("measured", *MEASURED, "global", "classes")
SCHEDULES = ("cubic", "linear", "geometric")
NORMALIZATIONS = ("share", "none", "mean", "max", "lamp")
PENALTIES = ("group_lasso", "growing", "slimming")
# Growing penalties rise in so many increments, one every so many steps (GReg, section 4, has 10 steps of training).
GROWTHS, GROWTH_STEPS = 20, 10
METRICS = ("macs", "params", "bytes")
# Of the mean diagonal of Gram matrices, towards what is there: there are few samples for so many unknowns.
RIDGE = 1e-3
# Of the mean gradient covariance: outputs whose gradient is small on the calibration data still matter elsewhere.
GRADIENT_DAMPING = 1e-2
# Of the largest scale of a batch norm: below this, an output can hardly be moved by the weights in front of the norm.
LEAST_SCALE = 1e-3
# Inputs of a layer that have to fit into memory, as a multiple of their width, for it to be fitted through a rectifier.
FEWEST_ROWS = 24
# How often the estimate of a narrowed network's cost is corrected by its true cost.
CORRECTIONS = 6
# How much of a limit may stay unused.
SLACK = 0.01
CURVE_POINTS = 40
# Of a group's units, how many removals there are between two looks at which unit is missed least.
AT_ONCE = 64


@dataclass(frozen=True)
class Structured(Step):
    """Remove whole slices that go together, so that the network really shrinks.

    Attributes:
        budget: what the whole network may cost (``macs``, ``params``, ``bytes`` or ``latency``), in shares of what the
            recipe was given; widths are then chosen.
        ratio: the share of every group's units to remove, 0 up to 1, instead of a budget; per group where it is a
            mapping from patterns.
        score: what decides which units stay: ``"loss"``, the predicted rise of the loss once the layers that read a
            unit are refitted (needs calibration data; ``"l2"`` is used without); ``"lasso"``, gates under an L1
            penalty; ``"l1"``, ``"l2"``, ``"random"``, ``"batch_norm"`` (its scales), ``"geometric_median"``,
            ``"input_l2"`` (squares of the weights that read the unit, as AIMET does), ``"activation"`` (root mean
            square of what the unit gives); or by gradients of the divergence on calibration data ``"taylor"``,
            ``"fisher"`` and ``"hessian"`` (the diagonal). None for ``"loss"``, and for ``"batch_norm"`` where the
            penalty is ``"slimming"``.
        select: how a budget is spread over the groups: ``"optimal"``, least predicted loss over all of them;
            ``"uniform"``, the same share of every one; ``"between"``, halfway; or ``"measured"``, whichever of these
            moves the answers on the calibration data least once the layers are refitted (``"optimal"`` without data).
            ``"global"`` is one ranking of all units, ``"classes"`` one of those of like layers, the same share of each.
        normalize: how scores are made comparable between groups: ``"share"`` of the group's sum, ``"mean"``, ``"max"``,
            ``"lamp"``, or ``"none"``. Predicted losses are comparable as they are.
        threshold: instead of a budget or a ratio, what may be lost: of every group as many units go as together lose no
            more than this, in predicted loss, or in normalized score where another score decides.
        reconstruct: what is put right, by the original's answers, of the layers from the first that reads narrowed
            inputs on: True for weights and biases, by least squares, to what the rectifier behind a layer makes of its
            answer, where that is known; ``"linear"`` for the same to the layer's own answer (He et al., 2017, section
            3.2); ``"bias"`` for the means of answers alone, which biases or the batch norms behind take up (Nagel et
            al., 2019, arxiv.org/abs/1906.04721, section 4.2); False for nothing; None for True wherever there is
            calibration data.
        asymmetric: fit every layer to the original's answers on what the narrowed layers before it give; False for
            what is kept of the inputs that it has in the original: then only the layers that read narrowed inputs are
            fitted, to their own answers. So it always is of a captured graph.
        positions: at how many random output positions (pixels, tokens) of every sample layers are fitted; None for as
            many as a fit can use. AIMET's channel pruning takes 10.
        batch_norm: whether batch norms are re-estimated afterwards; kept where answers come nearer to the original's.
        ignore: patterns of layers to leave alone: no layer that matches loses an output.
        multiple_of: keep multiples of this many slices (or all); per group where it is a mapping.
        minimum: keep at least this many units; per group where it is a mapping.
        samples: how many calibration samples to look at.
        epochs: of fine-tuning with ``task.train`` afterwards, after every round where there are several.
        rounds: in how many to prune; more goes in the earlier ones, on the cubic schedule of Zhu & Gupta, To prune, or
            not to prune, 2017, arxiv.org/abs/1710.01878. With a ``drop`` in the budget they end before the one that
            would lose more.
        schedule: of the rounds: ``"cubic"``, ``"linear"``, or ``"geometric"`` (of what is left the same share in every
            one).
        penalty: train with ``task.train`` first under a penalty that drives units to zero: ``"group_lasso"``,
            ``"growing"`` (weight decay that grows, on the units that are to go), or ``"slimming"`` (on the scales of
            batch norms). The task's `train` has to take a ``loss``.
        penalty_weight: the penalty's factor beside the loss; of ``"growing"`` its ceiling.
        penalty_epochs: of that training.
    """

    budget: Budget | None = None
    ratio: PerLayer[float] | None = None
    score: str | None = None
    select: str = "measured"
    normalize: str = "share"
    threshold: float | None = None
    reconstruct: bool | Literal["linear", "bias"] | None = None
    asymmetric: bool = True
    positions: int | None = None
    batch_norm: bool = True
    ignore: tuple[str, ...] = ()
    multiple_of: PerLayer[int] = 1
    minimum: PerLayer[int] = 1
    samples: int = 512
    epochs: float = 0
    rounds: int = 1
    schedule: str = "cubic"
    penalty: str | None = None
    penalty_weight: float = 1e-4
    penalty_epochs: float = 1

    stage: ClassVar[Stage] = Stage.SHAPE
    # The kinds of groups that are narrowed, as `graph.Group.kind` names them.
    kinds: ClassVar[tuple[str, ...]] = ()

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if sum(given is not None for given in (self.budget, self.ratio, self.threshold)) != 1:
            found.append("give one of budget=, ratio= and threshold=, which say how much to keep, to remove or to lose")
        if self.threshold is not None and self.threshold < 0:
            found.append(f"threshold is {self.threshold}: it is what may be lost, 0 or more")
        if self.threshold is not None and self.rounds > 1:
            found.append("rounds need a budget or a ratio to go towards; a threshold is met at once")
        if self.budget is not None:
            if self.budget.latency is not None and (self.rounds > 1 or self.budget.drop is not None):
                found.append("a latency is met at once, in no rounds, which a drop would end: give macs, or it alone")
            elif self.budget.drop is not None and self.rounds < 2:
                found.append("a drop ends rounds of pruning, and is no limit that widths can be chosen by: give rounds")
            if not self.budget.costs() and self.budget.latency is None:
                found.append("the budget has no cost: give macs, params or bytes beside the drop")
            if unknown := [metric for metric in self.budget.costs() if metric not in METRICS]:
                found.append(
                    f"{unknown[0]} is no cost that widths can be chosen by: use {', '.join(METRICS)} or latency"
                )
        for value in self.ratio.values() if isinstance(self.ratio, Mapping) else [self.ratio]:
            if value is not None and not 0 <= value < 1:
                found.append(f"ratio is {value}: it is the share of units to remove, from 0 up to but not 1")
        for name, setting in (("multiple_of", self.multiple_of), ("minimum", self.minimum)):
            for number in setting.values() if isinstance(setting, Mapping) else [setting]:
                if number < 1:
                    found.append(f"{name} is {number}: it must be at least 1")
        if self.ranked_by not in SCORES:
            found.append(f"score is {self.score!r}: use {', '.join(SCORES)}")
        if self.select not in SELECTORS:
            found.append(f"select is {self.select!r}: use {', '.join(SELECTORS)}")
        if self.normalize not in NORMALIZATIONS:
            found.append(f"normalize is {self.normalize!r}: use {', '.join(NORMALIZATIONS)}")
        if self.schedule not in SCHEDULES:
            found.append(f"schedule is {self.schedule!r}: use {', '.join(SCHEDULES)}")
        if self.penalty is not None:
            if self.penalty not in PENALTIES:
                found.append(f"penalty is {self.penalty!r}: use {', '.join(PENALTIES)}")
            if task.train is None:
                found.append("penalty needs Task(train=...), which the task does not have")
        if not self.penalty_weight > 0 or not self.penalty_epochs > 0:
            found.append("penalty_weight and penalty_epochs must be above 0")
        hows = [n for n, on in (("positions", self.positions), ("asymmetric=False", not self.asymmetric)) if on]
        if hows and self.reconstruct is False:
            found.append(
                f"{hows[0]} says how layers are fitted, which reconstruct=False leaves out: leave out one of them"
            )
        given = (("reconstruct", self.reconstruct), (f"score={self.score!r}", self._by_data))
        needs = [*(name for name, on in given if on), *hows]
        if needs and not task.has_calibration:
            found.append(f"{needs[0]} needs calibration data: give Task(calibration=...)")
        if self.positions is not None and self.positions < 1:
            found.append(f"positions is {self.positions}: at least one position of every sample is looked at")
        if self.epochs and task.train is None:
            found.append("epochs needs Task(train=...), which the task does not have")
        if self.samples < 1 or self.epochs < 0 or self.rounds < 1:
            found.append("samples and rounds must be at least 1, and epochs at least 0")
        return found + unmatched(self.ignore, list(weighted_layers(model)))

    @property
    def ranked_by(self) -> str:
        """The score that decides: the one that was given, or else what the penalty works on."""
        if self.score is not None:
            return self.score
        return "batch_norm" if self.penalty == "slimming" else "loss"

    @property
    def _by_data(self) -> bool:
        return self.ranked_by in ("lasso", "activation", *GRADIENT_SCORES)

    def check(self, study: Study) -> None:
        """Capture the model and hold the budget against its groups, before anything slow.

        Raises:
            GraphError: the model cannot be captured.
            RecipeError: a pattern matches no group.
            BudgetError: the budget cannot be met.
        """
        work = self._work(study)
        names = [group.name for group in work.groups]
        settings = [setting for setting in (self.ratio, self.multiple_of, self.minimum) if isinstance(setting, Mapping)]
        patterns = [pattern for setting in settings for pattern in setting]
        if wrong := [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names)]:
            known = f"which are {first_few(names)}" if names else "of which there are none"
            raise RecipeError([f"{self.name}: the pattern {p!r} matches none of the groups, {known}" for p in wrong])
        if self.budget is not None:
            work.check(self.budget.limits(_metrics(study.start)))
            if self.budget.latency is not None:
                Stopwatch.of(study, self.budget)  # which runs the original

    def planned(self, study: Study, before: Snapshot) -> Snapshot:
        self.check(study)
        work = self._work(study)
        return of_profile(work.narrowed(work.chosen()), None)

    def _work(self, study: Study) -> _Work:
        work: _Work | None = study.worked_out.get("pruning")
        if work is None or work.step is not self:
            work = study.worked_out["pruning"] = _Work(self, study)
        return work

    def _narrowed(self, study: Study) -> tuple[_Work, dict[str, tuple[int, ...]], Narrowed | None]:
        """The work, the units that stay and the narrowed model; widths are chosen anew without groups that fail."""
        work, said = self._work(study), len(study.notes)
        while kept := work.chosen() if work.groups else {}:
            try:
                return work, kept, narrow(study.model, work.coupling, kept)
            except Unfaithful as error:
                del study.notes[said:]
                why = f"the narrowed network would answer otherwise (by {error.difference:.1e}): please report it"
                work = study.worked_out["pruning"] = _Work(self, study, {**work.failed, error.group: why})
        return work, kept, None

    def edits(self, study: Study) -> Iterator[Edit]:
        """Round by round: choose widths, narrow, refit what reads narrowed inputs, mend batch norms, fine-tune."""
        self.check(study)
        whole = _metrics(study.profile.total)
        left: dict[str, str] | None = None
        first: _Work | None = None
        gone: list[Stays] = []
        if self.penalty is not None:
            self._work(study).shrink(study.model)
        for number in range(1, self.rounds + 1):
            # Of the two the first has the model as it becomes.
            now = study if number == 1 and self.penalty is None else study.again()
            step = self if self.rounds == 1 else self._round(number, whole, _metrics(study.start))
            sizes = {} if first is None else {group.name: group.size for group in first.groups}
            now.worked_out["round"] = _Round(sizes, *(self._gone(n) for n in (number - 1, number)))
            noted = len(study.notes)
            work, kept, made = step._narrowed(now)
            first = first or work
            stays = work.whole(kept)
            earlier, left = left, {name: why for name, why in stays.items() if left is None or name in left}
            if made is None:
                self._heard(study, number, noted)
                continue
            work.check_batches(made.module)
            edit = Narrow(made.narrowing)
            note = "the model's own class was kept"
            if rewritten := _rewritten(study.model, made.narrowing):
                note += f", with attributes that say a width rewritten: {first_few(rewritten)}"
            if made.narrowing.form == "graph":
                note = f"the narrowed model is a captured graph, no longer of its own class: {made.narrowing.why}"
                note += work.graph_limits()
            if self.budget is None or self.budget.drop is None:
                yield edit
                step._heal(now, work, study.model, kept)
            else:
                trial = edit.apply(copied(study.model))
                step._heal(now, work, trial, kept)
                lost = study.original_score - study.scorer(trial)
                if lost > self.budget.drop:
                    study.notes.append(f"ended after round {number - 1} of {self.rounds}: the next lost {lost:.4g}")
                    left = earlier or left
                    break
                yield edit
                study.model.load_state_dict(trial.state_dict())
            gone.append(work.coupling.kept(kept))
            norms = norms_over_kept(work.coupling, kept)
            kept_only = f"norms take their statistics over what was kept, not over zeros too: {first_few(norms)}"
            study.notes += [kept_only, note] if norms else [note]
            self._heard(study, number, noted)
        if first is not None and self.rounds > 1:
            study.findings["choices"] = first.over_rounds(gone)
        yield from (Leave(name, reason) for name, reason in (left or {}).items())

    def _heard(self, study: Study, number: int, noted: int) -> None:
        """Say of what a round has noted which round it was, and nothing twice."""
        if self.rounds > 1:
            before = {note.partition(": ")[2] for note in study.notes[:noted]}
            study.notes[noted:] = [f"round {number}: {note}" for note in study.notes[noted:] if note not in before]

    def _heal(self, study: Study, work: _Work, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        """Put the values of a narrowed model right, in place."""
        work.mend(model, kept)
        if self.epochs:
            finetune(model, study.task, self.epochs)

    def _gone(self, number: int) -> float:
        """The share of what is to go in all rounds that has gone after this one."""
        match self.schedule:
            case "linear":
                return schedules.linear(number, final=1.0, end=self.rounds)
            case "geometric":  # in the last round the rest, a hundredth of it all
                return 1.0 if number == self.rounds else schedules.geometric(number, each=1 - 0.01 ** (1 / self.rounds))
        return schedules.cubic(number, final=1.0, end=self.rounds)

    def _round(self, number: int, whole: Mapping[str, float], start: Mapping[str, float]) -> Structured:
        """This step as one of its rounds.

        Args:
            number: from 1.
            whole: what the network cost before the first.
            start: what shares of the budget are of.
        """
        if self.budget is None:
            return replace(self, rounds=1)
        ends, after = self.budget.limits(start), self._gone(number)
        limits: dict[str, Any] = {}  # as a budget takes them
        limits |= {m: max(2.0, whole[m] - after * max(whole[m] - end, 0.0)) for m, end in ends.items()}
        return replace(self, budget=Budget(**limits), rounds=1)


@dataclass(frozen=True)
class _Round:
    """One round of several: widths are shares of what they were before the first, or their rounding would add up.

    Attributes:
        sizes: how many units groups had then, by name; empty in the first round.
        before: the share of what is to go in all rounds that has gone before this one.
        after: the same after it.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    before: float = 0.0
    after: float = 1.0

    def width(self, group: Group, ratio: float) -> float:
        """How many units of a group are to stay after this round, where in the end a ratio of them is to have gone."""
        size = self.sizes.get(group.name, group.size / (1 - ratio * self.before))  # some have fallen apart
        return (1 - ratio * self.after) * size


class _Work:
    """One step at work on one model.

    Args:
        step: the step.
        study: the model.
        failed: groups that the narrowed network has been found to answer otherwise without, with the reason.
    """

    def __init__(self, step: Structured, study: Study, failed: Mapping[str, str] | None = None) -> None:
        self.step, self.study, self.failed = step, study, failed or {}
        self.coupling = couple(study.original, study.task.inputs().on(study.original))
        self.left: dict[str, str] = {}
        self.unscored: dict[str, list[str]] = {}  # why a score says nothing of groups, and which
        self._graph_tells: bool | None = None  # whether the graph form costs what the network will
        self._mended: dict[str, tuple[dict[str, Tensor], list[str]]] = {}  # by the units that stay: values and notes
        self.layers = weighted_layers(study.original)
        self.apart = {tensor: name for tensor, (name, _) in apart(study.original).items()}
        self.groups = [group for group in self.coupling.groups if self._wanted(group)]
        makes = {name: group for group in self.coupling.groups for name in self._holders(group)}
        narrowed = {name for group in self.groups for name in self._holders(group)}
        tensors = {**{name: f"{name}.weight" for name in self.layers}, **{n: t for t, n in self.apart.items()}}
        for name, tensor in tensors.items():
            if name in narrowed or name in self.left:
                continue
            if matches(name, step.ignore):
                self.left[name] = "ignored, as asked"
            elif name in makes:
                self.left[name] = f"what it makes are {makes[name].kind}, which this step leaves alone"
            else:
                self.left[name] = self._frozen(tensor)

    def _wanted(self, group: Group) -> bool:
        if group.kind not in self.step.kinds:
            return False
        if group.name in self.failed:
            self.left.update(dict.fromkeys(self._holders(group), self.failed[group.name]))
            return False
        if not telling(self.coupling, group):
            self.left[group.sites[0].tensor] = "no numbers say what its units are worth"
            return False
        ignored = {name for name in self._makers(group) if matches(name, self.step.ignore)}
        for name in self._holders(group) if ignored else ():
            goes_with = f"it goes with {min(ignored)}, which is ignored"
            self.left[name] = "ignored, as asked" if name in ignored else goes_with
        return not ignored

    def _makers(self, group: Group) -> list[str]:
        """The layers whose outputs are a group's units, depthwise ones too; of parts of a replaced layer, it."""
        weights = {f"{name}.weight" for name in self.layers}
        depthwise = [s for s in group.sites if s.role == "carried" and s.dim == 0 and s.tensor in weights]
        sites = [*group.producers(), *depthwise]
        return list(dict.fromkeys(self._layer(site) for site in sites))

    def _holders(self, group: Group) -> list[str]:
        """Its makers, and the tensors of no layer that hold its units otherwise than to read them."""
        held = [self.apart[s.tensor] for s in group.sites if s.role != "consumer" and s.tensor in self.apart]
        return list(dict.fromkeys([*self._makers(group), *held]))

    def _frozen(self, tensor: str) -> str:
        """Why no units go of what a layer makes, or along the last dimension of a tensor that is of no layer."""
        frozen, analysis = self.coupling.frozen, self.coupling.analysis
        stuck = [0] if (tensor, 0) in frozen else []
        if tensor in self.apart:
            if tensor not in analysis.tensors:
                return "the example does not use it"
            roles = [analysis.roles.get(id(axis.rows), ("carried", ""))[0] for axis in analysis.tensors[tensor]]
            stuck = [dim for dim in range(len(roles)) if (tensor, dim) in frozen]
            stuck.sort(key=lambda dim: (roles[dim] != "consumer", dim))
        return str(frozen[tensor, stuck[-1]]) if stuck else "it makes no units that could go"

    def _layer(self, site: Site) -> str:
        """The layer that a site is in; of the parts of a replaced layer, that layer; of no layer, the tensor."""
        if site.tensor in self.apart:
            return self.apart[site.tensor]
        wholes = [name for name in self.layers if site.layer.startswith(f"{name}.")]
        return wholes[0] if wholes and site.layer not in self.layers else site.layer or site.tensor

    def whole(self, kept: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """Layers that lost no outputs, and tensors of no layer that lost nothing, with the reason."""
        narrowed = [group for group in self.groups if group.name in kept]
        lost = {self.apart[s.tensor] for group in narrowed for s in group.sites if s.tensor in self.apart}
        smaller = lost.union(*(self._makers(group) for group in narrowed))
        found = {name: reason for name, reason in self.left.items() if name not in lost}
        for group in self.groups:
            reason = "nothing less was asked of it" if self.step.budget is None else "its cost is better spent as it is"
            if len(self.widths(group)) == 1:
                reason = "minimum and multiple_of allow it no other width"
            found.update({name: reason for name in self._holders(group) if name not in {*smaller, *self.left}})
        return found

    # Widths ---------------------------------------------------------------------------------------------------------

    def widths(self, group: Group) -> tuple[int, ...]:
        """How many units of a group may be kept: rising, all of them last."""
        multiple = for_layer(self.step.multiple_of, group.name, default=1)
        least = min(group.size, for_layer(self.step.minimum, group.name, default=1))
        return (*(n for n in range(least, group.size) if n * group.granularity % multiple == 0), group.size)

    def check(self, limits: Mapping[str, float]) -> None:
        """Raises:
        BudgetError: the least that can be left costs more; the message says how much.
        """
        least = {group.name: range(self.widths(group)[0]) for group in self.groups}
        cost, whole = (_metrics(counted.total) for counted in (self.narrowed(least), self.study.profile))
        why = "with as little left of every group as may be"
        advice = "ask for more, or ignore less"
        if bound := [group.name for group in self.groups if self.widths(group)[0] > 1]:
            advice += f", or lower minimum or multiple_of, which hold {first_few(bound)}"
        if not self.groups:
            reasons = [f"{name}: {reason}" for name, reason in self.left.items()]
            why = f"{self.step.name} finds nothing to remove" + (f" ({first_few(reasons)})" if reasons else "")
            advice = "ask for more, or use another step"
            if self.step.budget is not None and self.step.budget.latency is not None:
                raise BudgetError(f"{self.step.budget} cannot be met: {why}; {advice}")
        for metric, limit in limits.items():
            if cost[metric] > limit:
                raise BudgetError(
                    f"{self.step.budget} cannot be met: {why}, {metric} come to "
                    f"{rounded_up(cost[metric] / whole[metric]):g} of what they are; {advice}"
                )

    def bills(self, limits: Mapping[str, float]) -> dict[str, Bill]:
        """What the network costs, as a function of widths."""
        return bills(self.coupling, self.groups, self.study.profile, limits)

    def chosen(self) -> dict[str, tuple[int, ...]]:
        """The units that stay, of the groups that lose some."""
        step, now = self.step, self.study.worked_out.get("round", _Round())
        if step.budget is not None:
            widths = self._budgeted(step.budget)
        else:
            widths = {group.name: group.size for group in self.groups}
            for group in self.groups:
                if step.threshold is not None:
                    curve = self.curves[group.name]
                    pairs = zip(curve.widths, curve.losses, strict=True)
                    widths[group.name] = next(n for n, loss in pairs if loss <= step.threshold or n == group.size)
                elif ratio := for_layer(step.ratio, group.name, default=0.0):
                    widths[group.name] = nearest(self.widths(group), now.width(group, ratio))
        self._record(widths)
        return {group.name: self._kept(group, widths[group.name]) for group in self._narrowed(widths)}

    def _narrowed(self, widths: Mapping[str, int]) -> list[Group]:
        return [group for group in self.groups if widths[group.name] < group.size]

    def _budgeted(self, budget: Budget) -> dict[str, int]:
        """Widths under the budget: by the selector asked for, or of several the one that is measured to lose least.

        What groups lose is predicted one by one, and does not add up when the layers behind make good for all of them
        together; how far to trust the differences between groups is therefore tried out.
        """
        if self.step.select != "measured":
            return self._noted(self._found(budget, self.step.select))
        able = self.study.task.has_calibration and bool(self.readers)
        tried: dict[str, _Found] = {}
        for name in MEASURED if able else list(MEASURED)[:1]:
            found = self._found(budget, name, next(reversed(tried.values()), None))
            if all(found.widths != other.widths for other in tried.values()):
                tried[name] = found
        if len(tried) == 1:
            return self._noted(next(iter(tried.values())))
        lost = {name: self._measured(tried[name].widths) for name in track(list(tried), "trying out widths")}
        best = min(lost, key=lambda name: lost[name])
        said = ", ".join(f"{name} {loss:.3g}" for name, loss in lost.items())
        self.study.notes.append(f"widths were chosen by measured divergence: {said}")
        return self._noted(tried[best])

    def _noted(self, found: _Found) -> dict[str, int]:
        """The widths, with a note where they leave much of the limit unused, and of what was timed."""
        if self._narrowed(found.widths) and (used := self._used(found.widths, found.limits)) < 1 - SLACK:
            self.study.notes.append(f"the cost came to {used:.3f} of the limit: no group fits that is a step wider")
        if found.timed and self.step.budget is not None:
            self.study.notes.append(told(self.step.budget, found.timed))
        return found.widths

    def _found(self, budget: Budget, select: str, like: _Found | None = None) -> _Found:
        """Widths under the budget, by one selector.

        With a latency in it they are those for the largest share of the MACs whose network is measured to keep to it.

        Args:
            like: what another selector has found.
        """
        limits = budget.limits(_metrics(self.study.start))
        if budget.latency is None:
            return _Found(self._within(limits, select), limits)
        start, watch = self.study.start.metric("macs"), Stopwatch.of(self.study, budget)
        whole = {group.name: group.size for group in self.groups}
        narrowest = {group.name: self.widths(group)[0] for group in self.groups}
        least, most = (self._true(widths)["macs"] / start * (1 + 1e-9) for widths in (narrowest, whole))
        most = min([most, *([limits["macs"] / start] if "macs" in limits else [])])

        @cache
        def widths(share: float) -> dict[str, int]:
            try:
                return self._within({**limits, "macs": share * start}, select)
            except BudgetError:  # its estimates miss what only the narrowest meet
                return narrowest

        def probe(share: float) -> Timed:
            chosen = widths(share)
            return watch.time(share, tuple(chosen.items()), lambda: self._shaped(chosen))

        timed = largest(budget, probe, least, most, like.timed[-1].share if like is not None else None)
        share = timed[-1].share
        return _Found(widths(share), {**limits, "macs": share * start}, timed)

    def _shaped(self, widths: Mapping[str, int]) -> nn.Module:
        """The network at these widths, whichever units stay: for its time alone."""
        kept = {group.name: range(widths[group.name]) for group in self._narrowed(widths)}
        return narrow(self.study.original, self.coupling, kept, check=False).module if kept else self.study.original

    def _used(self, widths: Mapping[str, int], limits: Mapping[str, float]) -> float:
        """What the network truly costs at these widths, as a share of the nearest limit."""
        return _share(self._true(widths), limits)

    def _measured(self, widths: Mapping[str, int]) -> float:
        """How far the answers are from the original's with these widths, the layers refitted."""
        kept = {group.name: self._kept(group, widths[group.name]) for group in self._narrowed(widths)}
        trial = narrow(self.study.original, self.coupling, kept, check=False).module
        self.check_batches(trial)
        said = len(self.study.notes)
        self.mend(trial, kept)
        self._mended[_key(kept)] = trial.state_dict(), self.study.notes[said:]
        del self.study.notes[said:]
        return Divergence(self.study.original, self.study.task, self.step.samples)(trial)

    def check_batches(self, narrowed: nn.Module) -> None:
        """Raises:
        RecipeError: the narrowed model is a graph that takes one length of batch, and calibration has others.
        """
        trace, task = self.coupling.analysis.trace, self.study.task
        if trace.dynamic or not isinstance(narrowed, ModelGraph):
            return
        takes = trace.inputs.batch_size
        others = {b.batch_size for b in task.batches(narrowed, self.step.samples)} - {takes}
        if others:
            problem = (
                f"{self.step.name}: narrowed, the model is a captured graph that takes only batches of {takes}, as the "
                f"example is, since {trace.note}; calibration has batches of {max(others)}: give batches and an "
                "example of one length, or write that code for any length"
            )
            raise RecipeError([problem])

    def graph_limits(self) -> str:
        """What the graph form cannot do though the model could, in sentences."""
        trace = self.coupling.analysis.trace
        said = [f"lengths of its inputs, the batch's apart, are the example's ({trace.inputs})"]
        if not trace.dynamic:
            said.append(f"It takes only batches of {trace.inputs.batch_size}, the example's: {trace.note}")
        said += [f"in it, {what}: {first_few(names)}" for what, names in left_behind(self.study.original).items()]
        return "".join(f". {sentence[0].upper()}{sentence[1:]}" for sentence in said)

    def _within(self, limits: Mapping[str, float], select: str) -> dict[str, int]:
        """Widths under the limits, chosen by an estimate of what they cost, which is corrected by what they do cost."""
        aims, best, least = dict(limits), None, 0.0
        for _ in range(CORRECTIONS):
            try:
                widths = self._selected(select, self.bills(aims))
            except BudgetError:
                break
            true = self._true(widths)
            used = _share(true, limits)
            if least < used <= 1:
                best, least = widths, used
            if 1 - SLACK <= used <= 1 or not self._narrowed(widths):
                break
            estimated = {metric: bill.at(widths) for metric, bill in self.bills(limits).items()}
            aims = {m: limits[m] * (1 - SLACK / 4) - (true[m] - estimated[m]) for m in limits}
        if best is None:
            raise BudgetError(
                f"no widths were found that cost no more than {self.step.budget}: ask for more, or ignore fewer layers"
            )
        if not self._narrowed(best):
            return best

        def fits(widths: dict[str, int]) -> bool:
            nonlocal least
            if least >= 1 - SLACK:
                return False  # enough of the limit is used
            used = self._used(widths, limits)
            if used <= 1:
                least = max(least, used)
            return used <= 1

        return filled(self.curves, self.bills(limits), best, fits)

    def _selected(self, select: str, under: dict[str, Bill]) -> dict[str, int]:
        match select:
            case "global":
                return ranked(self.curves, under)
            case "classes":
                return ranked_within(self.curves, under, {group.name: self._class(group) for group in self.groups})
        return MEASURED[select](self.curves, under)

    def _class(self, group: Group) -> str:
        """Groups of one class have units of one kind that go in layers of the same kinds at as many places."""
        modules = dict(self.study.original.named_modules())
        return " ".join([group.kind, *sorted(f"{s.role}:{type(modules.get(s.layer)).__name__}" for s in group.sites)])

    def _true(self, widths: Mapping[str, int]) -> dict[str, float]:
        """What the network costs at these widths, whichever units stay.

        The graph form is made several times sooner; whether it costs the same is seen once. It does not where weights
        are confined, which a graph computes with as with any others.
        """
        kept = {group.name: range(widths[group.name]) for group in self._narrowed(widths)}
        if self._graph_tells is None:
            true = _metrics(self.narrowed(kept).total)
            self._graph_tells = bool(kept) and true == _metrics(self.narrowed(kept, "graph").total)
            return true
        return _metrics(self.narrowed(kept, "graph" if self._graph_tells else None).total)

    def narrowed(self, kept: Mapping[str, Sequence[int]], form: Literal["graph"] | None = None) -> Profile:
        """The costs of the network with these units kept, in this form or the one that it will have."""
        if not kept:
            return self.study.profile
        made = narrow(self.study.original, self.coupling, kept, form=form, check=False)
        return profile(made.module, self.study.task.inputs())

    # What units are worth -------------------------------------------------------------------------------------------

    @cached_property
    def readers(self) -> dict[str, Layer]:
        """The Linear and Conv layers with weights of their own whose inputs some group narrows, in calling order."""
        sites = {site.layer: site for group in self.groups for site in group.consumers()}
        called = [name for name, row in self.study.profile.layers.items() if row.calls and name in sites]
        stuck = obstacles(self.study.original, called, ())
        found = {name: reader(self.study.original, sites[name]) for name in called if name not in stuck}
        return {name: layer for name, layer in found.items() if layer is not None}

    @cached_property
    def fittable(self) -> list[str]:
        """The Linear and Conv layers with weights of their own that nothing confines, in calling order."""
        called = [name for name, row in self.study.profile.layers.items() if row.calls and name in self.layers]
        stuck, read = obstacles(self.study.original, called, ()), self.coupling.analysis.tensors
        able = [name for name in called if name not in stuck and f"{name}.weight" in read]
        return [name for name in able if is_layer(self.study.original.get_submodule(name))]

    @cached_property
    def statistics(self) -> Mapping[str, Statistics]:
        """Of the readers; empty without data."""
        if not self.study.task.has_calibration or not self.readers:
            return {}
        return self.study.statistics(self.readers, self.step.samples, gradients=True)

    def _consumers(self, group: Group) -> list[Consumer]:
        """The readers of a group's units with their moments, each group of a convolution on its own."""
        found = []
        for site in group.consumers():
            layer, seen = self.readers.get(site.layer), self.statistics.get(site.layer)
            if layer is None or seen is None or reader(self.study.original, site) is None:
                continue
            if len(set(site.indices.tolist())) < len(site.indices):
                continue  # each column reads a product of two units, and goes with either
            seen = seen if layer.bias is None else seen.centred()
            weight = layer.weight.detach().reshape(len(seen.gram), -1, seen.gram.shape[-1])
            at = columns(site, group.size, layer.weight[0, 0].numel())
            for g, (part, gram) in enumerate(zip(weight, seen.gram, strict=True)):
                outputs = slice(g * len(part), (g + 1) * len(part))
                gradients = None if seen.gradients is None else damp(seen.gradients[outputs, outputs], GRADIENT_DAMPING)
                found.append(Consumer(part, gram, at, gradients, seen.positions))
        return found

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """What every width of every group loses."""
        ranked = self._ranked
        return {
            group.name: Curve(widths, tuple(float(ranked[group.name][1][group.size - n]) for n in widths))
            for group in self.groups
            for widths in [self.widths(group)]
        }

    @cached_property
    def _ranked(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per group its units in the order in which they go, and what is lost after each; from 0."""
        return {group.name: self._rank(group) for group in track(self.groups, "weighing every group's units")}

    def _rank(self, group: Group) -> tuple[Tensor, Tensor]:
        consumers = self._consumers(group) if self.step.ranked_by in ("loss", "lasso") else []
        if consumers:
            # The largest groups take many at once: ranks change little from one removal to the next.
            run = greedy_elimination(consumers, left=1, at_once=max(1, group.size // AT_ONCE), damping=RIDGE)
            return torch.cat([run.order, run.kept(1)]), run.losses
        worth = self._worth(group).double()
        order = worth.argsort()
        if self.step.normalize == "share":
            worth = worth / worth.sum().clamp_min(torch.finfo(torch.float64).tiny)
        else:
            worth = scores.normalize(worth, self.step.normalize)  # type: ignore[arg-type]
        return order, torch.cat([worth.new_zeros(1), worth[order].cumsum(0)])

    def _worth(self, group: Group) -> Tensor:
        """One number a unit."""
        match self.step.ranked_by:
            case "random":
                return scores.random(group.size, self.study.seed)
            case "l1":
                return scores.l1(members(self.coupling, group, telling(self.coupling, group)))
            case "input_l2":
                told = telling(self.coupling, group)
                if read := [site for site in told if site.role == "consumer"]:
                    return scores.l2(members(self.coupling, group, read)).square()
                self.unscored.setdefault("no weight reads their units", []).append(group.name)
            case "taylor" | "fisher" | "hessian":
                return self.by_gradient[group.name]
            case "geometric_median":
                return scores.geometric_median(members(self.coupling, group, telling(self.coupling, group)))
            case "batch_norm":
                tensors, modules = self.coupling.analysis.trace.tensors, dict(self.study.original.named_modules())
                norms = [
                    site
                    for site in group.sites
                    if isinstance(modules.get(site.layer), _BatchNorm) and site.tensor == f"{site.layer}.weight"
                ]
                scales = [part for site in norms for part in slices(tensors[site.tensor], site, group.size)]
                if scales:
                    return scores.batch_norm_scale(scales)
                self.unscored.setdefault("no batch norm scales their units", []).append(group.name)
            case "activation" if consumers := self._consumers(group):
                power = torch.zeros(group.size, dtype=torch.float64)
                for consumer in consumers:
                    diagonal = consumer.gram.diagonal().double()
                    power += torch.stack([diagonal[at].sum() for at in consumer.units])
                return power.sqrt()
            case "loss" | "lasso" | "activation":
                why = "there are no statistics of what reads them"
                self.unscored.setdefault(why, []).append(group.name)
        return scores.l2(members(self.coupling, group, telling(self.coupling, group)))

    @cached_property
    def by_gradient(self) -> dict[str, Tensor]:
        """Scores by gradients of the divergence: Taylor's per batch, the others per sample; means over all."""
        study, kind = self.study, self.step.ranked_by
        model = copied(study.original).requires_grad_(True)
        tensors = self.coupling.analysis.trace.tensors
        weights = {n: p for n, p in model.named_parameters() if n in tensors}
        sites = {g.name: [s for s in telling(self.coupling, g) if s.tensor in weights] for g in self.groups}
        probe, generator = study.probe(), torch.Generator().manual_seed(study.seed)
        total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in self.groups}
        limit = self.step.samples if kind == "taylor" else min(GRADIENT_SAMPLES, self.step.samples)
        count = 0
        with mode(model, training=False):
            for inputs in study.task.batches(model, limit):
                for part in [inputs] if kind == "taylor" else inputs.each():
                    with torch.enable_grad():
                        loss = probe(part.into(model), generator)
                        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                    slopes = {n: g for n, g in zip(weights, found, strict=True) if g is not None}
                    count += 1
                    for group in self.groups:
                        here = [s for s in sites[group.name] if s.tensor in slopes]
                        values = [m for s in here for m in slices(weights[s.tensor], s, group.size)]
                        slope = [m for s in here for m in slices(slopes[s.tensor], s, group.size)]
                        if not values:
                            continue
                        match kind:
                            case "taylor":
                                total[group.name] += scores.taylor(values, slope)
                            case "fisher":
                                gates = [
                                    (v.double() * g.double()).sum(1, keepdim=True)
                                    for v, g in zip(values, slope, strict=True)
                                ]
                                total[group.name] += scores.fisher(gates)
                            case _:
                                total[group.name] += scores.hessian_diagonal(values, [g.square() for g in slope])
        return {name: score / max(1, count) for name, score in total.items()}

    @property
    def _predicted(self) -> set[str]:
        """The groups whose curves are predicted losses of the units that go, and not sums of scores."""
        if self.step.ranked_by != "loss":
            return set()
        # Without gradients it is the readers' own error that is known.
        blind = {name for name, seen in self.statistics.items() if seen.gradients is None}
        unknown = {group.name for group in self.groups if any(site.layer in blind for site in group.consumers())}
        return set(self.curves) - unknown - {name for names in self.unscored.values() for name in names}

    def _kept(self, group: Group, width: int) -> tuple[int, ...]:
        """The units that stay at a width."""
        if self.step.ranked_by == "lasso" and (consumers := self._consumers(group)):
            return tuple(lasso(consumers, [width])[0].tolist())
        return tuple(sorted(self._ranked[group.name][0][group.size - width :].tolist()))

    # Before it ------------------------------------------------------------------------------------------------------

    def shrink(self, model: nn.Module) -> None:
        """Train a model like the original, in place, under a penalty that drives units to zero.

        Raises:
            TaskError: training failed.
            RecipeError: there is nothing to put the penalty on.
        """
        step, task = self.step, self.study.task
        kind, weight = step.penalty, step.penalty_weight
        scales = [m.weight for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None]
        if not any(group.producers() for group in self.groups) or (kind == "slimming" and not scales):
            what = "batch norms with scales" if kind == "slimming" else "units that could go"
            raise RecipeError([f"{step.name}: the model has no {what} to put a penalty on"])
        going: dict[str, Tensor] = {}
        if kind == "growing":
            kept = self.chosen()
            for group in self.groups:
                going[group.name] = torch.ones(group.size)
                going[group.name][list(kept.get(group.name, range(group.size)))] = 0
        calls = 0

        def penalised(outputs: Any, target: Any) -> Tensor:
            nonlocal calls
            calls += 1
            value = loss_of(task.loss or "cross_entropy", outputs, target)
            match kind:
                case "slimming":
                    return value + weight * schedules.slimming(scales)
                case "group_lasso":
                    made = [schedules.group_lasso(rows) for group in self.groups if (rows := joint(model, group))]
                    return value + weight * torch.stack(made).sum()
            factor = schedules.growing_factor(calls, increment=weight / GROWTHS, every=GROWTH_STEPS, ceiling=weight)
            terms = [
                schedules.weight_penalty(rows, factor * going[group.name].to(rows[0]))
                for group in self.groups
                if (rows := joint(model, group))
            ]
            return value + torch.stack(terms).sum()

        finetune(model, task, step.penalty_epochs, penalised)

    # After the narrowing --------------------------------------------------------------------------------------------

    def mend(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        """Refit layers to the original's answers, from the first that reads narrowed inputs on; then batch norms."""
        step, study = self.step, self.study
        if not study.task.has_calibration:
            return
        if (done := self._mended.get(_key(kept))) is not None:  # when its widths were tried out
            model.load_state_dict(done[0])
            study.notes.extend(done[1])
            return
        lockstep = study.lockstep(model, step.samples)
        if step.reconstruct is not False:
            self._refit(model, kept, lockstep)
        lockstep.close()
        norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        if step.batch_norm and norms and lockstep.samples >= MENDING_SAMPLES:
            divergence = Divergence(study.original, study.task, step.samples)
            reestimate_batch_norm(model, lambda: study.task.batches(model, step.samples), divergence, norms)

    def _refit(self, model: nn.Module, kept: Mapping[str, Sequence[int]], lockstep: Lockstep) -> None:
        """Layers' weights and biases, in place, in calling order: the original's answers from what reaches them."""
        step, stays, layers = self.step, self.coupling.kept(kept), dict(model.named_modules())
        narrowed = [name for name in self.readers if not bool(stays[f"{name}.weight"][1].all())]
        first = next((name for name in self.fittable if name in narrowed and is_layer(layers[name])), None)
        after = [] if first is None or not step.asymmetric else self.fittable[self.fittable.index(first) :]
        through = (
            {n: self.rectified[n] for n in after if n in self.rectified} if step.reconstruct in (None, True) else {}
        )
        beside = _Beside(self.study.original, model, list(through.values()))
        # Also of a captured graph, which calls no layers that could be waited at.
        alone = [name for name in narrowed if name not in after]
        for name in track([*alone, *after], "refitting layers"):
            outputs, inputs = (torch.from_numpy(at.nonzero()[0]) for at in stays[f"{name}.weight"][:2])
            calls = len(self.study.profile.layers[name].calls)
            pairs: Iterable[tuple[Tensor, Tensor]]
            if name in alone:
                pairs = _kept_pairs(self.readers[name], lockstep.alone(name, calls), outputs, inputs)
            elif is_layer(layer := layers[name]):
                pairs = _kept_answers(layer, lockstep.at(name, calls), outputs)
            else:
                continue
            if name in through:
                pairs = list(pairs)  # the runs that stand still hold them anyway
                if self._refit_through(name, model, pairs, lockstep.samples, outputs, beside):
                    continue
            self._fit(name, model, pairs, lockstep.samples)
        sites = [site for group in self.groups if group.name in kept for site in group.consumers()]
        beside.close()
        if others := sorted({site.layer or site.tensor for site in sites} - set(narrowed)):
            self.study.notes.append(
                "not refitted, though what they read was narrowed, as they are no Linear or Conv layers "
                f"with weights of their own that the example calls: {first_few(others)}"
            )

    def _fit(self, name: str, model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], samples: int) -> None:
        """A layer's weight and bias, or bias alone, in place: the original's answers from the inputs beside them."""
        step, holder = self.step, model.get_submodule(name)
        layer = holder if is_layer(holder) else self.readers[name]
        seen = gather_paired(
            layer,
            pairs,
            samples=samples,
            rows_a_column=ROWS_A_KEPT_COLUMN,
            positions=step.positions,
            seed=self.study.seed,
        )
        if seen is None:
            return
        weight, bias = holder.get_parameter("weight"), holder._parameters.get("bias")
        made = weight.detach()
        if step.reconstruct != "bias":
            fitted = seen if bias is None else seen.centred()
            assert fitted.cross is not None
            flat = made.double().reshape(len(fitted.gram), -1, fitted.gram.shape[-1])
            made = least_squares(fitted.gram, fitted.cross, RIDGE, prior=flat).reshape(weight.shape).to(weight)
        with torch.no_grad():
            if bias is not None:
                bias.copy_(corrected_bias(weight, bias, made, seen))
            elif step.reconstruct == "bias" and name in self.norms:
                none = made.new_zeros(len(made))
                moved(model.get_submodule(self.norms[name]), corrected_bias(weight, none, made, seen))
            weight.copy_(made)

    def _refit_through(
        self,
        name: str,
        model: nn.Module,
        reached: Sequence[tuple[Tensor, Tensor]],
        samples: int,
        outputs: Tensor,
        beside: _Beside,
    ) -> bool:
        """The same for what the next rectifier makes of the answer; False where that cannot be done."""
        what, layer = self.rectified[name], model.get_submodule(name)
        norm = model.get_submodule(what.norm) if what.norm else None
        assert is_layer(layer)
        dim, outputs = _channels(layer), outputs.to(layer.weight.device)
        scale = layer.weight.new_ones(len(outputs))
        shift = torch.zeros_like(scale)
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.detach())
            shift = (0.0 if norm.bias is None else norm.bias.detach()) - scale * norm.running_mean
        if bool((scale.abs() < LEAST_SCALE * scale.abs().amax()).any()):
            return False  # no weight could turn the answers of such outputs into what they should be
        added = beside.taken(what)
        if what.beside is not None and (
            len(added) != len(reached)
            or any(now.shape != answer.shape for (_, now), (_, answer) in zip(added, reached, strict=True))
        ):
            return False
        others: list[tuple[Tensor, ...]] = [(was.index_select(dim, outputs), now) for was, now in added]
        others = others or [()] * len(reached)
        calls = ((x, (answer, *more)) for (x, answer), more in zip(reached, others, strict=True))
        rows = paired_rows(layer, calls, samples=samples, positions=self.step.positions, seed=self.study.seed)
        if rows is None:
            return False
        x, (answer, *both) = rows
        wanted, now = scale * answer + shift, shift
        if both:
            wanted, now = wanted + both[0], shift + both[1]
        flat = layer.weight.detach().flatten(1)
        weight, constant = rectified.fit(x, wanted, now, scale, flat, ceiling=what.ceiling, ridge=RIDGE)
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(constant)
            elif isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                norm.running_mean.sub_(constant.to(norm.running_mean))
        return True

    @cached_property
    def rectified(self) -> dict[str, Behind]:
        """Of the layers that can be fitted through what is behind them, what that is.

        Those whose inputs can be held in memory, and whose constant has somewhere to go: a bias, or a batch norm.
        """
        original, found = self.study.original, {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return {}  # every process holds a part of the inputs, and only their moments can be summed
        for name, what in behind(original, self.coupling.analysis.trace, self.fittable).items():
            layer = original.get_submodule(name)
            norm = original.get_submodule(what.norm) if what.norm else None
            assert is_layer(layer)
            holds = isinstance(norm, _BatchNorm) and norm.running_mean is not None
            able = isinstance(layer, nn.Linear) or layer.groups == 1
            if (
                able
                and (layer.bias is not None or holds)
                and layer.weight[0].numel() ** 2 * FEWEST_ROWS <= ROWS_NUMBERS
            ):
                found[name] = what
        return found

    @cached_property
    def norms(self) -> Mapping[str, str]:
        """Of layers without a bias the batch norm behind that can take up a constant."""
        return norms_behind(self.study.original, self.fittable, self.study.task.inputs())

    # The record -----------------------------------------------------------------------------------------------------

    def _record(self, widths: Mapping[str, int]) -> None:
        choices, predicted = {}, self._predicted
        for group in self.groups:
            curve = self.curves[group.name]
            losses = curve.losses if group.name in predicted else [None] * len(curve.widths)
            points = [self._point(group, n, loss) for n, loss in zip(curve.widths, losses, strict=True)]
            at = curve.widths.index(widths[group.name])
            stride = max(1, len(points) // CURVE_POINTS)
            shown = tuple(p for i, p in enumerate(points) if i % stride == 0 or i in (at, len(points) - 1))
            choices[group.name] = Choice(points[at], shown)
        for why, names in self.unscored.items():
            self.study.notes.append(f"ranked by l2, as {why}: {first_few(names)}")
        by = self.step.select if self.step.budget is not None else "manual"
        self.study.findings.update(choices=choices, metric=self.metric, selected_by=by)

    @property
    def metric(self) -> str:
        """The cost that points are shares of."""
        return self.step.budget.metrics[0] if self.step.budget is not None else "macs"

    @cached_property
    def _bill(self) -> Bill:
        return self.bills({self.metric: 1.0})[self.metric]

    def _point(self, group: Group, width: int, loss: float | None = None) -> Point:
        """A group at a width, all others whole."""
        whole = {group.name: group.size for group in self.groups}
        touched = [term for term in self._bill.terms if any(group.name in length.each for length in term.lengths)]
        full = sum(term.at(whole) for term in touched)
        share = sum(term.at({**whole, group.name: width}) for term in touched) / full if full else width / group.size
        return Point("as it is" if width == group.size else f"{width} of {group.size}", share, loss)

    def over_rounds(self, rounds: Sequence[Stays]) -> dict[str, Choice]:
        """What became of the groups in all rounds, this work's being the first.

        No loss is predicted: every round predicts from what the one before has left, refitted and trained.

        Args:
            rounds: what stayed of every tensor, each of what stayed in the round before.
        """
        choices = {}
        for group in self.groups:
            # Not by the groups' names: what has one unit left is no group any more, and others may fall apart.
            site = group.sites[0]
            left = np.arange(self.coupling.analysis.trace.tensors[site.tensor].shape[site.dim])
            for stays in (stays for stays in rounds if site.tensor in stays):
                left = left[stays[site.tensor][site.dim]]
            width = len(np.unique(site.units[np.isin(site.indices, left)]))
            choices[group.name] = Choice(self._point(group, width))
        return choices


@dataclass(frozen=True)
class _Found:
    """Widths that one selector has found.

    Attributes:
        widths: of every group.
        limits: the costs that they were chosen under, by metric.
        timed: what was measured for a limit of latency, that of these widths last.
    """

    widths: dict[str, int]
    limits: Mapping[str, float]
    timed: tuple[Timed, ...] = ()


class _Beside:
    """What is added to the answers of layers, in the original and in the narrowed network, batch by batch."""

    def __init__(self, original: nn.Module, narrowed: nn.Module, wanted: Sequence[Behind]) -> None:
        self._held: dict[tuple[str, bool], tuple[list[Tensor], list[Tensor]]] = {}
        self._hooks: list[RemovableHandle] = []
        for name, goes_in in {what.beside for what in wanted if what.beside is not None}:
            lists: tuple[list[Tensor], list[Tensor]] = ([], [])
            self._held[name, goes_in] = lists
            for model, held in zip((original, narrowed), lists, strict=True):
                module = model.get_submodule(name)
                if goes_in:
                    hook = module.register_forward_pre_hook(lambda _, args, held=held: held.append(args[0].detach()))
                else:
                    hook = module.register_forward_hook(lambda _, args, made, held=held: held.append(made.detach()))
                self._hooks.append(hook)

    def taken(self, what: Behind) -> list[tuple[Tensor, Tensor]]:
        """Of each batch the original's and the narrowed network's; empty where runs were started several times."""
        if what.beside is None:
            return []
        was, now = self._held[what.beside]
        found = list(zip(was, now, strict=True)) if len(was) == len(now) else []
        was.clear()
        now.clear()
        return found

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()


def _channels(layer: Layer) -> int:
    """The dimension of what goes into a layer and comes out that holds the channels, from the end."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def _kept_answers(
    layer: Layer, pairs: Iterable[tuple[Tensor, Tensor]], outputs: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of what goes into a layer and what the original answers, of which only some outputs are to be answered."""
    for x, answer in pairs:
        yield x, answer.index_select(_channels(layer), outputs.to(answer.device))


def _kept_pairs(
    layer: Layer, calls: Iterable[Reached], outputs: Tensor, inputs: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """What goes into the original's layer and what it answers, call by call, of the channels that stay.

    Args:
        layer: the original's.
        calls: of it, with answers.
        outputs: the indices of its weight's first dimension that stay.
        inputs: those of the second.
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    columns = (torch.arange(groups)[:, None] * layer.weight.shape[1] + inputs).flatten()
    pairs = ((call.x.index_select(_channels(layer), columns.to(call.x.device)), call.answer) for call in calls)
    yield from _kept_answers(layer, ((x, answer) for x, answer in pairs if answer is not None), outputs)


def _rewritten(model: nn.Module, narrowing: Narrowing) -> list[str]:
    """What a narrowing changes in attributes of the model's own classes, before it is applied."""
    found = []
    for path, changes in narrowing.attributes.items():
        module = model.get_submodule(path)
        if not type(module).__module__.startswith("torch.nn."):
            name = f"{path}." if path else ""
            found += [f"{name}{attribute} {getattr(module, attribute)} → {new}" for attribute, new in changes.items()]
    return found


def _key(kept: Mapping[str, Sequence[int]]) -> str:
    return repr(sorted((name, tuple(units)) for name, units in kept.items()))


def _share(cost: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """A cost as a share of the limit that it comes nearest to."""
    return max(cost[metric] / limit for metric, limit in limits.items())


def _metrics(cost: Cost) -> dict[str, float]:
    return {metric: cost.metric(metric) for metric in METRICS}
