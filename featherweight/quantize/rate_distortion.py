"""Rate-distortion optimised quantization: uniform steps, rounded to what is cheapest to write and hurts least.

Uniform steps with entropy coding come within a quarter of a bit of what is possible at all (Gish & Pierce,
Asymptotically efficient quantizing, 1968), so it is the file that shrinks, whatever bits the numbers would have
uncoded. Every value is rounded to where ``E + λ · bits`` is least, its bits counted under a model of the coder
(Wiedemann et al., DeepCABAC, 2020, arxiv.org/abs/1907.11900), its error weighed by the curvature of the loss: rounding
that weighs all errors alike shrinks weights and does harm. One number sets the steps of all layers and λ with them: at
equal slopes of error against rate a layer's step is in inverse proportion to the root of its curvature (Shoham &
Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight import artifact
from featherweight.batch import sketch
from featherweight.constant import norms_behind
from featherweight.curvature.gram import Statistics
from featherweight.curvature.rounding import swept
from featherweight.curvature.sweeps import Matrix, conditional, matrix, steadiness, steady
from featherweight.edits import Constrain, Edit, Leave, remade
from featherweight.errors import BudgetError
from featherweight.forms import (
    Constraint,
    Grid,
    Gridded,
    Layer,
    Mask,
    Masked,
    constraints_on,
    is_layer,
    layer_at,
    parametrized,
)
from featherweight.forms.grid import WIDTHS
from featherweight.layers import layer_names, obstacles, unmatched, weighted_layers, without_values
from featherweight.mend import corrected_bias, fold_batch_norms
from featherweight.progress import track
from featherweight.search.budget import Budget
from featherweight.search.optimal import rounded_up
from featherweight.step import Stage, Step
from featherweight.study import Study
from featherweight.task import Task

# Steps as shares of the weights' size, from finer than anybody needs to coarser than anything survives.
FINEST, COARSEST = 2.0**-9, 16.0
# How near below a limit on bytes a result is near enough, and how many files are written on the way there.
NEAR, FILES = 0.985, 10
# Of the step that equal slopes would give a layer, so much at most, in units of its weights' size: a layer that the
# data says nothing of is still needed.
WIDEST = 4.0
# Of the trade of error for bits, with data: see `RateDistortion.strength`.
STRENGTH = 1 / 16
# The largest whole number of the widest grid.
MOST = (1 << (WIDTHS[-1] - 1)) - 1
# Rounds in which values are rounded under the model and the model learns from them.
ROUNDS = 3
# Norms, of which no curvature is known, and biases without data: their step moves a channel by so much of the size of
# all channels, as a share of the coarseness over the root of how many weights a channel has (at equal slopes a number
# that moves a channel alone has a step smaller by that); and by so much at most.
NORM_SHARE, WIDEST_NORM = 1 / 4, 2.0**-5
# Added to the curvature of outputs and of inputs, as shares of their means: what few samples say nothing of is not
# free.
OUTPUTS_DAMPING, INPUTS_DAMPING = 0.3, 0.1
FAR_APART = "its numbers lie too far apart for one step of 16 bits, and stay as they are"
_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class RateDistortion(Step):
    """Quantize weights, biases and norms to steps that make the file as small as it is asked to be.

    What masks hold at zero stays zero, and what becomes zero is held there from then on. Give a budget of bytes, of the
    drop of the score, or both, or the coarseness itself.

    Attributes:
        budget: ``bytes`` is the size of the whole file without its record, met as written by `Compressed.save`; as a
            share, of the original's bytes. ``drop`` is how far the score may fall; alone, it gives the smallest file
            found.
        coarseness: steps as a share of the weights' root mean square, in the geometric mean over all weights.
        ignore: patterns of layers to leave alone.
        data_aware: weigh errors by the curvature of the loss; None for wherever there is calibration data.
        feedback: let weights make up for each other's errors, column by column, as GPTQ does; needs data.
        strength: how much a bit weighs against the error it saves, as a multiple of what equal slopes give at high
            rates; 0 rounds to the nearest step. None is a sixteenth with data, best by measurement on pruned networks:
            errors that all point to zero add up; and 0 without, where nothing says which zeros hurt.
        fold: take the statistics of batch norms into their weights first, which leaves half of their numbers to write;
            answers in evaluation mode stay the same up to rounding. Leave it out for a model to be trained on.
        samples: how many calibration samples to look at.
        evaluations: of the score, in search of a drop.
    """

    budget: Budget | None = None
    coarseness: float | None = None
    ignore: tuple[str, ...] = ()
    data_aware: bool | None = None
    feedback: bool = True
    strength: float | None = None
    fold: bool = True
    samples: int = 512
    evaluations: int = 8

    stage: ClassVar[Stage] = Stage.VALUES

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        """What is wrong with the settings for this model and task."""
        found = super().problems(model, task)
        if found:
            return found
        if (self.budget is None) == (self.coarseness is None):
            both = "budget and coarseness both say" if self.budget is not None else "nothing says"
            found.append(f"{both} how coarse steps are to be: give one of budget=, coarseness=")
        if self.coarseness is not None and not FINEST <= self.coarseness <= COARSEST:
            found.append(f"coarseness is {self.coarseness:g}: it lies between {FINEST:g} and {COARSEST:g}")
        if self.budget is not None and (others := [metric for metric in self.budget.costs() if metric != "bytes"]):
            found.append(
                f"the budget limits {', '.join(others)}, which steps do not change: give bytes=, drop= or both"
            )
        if self.data_aware and not task.has_calibration:
            found.append("data_aware needs calibration data: give Task(calibration=...) or leave it out")
        if (self.strength or 0) < 0 or self.samples < 1 or self.evaluations < 1:
            found.append("strength must be at least 0, samples and evaluations at least 1")
        return found + unmatched(self.ignore, list(weighted_layers(model, True)))

    # The work -------------------------------------------------------------------------------------------------------

    def edits(self, study: Study) -> Iterator[Edit]:
        """Look once at what the data does; find the coarseness; quantize."""
        bench = _Bench(self, study)
        yield from (Leave(name, reason) for name, reason in bench.left.items())
        if not bench.layers:
            return
        if self.fold:
            bench.folded = fold_batch_norms(study.model)
        if bench.folded:
            study.notes.append(f"the statistics of {len(bench.folded)} batch norms were taken into their weights")
        coarseness = self.coarseness if self.coarseness is not None else self._found(bench)
        made = bench.quantized(coarseness)
        study.notes.append(f"coarseness {coarseness:.4g}: {bench.described(made)}")
        yield from made

    def _found(self, bench: _Bench) -> float:
        """The coarseness that meets the budget.

        Raises:
            BudgetError: none does.
        """
        budget = cast(Budget, self.budget)
        if not budget.costs():
            return self._at_drop(bench, cast(float, budget.drop))
        limit = budget.limits({"bytes": bench.study.start.metric("bytes")})["bytes"]
        coarseness = self._at_bytes(bench, limit)
        if budget.drop is not None:
            lost = bench.study.original_score - bench.score(coarseness)
            if lost > budget.drop:
                raise BudgetError(
                    f"{self.name}: at {limit:,.0f} bytes the score falls by {lost:.4g}, and drop is {budget.drop:g}: "
                    "give more bytes, a larger drop, or prune and fine-tune first"
                )
        return coarseness

    def _at_bytes(self, bench: _Bench, limit: float) -> float:
        """The finest coarseness whose file is no larger: bytes fall nearly linearly in its logarithm."""
        fine, coarse = math.log(FINEST), math.log(COARSEST)
        sizes: dict[float, int] = {}

        def size(at: float) -> int:
            return sizes.setdefault(at, bench.size(math.exp(at)))

        at = math.log(0.4)
        for _ in track(range(FILES), "meeting the bytes"):
            if size(at) > limit:
                fine = at
            else:
                coarse = at
                if size(at) >= NEAR * limit:
                    break
            above, below = [x for x in sizes if sizes[x] > limit], [x for x in sizes if sizes[x] <= limit]
            if above and below:
                one, other = max(above), min(below)
                share = (sizes[one] - (1 + NEAR) / 2 * limit) / max(1, sizes[one] - sizes[other])
                at = one + min(0.9, max(0.1, share)) * (other - one)
            elif above:
                if fine >= math.log(COARSEST):
                    break
                at = min(fine + 1.0, math.log(COARSEST))
            elif coarse <= math.log(FINEST):
                break
            else:
                at = max(coarse - 1.0, math.log(FINEST))
        met = [x for x, found in sizes.items() if found <= limit]
        if not met:
            least = min(sizes.values())
            raise BudgetError(
                f"{self.name}: a file of {limit:,.0f} bytes is too small: the smallest found has {least:,}, which is "
                f"bytes={rounded_up(least / bench.study.start.metric('bytes')):g} of the original's; prune first"
            )
        return math.exp(min(met))

    def _at_drop(self, bench: _Bench, drop: float) -> float:
        """The coarsest coarseness found whose score falls no further.

        Raises:
            BudgetError: the score falls further whatever was tried.
        """
        allowed = bench.study.original_score - drop
        passed, failed = math.log(FINEST), math.log(COARSEST)
        at, best = math.log(0.4), None
        for _ in track(range(self.evaluations), "meeting the drop"):
            if bench.score(math.exp(at)) >= allowed:
                passed = best = at
            else:
                failed = at
            # From the first guess by factors of two, then by halving what is left.
            if best is None:
                at = max((passed + at) / 2, at - math.log(2))
            else:
                at = (passed + failed) / 2 if failed < math.log(COARSEST) else passed + math.log(2)
        if best is None:
            raise BudgetError(
                f"{self.name}: in {self.evaluations} evaluations no steps were found at which the score falls by no "
                f"more than {drop:g}: give a larger drop, or more evaluations"
            )
        return math.exp(best)


@dataclass
class _Bench:
    """The step at work on one model: what it quantizes, and how much that matters."""

    step: RateDistortion
    study: Study
    left: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    matters: dict[str, Tensor] = field(default_factory=dict)
    settled: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    means: dict[str, Statistics] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)
    strength: float = 0.0

    def __post_init__(self) -> None:
        model, step, task = self.study.model, self.step, self.study.task
        called = [name for name, row in self.study.profile.layers.items() if row.calls]
        self.left.update(obstacles(model, called, step.ignore, inside=True))
        names = [name for name in layer_names(model, inside=True) if name not in self.left]
        self.left.update(self.study.unread(names))
        for name in names:
            layer = layer_at(model, name)
            if name in self.left or not is_layer(layer):
                continue
            if (reason := without_values(layer)) is not None:
                self.left[name] = reason
            else:
                self.layers[name] = layer
        aware = task.has_calibration if step.data_aware is None else step.data_aware
        self.strength = step.strength if step.strength is not None else STRENGTH if aware else 0.0
        seen: Mapping[str, Statistics] = {}
        if aware and self.layers:
            originals = {name: layer_at(self.study.original, name) for name in self.layers}
            seen = self.study.statistics(cast(Mapping[str, Layer], originals), step.samples, gradients=True)
            free = {name for name, norm in self.norms() if norm.weight.numel() > 1}
            behind = norms_behind(self.study.original, self.layers, task.inputs())
            self.behind = {name: norm for name, norm in behind.items() if norm in free}
        for name, layer in self.layers.items():
            gone = None
            if masks := [c.mask for c in constraints_on(layer) if isinstance(c, Masked)]:
                gone = ~torch.stack(masks).all(0)
            moments = seen.get(name)
            if moments is not None and (name in self.behind or _free_bias(layer) is not None):
                # A constant makes good what becomes of the means: weights need not.
                self.means[name] = moments = moments.centred()
            found = matrix(layer.weight, getattr(layer, "groups", 1), moments, gone)
            self.matrices[name] = found
            self.matters[name] = curvature(found)
            self.settled[name] = settled(found, self.matters[name]) if step.feedback else self.matters[name]

    # Choosing steps -------------------------------------------------------------------------------------------------

    def steps(self, coarseness: float) -> tuple[dict[str, float], float]:
        """Every layer's step, and the root of what a step's square weighs in the loss, which all layers share."""
        wanted, sizes, counts = {}, {}, {}
        for name, of in self.matrices.items():
            kept = of.weight != 0
            sizes[name] = float(of.weight[kept].square().mean().sqrt())
            wanted[name] = float(self.settled[name][kept].mean().clamp_min(1e-300).rsqrt())
            counts[name] = int(kept.sum())
        total = sum(counts.values())
        mean = sum(counts[name] * math.log(wanted[name] / sizes[name]) for name in wanted) / total
        unit = coarseness / math.exp(mean)
        return {name: min(unit * wanted[name], WIDEST * sizes[name]) for name in wanted}, unit

    def share(self, coarseness: float) -> float:
        """How far a step of a norm may move its channels, as a share of their size."""
        kept = sum(int((of.weight != 0).sum()) for of in self.matrices.values())
        channels = sum(norm.weight.numel() for _, norm in self.norms())
        return min(NORM_SHARE * coarseness / math.sqrt(max(1.0, kept / max(1, channels))), WIDEST_NORM)

    def norms(self) -> list[tuple[str, Any]]:
        """The norms with weights that nothing confines."""
        named = [(name, module) for name, module in self.study.model.named_modules() if isinstance(module, _NORMS)]
        return [(n, m) for n, m in named if not hasattr(m, "parametrizations") and m.weight is not None]

    def quantized(self, coarseness: float) -> list[Constrain | Leave]:
        """The edits that confine everything to its steps, with the values."""
        steps, unit = self.steps(coarseness)
        share = self.share(coarseness)
        made: list[Constrain | Leave] = []
        lacking: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            of, step = self.matrices[name], steps[name]
            numbers = rounded(of, self.matters[name], step, self.strength * unit**2, self.step.feedback)
            step = refitted(of, numbers, self.matters[name], step)
            if name in self.behind and name in self.means:
                lacking[self.behind[name]] = self.lacking(name, numbers, step)
            made += self._confined(name, layer, numbers, step, of, unit, share)
        for name, norm in self.norms():
            made += _norm(name, norm, self.folded.get(name), share, lacking.get(name))
        return made

    def lacking(self, name: str, numbers: Tensor, step: float) -> Tensor:
        """What a layer's rounding takes from the means of its outputs, (outputs,), float64."""
        weight = self.layers[name].weight.detach()
        replaced = (numbers * step).reshape(weight.shape)
        nothing = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        return corrected_bias(weight, nothing, replaced, self.means[name])

    def _confined(
        self, name: str, layer: Layer, numbers: Tensor, step: float, of: Matrix, unit: float, share: float
    ) -> Iterator[Constrain]:
        """A layer's edits: its mask tightened, its weight and its bias on their steps."""
        built = copy.deepcopy(layer)
        numbers = numbers.reshape(layer.weight.shape)
        if any(type(constraint) is Masked for constraint in constraints_on(built)[-1:]):
            tight = Mask(int((numbers != 0).sum()))
            cast(Masked, tight.put_on(built)).mask.copy_(numbers != 0)
            yield self._made(name, tight, built)
        yield self._made(name, _on_grid(built, "weight", numbers, step), built)
        bias = _free_bias(built)
        if bias is not None and name in self.means:
            bias = bias + self.lacking(name, numbers, step)
        if bias is not None and bool(bias.any()):
            matters = of.positions * float(outputs_matter(of).mean()) if of.gradients is not None else 0.0
            size = float(bias.square().mean().sqrt())
            step = min(unit / math.sqrt(matters), size / 4) if matters else size * share
            yield Constrain(name, _on_grid(built, "bias", (bias / step).round(), step), _state(built))

    def _made(self, name: str, constraint: Constraint, built: Layer) -> Constrain:
        """The edit that makes a layer what it was built to be."""
        return cast(Constrain, remade(self.study.model, name, constraint, _state(built)))

    # Trials ---------------------------------------------------------------------------------------------------------

    def trial(self, coarseness: float) -> tuple[nn.Module, list[Constrain | Leave]]:
        """A copy of the model at a coarseness, and its edits."""
        model, made = copy.deepcopy(self.study.model), self.quantized(coarseness)
        for edit in made:
            edit.apply(model)
        return model, made

    def score(self, coarseness: float) -> float:
        """The score at a coarseness."""
        return self.study.scorer(self.trial(coarseness)[0])

    def size(self, coarseness: float) -> int:
        """The bytes of the file at a coarseness, without a record."""
        model, made = self.trial(coarseness)
        return artifact.measured(model, [*self.study.made, *made], None, sketch(self.study.task.inputs()))

    def described(self, made: Sequence[Edit]) -> str:
        """What came of it, in a few words."""
        grids = [edit.constraint for edit in made if isinstance(edit, Constrain) and isinstance(edit.constraint, Grid)]
        return f"{len(grids)} tensors on grids of {min(g.bits for g in grids)} to {max(g.bits for g in grids)} bits"


