"""In place of a module that is removed: what goes in comes out, or nothing does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.forms.form import Form, FormModule


class Gone(FormModule):
    """Gives its first input back, or zeros of its shape; other inputs are taken and not used.

    Args:
        zeros: whether to give zeros, as in place of a branch whose result is added to something.
    """

    def __init__(self, zeros: bool) -> None:
        super().__init__()
        self.zeros = zeros

    def forward(self, input: Tensor, *others: Any, **more: Any) -> Tensor:
        """Any shape → the same."""
        return torch.zeros_like(input) if self.zeros else input

    def extra_repr(self) -> str:
        """What `print` shows."""
        return "zeros" if self.zeros else ""


@dataclass(frozen=True)
class Removed(Form):
    """A module that is not there any more.

    Attributes:
        zeros: whether zeros take the place of its answer; otherwise its first input does.
    """

    zeros: bool = False

    def build(self, layer: nn.Module, device: torch.device | str | None = None) -> Gone:
        """A stand-in without parameters, for any module that gives one tensor of its first input's shape."""
        return Gone(self.zeros).train(layer.training)

    def __str__(self) -> str:
        return "removed, zeros in its place" if self.zeros else "removed"
