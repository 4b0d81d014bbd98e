"""Values of a floating-point type of fewer bits than the tensor's own.

Micikevicius et al., FP8 formats for deep learning, 2022, arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.errors import EditError, did_you_mean
from featherweight.forms.constraint import Constrained, Constraint, Stored, straight_through
from featherweight.forms.grid import Grid

TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Float(Constraint):
    """Values are those of another floating-point type; of one of 8 bits, times a scale.

    Attributes:
        type: ``"fp16"``, ``"bf16"``, or of 8 bits ``"e4m3"`` and ``"e5m2"`` (bits of exponent and mantissa).
        axis: of the tensor; of a type of 8 bits, every index along it has a scale. None: one for the whole tensor.
    """

    type: str
    axis: int | None = 0

    @property
    def bits(self) -> int:
        """Of each value."""
        return 8 * TYPES[self.type].itemsize

    def parametrization(self, tensor: Tensor) -> Floating:
        return Floating(tensor, self)

    def __str__(self) -> str:
        return self.type


class Floating(Constrained):
    """Gives the nearest values of the type; gradients pass straight through.

    Args:
        like: a tensor of the shape and type; its greatest magnitudes give the scales.
        form: the type.
    """

    scale: Tensor
    kind: Tensor

    def __init__(self, like: Tensor, form: Float) -> None:
        super().__init__()
        if form.type not in TYPES:
            raise EditError(f"there is no type {form.type!r}{did_you_mean(form.type, TYPES)}")
        if form.axis is not None and not -like.ndim <= form.axis < like.ndim:
            raise EditError(f"a tensor of shape {tuple(like.shape)} has no axis {form.axis}")
        self.form, self.to_type = form, TYPES[form.type]
        self.layout = Grid(8, axis=form.axis)
        most = self.layout.rows(like.detach()).abs().float().amax(-1)
        scale = most / torch.finfo(self.to_type).max
        # Where every value is 0, and where the type's own range will do.
        scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1)
        self.register_buffer("scale", scale if form.bits == 8 else torch.ones_like(scale), persistent=form.bits == 8)
        self.register_buffer("kind", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        """Any shape → the same."""
        return straight_through(original, self._values(self._typed(original)).to(original.dtype))

    def codes(self, value: Tensor) -> Tensor:
        """The bits of the type, as whole numbers from 0."""
        whole = torch.uint8 if self.form.bits == 8 else torch.int16
        return self._typed(value).view(whole).long() % (1 << self.form.bits)

    def decoded(self, codes: Tensor) -> Tensor:
        """The values of the codes, in the tensor's type."""
        if self.form.bits == 8:
            typed = codes.to(torch.uint8).view(self.to_type)
        else:
            typed = torch.where(codes < 1 << 15, codes, codes - (1 << 16)).to(torch.int16).view(self.to_type)
        return self._values(typed).to(self.kind.dtype)

    def stored(self, before: Stored) -> Stored:
        """So many bits a value, and the scales where there are any."""
        beside = 32 * self.scale.numel() if self.form.bits == 8 else 0
        return replace(before, bits=self.form.bits, beside=before.beside + beside)

    def check(self, shape: torch.Size) -> None:
        """See that every scale is a positive number."""
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise EditError(f"the scales of {self.form} must be positive numbers")

    def _typed(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        most = torch.finfo(self.to_type).max
        scaled = x.detach().to(exact) / self.layout.spread(self.scale, x.shape).to(exact)
        return scaled.clamp(-most, most).to(self.to_type)

    def _values(self, typed: Tensor) -> Tensor:
        exact = torch.promote_types(self.kind.dtype, torch.float32)
        # + 0: there is one zero.
        return typed.to(exact) * self.layout.spread(self.scale, typed.shape).to(exact) + 0.0

    def extra_repr(self) -> str:
        """What `print` shows."""
        return str(self.form)
