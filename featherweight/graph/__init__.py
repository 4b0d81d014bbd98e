"""A network as a graph: which slices of which tensors go together, and the narrowing itself."""

from featherweight.graph.behind import Behind, behind
from featherweight.graph.coupling import Coupling, Group, Site, couple
from featherweight.graph.edges import put_on_edges, value_names, weight_of
from featherweight.graph.fold import factor_of, fold, foldable, turn
from featherweight.graph.module import ModelGraph, graph_module, left_behind
from featherweight.graph.narrow import Narrowed, Narrowing, Unfaithful, narrow
from featherweight.graph.optimizer import narrow_optimizer
from featherweight.graph.trace import GraphError, Trace, capture
from featherweight.graph.verify import norms_over_kept

__all__ = [
    "Behind",
    "Coupling",
    "GraphError",
    "Group",
    "ModelGraph",
    "Narrowed",
    "Narrowing",
    "Site",
    "Trace",
    "Unfaithful",
    "behind",
    "capture",
    "couple",
    "factor_of",
    "fold",
    "foldable",
    "graph_module",
    "left_behind",
    "narrow",
    "narrow_optimizer",
    "norms_over_kept",
    "put_on_edges",
    "turn",
    "value_names",
    "weight_of",
]
