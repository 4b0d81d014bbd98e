"""The largest network that is measured to keep to a limit of latency.

Latency does not add up over layers, so no table foretells it. A plan is made for a share of the multiply-accumulates,
which do add up, its network is timed, and the share is searched: a bracket of one that keeps to the limit and one that
does not, narrowed where a line through what was measured meets the limit (regula falsi, held away from the ends).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from featherweight.cost.latency import Latency
from featherweight.errors import BudgetError
from featherweight.search.budget import Budget
from featherweight.search.optimal import rounded_up
from featherweight.study import Study

# Networks that one search times, at most: each has to be made and exported.
PROBES = 8
# How much of the limit is enough, and how much is aimed at: medians of one network differ by a percent or two.
ENOUGH, AIM = 0.97, 0.985
# Brackets narrower than this share of the first are not looked into; no probe is nearer to an end than the second.
NARROW, INSIDE = 0.01, 0.1
# Above this, the upper quartile as a multiple of the median says that something else ran beside.
SCATTERED = 1.25


@dataclass(frozen=True)
class Timed:
    """One network that was timed, in turn with the original.

    Attributes:
        share: of the original's multiply-accumulates, which its plan was made for.
        taken: how long it takes.
        original: how long the original takes.
    """

    share: float
    taken: Latency
    original: Latency

    def used(self, budget: Budget) -> float:
        """The median as a share of the limit: at most 1 where it is kept."""
        return self.taken.median_ms / budget.milliseconds(self.original.median_ms)


@dataclass
class Stopwatch:
    """Times the networks that one step tries, each once.

    Attributes:
        beside: times a network in turn with the original, and gives both latencies.
        known: what was timed, by whatever tells networks of other shapes apart.
    """

    beside: Callable[[nn.Module], tuple[Latency, Latency]]
    known: dict[Hashable, tuple[Latency, Latency]] = field(default_factory=dict)

    @staticmethod
    def of(study: Study, budget: Budget) -> Stopwatch:
        """The one of this study, in the budget's runtime, beside the network that the recipe was given.

        Raises:
            ExportError: that network cannot be run there.
        """
        watch: Stopwatch | None = study.worked_out.get("stopwatch")
        if watch is None:
            assert study.beside is not None, "a study for a limit of latency has something to time networks with"
            assert budget.runtime is not None, "a budget with a latency names the runtime"
            given = copy.deepcopy(study.original if study.given is None else study.given)
            watch = Stopwatch(study.beside(given, study.task.inputs(), budget.runtime))
            study.worked_out["stopwatch"] = watch
        return watch

    def time(self, share: float, key: Hashable, make: Callable[[], nn.Module]) -> Timed:
        """A network's latency, measured where none of that key was before."""
        if key not in self.known:
            self.known[key] = _as_the_first(self.beside(make()))
        return Timed(share, *self.known[key])


def largest(
    budget: Budget, probe: Callable[[float], Timed], least: float, most: float, guess: float | None = None
) -> tuple[Timed, ...]:
    """Time networks at shares of a cost until one keeps to the latency and uses most of it.

    Args:
        budget: with a latency.
        probe: makes the network for a share, and times it.
        least: the lowest share that there is a network for.
        most: the highest share that is wanted.
        guess: a share to try after the highest; by default where the limit would be if time were proportional.
    Returns:
        All that was timed, at most `PROBES` networks, in order, but that which is to be kept comes last: of those that
        were measured to keep to the limit the one of the largest share.

    Raises:
        BudgetError: none that was timed keeps to the limit, the cheapest among them; the message names the nearest.
    """
    tried = [probe(most)]
    above, kept = tried[0], tried[0] if tried[0].used(budget) <= 1 else None
    while (
        len(tried) < PROBES
        and above.share > least
        and (kept is None or (kept.used(budget) < ENOUGH and above.share - kept.share > NARROW * (most - least)))
    ):
        share = least
        if kept is not None or len(tried) < PROBES - 1:  # the last is for the cheapest, where none has kept to it yet
            share = _next(budget, tried, kept, above, least)
            share = guess if guess is not None and len(tried) == 1 and least < guess < most else share
        tried.append(probe(share))
        if tried[-1].used(budget) <= 1:
            kept = tried[-1]
        else:
            above = tried[-1]
    if kept is None:
        raise missed(budget, tried)
    return (*(timed for timed in tried if timed is not kept), kept)


def _as_the_first(measured: tuple[Latency, Latency]) -> tuple[Latency, Latency]:
    """What the first process of a group measured, in every one: they must choose alike."""
    world = torch.distributed
    if not (world.is_available() and world.is_initialized()):
        return measured
    theirs = [measured] * world.get_world_size()
    world.all_gather_object(theirs, measured)
    return theirs[0]


def _next(budget: Budget, tried: list[Timed], kept: Timed | None, above: Timed, least: float) -> float:
    """Where the line through two measurements meets the limit, inside the bracket; the middle where it rises nowhere.

    Args:
        kept: the lower end of the bracket, or None where the cheapest network is, which was not measured.
        above: the upper end, which took too long.
    """
    low = least if kept is None else kept.share
    if kept is None and len(tried) == 1:
        aim = above.share * AIM / above.used(budget)  # in proportion
    else:
        other = tried[-2] if kept is None else kept
        rise = above.used(budget) - other.used(budget)
        run = above.share - other.share
        aim = above.share + (AIM - above.used(budget)) * run / rise if rise * run > 0 else (low + above.share) / 2
    inside = INSIDE * (above.share - low)
    if kept is None and aim < low + inside:
        return low
    return min(max(aim, low + inside), above.share - inside)


def missed(budget: Budget, tried: Iterable[Timed]) -> BudgetError:
    """What is raised where nothing that was timed keeps to the latency; it names the nearest that can be met."""
    nearest = min(tried, key=lambda timed: timed.used(budget))
    taken, original = nearest.taken.median_ms, nearest.original.median_ms
    return BudgetError(
        f"latency cannot go below {rounded_up(taken / original):g} of the original's ({rounded_up(taken):g} ms of "
        f"{original:.3g} ms in {budget.runtime}, measured), and {budget.latency} was asked for: ask for no less, or "
        "leave out what keeps layers from getting cheaper"
    )


def told(budget: Budget, timed: tuple[Timed, ...]) -> str:
    """What was measured, in a sentence for the ledger."""
    *others, kept = timed
    threads = torch.get_num_threads()
    said = (
        f"latency in {budget.runtime} on {threads} thread{'s' if threads > 1 else ''}, medians and quartiles: "
        f"{_shown(kept.taken)} where {kept.share:.3f} of the MACs were planned for, "
        f"in turn with {_shown(kept.original)} of the original; "
        f"at most {budget.milliseconds(kept.original.median_ms):.4g} ms were asked for"
    )
    if max(each.upper_ms / each.median_ms for t in timed for each in (t.taken, t.original)) > SCATTERED:
        said += "; times were scattered, as where other work runs beside: measure again on a quiet machine"
    rest = [f"{t.taken.median_ms / t.original.median_ms:.3f} at {t.share:.3f}" for t in others]
    return f"{said}. Of the original's latency took, by the share planned for: {', '.join(rest)}" if rest else said


def _shown(latency: Latency) -> str:
    return f"{latency.median_ms:.4g} ms ({latency.lower_ms:.4g} to {latency.upper_ms:.4g})"
