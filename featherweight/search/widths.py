"""How much of every group of slices to keep, where a layer's cost is a product of two choices.

A channel that goes takes a row of the layer that makes it and a column of every layer that reads it, so what it saves
depends on how wide the others still are. Minimising predicted loss under a budget is then no knapsack of independent
items; here one group after the other is given its best width under a price on cost, the others held, until none
changes, and the price is bisected. What is left of the budget is spent where it buys most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from featherweight.errors import BudgetError

Numbers = npt.NDArray[np.float64]

_SWEEPS = 30
_BISECTIONS = 40


@dataclass(frozen=True)
class Curve:
    """What every width of one group loses.

    Attributes:
        widths: the numbers of units that may be kept, rising; the last is all of them.
        losses: the predicted loss of each.
    """

    widths: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Length:
    """The length of one dimension: what stays whatever is chosen, and what every unit of a group adds."""

    fixed: float = 1.0
    each: Mapping[str, float] = field(default_factory=dict)

    def at(self, widths: Mapping[str, int]) -> float:
        """The length when this much is kept of every group."""
        return self.fixed + sum(share * widths[group] for group, share in self.each.items())


@dataclass(frozen=True)
class Term:
    """A part of a cost: a coefficient times the lengths of some dimensions."""

    coefficient: float
    lengths: tuple[Length, ...]

    def at(self, widths: Mapping[str, int]) -> float:
        """What it comes to when this much is kept of every group."""
        return self.coefficient * float(np.prod([length.at(widths) for length in self.lengths]))


@dataclass(frozen=True)
class Bill:
    """A cost that depends on widths: a constant and terms. Its limit is in the same unit."""

    constant: float
    terms: tuple[Term, ...]
    limit: float

    def at(self, widths: Mapping[str, int]) -> float:
        """The cost at these widths."""
        return self.constant + sum(term.at(widths) for term in self.terms)


def least_loss(curves: Mapping[str, Curve], bills: Mapping[str, Bill]) -> dict[str, int]:
    """Widths of little predicted loss under all bills' limits.

    Args:
        curves: of every group that the bills name.
        bills: the costs to keep within their limits, by metric.
    Raises:
        BudgetError: at the least widths a bill is still above its limit; the message says where it ends.
    """
    search = _Search(curves, bills)
    search.check()
    full = {name: curve.widths[-1] for name, curve in curves.items()}
    if search.within(full):
        return full
    best = {name: curve.widths[0] for name, curve in curves.items()}
    low, high, start = 0.0, 1.0, full
    while not search.within(search.settled(high, full)) and high < 1e30:
        low, high = high, high * 100
    if low == 0.0:
        low = high * 1e-30
    for _ in range(_BISECTIONS):
        price = float(np.sqrt(low * high))
        found = search.settled(price, start)
        if search.within(found):
            high, best = price, found
        else:
            low, start = price, found
        if high / low < 1.001:
            break
    return search.filled(best)


def alike(
    curves: Mapping[str, Curve], bills: Mapping[str, Bill], shape: Mapping[str, float] | None = None
) -> dict[str, int]:
    """The same share of every group, as large as the limits allow; then single groups a unit wider, as far as they do.

    Args:
        curves: of every group that the bills name.
        bills: the costs to keep within their limits, by metric.
        shape: by group, the number of units to take shares of; of every group all of its units by default.
    Raises:
        BudgetError: as of `least_loss`.
    """
    search = _Search(curves, bills)
    search.check()
    whole = shape or {name: float(curve.widths[-1]) for name, curve in curves.items()}

    def kept(share: float) -> dict[str, int]:
        return {name: nearest(curve.widths, share * whole[name]) for name, curve in curves.items()}

    low, high = 0.0, max(curve.widths[-1] / whole[name] for name, curve in curves.items())
    if search.within(kept(high)):
        return kept(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if search.within(kept(middle)) else (low, middle)
    return search.filled(search.filled(kept(low), kept(high)))


def between(curves: Mapping[str, Curve], bills: Mapping[str, Bill]) -> dict[str, int]:
    """Halfway between `least_loss` and `alike`: widths in proportion to the geometric mean of theirs.

    Args, raises: as `least_loss`.
    """
    one, other = least_loss(curves, bills), alike(curves, bills)
    return alike(curves, bills, {name: float(np.sqrt(one[name] * other[name])) for name in curves})


def ranked(curves: Mapping[str, Curve], bills: Mapping[str, Bill]) -> dict[str, int]:
    """All units of all groups in one ranking by what each of them loses: those stay that lose more than a threshold.

    Args, raises: as `least_loss`.
    """
    return ranked_within(curves, bills, dict.fromkeys(curves, ""))


def ranked_within(curves: Mapping[str, Curve], bills: Mapping[str, Bill], classes: Mapping[str, str]) -> dict[str, int]:
    """The same share of every class of groups, in it by one ranking of all its units.

    Fang et al., Isomorphic pruning for vision models, 2024, arxiv.org/abs/2407.04616.

    Args:
        curves: of every group that the bills name.
        bills: the costs to keep within their limits, by metric.
        classes: of every group. With all in one class this is `ranked`.
    Raises:
        BudgetError: as of `least_loss`.
    """
    search = _Search(curves, bills)
    search.check()
    members: dict[str, list[str]] = {}
    for name in curves:
        members.setdefault(classes[name], []).append(name)

    def above(names: Sequence[str], threshold: float) -> dict[str, int]:
        found = {}
        for name in names:
            total = search.losses[name] + threshold * search.widths[name]
            found[name] = curves[name].widths[len(total) - 1 - int(np.argmin(total[::-1]))]
        return found

    def kept(share: float) -> dict[str, int]:
        found: dict[str, int] = {}
        for names in members.values():
            wanted = share * sum(curves[name].widths[-1] for name in names)
            most = max(float(search.losses[name].max()) for name in names)
            low, high = 1e-12 * most + 1e-30, 10 * most + 1e-30  # above all that any unit can be worth
            for _ in range(_BISECTIONS):
                middle = float(np.sqrt(low * high))
                low, high = (low, middle) if sum(above(names, middle).values()) <= wanted else (middle, high)
            found.update(above(names, high))
        return found

    full = {name: curve.widths[-1] for name, curve in curves.items()}
    if search.within(full):
        return full
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS // 2):
        middle = (low + high) / 2
        low, high = (middle, high) if search.within(kept(middle)) else (low, middle)
    best = kept(low)
    return search.filled(best if search.within(best) else {name: curve.widths[0] for name, curve in curves.items()})


def filled(
    curves: Mapping[str, Curve],
    bills: Mapping[str, Bill],
    widths: Mapping[str, int],
    fits: Callable[[dict[str, int]], bool],
) -> dict[str, int]:
    """Wider, one group at a time, where a unit of cost buys most, for as long as another judge of costs allows.

    Args:
        curves: of every group that the bills name.
        bills: the costs, by metric, to weigh groups by; their limits are not looked at.
        widths: where to begin.
        fits: whether widths may be had; what is wider than what may not be had may not either.
    """
    search, found, over = _Search(curves, bills), dict(widths), set[str]()
    while True:
        for step in search.wider(found):
            (name,) = (name for name in step if step[name] != found[name])
            if name in over:
                continue
            if fits(step):
                found = step
                break
            over.add(name)
        else:
            return found


def nearest(widths: Sequence[int], wanted: float) -> int:
    """The allowed width nearest to the one wanted."""
    return min(widths, key=lambda width: (abs(width - wanted), width))


class _Search:
    """Costs as arrays, so that all widths of one group are looked at together."""

    def __init__(self, curves: Mapping[str, Curve], bills: Mapping[str, Bill]) -> None:
        self.curves, self.bills = curves, bills
        self.widths = {name: np.asarray(curve.widths, dtype=np.float64) for name, curve in curves.items()}
        self.losses = {name: np.asarray(curve.losses, dtype=np.float64) for name, curve in curves.items()}
        self.meets: dict[str, list[tuple[float, Term]]] = {name: [] for name in curves}
        for bill in bills.values():
            for term in bill.terms:
                for name in {group for length in term.lengths for group in length.each}:
                    self.meets[name].append((1.0 / bill.limit, term))

    def check(self) -> None:
        """Raises:
        BudgetError: at the least widths a bill is still above its limit; the message says where it ends.
        """
        least, full = ({name: curve.widths[end] for name, curve in self.curves.items()} for end in (0, -1))
        for metric, bill in self.bills.items():
            if bill.at(least) > bill.limit:
                raise BudgetError(
                    f"{metric} cannot come to {bill.limit / bill.at(full):.4g} of what it is: "
                    f"at the least widths it comes to {bill.at(least) / bill.at(full):.4g}"
                )

    def within(self, widths: Mapping[str, int]) -> bool:
        """Whether all limits are kept."""
        return all(bill.at(widths) <= bill.limit for bill in self.bills.values())

    def costs(self, name: str, others: Mapping[str, int]) -> Numbers:
        """What the terms that a group has a part in come to at each of its widths, as shares of the limits."""
        total = np.zeros_like(self.widths[name])
        for weight, term in self.meets[name]:
            product = np.full_like(total, weight * term.coefficient)
            for length in term.lengths:
                own = length.each.get(name, 0.0)
                rest = length.fixed + sum(s * others[g] for g, s in length.each.items() if g != name)
                product *= rest + own * self.widths[name]
            total += product
        return total

    def settled(self, price: float, start: Mapping[str, int]) -> dict[str, int]:
        """Every group at its best width given the others', under a price on cost."""
        widths = dict(start)
        for _ in range(_SWEEPS):
            changed = False
            for name, curve in self.curves.items():
                total = self.losses[name] + price * self.costs(name, widths)
                chosen = curve.widths[len(total) - 1 - int(np.argmin(total[::-1]))]  # of equals the widest
                changed |= chosen != widths[name]
                widths[name] = chosen
            if not changed:
                break
        return widths

    def wider(self, widths: Mapping[str, int]) -> list[dict[str, int]]:
        """The widths with one group a step wider, those first where a unit of cost buys most."""
        found = []
        for name, curve in self.curves.items():
            at = curve.widths.index(widths[name])
            if at + 1 < len(curve.widths):
                costs = self.costs(name, widths)
                gain = float(self.losses[name][at] - self.losses[name][at + 1])
                worth = gain / max(float(costs[at + 1] - costs[at]), 1e-12)
                found.append((worth, {**widths, name: curve.widths[at + 1]}))
        return [step for _, step in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def filled(self, widths: Mapping[str, int], most: Mapping[str, int] | None = None) -> dict[str, int]:
        """Wider, one group at a time, for as long as the limits allow, where a unit of cost buys most.

        Args:
            widths: where to begin.
            most: by group, how wide it may become; all of its units by default.
        """
        found = dict(widths)
        while True:
            steps = (s for s in self.wider(found) if most is None or all(s[name] <= most[name] for name in most))
            step = next((step for step in steps if self.within(step)), None)
            if step is None:
                return found
            found = step
