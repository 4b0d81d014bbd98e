"""The optimal selector: least predicted loss within the budget, over all layers and options at once.

A multiple-choice knapsack by Lagrangian relaxation: Everett, Generalized Lagrange multiplier method for solving
problems of optimum allocation of resources, Operations Research 11, 1963; for rates in coding, Shoham & Gersho,
Efficient bit allocation for an arbitrary set of quantizers, IEEE Trans. ASSP 36, 1988.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.cost.cost import METRICS
from featherweight.errors import BudgetError, RecipeError, did_you_mean
from featherweight.search.budget import Budget
from featherweight.search.options import Choosing, Plan, Table, Trials, shortfall
from featherweight.settings import mistyped

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

# Among up to so many options, the best of all pairs of exchanges is looked for each time; among more, only where no
# single exchange helps, and then among as many pairs as take about a second.
FEW = 1_000
PAIRS = 16_000_000


@dataclass(frozen=True)
class Optimal:
    """Minimise the predicted loss subject to the budget; with a drop in it, find the cheapest plan that keeps to it.

    Attributes:
        evaluations: real evaluations that a search for a drop may take, beside the baseline.
        metric: the cost to lower where the budget has only a drop.
    """

    evaluations: int = 7
    metric: str = "macs"

    def __post_init__(self) -> None:
        """Raises:
        RecipeError: a setting is of the wrong type, there is no evaluation to search with, or no such cost.
        """
        problems = mistyped(self)
        if not problems and self.evaluations < 1:
            problems.append(f"evaluations is {self.evaluations}: give a whole number from 1 up")
        if not problems and self.metric not in METRICS:
            hint = did_you_mean(self.metric, METRICS)
            problems.append(f"metric is {self.metric!r}: it is one of {', '.join(METRICS)}{hint}")
        if problems:
            raise RecipeError([f"Optimal: {problem}" for problem in problems])

    def problems(self, budget: Budget) -> list[str]:
        """Nothing: it takes every budget there is."""
        return []

    def cheapest(self, table: Table, metric: str) -> float:
        """The least cost that it can choose, as a share of the start's."""
        return cheapest_share(table, metric)

    def choose(self, table: Table, budget: Budget, trials: Trials, step: str) -> Choosing:
        """The plan.

        Raises:
            BudgetError: the budget cannot be met; the message names the nearest that can.
        """
        if budget.drop is None:
            plan, notes = within(table, budget, step)
            return Choosing(plan, "optimal", next(iter(budget.costs())), notes=notes)
        if budget.costs():
            plan, notes = within(table, budget, step)
            drop = trials.baseline - trials.score(plan)
            if drop <= budget.drop:
                note = f"measured drop {drop:.4g}, allowed {budget.drop:.4g}"
                return Choosing(plan, "optimal", next(iter(budget.costs())), notes=(*notes, note))
        metric = next(iter(budget.costs()), self.metric)
        plan, share, notes = self._cheapest(table, metric, budget.drop, trials, step)
        if budget.costs():
            raise BudgetError(
                f"at {budget} the score drops by {drop:.4g}: "
                f"the nearest budget found that keeps the drop is {metric}={rounded_up(share):g}"
            )
        return Choosing(plan, "optimal", metric, notes=notes)

    def _cheapest(
        self, table: Table, metric: str, drop: float, trials: Trials, step: str
    ) -> tuple[Plan, float, tuple[str, ...]]:
        """Bisection on the budget's share, each share's best plan measured for real."""
        low, high = cheapest_share(table, metric), table.now.metric(metric) / table.start.metric(metric)
        best, best_share, best_drop = Plan(step), high, 0.0
        for attempt in range(self.evaluations):
            # A plan that keeps to the drop moves the upper end of the bracket, one that does not the lower.
            share = (low + high) / 2
            limit: dict[str, Any] = {metric: min(1.0, share)}
            plan, _ = within(table, Budget(**limit), step)
            fell = trials.baseline - trials.score(plan)
            if fell <= drop:
                best, best_share, best_drop, high = plan, share, fell, share
            else:
                low = share
            if high - low < 0.005 and attempt > 1:
                break
        return (
            best,
            best_share,
            (f"{metric} × {best_share:.3f} with a measured drop of {best_drop:.4g}, allowed {drop:.4g}",),
        )


def cheapest_share(table: Table, metric: str) -> float:
    """The least cost that any plan can reach, as a share of the start's."""
    saved = sum(o[0].cost.metric(metric) - min(x.cost.metric(metric) for x in o) for o in table.options.values())
    return (table.now.metric(metric) - saved) / table.start.metric(metric)


