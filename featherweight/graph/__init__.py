"""A network as a graph: which slices of which tensors go together, and the narrowing itself."""

from featherweight.graph.coupling import Coupling, Group, Site, couple
from featherweight.graph.narrow import Narrowed, Narrowing, narrow
from featherweight.graph.optimizer import narrow_optimizer
from featherweight.graph.trace import GraphError, Trace, capture

__all__ = [
    "Coupling",
    "GraphError",
    "Group",
    "Narrowed",
    "Narrowing",
    "Site",
    "Trace",
    "capture",
    "couple",
    "narrow",
    "narrow_optimizer",
]
