"""When pruning happens: how much of it at which step of a training, and what drives units to zero before they go.

A schedule is a pure function of the step. *Share* is the share of units (or weights, or whatever is counted) that has
gone by then, from 0 to 1. Penalties are terms to add to the loss.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import torch
from torch import Tensor


def one_shot(step: int, *, final: float, begin: int = 0) -> float:
    """Nothing before `begin`, everything from then on.

    Args:
        step: of the training, from 0.
        final: share gone in the end.
        begin: the step at which it goes.
    Returns:
        The share gone by this step, as from the schedules below.
    Raises:
        ValueError: a share is outside [0, 1], or steps are out of order; so in the schedules below.
    """
    _check_shares(final=final)
    return final if step >= begin else 0.0


def linear(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0, every: int = 1) -> float:
    """As much in every step.

    Args:
        step: of the training, from 0.
        final: share gone from step `end` on.
        end: the step that sees the last of it go.
        begin: the step up to which it is `initial`.
        initial: share gone to begin with.
        every: steps between two changes.
    """
    return initial + (final - initial) * _progress(step, final, end, begin, initial, every)


def cubic(step: int, *, final: float, end: int, begin: int = 0, initial: float = 0.0, every: int = 1) -> float:
    """Much early, when there is much to spare, and less and less: final + (initial − final) (1 − progress)³.

    Zhu & Gupta, To prune, or not to prune (automated gradual pruning), 2017, section 3, equation 1,
    arxiv.org/abs/1710.01878.

    Args:
        step: of the training, from 0.
        final: share gone from step `end` on.
        end: the step that sees the last of it go.
        begin: the step up to which it is `initial`.
        initial: share gone to begin with.
        every: steps between two changes.
    """
    return final + (initial - final) * (1 - _progress(step, final, end, begin, initial, every)) ** 3


def geometric(step: int, *, each: float, final: float = 1.0) -> float:
    """In every step the same share of what is left: 1 − (1 − each)^step, up to `final`.

    Frankle & Carbin, The lottery ticket hypothesis, 2019, arxiv.org/abs/1803.03635 (iterative pruning).

    Args:
        step: round, from 0.
        each: share of what is left that goes in a round.
        final: share gone in the end.
    """
    _check_shares(each=each, final=final)
    return min(final, 1 - (1 - each) ** max(0, step))


def rounds(shares: Iterable[float], *, baseline: float, max_drop: float) -> Generator[float, float, float]:
    """Prune, train, look: further in every round until the score has dropped too far.

    Yields the share that should be gone in this round, and is sent the score of the model pruned so and trained on.
    Returns the last share whose score was good enough, 0 if none was::

        asked = rounds([0.2, 0.4, 0.6], baseline=0.93, max_drop=0.01)
        share = next(asked)
        while True:  # ... until StopIteration, whose value is the share to go back to
            share = asked.send(score_of(pruned_and_trained(share)))

    Args:
        shares: one a round, rising; any schedule above gives them.
        baseline: the score before the first round, higher is better.
        max_drop: how far below `baseline` a score may be; 0 allows no drop.
    Raises:
        ValueError: shares do not rise or leave [0, 1]; a score is NaN.
    """
    good = 0.0
    for share in shares:
        _check_shares(share=share)
        if share <= good:
            raise ValueError(f"shares have to rise from round to round: {share} comes after {good}")
        score = yield share
        if score != score:
            raise ValueError(f"the score after pruning {share:.4g} is NaN")
        if baseline - score > max_drop:
            return good
        good = share
    return good


def growing_factor(step: int, *, increment: float, every: int, ceiling: float, begin: int = 0) -> float:
    """A penalty that grows by `increment` every so many steps, up to a ceiling.

    Wang et al., Neural pruning via growing regularization (GReg), 2021, section 3.2,
    arxiv.org/abs/2012.09243. GReg-1 puts it on the units that are to go and prunes at the ceiling; GReg-2 puts it on
    all, and sees by how they shrink which should.

    Args:
        step: of the training, from 0.
        increment: δλ.
        every: steps between two increments.
        ceiling: τ, the largest penalty.
        begin: the step of the first increment.
    Returns:
        The factor for `weight_penalty` at this step.
    Raises:
        ValueError: `increment`, `every` or `ceiling` is not above 0.
    """
    for name, value in {"increment": increment, "every": every, "ceiling": ceiling}.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: it has to be above 0")
    return min(ceiling, increment * ((step - begin) // every + 1)) if step >= begin else 0.0


def weight_penalty(members: Sequence[Tensor], factors: Tensor | float) -> Tensor:
    """½ Σ_u λ_u ‖w_u‖², the norm over all of a unit's slices: weight decay, unit by unit.

    Its gradient is λ_u w_u, as `growing_factor`'s paper adds it.

    Args:
        members: weights of a group's members, each (units, ...).
        factors: λ, (units,), or one for all.
    Returns:
        A scalar that gradients flow through, as from the penalties below.
    Raises:
        ValueError: there is no member, or members or factors have different numbers of units.
    """
    rows = _joint(members)
    squares = rows.square().sum(1)
    if isinstance(factors, Tensor) and factors.dim() and factors.shape != squares.shape:
        raise ValueError(f"factors are {tuple(factors.shape)}, not {tuple(squares.shape)}: one a unit")
    return (factors * squares).sum() / 2


def group_lasso(members: Sequence[Tensor]) -> Tensor:
    """Σ_u ‖w_u‖, the norm over all of a unit's slices: drives whole units to zero.

    Wen et al., Learning structured sparsity in deep neural networks, 2016, section 3.1, arxiv.org/abs/1608.03665. A
    unit that is at zero has gradient zero.

    Args:
        members: weights of a group's members, each (units, ...).
    Raises:
        ValueError: there is no member, or members have different numbers of units.
    """
    norms: Tensor = torch.linalg.vector_norm(_joint(members), dim=1)
    return norms.sum()


def slimming(scales: Sequence[Tensor]) -> Tensor:
    """Σ |γ| over all batch norms.

    Liu et al., Learning efficient convolutional networks through network slimming, 2017, section 3, equation 1,
    arxiv.org/abs/1708.06519.

    Args:
        scales: weights γ of batch norms, of any lengths.
    Raises:
        ValueError: there is no scale.
    """
    if not scales:
        raise ValueError("there is no batch-norm scale to put a penalty on")
    return torch.stack([scale.abs().sum() for scale in scales]).sum()


def _joint(members: Sequence[Tensor]) -> Tensor:
    """All slices of each unit in one row: (units, everything)."""
    if not members:
        raise ValueError("a group without members has nothing to put a penalty on")
    counts = {len(member) for member in members}
    if len(counts) > 1:
        raise ValueError(f"members of one group have different numbers of units: {sorted(counts)}")
    return torch.cat([member.reshape(len(member), -1) for member in members], dim=1)


def _progress(step: int, final: float, end: int, begin: int, initial: float, every: int) -> float:
    """How far from `begin` to `end`, from 0 to 1, in whole multiples of `every`; at `end` it is 1 whatever `every`."""
    _check_shares(initial=initial, final=final)
    if end < begin:
        raise ValueError(f"end={end} comes before begin={begin}")
    if every < 1:
        raise ValueError(f"every={every}: at least one step lies between two changes")
    if step >= end:
        return 1.0
    return (step - begin) // every * every / (end - begin) if step > begin else 0.0


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: a share lies between 0 and 1")
