"""Which inputs a layer can do without, from second moments alone.

A *unit* is a set of columns of a layer's weight: one channel's kernel taps, one head's width, one neuron. The layers
that read the same units are their *consumers*, and what a choice of units loses is the sum over all of them of

    ½ · positions · tr(A ΔW G ΔWᵀ),

the predicted rise of the network's loss, with G = E[x xᵀ] and A = E[g gᵀ] as in `gram`. Three ways to choose:

* the loss of removing each unit alone, its consumers refitted: optimal brain surgeon for groups of columns (Hassibi &
  Stork, Second order derivatives for network pruning, 1993; Frantar et al., Optimal brain compression, 2022,
  arxiv.org/abs/2208.11580; Kurtic et al., ZipLM, 2023, arxiv.org/abs/2302.04089);
* the same one unit after the other, each in the light of those that went before (greedy elimination);
* LASSO on one gate a unit (He et al., Channel pruning for accelerating very deep neural networks, 2017, section 3.1,
  arxiv.org/abs/1707.06168).

All functions are pure, work in float64 and never see a sample.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.curvature.solve import DAMPING, damp, root

# Of the mean diagonal: for roots of what is positive (semi)definite but for rounding, where DAMPING would bend losses.
_ROUNDING = 1e-14
# Gone columns as a share of a matrix at which it is cut down to what is left: copying it then pays for itself.
_GONE = 0.125
# From each penalty of a LASSO path to the next, and how far down it goes as a share of the first.
_PATH_STEP, _PATH_END = 0.85, 1e-7
_BISECTIONS = 24
_SWEEPS = 500


@dataclass(frozen=True)
class Consumer:
    """One layer that reads the units, flattened, with its moments.

    A convolution with groups is one consumer per group, in which units of other groups own no columns. Where a layer
    has a bias that will be corrected, all moments are those of x − E[x] (`Statistics.centred`).

    Attributes:
        weight: W, (outputs, d).
        gram: G = E[x xᵀ], (d, d).
        units: for every unit the indices of its columns, which no other unit has; (units, columns) if all have as many.
            A unit this layer does not read has none. Columns of no unit stay.
        gradients: A = E[g gᵀ], (outputs, outputs); None weighs all outputs by one.
        positions: output positions a sample, or any other weight of this consumer among the others.
        cross: C = E[t xᵀ], (outputs, d), with t what the layer should answer, where that is not W x: in a network whose
            earlier layers were changed, the original's outputs, W E[y xᵀ].
    """

    weight: Tensor
    gram: Tensor
    units: Sequence[Tensor] | Tensor
    gradients: Tensor | None = None
    positions: float = 1.0
    cross: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """What is predicted to be lost when one unit goes, for every unit.

    Attributes:
        refitted: (units,), if the consumers' other columns take over what they can.
        unrefitted: (units,), if they stay as they are.
    """

    refitted: Tensor
    unrefitted: Tensor


@dataclass(frozen=True)
class Elimination:
    """One run of removals, which answers for every width on its way.

    Attributes:
        units: how many there were.
        order: the units that went, first to last: (removed,).
        losses: predicted loss after 0, 1, 2, … removals: (removed + 1,), rising from 0.
    """

    units: int
    order: Tensor
    losses: Tensor

    def kept(self, count: int) -> Tensor:
        """The `count` units that are left when that many are, in rising order.

        Raises:
            ValueError: the run did not go that far.
        """
        return torch.from_numpy(np.setdiff1d(np.arange(self.units), self.order[: self._removed(count)].numpy()))

    def loss(self, count: int) -> float:
        """The predicted loss when `count` units are left.

        Raises:
            ValueError: the run did not go that far.
        """
        return float(self.losses[self._removed(count)])

    def _removed(self, count: int) -> int:
        fewest = self.units - len(self.order)
        if not fewest <= count <= self.units:
            raise ValueError(f"{count} units were asked for: this elimination answers for {fewest} to {self.units}")
        return self.units - count


def removal_losses(consumers: Sequence[Consumer], *, damping: float = DAMPING) -> Losses:
    """What each unit's removal alone loses, in closed form.

    With P = G⁻¹ and W_u, P_uu the unit's part, the best refit of all other columns leaves ½ tr(A W_u P_uu⁻¹ W_uᵀ), and
    none leaves ½ tr(A W_u G_uu W_uᵀ), G being damped in both. Of a consumer with a cross moment the first is the rise
    over the best weight of all columns, and the second the same without a further refit of that weight.

    Args:
        consumers: the layers that read the units.
        damping: of G, as a share of its mean diagonal; it is also the ridge of the refit, towards the weight.
    Raises:
        ValueError: the consumers do not fit each other or themselves; damping is not above 0.
    """
    units = _checked(consumers, damping)
    everything = torch.arange(units)
    refitted, unrefitted = torch.zeros(units).double(), torch.zeros(units).double()
    for consumer in consumers:
        if not _counts(consumer):
            continue
        state = _State(consumer, damping)
        refitted += state.losses(everything)
        unrefitted += state.unrefitted
    return Losses(refitted, unrefitted)


def greedy_elimination(
    consumers: Sequence[Consumer],
    *,
    left: int = 0,
    keep: Collection[int] = (),
    at_once: int = 1,
    damping: float = DAMPING,
) -> Elimination:
    """Remove the unit that is missed least, refit, and again, until `left` units are left.

    Each removal of k columns downdates G⁻¹ and the weight in O(d² k), d the columns still there, and is exact: the loss
    after n removals is that of the best weight without those n units.

    Args:
        consumers: the layers that read the units.
        left: units to leave.
        keep: units that stay whatever they are worth; with more of them than `left`, the run ends at them.
        at_once: units removed between two rankings of the rest. 1 is the true greedy order; more is faster, by less
            often looking up who is missed least, and its losses are as exact. It may put a unit and its double into
            the same round.
        damping: of G, as a share of its mean diagonal; it is also the ridge of the refit, towards the weight.
    Raises:
        ValueError: the consumers do not fit each other or themselves; damping is not above 0; `left`, `keep` or
            `at_once` is out of range.
    """
    units = _checked(consumers, damping)
    may_go = _may_go(units, keep)
    if not 0 <= left <= units:
        raise ValueError(f"left={left}: there are {units} units")
    if at_once < 1:
        raise ValueError(f"at_once={at_once}: at least one unit goes at a time")
    states = [_State(consumer, damping) for consumer in consumers if _counts(consumer)]
    remaining = min(units - left, len(may_go))
    order: list[Tensor] = []
    rises: list[Tensor] = []
    while remaining:
        losses = torch.zeros(len(may_go)).double()
        for state in states:
            losses += state.losses(may_go)
        ranked = losses.argsort(stable=True)
        count = min(at_once, remaining)
        going, may_go = may_go[ranked[:count]], may_go[ranked[count:].sort().values]
        rise = torch.zeros(count).double()
        for state in states:
            rise += state.remove(going)
        order.append(going)
        rises.append(rise)
        remaining -= count
    nothing = torch.zeros(1).double()
    return Elimination(
        units, torch.cat([torch.empty(0, dtype=torch.long), *order]), torch.cat([nothing, *rises]).cumsum(0)
    )


def lasso(
    consumers: Sequence[Consumer],
    counts: Sequence[int],
    *,
    keep: Collection[int] = (),
    tolerance: float = 1e-5,
) -> list[Tensor]:
    """The units that an L1 penalty on one gate a unit leaves open, for every count asked for.

    Minimises ½ E‖t − Σ_u β_u W_u x_u‖²_A + λ Σ_u |β_u|, summed over the consumers, by coordinate descent on the
    quadratic in β that the moments make of it. λ falls from where all gates are shut, each solution starting from the
    last, and is bisected where the number of open gates passes a count. Where one λ opens several gates at once, those
    that contribute most, |β_u| ‖W_u x_u‖, are taken. He et al. fix ‖W_u‖ = 1 first; left as trained, the choice does
    not depend on how a channel's scale is shared between the layers before and after it.

    Args:
        consumers: the layers that read the units.
        counts: how many units to keep, any number of times.
        keep: units that stay: their gates are not penalised, and they are counted.
        tolerance: where coordinate descent stops: the largest change of ‖β_u W_u x_u‖ as a share of what all open
            gates give.
    Returns:
        For every count the units kept, in rising order.
    Raises:
        ValueError: the consumers do not fit each other or themselves; `counts` or `keep` is out of range.
    """
    units = _checked(consumers)
    may_go = _may_go(units, keep)
    fewest = units - len(may_go)
    for count in counts:
        if not fewest <= count <= units:
            raise ValueError(f"counts holds {count}: there are {units} units, {fewest} of which must be kept")
    quadratic, linear = _gate_moments(consumers, units)
    gates = _Gates(quadratic.numpy(), linear.numpy(), may_go.numpy(), tolerance)
    found: dict[int, NDArray[np.int64]] = {}
    for count in sorted(set(counts)):
        found[count] = gates.open(count)
    return [torch.from_numpy(found[count]) for count in counts]


class _State:
    """One consumer while its units go: the weight refitted to those left, and the inverse of their Gram matrix.

    Attributes:
        scale: ½ · positions.
        rows: the weight's columns as rows, whitened by the gradients: (columns, outputs or fewer).
        inverse: of the damped Gram matrix of the columns that are left: (columns, columns).
        columns, real: where each unit's columns are, padded, and which of them are there: (units, most columns).
        gone: which columns went since the matrices were last cut down.
        unrefitted: what each unit's removal loses at the start, if nothing makes up for it: (units,), on the CPU.
    """

    def __init__(self, consumer: Consumer, damping: float) -> None:
        factor = root(consumer.gram, damping)
        weight = consumer.weight.detach().to(factor)
        if consumer.cross is not None:
            # To the best weight of all columns, from which losses of any choice among them are measured.
            missing = consumer.cross.detach().to(factor) - weight @ damp(consumer.gram, 0.0)
            weight = weight + torch.cholesky_solve(missing.T, factor).T
        self.scale = 0.5 * consumer.positions
        # Whitened on the outputs' side, rows are columns of the weight; only their inner products count from here on.
        self.rows = _whitened(weight, consumer.gradients)
        self.inverse = torch.cholesky_inverse(factor)
        self.columns, self.real = (x.to(factor.device) for x in _padded(consumer.units))
        self.gone = torch.zeros(len(factor), dtype=torch.bool, device=factor.device)
        products = [
            (factor[at] @ factor[at].T * (self.rows[at] @ self.rows[at].T)).sum()
            for at in (one[real] for one, real in zip(self.columns, self.real, strict=True))
        ]
        self.unrefitted = (self.scale * torch.stack(products)).cpu()

    def losses(self, units: Tensor) -> Tensor:
        """What each of these units' removal loses now: (len(units),), on the CPU."""
        units = units.to(self.columns.device)
        at, real = self.columns[units], self.real[units]
        if not bool(real.any()):
            return torch.zeros(len(units)).double()
        block = self.inverse[at[:, :, None], at[:, None, :]]
        # Padding is as large as the rest, or what the root adds against rounding would not be small beside that.
        padding = (block.diagonal(dim1=1, dim2=2) * real).amax(1)[:, None].expand(at.shape).diag_embed()
        block = torch.where(real[:, :, None] & real[:, None, :], block, padding)
        rows = self.rows[at] * real[:, :, None]
        rows = torch.linalg.solve_triangular(root(block, _ROUNDING), rows, upper=False)
        losses: Tensor = self.scale * rows.square().sum((1, 2))
        return losses.cpu()

    def remove(self, units: Tensor) -> Tensor:
        """Take these units out, in this order: what each adds to the loss, (len(units),), on the CPU."""
        units = units.to(self.columns.device)
        real = self.real[units]
        at = self.columns[units][real]
        added = self.rows.new_zeros(len(units))
        if not len(at):
            return added.cpu()
        panel = self.inverse[at]
        # Row by row the Cholesky factor takes one column out after the other, so each unit's share is read off at once.
        factor = root(panel[:, at], _ROUNDING)
        panel = torch.linalg.solve_triangular(factor, panel, upper=False)
        rows = torch.linalg.solve_triangular(factor, self.rows[at], upper=False)
        owner = torch.arange(len(units), device=at.device).repeat_interleave(real.sum(1))
        added.index_add_(0, owner, self.scale * rows.square().sum(1))
        self.rows.addmm_(panel.T, rows, alpha=-1)
        self.inverse.addmm_(panel.T, panel, alpha=-1)
        self.gone[at] = True
        self.real[units] = False
        if float(self.gone.double().mean()) >= _GONE:
            self._cut_down()
        return added.cpu()

    def _cut_down(self) -> None:
        """Drop the rows and columns of what is gone."""
        stay = (~self.gone).nonzero()[:, 0]
        places = (~self.gone).cumsum(0) - 1
        self.rows, self.inverse = self.rows[stay], self.inverse[stay][:, stay]
        self.columns = torch.where(self.real, places[self.columns], 0)
        self.gone = torch.zeros(len(stay), dtype=torch.bool, device=stay.device)


