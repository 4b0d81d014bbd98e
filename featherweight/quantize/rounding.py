"""What every technique has in common that rounds weights to fewer bits: bits as the one choice, scales, biases."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from featherweight.constant import turn
from featherweight.cost.cost import Cost
from featherweight.cost.count import LayerCall, price
from featherweight.curvature.gram import Statistics
from featherweight.curvature.rounding import errors, rescaled
from featherweight.curvature.sweeps import Matrix, loss, matrix, steady
from featherweight.edits import Edit
from featherweight.errors import did_you_mean
from featherweight.forms import Binary, Constraint, Float, Form, Grid, Layer, Ternary, constraints_on
from featherweight.forms.floats import TYPES
from featherweight.forms.grid import WIDTHS, least_error, min_max, percentile, short
from featherweight.forms.mask import Masked
from featherweight.layers import PerLayer, for_layer, layer_names, matches, settled
from featherweight.layerwise import Layerwise
from featherweight.mend import corrected_bias
from featherweight.search.options import Option
from featherweight.step import Stage
from featherweight.study import Study
from featherweight.task import Task

# Of the mean diagonal, towards the weight as it is, where it is fitted to changed inputs.
RIDGE = 1e-2
# Scales tried for every output, as shares of those at which values move least. A row of few values has few to make up
# for an error, and much hangs on its scale; many values even it out, and of many bits there is little to gain.
FEW_VALUES, MANY_BITS = 64, 5
TRIED_FOR_FEW = (1.0, *(step / 20 for step in range(10, 25) if step != 20))
TRIED_FOR_MANY = (1.0, 0.8, 0.9, 1.1)


@dataclass(frozen=True)
class Lattice:
    """What a layer's values may be, place by place.

    Attributes:
        scale: (groups, outputs, d), float64.
        zero_point: of the same shape.
        low, high: the least and the greatest whole number.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def nearest(self, x: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The nearest values that those columns may have."""
        scale, shift = self.scale[..., columns], self.zero_point[..., columns]
        return ((x / scale).round_().add_(shift).clamp_(self.low, self.high) - shift) * scale


@dataclass(frozen=True)
class TwoValues(Lattice):
    """Values with a whole number of 1 or −1."""

    def nearest(self, x: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        scale = self.scale[..., columns]
        return torch.where(x >= 0, scale, -scale)


@dataclass(frozen=True)
class Rounding(Layerwise):
    """Weights of fewer bits, layer by layer.

    Attributes:
        bits: of every weight: 2 to 8 or 16 on a grid with a scale; 1 for two values; ``"ternary"`` for three; or a
            type: ``"fp16"``, ``"bf16"``, ``"e4m3"``, ``"e5m2"``; instead of a budget; per layer where it is a mapping.
            Layers that it does not name stay in floating point, and ``"*"`` names all that are left.
        offer: the bits among which a budget chooses.
        symmetric: whether grids have no zero point; per layer where it is a mapping.
        granularity: what has a scale of its own, ``"channel"`` (every output) or ``"tensor"``; per layer where it is a
            mapping.
        group: values of an output that share a scale, such as 64; 0 for all; per layer where it is a mapping. It is for
            grids whose outputs have scales of their own.
        ranges: how far a grid reaches: ``"output"`` (least error of the layer's output once its values are rounded; as
            ``"mse"`` without data, for a grid that several outputs share, for groups, and to choose bits by),
            ``"mse"`` (least error of the values, weighed by what the inputs are), ``"min-max"`` (all values) or
            ``"percentile"`` (99.9 % of them); per layer where it is a mapping.
    """

    bits: PerLayer[int | str] | None = None
    offer: tuple[int | str, ...] = (8, 6, 5, 4, 3, 2)
    symmetric: PerLayer[bool] = True
    granularity: PerLayer[Literal["channel", "tensor"]] = "channel"
    group: PerLayer[int] = 0
    ranges: PerLayer[Literal["output", "mse", "min-max", "percentile"]] = "output"

    stage: ClassVar[Stage] = Stage.VALUES
    inside_forms: ClassVar[bool] = True
    metric: ClassVar[str] = "bytes"

    @abstractmethod
    def rounded(self, of: Matrix, lattice: Lattice) -> Tensor:
        """The values that the technique rounds to, given a Gram matrix: (groups, outputs, d)."""

    def at(self, name: str) -> Self:
        ranges: Any = for_layer(self.ranges, name, "output")
        return replace(super().at(name), ranges=ranges)

    def drafted(self, of: Matrix, lattice: Lattice) -> Tensor:
        """Values as good as those, but for a little, and found sooner: what scales are judged by."""
        return self.rounded(of, lattice)

    def weighing(self, of: Matrix) -> Tensor | None:
        """The Gram matrix that errors are weighed by, damped, (groups, d, d); None without data."""
        return None if of.gram is None else steady(of)

    @property
    def corrects_bias(self) -> bool:
        """Whether biases take up what rounding does to the means of the outputs, where data tells."""
        return True

    # Settings -------------------------------------------------------------------------------------------------------

    def ways(self) -> dict[str, Any]:
        return {"budget": self.budget, "bits": self.bits, **{k: v for k, v in super().ways().items() if k != "budget"}}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        given = self.bits.values() if isinstance(self.bits, Mapping) else [self.bits]
        for name, values in (("bits", given), ("offer", self.offer if isinstance(self.offer, tuple) else ())):
            for value in values:
                words = (*TYPES, "ternary")
                if isinstance(value, str) and value not in words:
                    hint = f"{did_you_mean(value, words)}; there are {', '.join(words)}"
                    found.append(f"{name} has {value!r}, which is no type{hint}")
                elif isinstance(value, int) and value not in (1, *WIDTHS):
                    found.append(f"{name} has {value}: it is 1 to 8 or 16")
        for value in self.group.values() if isinstance(self.group, Mapping) else [self.group]:
            if isinstance(value, int) and value < 0:
                found.append(f"group is {value}: it must be at least 1, or 0 for all values of an output")
        return found or self._without_say(model)

    def _without_say(self, model: nn.Module) -> list[str]:
        """A sentence for `group` and `symmetric` where a layer's weights have neither groups nor zero points."""
        found: dict[str, str] = {}
        for name in layer_names(model, inside=True) if self.plan is None else ():
            bits = self.offer if self.ways()["budget"] is not None else (for_layer(self.bits, name, None),)
            forms = [self.form(name, wanted) for wanted in bits if wanted is not None]
            if matches(name, self.ignore) or not forms:
                continue
            grids, group = any(isinstance(form, Grid) for form in forms), for_layer(self.group, name, 0)
            stated, others = f"with weights of {forms[0]}", "give 2 to 8 or 16 bits, or leave it out"
            if group and not grids:
                found.setdefault(
                    "group", f"group is {group} for {name!r}, and has no say {stated}: {others}, or no group"
                )
            elif group and for_layer(self.granularity, name, "channel") == "tensor":
                both = "groups are of the values of an output: give granularity='channel', or no group"
                found.setdefault("group", f"group is {group} for {name!r}, whose granularity is 'tensor': {both}")
            if not grids and not for_layer(self.symmetric, name, True):
                affine = f"symmetric is False for {name!r}, and has no say {stated}, which have no zero point"
                found.setdefault("symmetric", f"{affine}: {others}")
        return list(found.values())

    def form(self, name: str, bits: int | str) -> Constraint:
        """The constraint for a layer of that name."""
        axis = None if for_layer(self.granularity, name, "channel") == "tensor" else 0
        if bits == 1:
            return Binary(axis)
        if bits == "ternary":
            return Ternary(axis)
        if isinstance(bits, str):
            return Float(bits, axis)
        group = for_layer(self.group, name, 0) if axis == 0 else 0
        return Grid(bits, for_layer(self.symmetric, name, True), axis=axis, group=group)

    # The work -------------------------------------------------------------------------------------------------------

    def edits(self, study: Study) -> Iterator[Edit]:
        """Turn what batch norms would turn, should they be folded into what is rounded; then layer by layer."""
        turned = turn(study.model, self._bench(study).layers, study.task.inputs())
        yield from super().edits(study.again() if turned else study)

    # What layerwise steps say ---------------------------------------------------------------------------------------

    def unfit(self, layer: Layer) -> str | None:
        if _masks(layer) and self.bits == 1:
            return "a mask holds some of its values at zero, and two values leave none"
        return settled(layer)

    @property
    def chooses(self) -> bool:
        """Whether a budget is to choose among the bits on offer."""
        return self.budget is not None and self.plan is None

    def priced(self, name: str, layer: Layer, calls: Sequence[LayerCall]) -> list[Option]:
        forms: list[Form]
        if self.plan is not None:
            planned = self.plan.layers.get(name)
            forms = [planned] if isinstance(planned, Grid | Float | Binary | Ternary) else []
        elif self.chooses:
            forms = [self.form(name, bits) for bits in self.offer]
            if _masks(layer):
                forms = [form for form in forms if not isinstance(form, Binary)]
        else:
            asked = None if self.bits is None else for_layer(self.bits, name, None)
            forms = [] if asked is None else [self.form(name, asked)]
        priced = [Option(name, form, price(form.build(layer, "meta"), calls), 0.0) for form in dict.fromkeys(forms)]
        return sorted(priced, key=lambda option: option.cost.metric(self.metric))

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        of = self.known(layer, seen)
        blind = replace(of, gram=None, gradients=None) if self.data_aware is False else of
        # Values make up for each other on the inputs that were seen; on others, where it was chance, they do not.
        unseen = of if of.gram is None else replace(of, gram=steady(of))
        return [loss(unseen, self.fit(blind, option.form, layer.weight.shape)[0]) for option in options]

    def values(self, layer: Layer, form: Form, seen: Statistics | None) -> Mapping[str, Tensor]:
        """The layer's state with rounded values, and the bias that goes with them."""
        assert isinstance(form, Grid | Float | Binary | Ternary)
        of = self.known(layer, seen)
        values, scale, zero_point = self.fit(of, form, layer.weight.shape)
        values = values.reshape(layer.weight.shape)
        trained = bool(self.epochs or self.epochs_per_layer)
        if trained and not isinstance(form, Float):
            layout = form if isinstance(form, Grid) else Grid(2, axis=form.axis)
            wanted, size = of.weight.reshape(values.shape), layout.spread(scale, values.shape)
            values = latent(wanted, values, size, isinstance(form, Binary))
        built = cast(Layer, form.build(layer))
        made: Any = constraints_on(built)[-1]
        with torch.no_grad():
            built.get_parameter("parametrizations.weight.original").copy_(values)
            made.scale.copy_(scale)
            if zero_point is not None:
                made.zero_point.copy_(zero_point)
            if not trained:  # scales are rounded too
                built.get_parameter("parametrizations.weight.original").copy_(built.weight)
            if built.bias is not None and layer.bias is not None and seen is not None and self.corrects_bias:
                built.bias.copy_(corrected_bias(layer.weight, layer.bias, built.weight, seen))
        return built.state_dict()

    def decided(self, name: str, options: Sequence[Option], whole: Cost) -> Option | None:
        bits = for_layer(self.bits, name, None) if self.bits is not None else None
        if bits is None:
            return None
        return next(o for o in options if o.form == self.form(name, bits))

    # The rounding ---------------------------------------------------------------------------------------------------

    def known(self, layer: Layer, seen: Statistics | None) -> Matrix:
        """The layer as matrices; a bias that is corrected takes care of the means; a mask's zeros are held."""
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        fitted = seen if seen is None or layer.bias is None or not self.corrects_bias else seen.centred()
        masks = _masks(layer)
        held = ~torch.stack(masks).all(0) if masks else None
        return matrix(layer.weight, groups, fitted, held, RIDGE)

    def fit(self, of: Matrix, form: Form | None, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rounded values, (groups, outputs, d) in float64, with the scales and zero points of their form.

        Args:
            of: the layer.
            form: a grid or a floating-point type.
            shape: of the layer's weight.
        """
        if isinstance(form, Float):
            made = form.parametrization(of.weight.reshape(shape).float())
            return made(of.weight.reshape(shape).float()).double().reshape(of.weight.shape), made.scale, None
        if isinstance(form, Binary | Ternary):
            found, scale = self.few(of, form, shape)
            return found, scale, None
        assert isinstance(form, Grid)
        gram = self.weighing(of)
        scale, zero_point = scales(of, form, shape, cast(str, self.ranges))  # of one layer by now: `at`
        scale, shift = short(scale, form), laid_out(zero_point, form, shape, of)
        rows_apart = form.axis == 0 and not form.group
        if gram is not None and rows_apart and self.ranges == "output":
            scale = self.best_scale(of, form, shape, scale, shift, gram)
        lattice = Lattice(laid_out(scale, form, shape, of), shift, form.low, form.high)
        plain = lattice.nearest(of.weight)
        if gram is None:
            return plain, scale, zero_point
        found = self.rounded(of, lattice)
        # Rows are independent of each other: each takes what is better for it.
        better = errors(of.weight, found, gram) <= errors(of.weight, plain, gram)
        found = torch.where(better[..., None], found, plain)
        if rows_apart and self.ranges in ("output", "mse"):
            fitted = short(scale * rescaled(of.weight, found, gram).flatten().float(), form)
            found, scale = found * laid_out(fitted.double() / scale, form, shape, of), fitted
        return found, scale, zero_point

    def best_scale(
        self, of: Matrix, form: Grid, shape: torch.Size, scale: Tensor, shift: Tensor, gram: Tensor
    ) -> Tensor:
        """For every output the scale at which its error is least once its values are rounded, of some around these."""
        few = of.weight.shape[-1] <= FEW_VALUES
        tried = TRIED_FOR_FEW if few else TRIED_FOR_MANY if form.bits < MANY_BITS else ()
        best, least = scale, torch.full(of.weight.shape[:2], torch.inf, device=scale.device, dtype=torch.float64)
        for share in tried:
            candidate = short(scale * share, form)
            lattice = Lattice(laid_out(candidate, form, shape, of), shift, form.low, form.high)
            found = self.drafted(of, lattice)
            error = errors(of.weight, found * rescaled(of.weight, found, gram), gram)
            best = torch.where((error < least).flatten(), candidate, best)
            least = torch.minimum(error, least)
        return best

    def few(self, of: Matrix, form: Binary | Ternary, shape: torch.Size, rounds: int = 5) -> tuple[Tensor, Tensor]:
        """Two or three values: scales by least squares under the Gram matrix and values by the technique, in turn.

        Args:
            of: the layer.
            form: two values or three.
            shape: of the layer's weight.
            rounds: of both, at most; without data one is enough for two values.
        Returns:
            Values, (groups, outputs, d), and the scales of the form.
        """
        target, layout = of.weight.reshape(shape), Grid(2, axis=form.axis)
        if isinstance(form, Binary):
            scale = form.parametrization(target.float()).scale.detach()
        else:
            # The third level of a grid of 2 bits is its fourth left out: ranges are looked for as for a grid.
            scale, _ = three_values(layout.rows(target.float()))
        kind = TwoValues if isinstance(form, Binary) else Lattice
        gram = self.weighing(of)
        best: tuple[float, Tensor, Tensor] | None = None
        for _ in range(rounds):
            each = laid_out(scale, layout, shape, of)
            lattice = kind(each, torch.zeros_like(each), -1, 1)
            found = lattice.nearest(of.weight) if gram is None else self.rounded(of, lattice)
            # Least squares of one factor for all that a scale stands for.
            seen = found if gram is None else found @ gram
            above = layout.rows((seen * of.weight).reshape(shape)).sum(-1)
            below = layout.rows((seen * found).reshape(shape)).sum(-1)
            factor = torch.where((above > 0) & (below > 0), above / below.clamp_min(1e-300), 1)
            scale = (scale.double() * factor).clamp(min=torch.finfo(torch.float32).tiny).float()
            found = found * laid_out(factor, layout, shape, of)
            moved = of.weight - found
            left = float((moved * (moved if gram is None else moved @ gram)).sum())
            if best is not None and left >= best[0] * (1 - 1e-6):
                break
            best = left, found, scale
        assert best is not None
        return best[1], best[2]


def scales(of: Matrix, form: Grid, shape: torch.Size, ranges: str) -> tuple[Tensor, Tensor]:
    """The scales and zero points of a layer's grid.

    Args:
        of: the layer.
        form: the grid.
        shape: of its weight.
        ranges: ``"output"`` or ``"mse"``, which are the same here, ``"min-max"`` or ``"percentile"``.
    """
    target = of.weight.float().reshape(shape)
    if ranges == "percentile":
        return percentile(form.rows(target, torch.nan), form)
    rows = form.rows(target)
    if ranges == "min-max":
        return min_max(rows, form)
    if of.gram is None:
        return least_error(rows, form)
    inputs = of.gram.diagonal(dim1=1, dim2=2).float()
    # Inputs that the data hardly excites count a little all the same.
    inputs = inputs + 1e-4 * inputs.mean(-1, keepdim=True).clamp_min(1e-30)
    return least_error(rows, form, form.rows(inputs[:, None].expand(of.weight.shape).reshape(shape)))


def three_values(rows: Tensor, steps: int = 40) -> tuple[Tensor, Tensor]:
    """The scales at which rows of values move least when each becomes −scale, 0 or scale; and how far they move.

    Args:
        rows: (..., values).
        steps: how many thresholds to try; every threshold's best scale is the mean of the magnitudes above it.
    """
    size = rows.abs()
    most = size.amax(-1, keepdim=True)
    least, scale = torch.full_like(most[..., 0], torch.inf), torch.ones_like(most[..., 0])
    for step in range(steps):
        above = size > most * step / steps
        mean = (size * above).sum(-1) / above.sum(-1).clamp(min=1)
        # Of the threshold that goes with this scale, which is half of it.
        moved = (size - mean[..., None] * (size > mean[..., None] / 2)).square().sum(-1)
        better = (moved < least) & (mean > 0)
        least, scale = torch.where(better, moved, least), torch.where(better, mean, scale)
    return scale, least


def laid_out(each: Tensor, form: Grid, shape: torch.Size, of: Matrix) -> Tensor:
    """Scales or zero points place by place, in the layout of the layer's matrices."""
    return form.spread(each, shape).expand(shape).reshape(of.weight.shape).double()


def latent(wanted: Tensor, rounded: Tensor, scale: Tensor, binary: bool) -> Tensor:
    """Values near those wanted that round to the rounded ones: where training begins.

    All of one size, as rounded values are, a step that turns one sign would be as large as one that turns all.

    Args:
        wanted: any values.
        rounded: values of a grid, of the same shape.
        scale: of the grid, which broadcasts.
        binary: whether the grid has two values.
    """
    if binary:
        return wanted.abs().clamp(min=1e-8) * rounded.sign()
    return rounded + (wanted - rounded).clamp(-0.45 * scale, 0.45 * scale)


def _masks(layer: nn.Module) -> list[Tensor]:
    return [c.mask for c in constraints_on(layer) if isinstance(c, Masked)]
