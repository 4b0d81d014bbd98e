"""Pruning: what goes, and what the rest then looks like."""

from featherweight.prune.blocks import Blocks
from featherweight.prune.channels import Channels
from featherweight.prune.filters import Filters
from featherweight.prune.heads import Heads
from featherweight.prune.neurons import Neurons

__all__ = ["Blocks", "Channels", "Filters", "Heads", "Neurons"]
