"""Training: the default loop."""

from featherweight.train.fit import History as History
from featherweight.train.fit import fit as fit

__all__ = ["History", "fit"]
