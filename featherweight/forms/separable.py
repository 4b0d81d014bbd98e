"""A convolution along one axis, then along the others: k×1 then 1×k in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from featherweight.errors import EditError
from featherweight.forms.form import Form, is_layer
from featherweight.forms.pair import ConvPair


@dataclass(frozen=True)
class Separable(Form):
    """A Conv1d, Conv2d or Conv3d as two convolutions with `rank` channels (per group) between them.

    Attributes:
        rank: channels between the two factors; of a grouped convolution, per group.
        axis: the kernel axis of the first factor; 0 is depth in three dimensions, height in two, time in one.
    """

    rank: int
    axis: int = 0

    def build(self, layer: nn.Module, device: torch.device | str | None = None) -> ConvPair:
        if not is_layer(layer) or isinstance(layer, nn.Linear):
            raise EditError(f"a separable form is defined for Conv layers, not for {type(layer).__name__}")
        if not 0 <= self.axis < len(layer.kernel_size):
            raise EditError(f"axis {self.axis} is not among the {len(layer.kernel_size)} axes of the kernel")
        return ConvPair(layer, self.rank, (self.axis,), device)

    def __str__(self) -> str:
        return f"rank {self.rank}"
