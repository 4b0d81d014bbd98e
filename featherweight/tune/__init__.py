"""Training with nobody to learn from but the data."""

from featherweight.tune.fine_tune import FineTune

__all__ = ["FineTune"]
