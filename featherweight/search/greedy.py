"""The greedy selector: the highest common score at which every layer's cheapest share of its cost meets the target.

The method of AIMET's model compression guide, "Greedy compression ratio selection": every layer is made cheaper alone,
at a few shares of its cost, and the network's score is measured each time; then one score level is looked for, down to
which every layer walks along its curve. Here the curves are interpolated between the measured points, so that the
target is met.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import BudgetError, RecipeError
from featherweight.progress import track
from featherweight.search.budget import Budget
from featherweight.search.optimal import cheapest_share
from featherweight.search.options import Choosing, Option, Plan, Table, Trials, shortfall
from featherweight.settings import mistyped

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Greedy:
    """Measure every layer's score at some shares of its cost, and lower all layers to one common score.

    Takes exactly one cost limit; a latency, for which MACs stand, is one.

    Attributes:
        candidates: shares of a layer's cost are multiples of 1/candidates; the layer as it is, is the last of them.
        monotone: fit a curve that never falls with cost to each layer's scores, against scores that are noisy.
        lazy: measure only what the choice rests on, taking for granted that scores fall as a layer gets cheaper; where
            they do, the plan is the same as from all (layers × (candidates − 1)) measurements.
    """

    candidates: int = 10
    monotone: bool = False
    lazy: bool = True

    def __post_init__(self) -> None:
        """Raises:
        RecipeError: a setting is of the wrong type, or there are fewer than two candidates.
        """
        problems = mistyped(self)
        if not problems and self.candidates < 2:
            problems = [f"candidates is {self.candidates}: give a whole number from 2 up"]
        if problems:
            raise RecipeError([f"Greedy: {problem}" for problem in problems])

    def problems(self, budget: Budget) -> list[str]:
        """All that keeps it from choosing under this budget, a sentence each."""
        if len(budget.metrics) == 1 and budget.drop is None:
            return []
        one = f"greedy takes exactly one cost limit, and the budget is {budget}"
        return [f"{one}: choose with 'optimal', which takes several and a drop"]

    def choose(self, table: Table, budget: Budget, trials: Trials, step: str) -> Choosing:
        """The plan.

        Raises:
            BudgetError: not exactly one cost limit, or one that cannot be met; the message names the nearest that can.
        """
        if problems := self.problems(budget):
            raise BudgetError(problems[0])
        metric = next(iter(budget.costs()))
        limit = budget.limits({metric: table.start.metric(metric)})[metric]
        if table.now.metric(metric) <= limit:
            return Choosing(Plan(step), "greedy", metric, notes=(f"{metric} is within the limit as it is",))
        curves = self._curves(table, metric)
        room = limit - table.now.metric(metric) + sum(curve.whole for curve in curves)
        self._check(table, metric, limit, limit - room + sum(curve.whole * curve.shares[0] for curve in curves))

        for curve in curves:
            curve.scores[len(curve.options) - 1] = trials.baseline
        most = len(curves) * (self.candidates - 1)
        questions = self._needed(curves, room) if self.lazy else _all(curves)
        for curve, index in track(questions, "measuring layers alone", total=most):
            curve.scores[index] = trials.score_alone(curve.options[index])
        descent = self._descent(curves, room)
        plan = _fitting(table, curves, descent.ratios, metric, limit, step)
        return Choosing(
            plan,
            "greedy",
            metric,
            {c.layer: {str(c.options[i]): c.scores[i] for i in sorted(c.scores)} for c in curves},
            (*self._notes(table, curves, descent), *shortfall(table, plan, {metric: limit})),
        )

    def cheapest(self, table: Table, metric: str) -> float:
        """The least cost that it would choose, as a share of the start's: layers keep at least 1/candidates."""
        saved = sum(curve.whole * (1 - float(curve.shares[0])) for curve in self._curves(table, metric))
        return (table.now.metric(metric) - saved) / table.start.metric(metric)

    def _curves(self, table: Table, metric: str) -> list[_Curve]:
        every = [_Curve.of(options, metric, self.candidates) for options in table.options.values()]
        return [curve for curve in every if len(curve.options) > 1]

    def _needed(self, curves: Sequence[_Curve], room: float) -> Iterator[tuple[_Curve, int]]:
        """What is to be measured next, until nothing is missing on either side of where any layer comes to rest.

        Layers are asked about in calling order, which is the cheapest for a replay of what lies before them.
        """
        while True:
            missing = 0
            for curve, rests in zip(curves, self._descent(curves, room).rests, strict=True):
                unknown = sorted(set(rests) - set(curve.scores))
                if unknown:
                    missing += 1
                    yield curve, curve.next_to_ask(unknown)
            if not missing:
                return

    def _descent(self, curves: Sequence[_Curve], room: float) -> _Descent:
        return descend([c.shares for c in curves], [c.completed(self.monotone) for c in curves], _wholes(curves), room)

    def _check(self, table: Table, metric: str, limit: float, least: float) -> None:
        """The limit can be met, with shares of a layer from 1/candidates up."""
        start = table.start.metric(metric)
        if least <= limit * (1 + 1e-9):
            return
        asked = (
            f"{metric} cannot go below {least / start:.3f} of the original's ({least:.6g}), "
            f"and {limit / start:.3f} ({limit:.6g}) was asked for"
        )
        if cheapest_share(table, metric) * start > limit:
            raise BudgetError(f"{asked}: ask for no less, or let more layers be replaced")
        raise BudgetError(
            f"{asked}: greedy looks at no less than 1/{self.candidates} of a layer; "
            "give it more candidates, or choose with 'optimal'"
        )

    def _notes(self, table: Table, curves: Sequence[_Curve], descent: _Descent) -> Iterator[str]:
        asked = sum(len(curve.scores) - 1 for curve in curves)
        whole = sum(len(curve.options) - 1 for curve in curves)
        yield f"the common score level is {descent.level:.4g}; {asked} of {whole} single-layer scores were measured"
        if stuck := [name for name in table.options if name not in {curve.layer for curve in curves}]:
            yield f"no option is at or below {1 - 1 / self.candidates:.3g} of the cost of {', '.join(stuck)}"
        rising = [curve.layer for curve in curves if curve.rises()]
        if rising and not self.monotone:
            yield (
                f"scores rise where these layers get cheaper: {', '.join(rising)}; "
                "a layer stops at its first score below the level: Greedy(monotone=True) smooths that out"
            )


