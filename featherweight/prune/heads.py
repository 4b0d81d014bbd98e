"""Attention-head pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from featherweight.prune.structured import Structured


@dataclass(frozen=True)
class Heads(Structured):
    """Remove whole attention heads; where several query heads share keys and values, all of them together."""

    kinds: ClassVar[tuple[str, ...]] = ("heads",)