def outputs_matter(of: Matrix) -> Tensor:
    """The curvature of each output, (groups, outputs, 1): the diagonal of A = E[g gᵀ]."""
    assert of.gradients is not None
    return of.gradients.diagonal(dim1=1, dim2=2)[..., None].clamp_min(0)


def curvature(of: Matrix) -> Tensor:
    """What the square of each weight's error weighs in the loss, (groups, outputs, d): diagonal of A ⊗ G · positions.

    Without gradients all outputs weigh the same; without data, every weight what its layer's size makes of it.
    """
    if of.gram is None:
        return torch.full_like(of.weight, 1 / max(float(of.weight.square().mean()), 1e-300))
    inputs = of.gram.diagonal(dim1=1, dim2=2)[:, None, :].clamp_min(0)
    inputs = inputs + INPUTS_DAMPING * inputs.mean()  # an input that the data never had may come yet
    if of.gradients is None:
        return (inputs / max(float((of.weight @ of.gram * of.weight).sum()), 1e-300)).expand_as(of.weight)
    outputs = outputs_matter(of)
    return of.positions * (outputs + OUTPUTS_DAMPING * outputs.mean()) * inputs


def settled(of: Matrix, matters: Tensor) -> Tensor:
    """What is left of the curvature where later columns make up for an error as well as they can; the shape of matters.

    Of an input's variance that is what those behind it do not tell (their conditional variance); damped, for of few
    samples they tell all.
    """
    if of.gram is None:
        return matters
    inputs = of.gram.diagonal(dim1=1, dim2=2)[:, None, :].clamp_min(0)
    damping = INPUTS_DAMPING + steadiness(of)
    return matters * conditional(steady(of, damping)) / (inputs + damping * inputs.mean()).clamp_min(1e-300)


