"""An exponential moving average of a model's values, which is often better than any of the values themselves.

Polyak & Juditsky, Acceleration of stochastic approximation by averaging, 1992; as a moving average Tarvainen & Valpola,
Mean teachers are better role models, 2017, arxiv.org/abs/1703.01780.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.train.values import put_back, tensors_of, values_of


class Average:
    """The moving average of every parameter and floating-point buffer; other buffers are taken as they are.

    Args:
        model: whose values it starts from.
        decay: what is left of the average at every update. It begins lower, at (1 + n) / (10 + n) after n updates, so
            that the first values are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: tensor.detach().clone() for name, tensor in tensors_of(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's values as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in tensors_of(model):
            if tensor.is_floating_point():
                self.values[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.values[name].copy_(tensor)

    def into(self, model: nn.Module) -> None:
        """Give the model the averages."""
        put_back(model, self.values)

    @contextmanager
    def in_(self, model: nn.Module) -> Iterator[None]:
        """The model with the averages, and with its own values again afterwards."""
        own = values_of(model)
        self.into(model)
        try:
            yield
        finally:
            put_back(model, own)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        values: dict[str, Tensor] = {name: tensor.cpu() for name, tensor in self.values.items()}
        return {"updates": self.updates, "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` told."""
        self.updates = state["updates"]
        for name, tensor in self.values.items():
            tensor.copy_(state["values"][name])
