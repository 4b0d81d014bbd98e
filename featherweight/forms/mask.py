"""Zeros in some places of a tensor, which stay zero through training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.errors import EditError
from featherweight.forms.constraint import Constrained, Constraint, Stored, constraints_on


class Masked(Constrained):
    """Gives zero wherever its buffer ``mask`` (bool, of the tensor's shape) is False.

    Args:
        like: a tensor of the shape; a new mask keeps all of it.
        kept: how many places the mask is to keep.
    """

    mask: Tensor

    def __init__(self, like: Tensor, kept: int) -> None:
        super().__init__()
        self._kept, self._places = kept, like.numel()
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool))

    @property
    def kept(self) -> int:
        """How many places the mask keeps, or is to keep; of a tensor that was narrowed since, how many are left."""
        if self.mask.numel() != self._places and not self.mask.is_meta:  # kept for copies without data
            self._kept, self._places = int(self.mask.sum()), self.mask.numel()
        return min(self._kept, self.mask.numel())

    def forward(self, original: Tensor) -> Tensor:
        """Any shape → the same."""
        return original.masked_fill(~self.mask, 0)

    def stored(self, before: Stored) -> Stored:
        """The values that are kept and where: a bit for every place, or the place of every value, whichever is less."""
        return replace(before, values=self.kept, beside=before.beside + positions(self.mask.numel(), self.kept))

    def check(self, shape: torch.Size) -> None:
        """See that as many places are kept as the form says."""
        if (found := int(self.mask.sum())) != self.kept:
            raise EditError(f"a mask keeps {found} of {self.mask.numel()} values, where its form says {self.kept}")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"kept={self.kept}"


def positions(places: int, kept: int) -> int:
    """Bits that say which places are kept: a bit for every place, or the place of every one, whichever is less."""
    return min(places, kept * math.ceil(math.log2(max(places, 2))))


@dataclass(frozen=True)
class Mask(Constraint):
    """Some values are zero. Put on a tensor whose topmost constraint is such a mask it takes that one's place.

    Attributes:
        kept: how many are not held at zero.
    """

    kept: int

    def parametrization(self, tensor: Tensor) -> Masked:
        return Masked(tensor, self.kept)

    def put_on(self, layer: nn.Module) -> Constrained:
        """As any constraint; in the place of such a mask, where one is the topmost: a tighter one says all of it."""
        above = constraints_on(layer, self.tensor)
        if not above or type(above[-1]) is not Masked:
            return super().put_on(layer)
        made = self.parametrization(getattr(layer, self.tensor).detach()).to(above[-1].mask.device)
        held = cast(Any, layer).parametrizations[self.tensor]
        held[len(held) - 1] = made.train(layer.training)
        return made

    def __str__(self) -> str:
        return f"{self.kept} values kept"