def rounded(of: Matrix, matters: Tensor, step: float, weight_of_bits: float, feedback: bool) -> Tensor:
    """Whole numbers q, so that q · step is where ½ · error + λ · bits is least; (groups, outputs, d).

    Args:
        of: the layer.
        matters: what the square of each weight's error weighs in the loss.
        step: of the grid.
        weight_of_bits: what a step's square weighs in the loss, which λ is in proportion to; 0 rounds to the nearest.
        feedback: let later columns make up for the error of those before them.
    """
    # At high rates a bit more divides the error, a twelfth of the step's square, by four.
    slope = math.log(2) / 12 * weight_of_bits
    whole = of.weight / step
    numbers = whole.round()
    if slope:
        for _ in range(ROUNDS):
            numbers = cheapest(whole, matters * step**2, slope, Price.learned(numbers))
            if of.held is not None:
                numbers = numbers.masked_fill(of.held, 0)
    if not feedback or of.gram is None:
        return numbers
    price = Price.learned(numbers)
    # In a sweep a column's error counts for what the columns behind it cannot make up for.
    gram = steady(of)
    alone = conditional(gram)
    inputs = of.gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    outputs = matters.mean(-1, keepdim=True) / inputs.clamp_min(1e-300)

    def nearest(values: Tensor, columns: Tensor) -> Tensor:
        whole = values / step
        if not slope:
            return whole.round() * step
        return cheapest(whole, (alone * outputs)[..., columns] * step**2, slope, price.at(columns)) * step

    return (swept(of.weight, gram, nearest, of.held, order=True) / step).round()


