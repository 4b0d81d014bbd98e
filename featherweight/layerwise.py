"""Steps that choose one option for every layer: what the options are is the technique's, the rest is here.

Table of options → plan → one layer after the other, each fitted to what the layers before it have become → mending.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn

from featherweight.constant import moved, norms_behind, with_bias, without_bias
from featherweight.cost.confined import confined
from featherweight.cost.cost import Cost
from featherweight.cost.count import MODEL, LayerCall, price
from featherweight.curvature.gram import Statistics, gather_paired
from featherweight.curvature.lockstep import Lockstep
from featherweight.edits import Edit, Leave, Replace, remade
from featherweight.errors import BudgetError, RecipeError, TaskError, did_you_mean, first_few
from featherweight.forms import Constraint, Form, Layer, attention_of, is_layer, layer_at
from featherweight.layers import layer_names, nearest, obstacles, unmatched, weighted_layers
from featherweight.ledger import Choice, Point, Snapshot
from featherweight.mend import MENDING_SAMPLES, finetune, reestimate_batch_norm
from featherweight.progress import track
from featherweight.score import Divergence
from featherweight.search.budget import Budget
from featherweight.search.evaluations import Evaluations, key
from featherweight.search.greedy import Greedy
from featherweight.search.optimal import Optimal, check
from featherweight.search.options import Choosing, Option, Plan, Selector, Table
from featherweight.search.replay import Replay
from featherweight.search.timed import Stopwatch, Timed, largest, told
from featherweight.settings import made
from featherweight.snapshot import repriced
from featherweight.step import Step
from featherweight.study import Study
from featherweight.task import Task, fingerprint

SELECTORS: Mapping[str, type[Greedy] | type[Optimal]] = {"greedy": Greedy, "optimal": Optimal}
# Points of a layer's curve that go into the ledger.
CURVE_POINTS = 40


class Jointly(Protocol):
    """Work on several layers at once, done as soon as each of them was fitted alone."""

    def after(self, name: str) -> bool:
        """A layer was fitted, and stands in its place; whether layers before it were changed for that."""
        ...

    def restart(self) -> None:
        """All layers have changed."""
        ...

    def close(self) -> None:
        """No more layers come."""
        ...


@dataclass(frozen=True)
class Layerwise(Step):
    """A technique that offers options for single layers.

    Attributes:
        budget: what the whole network may cost, in shares of what the recipe was given; options are then chosen.
        select: who chooses under a budget: ``"optimal"`` (least predicted loss over all layers), ``"greedy"`` (measured
            scores, layer by layer), a selector with settings such as ``Greedy(candidates=5)``, or a plan.
        ignore: patterns of layers to leave alone.
        data_aware: fit to the calibration data; None for wherever there is some.
        asymmetric: fit every layer to the original's answers on what the compressed layers before it give.
        samples: how many calibration samples to look at.
        epochs_per_layer: of fine-tuning with ``task.train`` after every replaced layer.
        epochs: of fine-tuning with ``task.train`` after all of them.
    """

    budget: Budget | None = None
    select: Any = "optimal"
    ignore: tuple[str, ...] = ()
    data_aware: bool | None = None
    asymmetric: bool = True
    samples: int = 512
    epochs_per_layer: float = 0
    epochs: float = 0

    # Whether the layers that a replaced one is made of are worked on, as where values change and shapes stay.
    inside_forms: ClassVar[bool] = False
    # What costs are told in where no budget names one.
    metric: ClassVar[str] = "macs"

    # What a technique says ------------------------------------------------------------------------------------------

    def at(self, name: str) -> Self:
        """The step as it works on the values of one layer: what it has by pattern is what that layer gets."""
        return self

    @abstractmethod
    def unfit(self, layer: Layer) -> str | None:
        """Why the technique cannot replace such a layer; None where it can."""

    @abstractmethod
    def priced(self, name: str, layer: Layer, calls: Sequence[LayerCall]) -> list[Option]:
        """All ways of replacing a layer, by rising cost, their losses still 0; quickly, whatever the layer's size.

        Args:
            name: the layer's name.
            layer: the layer.
            calls: how the example calls it, for prices.
        Raises:
            LookupError: there are none; the message says why.
        """

    @abstractmethod
    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        """The rise of the loss that each option is predicted to bring.

        Args:
            layer: the layer.
            options: some of its options.
            seen: statistics of its inputs and gradients; None without data.
        """

    def options(self, name: str, layer: Layer, calls: Sequence[LayerCall], seen: Statistics | None) -> list[Option]:
        """All ways of replacing a layer, by rising cost, each with the loss it is predicted to bring."""
        priced = self.priced(name, layer, calls)
        losses = self.at(name).losses(layer, priced, seen)
        return [replace(option, loss=loss) for option, loss in zip(priced, losses, strict=True)]

    @abstractmethod
    def values(self, layer: Layer, form: Form, seen: Statistics | None) -> Mapping[str, Tensor]:
        """The state dict of the layer in its new form, fitted to the statistics."""

    @abstractmethod
    def decided(self, name: str, options: Sequence[Option], whole: Cost) -> Option | None:
        """The option that the settings spell out, where nothing is left to choose; None for the layer as it is.

        Raises:
            LookupError: there is no such option; the message says why the layer stays as it is.
        """

    def jointly(self, study: Study, plan: Plan, model: nn.Module) -> Jointly | None:
        """What works on several layers at once when each was fitted alone; None for nothing.

        Args:
            study: of the original.
            plan: what is carried out.
            model: the network, as it becomes.
        """
        return None

    def ways(self) -> dict[str, Any]:
        """The settings that say how much, of which exactly one must be given."""
        return {"budget": self.budget, "select": self.select if self.plan is not None else None}

    # Settings -------------------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        super().__post_init__()
        match self.select:
            case str(path) if path.endswith(".json"):
                object.__setattr__(self, "select", Plan.load(path))
            case {"step": _, "layers": _}:
                object.__setattr__(self, "select", Plan.from_json(self.select))
            case Mapping() as named if len(named) == 1 and next(iter(named)) in SELECTORS:
                kind, settings = next(iter(named.items()))
                object.__setattr__(self, "select", made(SELECTORS[kind], settings or {}))

    @property
    def plan(self) -> Plan | None:
        """The plan to carry out, where one was given."""
        return self.select if isinstance(self.select, Plan) else None

    @property
    def selector(self) -> Selector:
        """Who chooses under a budget; with a plan, nobody does."""
        if self.select == "optimal":
            return Optimal(metric=self.metric)
        return SELECTORS[self.select]() if isinstance(self.select, str) else cast(Selector, self.select)

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        """What is wrong with the settings for this model and task."""
        found = super().problems(model, task)
        if found:
            return found
        given = [way for way, value in self.ways().items() if value is not None]
        ways = ", ".join(f"{way}=" if way != "select" else "select=plan" for way in self.ways())
        if not given:
            found.append(f"nothing says how much to keep: give one of {ways}")
        if len(given) > 1:
            found.append(f"{' and '.join(given)} both say how much to keep: give one of {ways}")
        if isinstance(self.select, str) and self.select not in SELECTORS:
            hint = did_you_mean(self.select, SELECTORS)
            found.append(f"select is {self.select!r}{hint or ': use '}{'' if hint else 'optimal, greedy or a plan'}")
        elif not isinstance(self.select, str | Plan | Greedy | Optimal):
            found.append(f"select is a {type(self.select).__name__}: use 'optimal', 'greedy', a selector or a plan")
        elif self.budget is not None and self.plan is None:
            found += self.selector.problems(self.budget)
        if self.plan is not None and self.plan.step != self.name:
            found.append(f"the plan is for {self.plan.step}")
        if self.data_aware and not task.has_calibration:
            found.append("data_aware needs calibration data: give Task(calibration=...) or leave it out")
        if (self.epochs or self.epochs_per_layer) and task.train is None:
            found.append("epochs needs Task(train=...), which the task does not have")
        if self.samples < 1 or self.epochs < 0 or self.epochs_per_layer < 0:
            found.append("samples must be at least 1, and epochs at least 0")
        names = list(weighted_layers(model, self.inside_forms))
        return found + unmatched([*self.ignore, *self._patterns()], names)

    def _patterns(self) -> list[str]:
        """All layer patterns among the settings."""
        values = (getattr(self, f) for f in self.__dataclass_fields__)
        return [str(p) for v in values if isinstance(v, Mapping) for p in v]

    # The work -------------------------------------------------------------------------------------------------------

    def edits(self, study: Study) -> Iterator[Edit]:
        """Choose, then replace layer by layer in calling order, then mend."""
        bench = self._bench(study)
        choosing = self.choose(bench)
        bench.record(choosing)
        if bench.aware and self.asymmetric and any(attention_of(study.original, name) for name in choosing.plan.layers):
            study.notes.append("attention's projections were fitted to what the original gives them")
        yield from (Leave(name, reason) for name, reason in bench.left.items())
        reason = "nothing cheaper was asked of it" if self.budget is None else "its cost is better spent as it is"
        yield from (Leave(name, reason) for name in bench.kept(choosing.plan))
        yield from bench.carry_out(choosing.plan, study.model)

    def check(self, study: Study) -> None:
        """Hold the plan or the budget against what layers can cost, before anything slow.

        Raises:
            RecipeError: the plan is not for this model.
            BudgetError: the budget cannot be met; the message names the nearest that can.
        """
        bench = self._bench(study)
        if self.plan is not None:
            self._ordered(self.plan, bench, bench.prices)
        elif self.budget is not None:
            check(bench.prices, self.budget)
            if self.budget.latency is not None:
                Stopwatch.of(study, self.budget)  # which runs the original

    def planned(self, study: Study, before: Snapshot) -> Snapshot:
        bench = self._bench(study)
        choosing = self.choose(bench)
        bench.record(choosing)
        return repriced(before, bench.row_costs(choosing.plan))

    def _bench(self, study: Study) -> Bench:
        """The one bench of this step and study."""
        bench: Bench | None = study.worked_out.get("bench")
        if bench is None or bench.step is not self:
            bench = study.worked_out["bench"] = Bench(self, study)
        return bench

    def choose(self, bench: Bench) -> Choosing:
        """The plan: the given one, the one the settings spell out, or the selector's."""
        table = bench.table
        if self.plan is not None:
            return Choosing(self._ordered(self.plan, bench, table), "manual", self.metric)
        if self.budget is None:
            picked: dict[str, Form] = {}
            for name, options in table.options.items():
                try:
                    option = self.decided(name, options[1:], options[0].cost)
                except LookupError as error:
                    bench.left[name] = str(error.args[0])
                else:
                    picked |= {name: option.form} if option and option.form else {}
            return Choosing(Plan(self.name, picked), "manual", self.metric)
        if self.budget.latency is not None:
            return self._in_time(self.budget, bench)
        return self.selector.choose(table, self.budget, bench, self.name)

    def _in_time(self, budget: Budget, bench: Bench) -> Choosing:
        """The selector's plan for the largest share of the MACs whose network is measured to keep to a latency.

        Raises:
            BudgetError: there is none, or the score falls further at it than the budget allows.
        """
        table, watch = bench.table, Stopwatch.of(bench.study, budget)
        if not table.options or not table.start.macs:
            reasons = [f"{name}: {reason}" for name, reason in bench.left.items()]
            why = f" ({first_few(reasons)})" if reasons else ""
            raise BudgetError(f"{budget} cannot be met: {self.name} finds nothing to make faster{why}")
        start, now = table.start.metric("macs"), table.now.metric("macs")
        most = [1.0, now / start * (1 + 1e-9)]  # a little more, so that rounding leaves layers alone
        if "macs" in budget.costs():
            most.append(budget.limits({m: table.start.metric(m) for m in budget.costs()})["macs"] / start)

        @cache
        def chosen(share: float, drop: float | None = None) -> Choosing:
            under = replace(budget, latency=None, runtime=None, macs=share, drop=drop)
            return self.selector.choose(table, under, bench, self.name)

        def probe(share: float) -> Timed:
            plan = chosen(share).plan
            return watch.time(share, repr(plan), lambda: bench.shaped(plan))

        timed = largest(budget, probe, self.selector.cheapest(table, "macs") * (1 + 1e-9), min(most))
        share = timed[-1].share
        try:
            choosing = chosen(share, budget.drop)
        except BudgetError as error:
            raise BudgetError(f"{budget}: that latency takes {share:.3g} of the original's MACs; {error}") from error
        return replace(choosing, notes=(*choosing.notes, told(budget, timed)))

    def _ordered(self, plan: Plan, bench: Bench, table: Table) -> Plan:
        """The plan's layers in calling order, each of them found in the table."""
        for name, form in plan.layers.items():
            if name in bench.left:
                raise RecipeError([f"{self.name}: the plan names {name!r}, but {bench.left[name]}"])
            table.find(name, form)
        return Plan(self.name, {name: plan.layers[name] for name in table.options if name in plan.layers})


