"""A layer of rank r: a Linear as two Linears, a convolution as 1×1 then k×k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from featherweight.errors import EditError
from featherweight.forms.form import Form, is_layer
from featherweight.forms.pair import ConvPair, LinearPair


@dataclass(frozen=True)
class LowRank(Form):
    """Inputs → rank → outputs. Of a convolution the first factor is 1×1 and the second has the whole kernel.

    Attributes:
        rank: width between the two factors; of a grouped convolution, per group.
    """

    rank: int

    def build(self, layer: nn.Module, device: torch.device | str | None = None) -> LinearPair | ConvPair:
        if not is_layer(layer):
            raise EditError(f"a low-rank form is defined for Linear and Conv layers, not for {type(layer).__name__}")
        if isinstance(layer, nn.Linear):
            return LinearPair(layer, self.rank, device)
        return ConvPair(layer, self.rank, (), device)

    def __str__(self) -> str:
        return f"rank {self.rank}"
