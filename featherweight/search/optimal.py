"""The optimal selector: least predicted loss within the budget, over all layers and options at once.

A multiple-choice knapsack by Lagrangian relaxation: Everett, Generalized Lagrange multiplier method for solving
problems of optimum allocation of resources, Operations Research 11, 1963; for rates in coding, Shoham & Gersho,
Efficient bit allocation for an arbitrary set of quantizers, IEEE Trans. ASSP 36, 1988.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import BudgetError
from featherweight.search.budget import Budget
from featherweight.search.options import Choosing, Plan, Table, Trials

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Optimal:
    """Minimise the predicted loss subject to the budget; with a drop in it, find the cheapest plan that keeps to it.

    Attributes:
        evaluations: real evaluations that a search for a drop may take, beside the baseline.
        metric: the cost to lower where the budget has only a drop.
    """

    evaluations: int = 7
    metric: str = "macs"

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
            plan, _ = within(table, Budget(**{metric: min(1.0, share)}), step)
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
    return plan, _shortfall(table, plan, limits)


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
    weights = np.full(len(room), 1 / len(room))
    best: tuple[float, list[int]] | None = None
    # With one metric, one price settles it. With several, weight moves to those that are used up the most.
    for _ in range(1 if len(room) == 1 else 40):
        prices = [cost @ (weights / room) for cost in costs]
        chosen = _at_lowest_price(prices, losses, costs, room)
        if chosen is not None:
            chosen = _fill(chosen, costs, losses, room)
            loss = sum(float(losses[n][i]) for n, i in enumerate(chosen))
            if best is None or loss < best[0]:
                best = loss, chosen
        used = _total(costs, chosen if chosen is not None else [int(p.argmin()) for p in prices]) / room
        weights = weights * np.exp(2.0 * (used - used.max()))
        weights = np.maximum(weights / weights.sum(), 1e-6)
    if best is not None:
        return best[1]
    squeezed = _squeezed(costs, room)
    return None if squeezed is None else _fill(squeezed, costs, losses, room)


def _at_lowest_price(prices: list[Array], losses: list[Array], costs: list[Array], room: Array) -> list[int] | None:
    """The plan of the smallest multiplier whose costs fit, by bisection on its logarithm."""

    def choose(log_multiplier: float) -> list[int]:
        multiplier = np.exp(log_multiplier)
        return [int(np.argmin(loss + multiplier * price)) for loss, price in zip(losses, prices, strict=True)]

    low, high = -80.0, 80.0
    if bool((_total(costs, choose(high)) > room * (1 + 1e-12)).any()):
        cheapest = [int(price.argmin()) for price in prices]
        return cheapest if bool((_total(costs, cheapest) <= room * (1 + 1e-12)).all()) else None
    for _ in range(60):
        middle = (low + high) / 2
        if bool((_total(costs, choose(middle)) > room * (1 + 1e-12)).any()):
            low = middle
        else:
            high = middle
    return choose(high)


def _squeezed(costs: list[Array], room: Array) -> list[int] | None:
    """A plan that fits, whatever it loses: one or two layers' options are exchanged while that lowers the excess."""
    layer = np.repeat(np.arange(len(costs)), [len(cost) for cost in costs])
    option = np.concatenate([np.arange(len(cost)) for cost in costs])
    shares = np.concatenate(costs) / room
    chosen = np.array([int((cost / room).max(1).argmin()) for cost in costs])
    while True:
        total = _total(costs, list(chosen)) / room
        excess = float(np.maximum(total - 1, 0).sum())
        if bool((total <= 1 + 1e-12).all()):
            return [int(i) for i in chosen]
        now = np.array([cost[i] for cost, i in zip(costs, chosen, strict=True)]) / room
        moves = shares - now[layer]
        best, found = excess - 1e-12, (-1, -1)
        for first in range(len(moves)):
            # A layer's move to the option that it has already leaves the other move by itself.
            after = np.maximum(total + moves[first] + moves - 1, 0).sum(1)
            after[layer == layer[first]] = np.inf
            second = int(after.argmin())
            if after[second] < best:
                best, found = float(after[second]), (first, second)
        if found == (-1, -1):
            return None
        for move in found:
            chosen[layer[move]] = option[move]


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


def _fill(chosen: list[int], costs: list[Array], losses: list[Array], room: Array) -> list[int]:
    """Spend the room that is left, exchange by exchange, on whatever saves most loss for what it takes."""
    chosen, left = list(chosen), room - _total(costs, chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for n, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            extra, saved = cost - cost[chosen[n]], loss[chosen[n]] - loss
            possible = (extra <= left).all(1) & (saved > 0)
            if possible.any():
                gain = np.where(possible, saved / np.maximum((extra / room).max(1), 1e-12), -np.inf)
                i = int(gain.argmax())
                if best is None or gain[i] > best[0]:
                    best = float(gain[i]), n, i
        if best is None:
            return chosen
        _, n, i = best
        left = left - (costs[n][i] - costs[n][chosen[n]])
        chosen[n] = i


def _total(costs: list[Array], chosen: list[int]) -> Array:
    total: Array = np.sum([cost[i] for cost, i in zip(costs, chosen, strict=True)], axis=0)
    return total


def _shortfall(table: Table, plan: Plan, limits: dict[str, float]) -> tuple[str, ...]:
    """Says so where a plan stays more than 1 % below every limit though layers were replaced: options are coarse."""
    cost = table.cost(plan)
    used = {metric: cost.metric(metric) / limit for metric, limit in limits.items()}
    if not plan.layers or max(used.values()) >= 0.99:
        return ()
    metric = max(used, key=lambda m: used[m])
    return (f"{metric} came to {used[metric]:.3f} of the limit: no option lies nearer below it",)
