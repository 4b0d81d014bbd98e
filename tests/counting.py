"""A network that writes into its own buffers whenever it runs."""

from __future__ import annotations

import torch
from networks import Mixed
from torch import Tensor


class Counting(Mixed):
    """`Mixed`, with a buffer of how often it was called; uses up random numbers too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x + 0 * torch.rand(()))
