"""What goes along the edges of a model's graph, by name, and modules put onto them.

A value is named after the layer whose weight makes it (``layer1.0.conv1``), after the module and operation that make it
(``layer1.0.add``), or, of an input, as the argument. A second value of the same name has ``_1`` behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, fx, nn

from featherweight.errors import did_you_mean
from featherweight.graph.module import ModelGraph, register
from featherweight.graph.rules.call import operation_of, read_by
from featherweight.graph.trace import GraphError, attribute, module_of

ROOM = "quantizers"  # where the graph keeps the modules on its edges
# Operations with a weight, and which argument it is.
WEIGHTED = {
    "linear": 1, "conv1d": 1, "conv2d": 1, "conv3d": 1, "conv_transpose1d": 1, "conv_transpose2d": 1,
    "conv_transpose3d": 1, "batch_norm": 1,
}  # fmt: skip


def value_names(graph: ModelGraph) -> dict[fx.Node, str]:
    """Every tensor that an input or an operation of the graph gives, with its name, in calling order."""
    names: dict[fx.Node, str] = {}
    taken: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "call_function") or not isinstance(node.meta.get("val"), Tensor):
            continue
        base = _base_name(node)
        count = taken.get(base, 0)
        taken[base] = count + 1
        names[node] = f"{base}_{count}" if count else base
    return names


def weight_of(node: fx.Node) -> str | None:
    """The name of the tensor that a layer's operation multiplies by; None where it computes it, or has none."""
    at = WEIGHTED.get(operation_of(node)) if node.op == "call_function" else None
    if at is None or len(node.args) <= at:
        return None
    held = read_by(node.args[at])
    return None if held is None else str(held.target)


def put_on_edges(
    graph: ModelGraph,
    edges: Mapping[str, Sequence[str] | None],
    make: Callable[[str], nn.Module],
    room: str = ROOM,
) -> None:
    """Put a module behind values, in place: those who read a value read what the module makes of it.

    Args:
        graph: the model.
        edges: by the value's name, the names of what reads the module's answer; None for all that read the value.
        make: gives the module for a value's name.
        room: name of the submodule that holds the modules.
    Raises:
        GraphError: there is no value of such a name, or it is not read by what is named, or has a module already.
    """
    names = value_names(graph)
    nodes = {name: node for node, name in names.items()}
    for value, readers in edges.items():
        if value not in nodes:
            raise GraphError(f"the graph has no value {value!r}{did_you_mean(value, nodes)}")
        node = nodes[value]
        reading = list(node.users) if readers is None else [u for u in node.users if names.get(u) in set(readers)]
        if readers is not None and (lost := sorted(set(readers) - {names.get(u) for u in reading})):
            raise GraphError(f"{value} is not read by {', '.join(lost)}")
        target = f"{room}.{value}"
        if any(n.op == "call_module" and n.target == target for n in node.users):
            raise GraphError(f"{value} is quantized already, by an earlier step: leave one of the two out")
        register(graph, target, make(value).train(graph.training))
        behind = node
        while behind.next.op == "placeholder":
            behind = behind.next
        with graph.graph.inserting_after(behind):
            made = graph.graph.call_module(target, (node,))
        made.meta = {key: value for key, value in node.meta.items() if key != "trains"}
        for reader in reading:
            reader.replace_input_with(node, made)
    graph.recompile()


def _holds(node: fx.Node, module: str, weight: str) -> bool:
    """Whether a module's own weight is this tensor: of a tied one the graph reads one name only, maybe another's."""
    whole = node.graph.owning_module
    if whole is None or not module:
        return False
    try:
        return attribute(whole, f"{module}.weight") is attribute(whole, weight)
    except AttributeError:
        return False


def _base_name(node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(node.target)
    weight, module, operation = weight_of(node), module_of(node), operation_of(node)
    if weight is not None:
        return module if _holds(node, module, weight) else weight.removesuffix(".weight")
    return module if module.rpartition(".")[2] == operation else f"{module}.{operation}".removeprefix(".")
