"""A convolution in two: every channel by itself under the kernel, then all channels mixed at every position.

Howard et al., MobileNets, 2017, arxiv.org/abs/1704.04861; as a sum of several, Guo et al., Network decoupling, 2018,
arxiv.org/abs/1808.05517.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.errors import EditError
from featherweight.forms.form import Form, FormModule, is_layer
from featherweight.forms.pair import CONVOLUTIONS, Conv, inherit, uninitialised


class DepthwiseConv(FormModule):
    """``second(first(x))``: k×k over every channel, `terms` answers each, then 1×1 over all of them.

    The first takes the layer's stride, padding and dilation, the second its bias. With groups, channels are mixed
    within each group. Has the attributes of the convolution it replaces; ``weight`` is the product, computed when asked
    for.

    Args:
        layer: the convolution to replace.
        terms: how many kernels every channel has.
    """

    def __init__(self, layer: Conv, terms: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.padding_mode, self.terms = layer.dilation, layer.padding_mode, terms
        kind = CONVOLUTIONS[len(layer.kernel_size)]
        place: dict[str, Any] = {"device": device or layer.weight.device, "dtype": layer.weight.dtype}
        middle = terms * layer.in_channels
        self.first = uninitialised(
            kind,
            layer.in_channels,
            middle,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.in_channels,
            bias=False,
            padding_mode=layer.padding_mode,
            **place,
        )
        has_bias = layer.bias is not None
        self.second = uninitialised(kind, middle, layer.out_channels, 1, groups=layer.groups, bias=has_bias, **place)
        inherit(self, layer)

    def forward(self, input: Tensor) -> Tensor:
        """(samples, inputs, *positions) → (samples, outputs, *positions)."""
        return cast(Tensor, self.second(self.first(input)))

    @property
    def weight(self) -> Tensor:
        """The one kernel this layer convolves with: (outputs, inputs / groups, *kernel)."""
        inputs = self.in_channels // self.groups
        kernels = self.first.weight.reshape(self.groups, inputs, self.terms, -1)
        mixing = self.second.weight.reshape(self.groups, -1, inputs, self.terms)
        whole = torch.einsum("goct,gctk->gock", mixing, kernels)
        return whole.reshape(self.out_channels, inputs, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias: (outputs,)."""
        return cast("Tensor | None", self.second.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"terms={self.terms}"


@dataclass(frozen=True)
class Depthwise(Form):
    """A Conv1d, Conv2d or Conv3d as a sum of `terms` depthwise convolutions, each mixed by one that is 1×1.

    Attributes:
        terms: how many; one is the layer of a MobileNet.
    """

    terms: int = 1

    def build(self, layer: nn.Module, device: torch.device | str | None = None) -> DepthwiseConv:
        if not is_layer(layer) or isinstance(layer, nn.Linear):
            raise EditError(f"a depthwise form is defined for Conv layers, not for {type(layer).__name__}")
        return DepthwiseConv(layer, self.terms, device)

    def __str__(self) -> str:
        return f"depthwise, {self.terms} term{'s' if self.terms > 1 else ''}"
