"""Filter pruning: outputs of convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from featherweight.prune.structured import Structured


@dataclass(frozen=True)
class Filters(Structured):
    """Remove filters of convolutions, with their norms and the slices of whatever reads them; Linear widths stay."""

    kinds: ClassVar[tuple[str, ...]] = ("channels",)