class _Gates:
    """A path of LASSO solutions: ½ βᵀ Q β − cᵀ β + λ Σ |β_u|, λ falling."""

    def __init__(
        self,
        quadratic: NDArray[np.float64],
        linear: NDArray[np.float64],
        penalised: NDArray[np.int64],
        tolerance: float,
    ) -> None:
        self.quadratic, self.linear = quadratic, linear
        self.norms = np.sqrt(np.maximum(quadratic.diagonal(), 0))
        self.penalised = np.zeros(len(linear), dtype=bool)
        self.penalised[penalised] = True
        self.change = tolerance * math.sqrt(max(float(quadratic.sum()), float(quadratic.trace())))
        self.beta = self._solve(np.zeros(len(linear)), math.inf)
        slope = np.abs(linear - quadratic @ self.beta)[self.penalised]
        self.first = self.penalty = float(slope.max(initial=0.0))

    def open(self, count: int) -> NDArray[np.int64]:
        """The units of `count` open gates, in rising order; counts must be asked for in rising order."""
        if count == len(self.linear):
            return np.arange(count)
        above, below, beta = self.penalty, self.penalty, self.beta
        while self._number(beta) < count and below > self.first * _PATH_END:
            self.beta, above = beta, below
            below *= _PATH_STEP
            beta = self._solve(beta, below)
        self.penalty = above
        for _ in range(_BISECTIONS):
            if self._number(beta) <= count:
                break
            middle = math.sqrt(above * below)
            trial = self._solve(self.beta, middle)
            if self._number(trial) >= count:
                beta, below = trial, middle
            else:
                self.beta, self.penalty, above = trial, middle, middle
        # What must stay first, then by what the gate lets through, then by what it would if it were open.
        ranked = np.lexsort((-self.norms, -np.abs(beta) * self.norms, self.penalised))
        return np.sort(ranked[:count])

    def _number(self, beta: NDArray[np.float64]) -> int:
        return int(((beta != 0) | ~self.penalised).sum())

    def _solve(self, beta: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
        """Coordinate descent on the open gates, then on those the result would open, until it opens none."""
        beta = beta.copy()
        active = np.flatnonzero((beta != 0) | ~self.penalised)
        while True:
            self._descend(beta, active, penalty)
            slope = np.abs(self.linear - self.quadratic[:, active] @ beta[active])
            slope[active] = 0
            wrong = np.flatnonzero(self.penalised & (slope > penalty + self.change * self.norms) & (self.norms > 0))
            if not len(wrong):
                return beta
            active = np.union1d(active, wrong)

    def _descend(self, beta: NDArray[np.float64], active: NDArray[np.int64], penalty: float) -> None:
        """Minimise over the active gates, one after the other, in place."""
        block = np.ascontiguousarray(self.quadratic[np.ix_(active, active)])
        curvatures, values = block.diagonal().tolist(), beta[active]
        slopes = self.linear[active] - block @ values
        penalties = np.where(self.penalised[active], penalty, 0.0).tolist()
        for _ in range(_SWEEPS):
            largest = 0.0
            for i, (curvature, shut) in enumerate(zip(curvatures, penalties, strict=True)):
                if curvature <= 0:
                    continue
                old = float(values[i])
                pull = float(slopes[i]) + curvature * old
                new = math.copysign(max(abs(pull) - shut, 0.0), pull) / curvature
                if new != old:
                    slopes -= block[i] * (new - old)
                    values[i] = new
                    largest = max(largest, abs(new - old) * math.sqrt(curvature))
            if largest <= self.change:
                break
        beta[active] = values


def _gate_moments(consumers: Sequence[Consumer], units: int) -> tuple[Tensor, Tensor]:
    """Q and c of E‖t − Σ β_u W_u x_u‖²_A = βᵀ Q β − 2 cᵀ β + …: (units, units) and (units,), on the CPU."""
    quadratic, linear = torch.zeros(units, units).double(), torch.zeros(units).double()
    for consumer in consumers:
        if not _counts(consumer):
            continue
        gram = damp(consumer.gram, 0.0)
        rows = _whitened(consumer.weight.detach().to(gram), consumer.gradients)
        columns, real = (x.to(gram.device) for x in _padded(consumer.units))
        owner = torch.full((len(gram),), units, device=gram.device)
        owner[columns[real]] = torch.arange(units, device=gram.device).repeat_interleave(real.sum(1))
        pairs = gram * (rows @ rows.T)
        by_unit = pairs.new_zeros(units + 1, len(gram)).index_add_(0, owner, pairs)
        square = pairs.new_zeros(units + 1, units + 1).index_add_(1, owner, by_unit)
        if consumer.cross is None:
            answers = square[:units, :units].sum(1)
        else:
            # What columns of no unit answer needs no gate, so it is taken off what the gates are to answer.
            weight, cross = consumer.weight.detach().to(gram), consumer.cross.detach().to(gram)
            weighed = cross if consumer.gradients is None else damp(consumer.gradients, 0.0).to(gram) @ cross
            by_column = (weighed * weight).sum(0)
            answers = by_column.new_zeros(units + 1).index_add_(0, owner, by_column)[:units] - square[:units, units]
        quadratic += consumer.positions * square[:units, :units].cpu()
        linear += consumer.positions * answers.cpu()
    return quadratic, linear


def _whitened(weight: Tensor, gradients: Tensor | None) -> Tensor:
    """Rows whose inner products are Wᵀ A W: (d, outputs) or, where that is less, (d, d)."""
    rows: Tensor = weight.T if gradients is None else weight.T @ root(gradients, _ROUNDING).to(weight)
    if rows.shape[1] > rows.shape[0]:
        rows = torch.linalg.qr(rows.T, mode="r").R.T
    return rows.clone(memory_format=torch.contiguous_format)


def _counts(consumer: Consumer) -> bool:
    """Whether the consumer can lose anything: data reaches it, and the loss sees it."""
    seen = consumer.gradients is None or bool(consumer.gradients.any())
    return seen and bool(consumer.gram.any())


def _padded(units: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Column indices as a matrix, and which of them are real: (units, most columns), twice."""
    if isinstance(units, Tensor):
        return units.long().clone(), torch.ones_like(units, dtype=torch.bool)
    widest = max(1, *(len(unit) for unit in units))
    columns = torch.zeros(len(units), widest, dtype=torch.long)
    real = torch.zeros(len(units), widest, dtype=torch.bool)
    for index, unit in enumerate(units):
        columns[index, : len(unit)], real[index, : len(unit)] = unit, True
    return columns, real


def _may_go(units: int, keep: Collection[int]) -> Tensor:
    """The units that need not be kept, in rising order."""
    outside = sorted(unit for unit in keep if not 0 <= unit < units)
    if outside:
        raise ValueError(f"keep holds {outside}: units are numbered 0 to {units - 1}")
    return torch.tensor([unit for unit in range(units) if unit not in set(keep)], dtype=torch.long)


def _checked(consumers: Sequence[Consumer], damping: float = DAMPING) -> int:
    """How many units there are.

    Raises:
        ValueError: there are none; the consumers do not fit each other or themselves; damping is not above 0.
    """
    if not damping > 0:
        raise ValueError(f"damping={damping}: it has to be above 0, or a direction without data has no inverse")
    if not consumers:
        raise ValueError("units without a consumer: nothing says what they are worth")
    units = len(consumers[0].units)
    if not units:
        raise ValueError("there are no units to choose from")
    for index, consumer in enumerate(consumers):
        outputs, width = consumer.weight.shape
        expected = {"gram": (width, width), "gradients": (outputs, outputs), "cross": (outputs, width)}
        for name, shape in expected.items():
            matrix: Tensor | None = getattr(consumer, name)
            if matrix is not None and matrix.shape != shape:
                raise ValueError(f"consumer {index}: {name} is {tuple(matrix.shape)}, not {shape}")
        if len(consumer.units) != units:
            raise ValueError(f"consumer {index} has {len(consumer.units)} units, consumer 0 has {units}")
        columns, real = _padded(consumer.units)
        used = columns[real]
        if len(used) and not 0 <= int(used.min()) <= int(used.max()) < width:
            raise ValueError(f"consumer {index}: its units name columns outside 0 to {width - 1}")
        if len(used) and int(used.bincount().max()) > 1:
            raise ValueError(f"consumer {index}: a column belongs to more than one unit, or to one unit twice")
    return units