def check(table: Table, budget: Budget) -> None:
    """Every limit can be met by itself; looks at costs alone, so it can be asked before anything is predicted.

    Raises:
        BudgetError: one cannot; the message names the nearest that can.
    """
    short = []
    for metric, limit in budget.limits({m: table.start.metric(m) for m in budget.costs()}).items():
        whole, share = table.start.metric(metric), cheapest_share(table, metric)
        if share * whole > limit * (1 + 1e-9):
            short.append(
                f"{metric} cannot go below {rounded_up(share):g} of the original's "
                f"({rounded_up(share * whole, 6):.6g}), and {limit / whole:.3g} ({limit:.6g}) was asked for"
            )
    if short:
        raise BudgetError("; ".join(short) + ": ask for no less, or let more layers be replaced")


def within(table: Table, budget: Budget, step: str) -> tuple[Plan, tuple[str, ...]]:
    """The plan of least predicted loss whose costs keep to the budget, and what the user should know of it.

    Raises:
        BudgetError: even the cheapest plan costs more.
    """
    check(table, budget)
    whole = {metric: table.start.metric(metric) for metric in budget.costs()}
    limits = budget.limits(whole)
    layers = list(table.options)
    costs = [np.array([[o.cost.metric(m) for m in limits] for o in table.options[n]]) for n in layers]
    losses = [np.array([o.loss for o in table.options[n]]) for n in layers]
    fixed = np.array([table.now.metric(m) for m in limits]) - sum((c[0] for c in costs), np.zeros(len(limits)))
    room = np.array(list(limits.values())) - fixed
    chosen = allocate(costs, losses, room)
    if chosen is None:
        nearest = _nearest(costs, losses, room, fixed, whole)
        raise BudgetError(
            f"no plan was found that keeps to all of {budget} at once: the nearest that can be is {nearest}"
        )
    forms = {n: table.options[n][i].form for n, i in zip(layers, chosen, strict=True)}
    plan = Plan(step, {n: f for n, f in forms.items() if f is not None})
    return plan, shortfall(table, plan, limits)


def allocate(costs: list[Array], losses: list[Array], room: Array) -> list[int] | None:
    """One option for each layer, of least total loss, with total costs within the room.

    The Lagrangian finds the best plan on the lower convex hull; what room it leaves is then filled with the exchanges
    that save most loss.

    Args:
        costs: by layer, (options, metrics).
        losses: by layer, (options,).
        room: (metrics,), greater than 0.
    Returns:
        Indices of the chosen options by layer, or None where no plan was found that fits. With one metric there is
        then none; with several, there hardly ever is.
    """
    if not costs:
        return [] if bool((room >= 0).all()) else None
    pool = _Pool.of(costs, losses, room)
    weights = np.full(len(room), 1 / len(room))
    best: tuple[float, Indices] | None = None
    # With one metric, one price settles it. With several, weight moves to those that are used up the most.
    for _ in range(1 if len(room) == 1 else 40):
        prices = weights @ pool.shares
        chosen = _at_lowest_price(pool, prices)
        if chosen is not None:
            chosen = _filled(pool, chosen)
            loss = float(pool.losses[chosen].sum())
            if best is None or loss < best[0]:
                best = loss, chosen
        used = pool.used(pool.least(prices) if chosen is None else chosen)
        weights = weights * np.exp(2.0 * (used - used.max()))
        weights = np.maximum(weights / weights.sum(), 1e-6)
    if best is None:
        squeezed = _squeezed(pool)
        if squeezed is None:
            return None
        best = 0.0, _filled(pool, squeezed)
    return [int(i) for i in best[1] - pool.starts]


@dataclass(frozen=True)
class _Pool:
    """The options of all layers in one row, layer after layer. A plan is one index into it for each layer.

    Attributes:
        shares: (metrics, all options), costs as shares of the room.
        losses: (all options,).
        layer: (all options,), the layer each belongs to.
        starts: (layers,), where each layer's options begin.
    """

    shares: Array
    losses: Array
    layer: Indices
    starts: Indices

    @classmethod
    def of(cls, costs: list[Array], losses: list[Array], room: Array) -> _Pool:
        """The options of layers whose costs are (options, metrics) and losses (options,)."""
        counts = np.array([len(cost) for cost in costs])
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        shares = np.ascontiguousarray((np.concatenate(costs) / room).T)
        return cls(shares, np.concatenate(losses), np.repeat(np.arange(len(costs)), counts), starts)

    def least(self, values: Array) -> Indices:
        """Each layer's option of the least value, the first of equals; (layers,)."""
        found = np.flatnonzero(values == np.minimum.reduceat(values, self.starts)[self.layer])
        first: Indices = found[np.searchsorted(found, self.starts)]
        return first

    def used(self, chosen: Indices) -> Array:
        """(metrics,), the shares of the room that a plan takes."""
        used: Array = self.shares[:, chosen].sum(1)
        return used

    def of_layer(self, index: int) -> slice:
        """Where the options of one option's layer are."""
        layer = self.layer[index]
        return slice(self.starts[layer], self.starts[layer + 1] if layer + 1 < len(self.starts) else len(self.layer))

    def fits(self, chosen: Indices) -> bool:
        """Whether a plan keeps to the room."""
        return bool((self.used(chosen) <= 1 + 1e-12).all())


