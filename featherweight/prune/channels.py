"""Channel pruning: every width of a network that can be narrowed, whatever makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from featherweight.prune.structured import Structured


@dataclass(frozen=True)
class Channels(Structured):
    """Remove channels of convolutions, hidden units of Linear layers, features of a residual stream, and heads.

    Whatever goes together goes together: a channel of a residual stream in all its blocks, one channel of every group
    of a grouped convolution, an attention head in queries, keys and values.
    """

    kinds: ClassVar[tuple[str, ...]] = ("channels", "neurons", "features", "heads", "blocks")