@dataclass
class _Curve:
    """One layer's score against the share of its cost.

    Attributes:
        options: the candidates, the cheapest first; the layer as it is last.
        shares: (options,), their costs as shares of the layer's own; the last is 1.
        whole: the layer's own cost.
        scores: measured scores by index into the options.
    """

    options: tuple[Option, ...]
    shares: Array
    whole: float
    scores: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Sequence[Option], metric: str, candidates: int) -> _Curve:
        """The curve over a layer's candidates: at each multiple of 1/candidates, the largest option that fits."""
        costs = np.array([option.cost.metric(metric) for option in options])
        found: dict[int, Option] = {}
        for k in range(1, candidates):
            index = _largest_within(options, costs, k / candidates * costs[0])
            if index is not None and costs[0] > 0:
                found[index] = options[index]
        chosen = [*found.values(), options[0]]
        return cls(tuple(chosen), costs[[*found, 0]] / max(costs[0], 1e-300), float(costs[0]))

    @property
    def layer(self) -> str:
        return self.options[0].layer

    def completed(self, monotone: bool) -> Array:
        """(options,), the measured scores, and between and beyond them what the predicted losses let expect."""
        known = np.array(sorted(self.scores))
        scores = np.array([self.scores[index] for index in known])
        if monotone:
            scores = isotonic(scores)
        # Predicted losses rise as the layer gets cheaper, if only a little where nothing is predicted.
        losses = np.maximum.accumulate([option.loss for option in self.options[::-1]])[::-1]
        losses = losses + 1e-6 * (losses[0] or 1.0) * (1 - self.shares)
        between = np.interp(-losses, -losses[known], scores)
        first, last = known[0], known[-1]
        measured = (scores[-1] - scores[0]) / (losses[first] - losses[last]) if len(known) > 1 else 1.0
        beyond = scores[0] - max(measured, 0.0) * (losses - losses[first])
        completed: Array = np.where(np.arange(len(losses)) < first, beyond, between)
        return completed

    def next_to_ask(self, unknown: Sequence[int]) -> int:
        """Which of the points to measure first: as far as possible from those that are measured."""
        known = np.array(list(self.scores))
        return max(unknown, key=lambda index: int(np.abs(known - index).min()))

    def rises(self) -> bool:
        """Whether some cheaper option measured better than a dearer one."""
        return bool(np.any(np.diff([self.scores[index] for index in sorted(self.scores)]) < 0))


@dataclass(frozen=True)
class _Descent:
    """Where all layers come to rest.

    Attributes:
        ratios: (layers,), the share of its cost that each layer keeps.
        level: the common score.
        rests: by layer, the points of its curve that decided.
    """

    ratios: Array
    level: float
    rests: list[list[int]]


