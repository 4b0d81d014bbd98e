"""Values on a uniform grid: whole numbers of a few bits times a scale.

Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, 2018,
arxiv.org/abs/1712.05877. The gradient of the scale is that of Esser et al., Learned step size quantization, 2020,
arxiv.org/abs/1902.08153.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import EditError
from featherweight.forms.constraint import Constrained, Constraint, Stored

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class Grid(Constraint):
    """Values are ``scale · (q − zero point)``, q a whole number of so many bits.

    Zero is always on the grid, so what a mask beneath holds at zero stays zero.

    Attributes:
        bits: of each whole number: 2 to 8, or 16.
        symmetric: whether the zero point is 0.
        signed: whether q runs from ``−2^(bits − 1)``, and not from 0.
        axis: of the tensor; every index along it has a scale of its own. None: one scale for the whole tensor.
        group: values that share a scale, in the order in which they lie at one index of the axis; 0 for all of them.
    """

    bits: int
    symmetric: bool = True
    signed: bool = True
    axis: int | None = 0
    group: int = 0

    @property
    def low(self) -> int:
        """The least whole number."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The greatest whole number."""
        return self.low + (1 << self.bits) - 1

    @property
    def type_of_zero_points(self) -> torch.dtype:
        """The smallest that holds every whole number of the grid."""
        if self.bits > 8:
            return torch.int16 if self.signed else torch.int32
        return torch.int8 if self.signed else torch.uint8

    def parametrization(self, tensor: Tensor) -> Gridded:
        return Gridded(tensor, self)

    def blank(self, like: Tensor) -> Gridded:
        return Gridded(like, self, fitted=False)

    def __str__(self) -> str:
        where = "" if self.axis == 0 else " a tensor" if self.axis is None else f" along axis {self.axis}"
        where += f" in groups of {self.group}" if self.group else ""
        kind = "" if self.symmetric else ", affine"
        return f"{self.bits} bits{where}{kind}{'' if self.signed else ', unsigned'}"

    def rows(self, tensor: Tensor, fill: float = 0.0) -> Tensor:
        """The values that share a scale side by side: (*shape of the scales, values), a short last group filled up."""
        if self.axis is None:
            return tensor.flatten()
        flat = tensor.movedim(self.axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
        if not self.group:
            return flat
        short = -flat.shape[1] % self.group
        return F.pad(flat, (0, short), value=fill).reshape(len(flat), -1, self.group)

    def spread(self, each: Tensor, shape: torch.Size) -> Tensor:
        """Scales or zero points as a tensor that broadcasts against one of this shape."""
        if self.axis is None:
            return each
        others = [size for axis, size in enumerate(shape) if axis != self.axis % len(shape)]
        if self.group:
            each = each.repeat_interleave(self.group, 1)[:, : math.prod(others)].reshape(-1, *others)
        else:
            each = each.reshape(-1, *(1 for _ in others))
        return each.movedim(0, self.axis)

    def reason_against(self, shape: torch.Size) -> str | None:
        """Why a tensor of this shape cannot have such a grid; None where it can."""
        if self.bits not in WIDTHS:
            return f"a grid has 2 to 8 bits or 16, not {self.bits}"
        if self.axis is not None and not -len(shape) <= self.axis < len(shape):
            return f"a tensor of shape {tuple(shape)} has no axis {self.axis}"
        if self.group < 0 or (self.group and self.axis is None):
            return "groups need an axis" if self.group > 0 else f"a group cannot hold {self.group} values"
        return None


class Gridded(Constrained):
    """Gives the nearest values of a grid; gradients pass straight through to what lies on its range.

    Args:
        like: a tensor of the shape and type; its least and greatest values give the scales to begin with.
        form: the grid.
        fitted: whether they do; without, all scales are 1 and all zero points 0.

    Attributes:
        scale: float32, of shape () for a tensor, (indices,) along an axis, (indices, groups) in groups.
        zero_point: whole numbers of the same shape, always within the grid.
        growth: what the scale is learned by, as in `grown`, from `learn` to `settle`; None otherwise.
    """

    scale: nn.Parameter
    growth: nn.Parameter | None
    zero_point: Tensor
    kind: Tensor

    def __init__(self, like: Tensor, form: Grid, fitted: bool = True) -> None:
        super().__init__()
        if (reason := form.reason_against(like.shape)) is not None:
            raise EditError(reason)
        self.form = form
        rows = form.rows(like)
        if fitted:
            scale, zero_point = min_max(rows, form)
        else:
            scale = torch.ones(rows.shape[:-1], device=like.device)
            zero_point = torch.zeros(rows.shape[:-1], dtype=form.type_of_zero_points, device=like.device)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("growth", None)
        self.register_buffer("zero_point", zero_point, persistent=not form.symmetric)
        # Decoding needs the tensor's type, and follows it when the model is cast.
        self.register_buffer("kind", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        """Any shape → the same."""
        form, shape = self.form, original.shape
        scale = self.scale if self.growth is None else grown(self.scale, self.growth)
        scale, zero_point = form.spread(scale, shape), form.spread(self.zero_point, shape)
        # Esser et al., section 2.2: a scale's gradient is kept in proportion to those of its weights.
        share = self.scale.numel() / (max(1, original.numel()) * max(1, form.high))
        return fake_quantized(original, scale, zero_point, form.low, form.high, math.sqrt(share))

    def learn(self) -> None:
        """Let the scale be trained until `settle`."""
        self.growth = nn.Parameter(torch.zeros_like(self.scale))

    def settle(self) -> None:
        """Keep the scale that was learned."""
        if self.growth is not None:
            self.scale.data.mul_(self.growth.detach().exp())
            self.growth = None

    def codes(self, value: Tensor) -> Tensor:
        """Whole numbers from 0 to ``2^bits − 1``: q less the least q."""
        found: Tensor = self.numbers(value) + self._zero(value.shape)
        return found

    def decoded(self, codes: Tensor) -> Tensor:
        """The values of the codes, in the tensor's type."""
        return self.numbered(codes - self._zero(codes.shape))

    def numbers(self, value: Tensor, zeros: Tensor | None = None) -> Tensor:
        """q less the zero point."""
        form, zero = self.form, self._zero(value.shape)
        scale = form.spread(self.scale.detach(), value.shape)
        exact = torch.promote_types(value.dtype, torch.float32)
        least, most = -zero, form.high - form.low - zero
        found = (value.detach().to(exact) / scale.to(exact)).round_().clamp_(least, most).long()
        if value.element_size() >= 4 or torch.equal(self.numbered(found), value):
            return found
        # In a type coarser than the grid several numbers have one value, and the nearest may have its neighbour's.
        for shift in (1, -1):
            beside = (found + shift).clamp(least, most)
            better = (self.numbered(found) != value) & (self.numbered(beside) == value)
            found = torch.where(better, beside, found)
        return found

    def numbered(self, numbers: Tensor, zeros: Tensor | None = None) -> Tensor:
        """Their values, in the tensor's type."""
        scale = self.form.spread(self.scale.detach(), numbers.shape)
        exact = torch.promote_types(self.kind.dtype, torch.float32)
        return (numbers.to(exact) * scale.to(exact)).to(self.kind.dtype)

    def _zero(self, shape: torch.Size) -> Any:
        """The code of zero; a tensor of them, to broadcast against one of this shape, where scales have their own."""
        if self.form.symmetric:
            return -self.form.low
        return self.form.spread(self.zero_point, shape).long() - self.form.low

    def stored(self, before: Stored) -> Stored:
        """So many bits a value; the scales, and the zero points where they are not all 0."""
        beside = 32 * self.scale.numel()
        if not self.form.symmetric:
            beside += self.zero_point.numel() * 8 * self.zero_point.element_size()
        return replace(before, bits=self.form.bits, beside=before.beside + beside)

    def check(self, shape: torch.Size) -> None:
        """See that every scale is a positive number and every zero point within the grid."""
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise EditError(f"the scales of a grid of {self.form} must be positive numbers")
        if not bool(((self.zero_point >= self.form.low) & (self.zero_point <= self.form.high)).all()):
            raise EditError(f"the zero points of a grid of {self.form} must lie in {self.form.low} … {self.form.high}")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return str(self.form)


def whole(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The whole numbers q of the nearest values of a grid, as floats.

    Args:
        x: any shape.
        scale: broadcasts against x.
        zero_point: broadcasts against x.
        low: the least q.
        high: the greatest.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    return (
        (x.detach().to(exact) / scale.detach().to(exact)).round_().add_(zero_point.detach().round()).clamp_(low, high)
    )


def fake_quantized(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, gradient_share: float = 1.0
) -> Tensor:
    """The nearest values of a grid, with gradients as if rounding were none.

    The gradient reaches x where it lies within the grid's range. It reaches the scale, and a floating-point zero point
    (Bhalgat et al., LSQ+, 2020, arxiv.org/abs/2004.09576), where they ask for one.

    Args:
        x: any shape and floating-point type, which the result has too.
        scale: broadcasts against x.
        zero_point: broadcasts against x; rounded where it is not whole.
        low: the least whole number of the grid.
        high: the greatest.
        gradient_share: what the gradients of scale and zero point are multiplied by.
    """
    made: Tensor = _FakeQuantized.apply(x, scale, zero_point, low, high, gradient_share)  # type: ignore[no-untyped-call]
    return made


class _FakeQuantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, gradient_share: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high, ctx.gradient_share = low, high, gradient_share
        q = whole(x, scale, zero_point, low, high)
        return (q.sub_(zero_point.round()) * scale.to(q.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        exact = torch.promote_types(x.dtype, torch.float32)
        shift = zero_point.round()
        position = x.to(exact) / scale.to(exact)
        q = position.round() + shift
        inside = (q >= ctx.low) & (q <= ctx.high)
        to_x = to_scale = to_shift = None
        if ctx.needs_input_grad[0]:
            to_x = gradient * inside
        if ctx.needs_input_grad[1]:
            rate = q.clamp(ctx.low, ctx.high) - shift - torch.where(inside, position, 0)
            to_scale = (gradient.to(exact) * rate * ctx.gradient_share).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            rate = torch.where(inside, 0, -scale.to(exact))
            to_shift = (gradient.to(exact) * rate * ctx.gradient_share).sum_to_size(zero_point.shape)
            to_shift = to_shift.to(zero_point.dtype)
        return to_x, to_scale, to_shift, None, None, None


def grown(start: Tensor, growth: Tensor) -> Tensor:
    """A positive number that is learned by the logarithm of its growth: ``start · e^growth``.

    A step of 0.001 that is learned as such can be negative after one update, and what is a small update to one step is
    a large one to another. The growth's gradient is the number's own in proportion to it, ``gradient / number``: to
    first order the updates of SGD are then those that the number itself would see, with the gradients of
    `fake_quantized` those of Esser et al. It goes through a tanh, as in Jain et al., Trained quantization thresholds,
    2020, arxiv.org/abs/1903.08066, so that no gradient moves a number by more, in proportion, than the learning rate.

    Args:
        start: any shape, positive; no gradient reaches it.
        growth: the same shape.
    """
    made: Tensor = _Moved.apply(growth, start, True)  # type: ignore[no-untyped-call]
    return made


def moved(start: Tensor, unit: Tensor, by: Tensor) -> Tensor:
    """A number that is learned in units of another: ``start + unit · by``, its updates bounded as in `grown`.

    Args:
        start: any shape.
        unit: the same shape, positive; no gradient reaches it, nor the start.
        by: the same shape.
    """
    made: Tensor = _Moved.apply(by, unit, False)  # type: ignore[no-untyped-call]
    return start + made


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, learned: Tensor, unit: Tensor, grows: bool) -> Tensor:
        made = unit * (learned.exp() if grows else learned)
        ctx.save_for_backward(made if grows else unit)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return (gradients[0] / unit).tanh(), None, None


# Finding scales -------------------------------------------------------------------------------------------------------
# Of rows of values, (..., values), each with a scale of its own; all give scales and zero points of shape (...).


def between(lowest: Tensor, highest: Tensor, form: Grid) -> tuple[Tensor, Tensor]:
    """The scale, float32, and the zero point of a grid that reaches from the lowest to the highest value, and over 0.

    A range that holds nothing but zero has scale 1.
    """
    lowest, highest = lowest.float().clamp(max=0), highest.float().clamp(min=0)
    if form.symmetric:
        scale = highest / form.high
        if form.low:
            scale = torch.maximum(scale, lowest / form.low)
    else:
        scale = (highest - lowest) / (form.high - form.low)
    scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1)
    return scale, _zero_point(lowest, scale, form)


def short(scale: Tensor, form: Grid) -> Tensor:
    """Scales of weights to the 11 bits that float16 has, so that files hold them in half the room.

    They move by 1/2048 at most, by which the largest whole number of 8 bits is off by a sixteenth of a step. Scales
    beyond what float16 has so many bits for, 6.1e-5 to 65504, stay, and so do those of grids of 16 bits.

    Args:
        scale: float32, of any shape.
        form: the grid.
    """
    half = scale.half().float()
    near = (half - scale).abs() <= scale / 2048
    return torch.where(near, half, scale) if form.bits <= 8 else scale


def _zero_point(lowest: Tensor, scale: Tensor, form: Grid) -> Tensor:
    if form.symmetric:
        zero_point = torch.zeros_like(scale)
    else:
        zero_point = (form.low - lowest / scale).round().clamp(form.low, form.high)
    return zero_point.to(form.type_of_zero_points)


def min_max(rows: Tensor, form: Grid) -> tuple[Tensor, Tensor]:
    """The scales and zero points at which no value is cut off."""
    if not rows.shape[-1]:
        rows = rows.new_zeros(*rows.shape[:-1], 1)
    return between(rows.amin(-1), rows.amax(-1), form)


def percentile(rows: Tensor, form: Grid, share: float = 0.999) -> tuple[Tensor, Tensor]:
    """The scales and zero points that keep this share of the values, the same share on both sides cut off.

    Args:
        rows: (..., values); NaN are passed over, as in a short group filled up with them.
        form: the grid.
        share: of the values that are kept.
    """
    ordered = rows.float().sort(-1).values  # NaN last
    last = (~rows.isnan()).sum(-1, keepdim=True).clamp(min=1) - 1
    cut = (1 - share) / 2

    def at(place: float) -> Tensor:
        exact = place * last
        below, above = exact.floor().long(), exact.ceil().long()
        return torch.lerp(ordered.gather(-1, below), ordered.gather(-1, above), (exact - below).float())[..., 0]

    return between(at(cut).nan_to_num(), at(1 - cut).nan_to_num(), form)


def least_error(
    rows: Tensor, form: Grid, weights: Tensor | None = None, steps: int = 40, refits: int = 4
) -> tuple[Tensor, Tensor]:
    """The scales and zero points at which the values move least, ``Σ weight · (x − rounded x)²``.

    Ranges from the whole one down are tried in equal steps; the best scale is then refitted to the codes that it gives,
    by least squares, and these rounded anew, which never raises the error.

    Args:
        rows: (..., values).
        form: the grid.
        weights: of the squared errors, broadcast against rows: such as the mean square of what each value multiplies.
        steps: how many ranges to try.
        refits: how often to refit.
    """
    rows = rows.float()
    weights = torch.ones_like(rows[..., :1]) if weights is None else weights.float()

    def error(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        shift = zero_point[..., None].float()
        q = whole(rows, scale[..., None], shift, form.low, form.high).sub_(shift)
        return (q * scale[..., None]).sub_(rows).square_().mul_(weights).sum(-1), q

    lowest, highest = (rows.amin(-1), rows.amax(-1)) if rows.shape[-1] else (rows.sum(-1), rows.sum(-1))
    scale, zero_point = between(lowest, highest, form)
    least, q = error(scale, zero_point)
    # A grid of few values may do better with one more or less of them below zero.
    shifts = (0, 1, -1) if not form.symmetric and form.bits <= 4 else (0,)
    for step, shift in itertools.product(range(steps), shifts):
        tried, about = between(lowest * (1 - step / steps), highest * (1 - step / steps), form)
        about = (about.long() + shift).clamp(form.low, form.high).to(zero_point.dtype)
        found, theirs = error(tried, about)
        better = found < least
        scale, zero_point = torch.where(better, tried, scale), torch.where(better, about, zero_point)
        least, q = torch.where(better, found, least), torch.where(better[..., None], theirs, q)
    for _ in range(refits):
        fitted = (rows * q * weights).sum(-1) / (q.square() * weights).sum(-1)
        fitted = torch.where(fitted > torch.finfo(torch.float32).tiny, fitted, scale)
        found, theirs = error(fitted, zero_point)
        better = found < least
        if not bool(better.any()):
            break
        scale, least = torch.where(better, fitted, scale), torch.where(better, found, least)
        q = torch.where(better[..., None], theirs, q)
    return scale, zero_point
