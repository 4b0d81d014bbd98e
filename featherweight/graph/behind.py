"""What stands between a layer's answer and the next rectifier: a batch norm, and what is added."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.graph.rules import operation_of
from featherweight.graph.trace import Trace, module_of

_THROUGH = ("dropout", "feature_dropout", "contiguous", "clone", "alias")


@dataclass(frozen=True)
class Behind:
    """What becomes of a layer's answer.

    Attributes:
        norm: the batch norm that it goes through first; empty where there is none.
        beside: the module with the tensor that is then added, and whether it is what goes into that module (or what
            comes out); None where nothing is.
        ceiling: where the rectifier behind stops rising: infinite for ReLU, 6 for ReLU6; None where there is none.
    """

    norm: str = ""
    beside: tuple[str, bool] | None = None
    ceiling: float | None = None


def behind(model: nn.Module, trace: Trace, layers: Collection[str]) -> dict[str, Behind]:
    """For every layer that is called once and whose answer goes one way only what is behind it, if anything is.

    Of what is added only that is known which a layer or batch norm called before this one takes or gives.

    Args:
        model: the network.
        trace: its graph.
        layers: names of its Linear and Conv layers.
    """
    nodes = list(trace.graph.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    calls: dict[str, list[fx.Node]] = {}
    known: dict[fx.Node, tuple[int, str, bool]] = {}
    modules = dict(model.named_modules())
    for node in nodes:
        if node.op != "call_function":
            continue
        name = module_of(node)
        if isinstance(modules.get(name), (nn.Linear, nn.modules.conv._ConvNd, _BatchNorm)) and isinstance(
            taken := node.args[0] if node.args else None, fx.Node
        ):
            calls.setdefault(name, []).append(node)
            known.setdefault(node, (order[node], name, False))
            known.setdefault(taken, (order[node], name, True))
    once = {name for name, found in calls.items() if len(found) == 1}
    made: dict[str, Behind] = {}
    for name in layers:
        if name not in once:
            continue
        start, norm, beside = calls[name][0], "", None
        node = _onward(start)
        if node is not None and isinstance(modules.get(module_of(node)), _BatchNorm) and module_of(node) in once:
            norm, node = module_of(node), _onward(node)
        if node is not None and operation_of(node) == "add" and not node.kwargs and len(node.args) == 2:
            other = next((a for a in node.args if isinstance(a, fx.Node) and not _comes_from(a, start)), None)
            here = known.get(other) if other is not None else None
            if here is not None and here[0] < order[start] and here[1] in once:
                beside, node = (here[1], here[2]), _onward(node)
            else:
                node = None
        ceiling = None if node is None else _ceiling(node)
        if beside is not None or ceiling is not None:
            made[name] = Behind(norm, beside, ceiling)
    return made


def _onward(node: fx.Node) -> fx.Node | None:
    """The one operation that a result goes into; None where it goes more ways."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_function":
            return None
        if operation_of(node) not in _THROUGH:
            return node
    return None


def _comes_from(node: fx.Node, start: fx.Node) -> bool:
    """Whether a result is the start's, on the one way that leads on from it."""
    while node is not start:
        if not node.args or not isinstance(node.args[0], fx.Node) or len(node.args[0].users) != 1:
            return False
        node = node.args[0]
    return True


def _ceiling(node: fx.Node) -> float | None:
    match operation_of(node):
        case "relu":
            return math.inf
        case "relu6":
            return 6.0
        case "hardtanh" if len(node.args) == 3 and node.args[1] == 0:
            return float(node.args[2])  # type: ignore[arg-type]
    return None
