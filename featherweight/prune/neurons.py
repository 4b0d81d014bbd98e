"""Neuron pruning: hidden units of Linear and recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from featherweight.prune.structured import Structured


@dataclass(frozen=True)
class Neurons(Structured):
    """Remove hidden units of Linear and recurrent layers, with the columns of whatever reads them."""

    kinds: ClassVar[tuple[str, ...]] = ("neurons",)
