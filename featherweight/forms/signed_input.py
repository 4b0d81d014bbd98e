"""A layer that sees nothing of its inputs but their signs.

Hubara et al., Binarized neural networks, 2016, arxiv.org/abs/1602.02830; Rastegari et al., XNOR-Net, 2016,
arxiv.org/abs/1603.05279, whose scale of every position is here one of every sample.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.errors import EditError
from featherweight.forms.form import Form, FormModule, is_layer, without_data


class WithSignedInput(FormModule):
    """``layer(sign(x) · mean|x|)``, the mean over one sample; gradients reach inputs whose magnitude is at most 1.

    Args:
        layer: a Linear or a convolution, which becomes part of this.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        """What the layer takes → what it gives."""
        size = input.detach().abs().mean(tuple(range(1, input.ndim)) or None, keepdim=input.ndim > 1)
        made: Tensor = _Sign.apply(input, size)  # type: ignore[no-untyped-call]
        return cast(Tensor, self.layer(made))

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        return cast(Tensor, self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return cast("Tensor | None", self.layer.bias)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, size, -size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() <= 1), None


@dataclass(frozen=True)
class SignedInput(Form):
    """The layer itself, whose inputs become their signs times the mean of each sample's magnitudes."""

    def build(self, layer: nn.Module, device: torch.device | str | None = None) -> WithSignedInput:
        if not is_layer(layer):
            raise EditError(f"signed inputs are defined for Linear and Conv layers, not for {type(layer).__name__}")
        meta = device is not None and torch.device(device).type == "meta"
        copied = without_data(layer) if meta else copy.deepcopy(layer)
        return WithSignedInput(copied if meta or device is None else copied.to(device)).train(layer.training)

    def __str__(self) -> str:
        return "inputs of one bit"