@dataclass
class Bench:
    """One step at work on one model: its table, its trials, and the carrying out of a plan."""

    step: Layerwise
    study: Study
    left: dict[str, str] = field(default_factory=dict)

    @cached_property
    def aware(self) -> bool:
        """Whether the data has a say."""
        wanted = self.step.data_aware
        return self.study.task.has_calibration if wanted is None else wanted

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers that can be replaced, in calling order; the others are listed in `left`."""
        rows, original = self.study.profile.layers, self.study.original
        called, inside = [n for n, row in rows.items() if row.calls], self.step.inside_forms
        self.left.update(obstacles(original, called, self.step.ignore, inside))
        able: dict[str, Layer] = {}
        order = {name: place for place, name in enumerate(rows)}

        def turn(name: str) -> int:
            # Of attention's projections the attention is called, and none of them.
            caller = name.rpartition(".")[0] if attention_of(original, name) is not None else name
            return order.get(nearest(caller, order) or ("" if caller else MODEL), len(order))

        names = sorted(layer_names(original, inside), key=turn)
        if inside:
            self.left.update(self.study.unread([name for name in names if name not in self.left]))
        for name in names:
            layer = layer_at(original, name)
            if name in self.left or not is_layer(layer):
                continue
            if (reason := self.step.unfit(layer)) is not None:
                self.left[name] = reason
            else:
                able[name] = layer
        return able

    @cached_property
    def statistics(self) -> Mapping[str, Statistics]:
        """Of the original's layers; empty without data."""
        task = self.study.task
        if not task.has_calibration or not self.layers:
            return {}
        return self.study.statistics(self.layers, self.step.samples, gradients=True)

    @cached_property
    def norms(self) -> Mapping[str, str]:
        """Of layers without a bias the batch norm behind that can take up a constant; none without data to tell it."""
        return norms_behind(self.study.original, self.layers, self.study.task.inputs()) if self.aware else {}

    def lent(self, name: str) -> Layer:
        """The layer to be fitted: with a bias of zeros where a batch norm can take that up."""
        return with_bias(self.layers[name]) if name in self.norms else self.layers[name]

    def fitted(self, name: str, form: Form, seen: Statistics | None) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """The values of a layer in a new form, and what the batch norm behind it is to take up; None where nothing."""
        values = self.step.at(name).values(self.lent(name), form, seen)
        if name not in self.norms:
            return values, None
        return without_bias(values, form.build(self.layers[name], "meta").state_dict())

    @cached_property
    def prices(self) -> Table:
        """Every layer's options, not weighed; layers without any go to `left`."""
        rows, metrics = self.study.profile.layers, self.metrics
        options: dict[str, tuple[Option, ...]] = {}
        for name, layer in self.layers.items():
            # A layer inside a replaced one has no row: what is of the values alone can be priced without its calls.
            calls, whole = rows[name].calls if name in rows else (), self._whole(name)
            try:
                found = self.step.priced(name, layer, calls)
            except LookupError as error:
                self.left[name] = str(error.args[0])
                continue
            cheaper = [o for o in found if any(o.cost.metric(m) < whole.metric(m) for m in metrics)]
            if cheaper:
                options[name] = (Option(name, None, whole, 0.0), *cheaper)
            else:
                dear = "every option costs as much as the layer itself, or more"
                self.left[name] = dear if found else "nothing was asked of it"
        return Table(options, self.study.profile.total, self.study.start)

    @cached_property
    def table(self) -> Table:
        """Every layer's options, with the losses they are predicted to bring."""
        options: dict[str, tuple[Option, ...]] = {}
        for name, (whole, *others) in track(self.prices.options.items(), "weighing every layer's options"):
            losses = self.step.at(name).losses(self.lent(name), others, self.statistics.get(name))
            options[name] = (whole, *(replace(o, loss=loss) for o, loss in zip(others, losses, strict=True)))
        return replace(self.prices, options=options)

    def _whole(self, name: str) -> Cost:
        """What a layer costs as it is."""
        rows = self.study.profile.layers
        return rows[name].cost if name in rows else price(self.layers[name], ())

    def offer(self, name: str, form: Constraint) -> None:
        """Put a constraint that the settings spell out among its layer's options; before these are weighed."""
        prices = self.prices
        whole, *others = prices.options.get(name) or (Option(name, None, self._whole(name), 0.0),)
        if all(option.form != form for option in others):
            others.append(Option(name, form, confined(whole.cost, self.layers[name], form), 0.0))
            others.sort(key=lambda option: option.cost.metric(self.metrics[0]))
            self.__dict__["prices"] = replace(prices, options={**prices.options, name: (whole, *others)})
            self.left.pop(name, None)

    def row_costs(self, plan: Plan) -> dict[str, Cost]:
        """What the rows of the profile would cost under a plan; layers inside a replaced one count to its row."""
        rows = self.study.profile.layers
        costs: dict[str, Cost] = {}
        for name, form in plan.layers.items():
            row = nearest(name, rows) or MODEL
            saved = self.table.options[name][0].cost - self.table.find(name, form).cost
            costs[row] = costs.get(row, rows[row].cost) - saved
        return costs

    @property
    def metrics(self) -> list[str]:
        """The costs that count here."""
        return (self.step.budget.metrics if self.step.budget else []) or [self.step.metric]

    # Trials, as selectors ask for them ------------------------------------------------------------------------------

    @property
    def baseline(self) -> float:
        """The score of the network as it is."""
        return self.study.original_score

    def score(self, plan: Plan) -> float:
        """The score of a copy of the network made to the plan."""
        trial = copy.deepcopy(self.study.original)
        for edit in self.carry_out(plan, trial, train=False):
            edit.apply(trial)
        return self.study.scorer(trial)

    def shaped(self, plan: Plan) -> nn.Module:
        """A copy of the network in the forms of a plan, with any values: for its time alone."""
        trial, generator = copy.deepcopy(self.study.original), torch.Generator().manual_seed(0)
        for name, form in plan.layers.items():
            Replace(name, form).apply(trial)
            for parameter in trial.get_submodule(name).parameters():
                # Of their usual size: numbers too small for the processor's fast path would take longer.
                values = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
                parameter.data.copy_(values)
        return trial

    def score_alone(self, option: Option) -> float:
        """The score of the network with one layer changed; asked once, and kept on disk where the study has a store."""

        def measure() -> float:
            assert option.form is not None
            name, seen = option.layer, self.statistics.get(option.layer) if self.aware else None
            values, constant = self.fitted(name, option.form, seen)
            if attention_of(self.study.original, name) is not None:  # no call of a layer to replay from
                trial = copy.deepcopy(self.study.original)
                return self.study.scorer(remade(trial, name, option.form, values).apply(trial))
            # A constraint comes with a copy of its layer here: the layer is put back as it was afterwards.
            with self.replay.changed(Replace(name, option.form, values)) as model:
                if constant is None:
                    return self.study.scorer(model)
                norm = model.get_submodule(self.norms[name])
                mean = cast(Tensor, norm.running_mean).clone()
                moved(norm, constant)
                try:
                    return self.study.scorer(model)
                finally:
                    cast(Tensor, norm.running_mean).copy_(mean)

        return self.evaluations.ask(key(*self._identity, option.layer, repr(option.form)), measure)

    @cached_property
    def replay(self) -> Replay:
        """Runs only what lies behind a changed layer."""
        return Replay(self.study.original)

    @cached_property
    def evaluations(self) -> Evaluations:
        """Scores already measured."""
        return Evaluations(self.study.store)

    @cached_property
    def _identity(self) -> tuple[str, ...]:
        """What a score depends on beside the layer and its option: the model, the data, and how values are fitted."""
        chosen = ("budget", "select", "ignore", "epochs", "epochs_per_layer")
        own = sorted((k, repr(v)) for k, v in self.step.settings().items() if k not in chosen)
        settings = f"{self.step.name} {own} data_aware={self.aware} seed={self.study.seed}"
        return (fingerprint(self.study.original), self.study.task.fingerprint(), repr(self.baseline), settings)

    # Carrying out ---------------------------------------------------------------------------------------------------

    def carry_out(self, plan: Plan, model: nn.Module, train: bool = True) -> Iterator[Edit]:
        """The plan's edits in calling order, each fitted to what the model has become; then the mending.

        Args:
            plan: what to do.
            model: where the caller applies the edits.
            train: whether to fine-tune as the settings say.
        """
        task, step = self.study.task, self.step
        lockstep = self.study.lockstep(model, step.samples) if self.aware and step.asymmetric and plan.layers else None
        jointly = step.jointly(self.study, plan, model) if train and plan.layers else None
        for name, form in track(plan.layers.items(), "fitting layers", total=len(plan.layers)):
            values, constant = self.fitted(name, form, self._seen(name, lockstep) if self.aware else None)
            yield remade(model, name, form, values)
            if constant is not None:
                moved(model.get_submodule(self.norms[name]), constant)
            if jointly is not None and jointly.after(name) and lockstep is not None:
                lockstep.restart()
            if train and step.epochs_per_layer:
                finetune(model, task, step.epochs_per_layer)
                for runs in (lockstep, jointly):
                    if runs is not None:
                        runs.restart()
        if jointly is not None:
            jointly.close()
        if plan.layers:
            self._mend(plan, model, lockstep)
        if train and step.epochs:
            finetune(model, task, step.epochs)

    def _seen(self, name: str, lockstep: Lockstep | None) -> Statistics | None:
        """A layer's statistics as the model is now: of its inputs after the layers already replaced."""
        seen = self.statistics.get(name)
        # Attention's projections are fitted to what the original gives them: runs wait at calls of layers.
        if seen is None or lockstep is None or attention_of(self.study.original, name) is not None:
            return seen
        rows = self.study.profile.layers
        pairs = lockstep.at(name, calls=len(rows[nearest(name, rows) or MODEL].calls))
        now = gather_paired(self.layers[name], pairs, samples=lockstep.samples, seed=self.study.seed)
        if now is None:
            raise TaskError(f"no calibration batch reached {name!r}")
        return replace(now, gradients=seen.gradients, positions=seen.positions)

    def _mend(self, plan: Plan, model: nn.Module, lockstep: Lockstep | None) -> None:
        """Re-estimate the batch norms behind the first replaced layer."""
        task, samples = self.study.task, self.step.samples
        if not task.has_calibration:
            return
        rows = list(self.study.profile.layers)
        behind = set(rows[min(rows.index(nearest(name, rows) or MODEL) for name in plan.layers) :])
        seen = sum(inputs.batch_size for inputs in task.batches(model, samples))
        if seen < MENDING_SAMPLES:
            return
        if lockstep is None or lockstep.samples < seen:  # one process of several sees its share only
            divergence, before = Divergence(self.study.original, task, samples), None
        else:
            original, changed = lockstep.answers()
            divergence = Divergence(self.study.original, task, samples, original)
            before = divergence.of(changed)
        reestimate_batch_norm(model, lambda: task.batches(model, samples), divergence, behind, before)

    # The record -----------------------------------------------------------------------------------------------------

    def kept(self, plan: Plan) -> list[str]:
        """Layers that could have been replaced, and were not chosen to be."""
        return [name for name in self.table.options if name not in plan.layers and name not in self.left]

    def record(self, choosing: Choosing) -> None:
        """Put what was chosen, and among what, into the study's findings."""
        table, metric = self.table, choosing.metric

        def point(option: Option, scores: Mapping[str, float]) -> Point:
            whole = table.options[option.layer][0].cost.metric(metric)
            score = self.baseline if option.form is None and scores else scores.get(str(option))
            return Point(str(option), option.cost.metric(metric) / whole if whole else 1.0, option.loss, score)

        choices = {}
        for name, options in table.options.items():
            scores = choosing.scores.get(name, {})
            form = choosing.plan.layers.get(name)
            shown = [*options[1:], options[0]]
            stride = max(1, len(shown) // CURVE_POINTS)
            curve = [o for i, o in enumerate(shown) if i % stride == 0 or str(o) in scores or o.form in (form, None)]
            chosen = options[0] if form is None else table.find(name, form)
            choices[name] = Choice(point(chosen, scores), tuple(point(o, scores) for o in curve))
        plan = choosing.plan.to_json()["layers"]
        self.study.findings.update(plan=plan, choices=choices, metric=metric, selected_by=choosing.by)
        self.study.notes.extend(choosing.notes)
        if "replay" in vars(self):  # only where scores were measured layer by layer
            for name, obstacle in self.replay.obstacles.items():
                self.study.notes.append(f"{name} was evaluated without replaying what lies before it: {obstacle}")
