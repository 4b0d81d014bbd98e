"""All values of a model: parameters and buffers, copied out and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors_of(model)}


@torch.no_grad()
def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a model the values that `values_of` copied."""
    for name, tensor in tensors_of(model):
        tensor.copy_(values[name])


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()  # those left out of state_dict() too
