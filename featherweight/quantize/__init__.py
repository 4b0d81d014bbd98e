"""Whole numbers of a few bits for weights and activations."""

from featherweight.quantize.dynamic import Dynamic
from featherweight.quantize.qat import QAT
from featherweight.quantize.static import Static
from featherweight.quantize.targets import TARGETS, Target, target

__all__ = ["QAT", "TARGETS", "Dynamic", "Static", "Target", "target"]