@dataclass(frozen=True)
class Price:
    """Bits of whole numbers under a model of the coder: rows and columns have their own shares of zeros.

    Attributes:
        zero: of a 0, (groups, outputs, d).
        other: of not being one, of the same shape.
        sizes: of each size from 1 up, its sign included, (sizes,); the last for all above.
    """

    zero: Tensor
    other: Tensor
    sizes: Tensor

    @staticmethod
    def learned(numbers: Tensor) -> Price:
        """The model of numbers that were rounded already, (groups, outputs, d); what masks hold at zero included."""
        filled = (numbers != 0).double()
        there = torch.ones_like(filled)
        share = float((filled.sum() + 0.5) / (there.sum() + 1))

        def logit(dim: int) -> Tensor:
            p = (filled.sum(dim, keepdim=True) + 2 * share) / (there.sum(dim, keepdim=True) + 2)
            return p.clamp(1e-5, 1 - 1e-5).logit()

        mixed = logit(-1) + logit(-2) - torch.tensor(share, dtype=torch.float64).clamp(1e-5, 1 - 1e-5).logit()
        counts = torch.bincount(numbers.abs().long().clamp(max=4096).flatten(), minlength=2)[1:].double()
        # Neighbouring sizes lend each other their counts, so that none that was not met is out of reach.
        padded = torch.nn.functional.pad(counts, (1, 2))
        smooth = counts_smoothed(padded)
        sizes = 1 - (smooth / smooth.sum()).log2()
        softplus = torch.nn.functional.softplus
        return Price(softplus(mixed) / math.log(2), softplus(-mixed) / math.log(2), sizes)

    def at(self, columns: Tensor) -> Price:
        """The same of some columns."""
        return Price(self.zero[..., columns], self.other[..., columns], self.sizes)

    def bits(self, numbers: Tensor) -> Tensor:
        """Of each number, of the shape of `zero`."""
        size = numbers.abs().long().clamp(1, len(self.sizes)) - 1
        return torch.where(numbers == 0, self.zero, self.other + self.sizes[size])


