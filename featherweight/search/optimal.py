"""The optimal selector: least predicted loss within the budget, over all layers and options at once.

A multiple-choice knapsack by Lagrangian relaxation: Everett, Generalized Lagrange multiplier method for solving
problems of optimum allocation of resources, Operations Research 11, 1963; for rates in coding, Shoham & Gersho,
Efficient bit allocation for an arbitrary set of quantizers, IEEE Trans. ASSP 36, 1988.
"""

from __future__ import annotations

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
                f"the nearest budget that keeps the drop is {metric}={share:.3g}"
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


def within(table: Table, budget: Budget, step: str) -> tuple[Plan, tuple[str, ...]]:
    """The plan of least predicted loss whose costs keep to the budget, and what the user should know of it.

    Raises:
        BudgetError: even the cheapest plan costs more.
    """
    whole = {metric: table.start.metric(metric) for metric in budget.costs()}
    limits = budget.limits(whole)
    layers = list(table.options)
    costs = [np.array([[o.cost.metric(m) for m in limits] for o in table.options[n]]) for n in layers]
    losses = [np.array([o.loss for o in table.options[n]]) for n in layers]
    fixed = np.array([table.now.metric(m) for m in limits]) - sum((c[0] for c in costs), np.zeros(len(limits)))
    room = np.array(list(limits.values())) - fixed
    least = sum((c.min(0) for c in costs), np.zeros(len(limits)))
    if short := [
        f"{metric} cannot go below {(fixed[k] + least[k]) / whole[metric]:.3f} of the original's "
        f"({fixed[k] + least[k]:.6g}), and {limits[metric] / whole[metric]:.3f} ({limits[metric]:.6g}) was asked for"
        for k, metric in enumerate(limits)
        if least[k] > room[k] * (1 + 1e-9)
    ]:
        raise BudgetError("; ".join(short) + ": ask for no less, or let more layers be replaced")
    chosen = allocate(costs, losses, room)
    if chosen is None:
        raise BudgetError(f"no plan keeps to all of {budget} at once: relax one of the limits")
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
        Indices of the chosen options by layer, or None where no price found a plan that fits.
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
        weights = weights / weights.sum()
    return None if best is None else best[1]


def _at_lowest_price(prices: list[Array], losses: list[Array], costs: list[Array], room: Array) -> list[int] | None:
    """The plan of the smallest multiplier whose costs fit, by bisection on its logarithm."""

    def choose(log_multiplier: float) -> list[int]:
        multiplier = np.exp(log_multiplier)
        return [int(np.argmin(loss + multiplier * price)) for loss, price in zip(losses, prices, strict=True)]

    low, high = -80.0, 80.0
    if bool((_total(costs, choose(high)) > room * (1 + 1e-12)).any()):
        cheapest = [int(price.argmin()) for price in prices]
        return cheapest if bool((_total(costs, cheapest) <= room * (1 + 1e-12)).all()) else None
    for _ in range(100):
        middle = (low + high) / 2
        if bool((_total(costs, choose(middle)) > room * (1 + 1e-12)).any()):
            low = middle
        else:
            high = middle
    return choose(high)


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
