"""Zeros in patterns that hardware knows, and whose places take fewer bits: N of every M, and whole blocks.

Mishra et al., Accelerating sparse deep neural networks, 2021, arxiv.org/abs/2104.08378 (2:4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import EditError
from featherweight.forms.constraint import Constrained, Constraint, Stored
from featherweight.forms.mask import Masked, positions

WHOLE = (1, 1)


class Patterned(Masked):
    """A mask that keeps or drops whole blocks, of which it keeps as many as its form says.

    Args:
        like: a tensor of the shape; a new mask keeps all of it.
        form: what is kept.
    """

    def __init__(self, like: Tensor, form: BlockMask | Pattern) -> None:
        if (reason := form.reason_against(like.shape)) is not None:
            raise EditError(reason)
        super().__init__(like, form.kept_of(like.shape))
        self.form = form

    def stored(self, before: Stored) -> Stored:
        """The values that are kept, and in bits which blocks these are."""
        return replace(before, values=self.kept, beside=before.beside + self.form.position_bits(self.mask.shape))

    def check(self, shape: torch.Size) -> None:
        """See that blocks are whole, and that as many are kept as the form says, everywhere."""
        super().check(shape)
        counts = in_blocks(self.mask.double(), self.form.block)
        size = math.prod(self.form.block)
        whole = bool(((counts == 0) | (counts == size)).all())
        if isinstance(self.form, Pattern):
            whole = whole and bool((in_runs(counts / size, self.form.m).sum(-1) == self.form.n).all())
        if not whole:
            raise EditError(f"a mask does not keep {self.form}")


def matrices(tensor: Tensor) -> Tensor:
    """A weight as one matrix (outputs, inputs) for each place of its kernel: (places, outputs, inputs / groups)."""
    return tensor.reshape(*tensor.shape[:2], -1).movedim(-1, 0)


def from_matrices(of: Tensor, shape: Sequence[int]) -> Tensor:
    """The way back from `matrices`."""
    return of.movedim(0, -1).reshape(*shape)


def in_blocks(tensor: Tensor, block: Sequence[int]) -> Tensor:
    """The sum over every block of a weight: (places, outputs / rows, inputs / columns)."""
    rows, columns = block
    view = matrices(tensor)
    return view.reshape(len(view), view.shape[1] // rows, rows, -1, columns).sum((2, 4))


def out_of_blocks(blocks: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Each block's value in all its places: the weight's shape."""
    rows, columns = block
    return from_matrices(blocks.repeat_interleave(rows, 1).repeat_interleave(columns, 2), shape)


def in_runs(blocks: Tensor, m: int) -> Tensor:
    """Every m neighbouring blocks along the inputs: (places, rows of blocks, runs, m)."""
    return blocks.reshape(*blocks.shape[:2], -1, m)


@dataclass(frozen=True)
class BlockMask(Constraint):
    """Whole blocks are zero.

    Attributes:
        kept: how many blocks are not held at zero.
        block: (outputs, inputs) of a block, at one place of a kernel.
    """

    kept: int
    block: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))  # JSON knows lists only

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "block": list(self.block)}

    def kept_of(self, shape: torch.Size) -> int:
        """How many values of a tensor of this shape are kept."""
        return self.kept * math.prod(self.block)

    def position_bits(self, shape: torch.Size) -> int:
        """Bits that say which blocks are kept."""
        return positions(shape.numel() // math.prod(self.block), self.kept)

    def reason_against(self, shape: torch.Size) -> str | None:
        """Why a tensor of this shape cannot be in such blocks; None where it can."""
        return not_in_blocks(shape, self.block)

    def parametrization(self, tensor: Tensor) -> Constrained:
        return Patterned(tensor, self)

    def __str__(self) -> str:
        return f"{self.kept} blocks of {self.block[0]}×{self.block[1]} kept"


@dataclass(frozen=True)
class Pattern(Constraint):
    """Of every M neighbouring inputs (or blocks of them), at each place of a kernel, N are not zero.

    Attributes:
        n: how many stay.
        m: of how many.
        block: (outputs, inputs) of what stays or goes together.
    """

    n: int
    m: int
    block: tuple[int, int] = WHOLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "block": list(self.block)}

    def kept_of(self, shape: torch.Size) -> int:
        """How many values of a tensor of this shape are kept."""
        return shape.numel() // self.m * self.n

    def position_bits(self, shape: torch.Size) -> int:
        """For every M blocks the number of their choice among all choices of N."""
        runs = shape.numel() // (self.m * math.prod(self.block))
        return runs * math.ceil(math.log2(math.comb(self.m, self.n)))

    def reason_against(self, shape: torch.Size) -> str | None:
        """Why a tensor of this shape cannot have the pattern; None where it can."""
        if not 0 < self.n <= self.m:
            return f"{self.n} of every {self.m} cannot be kept: n is at least 1 and at most m"
        return not_in_blocks(shape, (self.block[0], self.block[1] * self.m))

    def parametrization(self, tensor: Tensor) -> Constrained:
        return Patterned(tensor, self)

    def __str__(self) -> str:
        blocks = "" if self.block == WHOLE else f" blocks of {self.block[0]}×{self.block[1]}"
        return f"{self.n} of every {self.m}{blocks} kept"


def not_in_blocks(shape: Sequence[int], block: Sequence[int]) -> str | None:
    """Why a weight of this shape does not divide into blocks; None where it does."""
    if min(block) < 1:
        return f"a block of {block[0]}×{block[1]} is none"
    for what, size, of in zip(("outputs", "inputs"), shape, block, strict=False):
        if size % of:
            return f"its {size} {what}{' a group' if what == 'inputs' else ''} are not a multiple of {of}"
    return None
