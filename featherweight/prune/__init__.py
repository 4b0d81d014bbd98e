"""Pruning: what goes, and what the rest then looks like."""

from featherweight.prune.blocks import Blocks
from featherweight.prune.channels import Channels
from featherweight.prune.filters import Filters
from featherweight.prune.heads import Heads
from featherweight.prune.magnitude import Magnitude
from featherweight.prune.movement import Movement
from featherweight.prune.neurons import Neurons
from featherweight.prune.nm import NM
from featherweight.prune.obs import OBS
from featherweight.prune.wanda import Wanda

__all__ = ["NM", "OBS", "Blocks", "Channels", "Filters", "Heads", "Magnitude", "Movement", "Neurons", "Wanda"]