def descend(shares: Sequence[Array], scores: Sequence[Array], wholes: Array, room: float) -> _Descent:
    """Lower the common score level until the layers' costs sum up to the room.

    The total cost falls with the level: linearly between one measured score and the next, and by jumps at scores where
    a curve is flat, or has a dip that the walk then gets past. Across a jump the level stays, and all ratios move
    together.

    Args:
        shares: by layer, (points,), rising to 1.
        scores: by layer, (points,); the last is the score of the layer as it is.
        wholes: (layers,), the layers' costs.
        room: what they may cost together; less than all of them, and no less than their cheapest points.
    """
    levels = np.unique(np.concatenate([*scores]))[::-1]
    levels = levels[levels <= max(y[-1] for y in scores)]

    def stage(number: int) -> tuple[Array, list[list[int]]]:
        """The ratios just above a level (even numbers), or on it (odd ones)."""
        level, above = float(levels[number // 2]), number % 2 == 0
        walks = [_walk(x, y, level, above) for x, y in zip(shares, scores, strict=True)]
        return np.array([ratio for ratio, _ in walks]), [rests for _, rests in walks]

    low, high = 0, 2 * len(levels) - 1  # the layers cost more than the room at `low`, and no more at `high`
    while high - low > 1:
        middle = (low + high) // 2
        if float(stage(middle)[0] @ wholes) > room:
            low = middle
        else:
            high = middle
    (dear, above), (cheap, below) = stage(low), stage(high)
    part = float(np.clip((room - cheap @ wholes) / np.maximum((dear - cheap) @ wholes, 1e-300), 0, 1))
    level = float(levels[high // 2] + part * (levels[low // 2] - levels[high // 2]))
    return _Descent(cheap + part * (dear - cheap), level, [[*a, *b] for a, b in zip(above, below, strict=True)])


def _walk(shares: Array, scores: Array, level: float, above: bool) -> tuple[float, list[int]]:
    """The smallest ratio reached from 1 down while the curve keeps to the level, and the points that say so.

    Args:
        above: whether a point on the level itself ends the walk.
    """
    stops = np.flatnonzero(scores <= level if above else scores < level)
    if not len(stops):
        return float(shares[0]), [0]
    stop = int(stops[-1])
    if stop == len(shares) - 1:
        return 1.0, [stop]
    rise = (level - scores[stop]) / (scores[stop + 1] - scores[stop])
    return float(shares[stop] + rise * (shares[stop + 1] - shares[stop])), [stop, stop + 1]


def isotonic(values: Array) -> Array:
    """The closest values, in least squares, that never fall: neighbours that do are pooled into their mean.

    Ayer et al., An Empirical Distribution Function for Sampling with Incomplete Information, Annals of Mathematical
    Statistics 26, 1955. AIMET fits a polynomial of degree 7 with a quadratic program instead: that needs a solver, and
    overshoots at the knees that such curves have; this one is exact, and leaves values that never fall as they are.
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def _fitting(table: Table, curves: Sequence[_Curve], ratios: Array, metric: str, limit: float, step: str) -> Plan:
    """The largest option within each layer's ratio; then, with the cost that this leaves over, the options next up.

    The upgrade that exceeds its layer's ratio least comes first.
    """
    options = [table.options[curve.layer] for curve in curves]
    costs = [np.array([option.cost.metric(metric) for option in row]) for row in options]
    chosen = []
    for row, cost, ratio in zip(options, costs, ratios, strict=True):
        index = _largest_within(row, cost, ratio * cost[0])
        assert index is not None  # no ratio is below the cheapest candidate's
        chosen.append(index)
    left = limit - table.now.metric(metric) + sum(float(c[0] - c[i]) for c, i in zip(costs, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for n, (cost, index) in enumerate(zip(costs, chosen, strict=True)):
            up = np.where(cost > cost[index], cost, np.inf)
            i = int(up.argmin())
            if up[i] <= min(cost[index] + left, cost[0]):
                excess = float(cost[i] / cost[0] - ratios[n])
                if best is None or excess < best[0]:
                    best = excess, n, i
        if best is None:
            break
        _, n, i = best
        left -= float(costs[n][i] - costs[n][chosen[n]])
        chosen[n] = i
    forms = {curve.layer: row[i].form for curve, row, i in zip(curves, options, chosen, strict=True)}
    return Plan(step, {layer: form for layer, form in forms.items() if form is not None})


def _largest_within(options: Sequence[Option], costs: Array, limit: float) -> int | None:
    """The option of largest cost within the limit, of least predicted loss among equals; None where all cost more."""
    within = [i for i in range(len(options)) if costs[i] <= min(limit * (1 + 1e-9), costs[0])]
    return max(within, key=lambda i: (costs[i], -options[i].loss), default=None)


def _wholes(curves: Sequence[_Curve]) -> Array:
    return np.array([curve.whole for curve in curves])


def _all(curves: Sequence[_Curve]) -> Iterator[tuple[_Curve, int]]:
    """Every point of every curve, layer by layer."""
    return ((curve, index) for curve in curves for index in range(len(curve.options) - 1))
