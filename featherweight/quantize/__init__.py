"""Fewer bits: which numbers weights may be, and how each becomes one of them."""

from featherweight.quantize.adaround import AdaRound
from featherweight.quantize.binary import Binary, Ternary
from featherweight.quantize.brecq import BRECQ
from featherweight.quantize.dynamic import Dynamic
from featherweight.quantize.gptq import GPTQ
from featherweight.quantize.qat import QAT
from featherweight.quantize.rate_distortion import RateDistortion
from featherweight.quantize.smooth_quant import SmoothQuant
from featherweight.quantize.static import Static
from featherweight.quantize.targets import TARGETS, Target, target
from featherweight.quantize.weights import Weights

__all__ = [
    "BRECQ",
    "GPTQ",
    "QAT",
    "TARGETS",
    "AdaRound",
    "Binary",
    "Dynamic",
    "RateDistortion",
    "SmoothQuant",
    "Static",
    "Target",
    "Ternary",
    "Weights",
    "target",
]