def counts_smoothed(counts: Tensor) -> Tensor:
    """Counts, each with a part of its neighbours' and a little of nothing."""
    kernel = torch.tensor([0.1, 0.8, 0.1], dtype=counts.dtype)
    return torch.nn.functional.conv1d(counts[None, None], kernel[None, None], padding=1)[0, 0, 1:] + 0.05


def cheapest(whole: Tensor, matters: Tensor, slope: float, price: Price) -> Tensor:
    """Of the whole numbers around each value and 0, the one of the least ½ · matters · error² + slope · bits."""
    best, least = torch.zeros_like(whole), 0.5 * matters * whole.square() + slope * price.zero
    for candidate in (whole.floor(), whole.ceil()):
        cost = 0.5 * matters * (whole - candidate).square() + slope * price.bits(candidate)
        best, least = torch.where(cost < least, candidate, best), torch.minimum(cost, least)
    return best


def refitted(of: Matrix, numbers: Tensor, matters: Tensor, step: float) -> float:
    """The step at which the numbers are nearest to the weight, by least squares: rounding towards zero shrinks."""
    seen = numbers @ of.gram if of.gram is not None else numbers
    rows = matters.mean(-1, keepdim=True)
    down = float((rows * numbers * seen).sum())
    up = float((rows * of.weight * seen).sum())
    return up / down if down > 0 and 0.5 < up / down / step < 2 else step


