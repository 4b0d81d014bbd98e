"""Neuron pruning: hidden units of Linear and recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from featherweight.prune.structured import Structured


@dataclass(frozen=True)
class Neurons(Structured):
    """Remove hidden units of Linear and recurrent layers, with the columns of whatever reads them.

    What a Linear layer makes for attention are heads, which are `prune.Heads`', and head dims, one place in the width
    of every head, which no step removes. Where a view splits what it makes into parts of one length, those are blocks,
    which are `prune.Channels`', and slots, one place in every part, which no step removes either.
    """

    kinds: ClassVar[tuple[str, ...]] = ("neurons",)