def _at_lowest_price(pool: _Pool, prices: Array) -> Indices | None:
    """The plan of the smallest multiplier whose costs fit, by bisection on its logarithm."""

    def choose(log_multiplier: float) -> Indices:
        return pool.least(pool.losses + np.exp(log_multiplier) * prices)

    low, high = -80.0, 80.0
    if not pool.fits(choose(high)):
        cheapest = pool.least(prices)
        return cheapest if pool.fits(cheapest) else None
    for _ in range(60):
        middle = (low + high) / 2
        if pool.fits(choose(middle)):
            high = middle
        else:
            low = middle
    return choose(high)


def _squeezed(pool: _Pool) -> Indices | None:
    """A plan that fits, whatever it loses: one or two layers' options are exchanged while that lowers the excess.

    A round takes time in proportion to the number of options: where two exchanges are needed and all pairs would be too
    many, one of the two is among those that raise the excess least by themselves.
    """
    chosen = pool.least(pool.shares.max(0))
    moves = pool.shares - pool.shares[:, chosen][:, pool.layer]
    while not pool.fits(chosen):
        over = (pool.used(chosen) - 1)[:, None]
        least = float(np.maximum(over, 0).sum()) - 1e-12
        alone = np.maximum(over + moves, 0).sum(0)
        best: tuple[int, ...] = ()
        if len(alone) > FEW and alone.min() < least:
            best = (int(alone.argmin()),)
        else:
            many = len(alone) ** 2 > PAIRS
            for first in np.argsort(alone)[: PAIRS // len(alone) + 1] if many else range(len(alone)):
                after = np.maximum(over + moves[:, first, None] + moves, 0).sum(0)
                after[pool.of_layer(first)] = np.inf
                second = int(after.argmin())
                if after[second] < least:
                    least, best = float(after[second]), (int(first), second)
        if not best:
            return None
        for move in best:
            chosen[pool.layer[move]] = move
            here = pool.of_layer(move)
            moves[:, here] = pool.shares[:, here] - pool.shares[:, move, None]
    return chosen


def _filled(pool: _Pool, chosen: Indices) -> Indices:
    """Spend the room that is left, exchange by exchange, on whatever saves most loss for what it takes."""
    chosen = chosen.copy()
    extra = pool.shares - pool.shares[:, chosen][:, pool.layer]
    saved = pool.losses[chosen][pool.layer] - pool.losses
    while True:
        left = 1 - pool.used(chosen)[:, None]
        possible = np.flatnonzero((extra <= left + 1e-12).all(0) & (saved > 0))
        if not len(possible):
            return chosen
        gain = saved[possible] / np.maximum(extra[:, possible].max(0), 1e-12)
        best = int(possible[gain.argmax()])
        chosen[pool.layer[best]] = best
        here = pool.of_layer(best)
        extra[:, here] = pool.shares[:, here] - pool.shares[:, best, None]
        saved[here] = pool.losses[best] - pool.losses[here]


def _nearest(costs: list[Array], losses: list[Array], room: Array, fixed: Array, whole: dict[str, float]) -> str:
    """The limits, all wider by the same factor, at which a plan is found, as shares of the original's."""
    limits, now, start = room + fixed, fixed + sum(cost[0] for cost in costs), np.array(list(whole.values()))

    def widened(factor: float) -> list[float]:
        return [rounded_up(share) for share in np.minimum(limits * factor, now) / start]

    low, high = 1.0, float((now / limits).max())  # at the upper end everything can stay as it is
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        if allocate(costs, losses, widened(middle) * start - fixed) is None:
            low = middle
        else:
            high = middle
    return ", ".join(f"{metric}={share:g}" for metric, share in zip(whole, widened(high), strict=True))


def rounded_up(value: float, digits: int = 3) -> float:
    """The next number of so many significant digits that is not below `value`: a limit that is named must hold."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / step - 1e-9) * step:.{digits}g}")