def _on_grid(layer: nn.Module, tensor: str, numbers: Tensor, step: float) -> Grid:
    """Put the numbers on a grid of this step, in place; returns the grid."""
    low, high = int(-numbers.min()), int(numbers.max())
    bits = next((bits for bits in WIDTHS if low <= 1 << (bits - 1) and high < 1 << (bits - 1)), None)
    if bits is None:  # wider than any grid: the step grows until the largest number fits
        factor = max(low, high) / MOST
        numbers, step, bits = (numbers / factor).round().clamp(-MOST, MOST), step * factor, WIDTHS[-1]
    grid = Grid(bits, axis=None, tensor=tensor)
    made = cast(Gridded, grid.put_on(layer))
    with torch.no_grad():
        made.scale.fill_(step)
        value = made.decoded(numbers.to(made.scale.device).long() - grid.low)
        held = cast(Any, layer).parametrizations[tensor]
        held.original.copy_(value)
    return grid


def _free_bias(layer: Layer) -> Tensor | None:
    """A layer's bias in float64, where it has one that nothing confines."""
    return None if layer.bias is None or "bias" in parametrized(layer) else layer.bias.detach().double()


def _norm(
    name: str, norm: nn.Module, inputs: tuple[Tensor, Tensor] | None, share: float, lacking: Tensor | None
) -> Iterator[Constrain | Leave]:
    """A norm's weight and bias on steps that move its channels little.

    Args:
        name: of the norm.
        norm: as it is, left alone.
        inputs: their mean and standard deviation, each (channels,); None where they are 0 and 1, having been made so.
        share: how far a step may move a channel, as a share of the root mean square of how far channels move.
        lacking: what is to be added to what reaches the norm, (channels,).
    """
    built = copy.deepcopy(norm)
    weight = cast(Tensor, built.weight).detach().double()
    if weight.numel() < 2:
        yield Leave(name, "it has one number, which is written as it is")
        return
    mean, spread = inputs if inputs is not None else (torch.zeros_like(weight), torch.ones_like(weight))
    moved = (weight * spread).abs()
    size = float(moved.square().mean().sqrt())
    if not size:
        yield Leave(name, "all of its weights are zero")
        return
    # The weight of a channel that hardly moves is as large as its statistics are small, and nothing comes of it.
    step = share * size / float(spread.square().mean().sqrt())
    numbers = torch.where(moved < size * share / 4, 0.0, weight / step).round()
    if float(numbers.abs().max()) > MOST:
        yield Leave(name, FAR_APART)
        return
    yield Constrain(name, _on_grid(built, "weight", numbers, step), _state(built))
    if getattr(built, "bias", None) is None:
        return
    # What the weight's rounding does to the mean of the outputs, the bias makes good, and what the layer's did.
    new = cast(Tensor, built.weight).detach().double()
    bias = cast(Tensor, built.bias).detach().double() + mean * (weight - new)
    if lacking is not None:
        of_batch = cast(_BatchNorm, built)
        bias = bias + new * lacking / (cast(Tensor, of_batch.running_var).double() + of_batch.eps).sqrt()
    if not bool(bias.any()):
        return
    step = share * size
    if float((bias / step).abs().max()) > MOST:
        yield Leave(name, f"its bias: {FAR_APART}")
        return
    yield Constrain(name, _on_grid(built, "bias", (bias / step).round(), step), _state(built))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
