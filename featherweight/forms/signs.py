"""Two or three values: the signs of a tensor times a scale, with zeros between them or without.

Courbariaux et al., BinaryConnect, 2015, arxiv.org/abs/1511.00363; Rastegari et al., XNOR-Net, 2016,
arxiv.org/abs/1603.05279; Li et al., Ternary weight networks, 2016, arxiv.org/abs/1605.04711.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import EditError
from featherweight.forms.constraint import Constrained, Constraint, Stored
from featherweight.forms.grid import Grid, fake_quantized, whole

# Of a value out of three: five of them go into a byte, as 3⁵ is 243.
TERNARY_BITS = 1.6


@dataclass(frozen=True)
class Binary(Constraint):
    """Values are ``−scale`` and ``scale``.

    Attributes:
        axis: of the tensor; every index along it has a scale of its own. None: one scale for the whole tensor.
    """

    axis: int | None = 0

    def parametrization(self, tensor: Tensor) -> Signs:
        return Signs(tensor, self)

    def __str__(self) -> str:
        return "1 bit" if self.axis == 0 else "1 bit a tensor" if self.axis is None else f"1 bit along axis {self.axis}"


@dataclass(frozen=True)
class Ternary(Constraint):
    """Values are ``−scale``, 0 and ``scale``.

    Attributes:
        axis: of the tensor; every index along it has a scale of its own. None: one scale for the whole tensor.
    """

    axis: int | None = 0

    def parametrization(self, tensor: Tensor) -> Signs:
        return Signs(tensor, self)

    def __str__(self) -> str:
        where = "" if self.axis == 0 else " a tensor" if self.axis is None else f" along axis {self.axis}"
        return f"3 values{where}"


class Signs(Constrained):
    """Gives the nearest of two or three values; gradients pass straight through to the tensor, and reach the scale.

    Args:
        like: a tensor of the shape and type; the means of its magnitudes are the scales to begin with, which of two
            values is their least-squares fit (Rastegari et al., equation 6).
        form: which values.

    Attributes:
        scale: float32, of shape () for a tensor, (indices,) along an axis; trained where the tensor is.
    """

    scale: nn.Parameter
    kind: Tensor

    def __init__(self, like: Tensor, form: Binary | Ternary) -> None:
        super().__init__()
        if form.axis is not None and not -like.ndim <= form.axis < like.ndim:
            raise EditError(f"a tensor of shape {tuple(like.shape)} has no axis {form.axis}")
        self.form, self.layout = form, Grid(2, axis=form.axis)
        size = self.layout.rows(like.detach()).abs().float()
        scale = size.mean(-1) if size.shape[-1] else size.sum(-1)
        if isinstance(form, Ternary):
            # Li et al., section 2.2: what is above 0.7 of the mean counts, and its mean is the scale.
            above = size > 0.7 * scale[..., None]
            scale = (size * above).sum(-1) / above.sum(-1).clamp(min=1)
        scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1)
        self.scale = nn.Parameter(scale, requires_grad=like.requires_grad)
        self.register_buffer("kind", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        """Any shape → the same."""
        scale = self.layout.spread(self.scale, original.shape)
        if isinstance(self.form, Binary):
            made: Tensor = _Signs.apply(original, scale)  # type: ignore[no-untyped-call]
            return made
        return fake_quantized(original, scale, torch.zeros_like(scale), -1, 1)

    def codes(self, value: Tensor) -> Tensor:
        """0 and 1 for the lower and the higher of two values; 0, 1 and 2 for those of three."""
        if isinstance(self.form, Binary):
            return (value >= 0).long()
        scale = self.layout.spread(self.scale, value.shape)
        return whole(value, scale, torch.zeros_like(scale), -1, 1).long() + 1

    def decoded(self, codes: Tensor) -> Tensor:
        """The values of the codes, in the tensor's type."""
        signs = 2 * codes - 1 if isinstance(self.form, Binary) else codes - 1
        exact = torch.promote_types(self.kind.dtype, torch.float32)
        scale = self.layout.spread(self.scale.detach(), codes.shape).to(exact)
        return (signs.to(exact) * scale).to(self.kind.dtype)

    def stored(self, before: Stored) -> Stored:
        """1 bit, or a fifth of a byte, for every value, those that lie on zeros included; and the scales."""
        bits = 1.0 if isinstance(self.form, Binary) else TERNARY_BITS
        return replace(before, bits=bits, beside=before.beside + 32 * self.scale.numel())

    def check(self, shape: torch.Size) -> None:
        """See that every scale is a positive number."""
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise EditError(f"the scales of {self.form} must be positive numbers")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return str(self.form)


class _Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        exact = torch.promote_types(x.dtype, torch.float32)
        size = scale.to(exact)
        return torch.where(x >= 0, size, -size).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        (gradient,) = gradients
        to_scale = None
        if ctx.needs_input_grad[1]:
            signed = torch.where(x >= 0, gradient, -gradient)
            to_scale = signed.to(scale.dtype).sum_to_size(scale.shape)
        # Courbariaux et al.: a weight that has gone far beyond its scale is not driven further.
        return gradient * (x.abs() <= 1), to_scale
