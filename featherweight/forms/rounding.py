"""Activations on a uniform grid: what goes along an edge of a network is rounded to whole numbers times a scale.

Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, 2018,
arxiv.org/abs/1712.05877. Gradients are those of Esser et al., Learned step size quantization, 2020,
arxiv.org/abs/1902.08153; of Bhalgat et al., LSQ+, 2020, arxiv.org/abs/2004.09576, where the zero point is learned; or
of Choi et al., PACT, 2018, arxiv.org/abs/1805.06085, where only the range's upper end is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.errors import ArtifactError, EditError
from featherweight.forms.constraint import straight_through
from featherweight.forms.grid import WIDTHS, Grid, between, fake_quantized, grown, moved


@dataclass(frozen=True)
class Rounding:
    """Values are ``scale · (q − zero point)``, q a whole number of so many bits, with one scale for the tensor.

    Attributes:
        bits: of each whole number: 2 to 8, or 16.
        signed: whether q runs from ``−2^(bits − 1)``, and not from 0.
        symmetric: whether the zero point is 0.
        dynamic: whether scale and zero point are those of the tensor's own least and greatest value, found anew at
            every call, and not kept.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    dynamic: bool = False

    @property
    def grid(self) -> Grid:
        """The same as a grid of one scale."""
        return Grid(self.bits, self.symmetric, self.signed, axis=None)

    def __str__(self) -> str:
        kind = "" if self.symmetric else " affine"
        return f"{self.bits} bits{' signed' if self.signed else ''}{kind}{', dynamic' if self.dynamic else ''}"

    def to_json(self) -> dict[str, Any]:
        """The rounding as JSON-ready data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Rounding:
        """The rounding back from `to_json`.

        Raises:
            ArtifactError: not a rounding of this version.
        """
        kinds = {f.name: type(f.default) for f in fields(Rounding)}
        if {name: type(value) for name, value in data.items()} != kinds or data["bits"] not in WIDTHS:
            raise ArtifactError(f"this is not a rounding that this version knows: {dict(data)}")
        return Rounding(**data)


class Rounded(nn.Module):
    """Gives the nearest values of a grid; what is no floating-point tensor passes as it is.

    Args:
        form: the grid.
        device: where its two numbers are kept.

    Attributes:
        scale: float32, of shape ().
        zero_point: float32, of shape (), a whole number.
        growth: what the scale is learned by, as in `grown`, from `learn` to `settle`; None otherwise.
        offset: what the value of the whole number 0 is learned by, in ranges of the whole grid; None otherwise.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter | Tensor
    growth: nn.Parameter | None
    offset: nn.Parameter | None

    def __init__(self, form: Rounding, device: torch.device | str | None = None) -> None:
        super().__init__()
        if form.bits not in WIDTHS:
            raise EditError(f"a grid has 2 to 8 bits or 16, not {form.bits}")
        self.form = form
        self._ends_only = False
        self.register_parameter("growth", None)
        self.register_parameter("offset", None)
        if form.dynamic:
            return
        self.scale = nn.Parameter(torch.ones((), device=device), requires_grad=False)
        zero = torch.zeros((), device=device)
        if form.symmetric:
            self.register_buffer("zero_point", zero, persistent=False)
        else:
            self.zero_point = nn.Parameter(zero, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same."""
        if not x.is_floating_point():
            return x
        grid = self.form.grid
        if self.form.dynamic:
            if not x.numel():
                return x
            scale, zero_point = between(x.detach().amin(), x.detach().amax(), grid)
            return fake_quantized(x, scale, zero_point.to(scale.dtype), grid.low, grid.high)
        scale, zero_point = self.learned()
        if self._ends_only and self.growth is not None:
            reach = grid.high - self.zero_point
            x = torch.minimum(x, grown(self.scale * reach, self.growth).to(x.dtype))
            scale = scale.detach()
        # Esser et al., section 2.2, for the values of one sample.
        share = 1 / max(1, x.numel() // max(1, x.shape[0] if x.ndim else 1) * max(1, grid.high))
        return fake_quantized(x, scale, zero_point, grid.low, grid.high, math.sqrt(share))

    def learned(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point as they are by now, the latter between two whole numbers where it is learned."""
        if self.growth is None:
            return self.scale, self.zero_point
        scale = grown(self.scale, self.growth)
        if self.offset is None:
            return scale, self.zero_point
        grid = self.form.grid
        offset = moved(-self.scale * self.zero_point, self.scale * (grid.high - grid.low), self.offset)
        # 0 stays on the grid; the gradient goes on as if it need not.
        return scale, straight_through(-offset / scale, (-offset / scale).clamp(grid.low, grid.high))

    def learn(self, how: Literal["lsq", "lsq+", "pact"]) -> None:
        """Let the grid be trained until `settle`.

        Args:
            how: ``"lsq"``: the scale; ``"lsq+"``: the scale and, where it is not symmetric, the value of the whole
                number 0, which is rounded to a zero point wherever it is used; ``"pact"``: the scale, by the grid's
                upper end alone.
        """
        # An upper end that is 0 has no growth.
        if self.form.dynamic or (how == "pact" and bool(self.zero_point == self.form.grid.high)):
            return
        self.growth = nn.Parameter(torch.zeros_like(self.scale))
        self._ends_only = how == "pact"
        if how == "lsq+" and not self.form.symmetric:
            self.offset = nn.Parameter(torch.zeros_like(self.scale))

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Give it a scale, a positive number, and a zero point within the grid."""
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    def settle(self) -> None:
        """Keep what was learned, the zero point as the whole number that it was used as."""
        if self.growth is not None:
            scale, zero_point = (made.detach() for made in self.learned())
            self.set_range(scale, zero_point.round())
            self.growth = self.offset = None

    def extra_repr(self) -> str:
        """What `print` shows."""
        return str(self.form)
