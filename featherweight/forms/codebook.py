"""Values out of a small table: weights that share a value share an index into it.

Han et al., Deep Compression, 2016, section 3, arxiv.org/abs/1510.00149; vectors of values as in Gong et al.,
Compressing deep convolutional networks using vector quantization, 2014, arxiv.org/abs/1412.6115.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import EditError
from featherweight.forms.constraint import Constrained, Constraint, Stored, beneath

MOST = 256


@dataclass(frozen=True)
class Codebook(Constraint):
    """Every value, or vector of neighbouring values, is one of a table's centroids.

    Attributes:
        size: centroids of a table, 1 to 256.
        vector: how many values, side by side in an output's weights, share one index.
        channels: outputs that share a table; 0 for all of them.
        product: whether every place of a vector among an output's weights has a table of its own.
        zero: whether there is a code for zero beside the centroids: what was pruned stays exactly zero.
    """

    size: int
    vector: int = 1
    channels: int = 0
    product: bool = False
    zero: bool = False

    def parametrization(self, tensor: Tensor) -> Shared:
        return Shared(tensor, self)

    def put_on(self, layer: nn.Module) -> Constrained:
        """As any constraint; what lies beneath no longer has a say, and tables are trained where it was."""
        made = super().put_on(layer)
        original = beneath(layer, self.tensor)
        made.get_parameter("centroids").requires_grad_(original.requires_grad)
        original.requires_grad_(False)
        return made

    def tables(self, shape: torch.Size) -> int:
        """How many tables a tensor of this shape has."""
        if self.product:
            return shape[1:].numel() // self.vector
        return -(-shape[0] // self.channels) if self.channels else 1

    def table_of(self, shape: torch.Size) -> Tensor:
        """Which table each index is into, as a tensor that broadcasts against (outputs, vectors an output)."""
        if self.product:
            return torch.arange(shape[1:].numel() // self.vector)[None]
        if self.channels:
            return torch.arange(shape[0])[:, None] // self.channels
        return torch.zeros(1, 1, dtype=torch.long)

    def reason_against(self, shape: torch.Size) -> str | None:
        """Why a tensor of this shape cannot be made of such tables; None where it can."""
        if not 1 <= self.size <= MOST:
            return f"a table has 1 to {MOST} centroids, not {self.size}"
        if self.vector < 1 or (len(shape) and shape[1:].numel() % self.vector):
            return f"{shape[1:].numel()} weights an output do not divide into vectors of {self.vector}"
        if self.product and self.channels:
            return "tables are by channels or by place, not both"
        values = shape.numel() // max(1, self.vector * self.tables(shape)) if shape.numel() else 0
        if self.size > values:
            return f"{self.size} centroids are more than the {values} values that share a table"
        return None

    def __str__(self) -> str:
        of = "" if self.vector == 1 else f" of {self.vector} weights"
        per = f" for every {self.channels} outputs" if self.channels else " for every place" if self.product else ""
        return f"{self.size} centroids{of}{per}{' and zero' if self.zero else ''}"


class Shared(Constrained):
    """Gives each place the centroid that its index says; a centroid's gradient is the sum of its places'.

    Args:
        like: a tensor of the shape and type; a new table is all zero.
        form: the codebook.

    Attributes:
        centroids: (tables, size, vector).
        indices: (outputs, vectors an output), whole numbers. With a zero in the form, 0 is that, and centroids count
            from 1.
    """

    centroids: nn.Parameter
    indices: Tensor
    table: Tensor
    all_its_own: ClassVar[bool] = True

    def __init__(self, like: Tensor, form: Codebook) -> None:
        super().__init__()
        if (reason := form.reason_against(like.shape)) is not None:
            raise EditError(reason)
        self.form, self.shape = form, like.shape
        tables = form.tables(like.shape)
        self.centroids = nn.Parameter(like.new_zeros(tables, form.size, form.vector))
        kind = torch.uint8 if form.size + form.zero <= MOST else torch.int16
        indices = torch.zeros(like.shape[0], like.shape[1:].numel() // form.vector, dtype=kind, device=like.device)
        self.register_buffer("indices", indices)
        self.register_buffer("table", form.table_of(like.shape).to(like.device), persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        """Any tensor of the shape → the one that the indices say."""
        return self._looked_up(self.indices.long())

    def _looked_up(self, indices: Tensor) -> Tensor:
        table = self.centroids.flatten(0, 1)
        if self.form.zero:
            found = F.embedding((self.table * self.form.size + indices - 1).clamp_min(0), table)
            found = found.masked_fill((indices == 0)[..., None], 0)
        else:
            found = F.embedding(self.table * self.form.size + indices, table)
        return found.reshape(self.shape)

    def codes(self, value: Tensor) -> Tensor | None:
        """The indices, place by place; None where an index is of several values."""
        if self.form.vector > 1:
            return None
        rows = value.detach().flatten(1)
        centroids, order = self.centroids.detach()[..., 0].sort(1)
        table = self.table.expand_as(rows)
        found = torch.zeros_like(rows, dtype=torch.long)
        for index, (row, places) in enumerate(zip(centroids, order, strict=True)):
            here = table == index
            at = torch.searchsorted(row, rows[here].contiguous()).clamp_max(self.form.size - 1)
            found[here] = places[at] + int(self.form.zero)
        if self.form.zero:
            found.masked_fill_(rows == 0, 0)
        return found.reshape(value.shape)

    def decoded(self, codes: Tensor) -> Tensor:
        """The centroids that the codes stand for."""
        return self._looked_up(codes.reshape(self.indices.shape)).detach()

    def stored(self, before: Stored) -> Stored:
        """An index for every value that is kept, and the tables."""
        # Where a mask beneath says which values are zero, no index has to.
        codes = self.form.size + (self.form.zero and before.values == self.shape.numel())
        bits = max(1, math.ceil(math.log2(codes))) / self.form.vector
        return replace(
            before, bits=bits, beside=before.beside + 8 * self.centroids.element_size() * self.centroids.numel()
        )

    def check(self, shape: torch.Size) -> None:
        """See that every index has a centroid."""
        codes = self.form.size + self.form.zero
        if self.indices.numel() and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < codes:
            raise EditError(f"an index of {int(self.indices.max())} is into {codes} codes: {self.form}")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return str(self.form)
