"""Two thin layers in place of one: what low-rank and separable layers have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.forms.form import FormModule

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LinearPair(FormModule):
    """``second(first(x))``: a Linear of rank r as inputs → r → outputs; the bias belongs to the second.

    Has the attributes of the Linear it replaces (``in_features``, ``out_features``, ``weight``, ``bias``), so that code
    that reads them goes on working; ``weight`` is the product, computed when asked for.
    """

    def __init__(self, layer: nn.Linear, rank: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = layer.in_features, layer.out_features, rank
        place: dict[str, Any] = {"device": device or layer.weight.device, "dtype": layer.weight.dtype}
        has_bias = layer.bias is not None
        self.first = uninitialised(nn.Linear, layer.in_features, rank, bias=False, **place)
        self.second = uninitialised(nn.Linear, rank, layer.out_features, bias=has_bias, **place)
        inherit(self, layer)

    def forward(self, input: Tensor) -> Tensor:  # named as the Linear's, which may be called by keyword
        """(..., inputs) → (..., outputs)."""
        return cast(Tensor, self.second(self.first(input)))

    @property
    def weight(self) -> Tensor:
        """The one matrix this layer multiplies by: (outputs, inputs)."""
        return cast(Tensor, self.second.weight @ self.first.weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias: (outputs,)."""
        return cast("Tensor | None", self.second.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"rank={self.rank}"


class ConvPair(FormModule):
    """``second(first(x))``: the first convolution runs along some axes of the kernel, the second along the others.

    Each factor takes stride, padding and dilation of its own axes, so any padding that treats the axes one after the
    other ('same', zeros, reflect, replicate, circular) gives what the whole convolution would. With groups, each group
    is factorized alone, to the same rank. The bias belongs to the second.

    Args:
        layer: the convolution to replace.
        rank: channels between the factors, per group.
        first_axes: kernel axes of the first factor; () for a 1×1 first factor.
    """

    def __init__(self, layer: Conv, rank: int, first_axes: Collection[int], device: torch.device | str | None) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.padding_mode = layer.dilation, layer.padding_mode
        # An axis that the kernel does not reach along costs nothing in the first factor: its stride then comes early.
        unreached = {axis for axis, size in enumerate(layer.kernel_size) if size == 1}
        self.rank, self.first_axes = rank, tuple(sorted({*first_axes, *unreached}))
        second_axes = [axis for axis in range(len(layer.kernel_size)) if axis not in self.first_axes]
        middle = rank * layer.groups
        self.first = along(layer, layer.in_channels, middle, self.first_axes, bias=False, device=device)
        has_bias = layer.bias is not None
        self.second = along(layer, middle, layer.out_channels, second_axes, bias=has_bias, device=device)
        inherit(self, layer)

    def forward(self, input: Tensor) -> Tensor:
        """(samples, inputs, *positions) → (samples, outputs, *positions)."""
        return cast(Tensor, self.second(self.first(input)))

    @property
    def weight(self) -> Tensor:
        """The one kernel this layer convolves with: (outputs, inputs / groups, *kernel)."""
        first, second = self.first.weight, self.second.weight
        groups, rank, dims = self.groups, self.rank, len(self.kernel_size)
        left = second.reshape(groups, -1, rank, second[0, 0].numel()).transpose(2, 3)  # (g, outputs, k₂, rank)
        right = first.reshape(groups, 1, rank, -1)  # (g, 1, rank, inputs · k₁)
        inputs = self.in_channels // groups
        kernel = (left @ right).reshape(self.out_channels, *second.shape[2:], inputs, *first.shape[2:])
        # (outputs, k₂ axes, inputs, k₁ axes), where an axis has length 1 in the factor that does not run along it
        order = [0, 1 + dims]
        for axis in range(dims):
            order += [1 + axis, 2 + dims + axis]
        return kernel.permute(order).reshape(self.out_channels, inputs, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias: (outputs,)."""
        return self.second.bias

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"rank={self.rank}, first_axes={self.first_axes}"


def along(
    layer: Conv,
    in_channels: int,
    out_channels: int,
    axes: Collection[int],
    *,
    bias: bool,
    device: torch.device | str | None,
) -> Conv:
    """A convolution with the layer's kernel, stride, padding and dilation along `axes`, and 1×1 along the others."""

    def only(values: Sequence[int], neutral: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else neutral for axis, value in enumerate(values))

    # A padding given as a word ('same', 'valid') holds for a factor as it does for the whole kernel.
    padding = layer.padding if isinstance(layer.padding, str) else only(layer.padding, 0)
    return cast(
        Conv,
        uninitialised(
            CONVOLUTIONS[len(layer.kernel_size)],
            in_channels,
            out_channels,
            only(layer.kernel_size, 1),
            stride=only(layer.stride, 1),
            padding=padding,
            dilation=only(layer.dilation, 1),
            groups=layer.groups,
            bias=bias,
            padding_mode=layer.padding_mode if isinstance(padding, str) or any(padding) else "zeros",
            device=device or layer.weight.device,
            dtype=layer.weight.dtype,
        ),
    )


def uninitialised(kind: type[Any], *sizes: Any, **settings: Any) -> Any:
    """A layer whose parameters are allocated but not drawn: their values come from a fit or a file."""
    # torch's skip_init draws them on the meta device first, which takes longer than all else that pricing a layer does.
    layer = _undrawn(kind)(*sizes, **settings)  # type: ignore[arg-type]
    layer.__class__ = kind
    return layer


@cache
def _undrawn(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})


def inherit(pair: FormModule, layer: nn.Module) -> None:
    """Give what replaces a layer its training flag, and let its factors be trained where the layer's parameters are."""
    trained = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    weight_trained = next((on for name, on in trained.items() if name != "bias"), True)
    for name, parameter in pair.named_parameters():
        parameter.requires_grad_(trained.get("bias", True) if name.endswith("bias") else weight_trained)
    pair.train(layer.training)
