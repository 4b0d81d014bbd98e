"""What every ATen operation does to labels: one small function per operation or family, registered by name."""

from featherweight.graph.rules import contraction, layers, pointwise, reduction, shapes
from featherweight.graph.rules.call import RULES, Axes, Axis, Call, Unsupported, Value, operation_of, rule

__all__ = [
    "RULES",
    "Axes",
    "Axis",
    "Call",
    "Unsupported",
    "Value",
    "contraction",
    "layers",
    "operation_of",
    "pointwise",
    "reduction",
    "rule",
    "shapes",
]
