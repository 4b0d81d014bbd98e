"""Where a network's activations are rounded, so that its layers run on whole numbers in one runtime.

Every operand of an integer layer is rounded, as near to where it is made as possible, so that what only moves numbers
about (reshapes, max pools) moves whole ones. Operations between integer layers follow where all around them is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from featherweight.graph import ModelGraph, value_names, weight_of
from featherweight.graph.rules import operation_of
from featherweight.graph.rules.call import arguments, read_by
from featherweight.graph.trace import module_of
from featherweight.quantize.targets import CLIPS, CONVOLUTIONS, Target

# Operations that move numbers about, or choose among them, and make no new ones.
MOVING = frozenset((
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "transpose", "t", "permute", "movedim", "squeeze",
    "unsqueeze", "expand", "contiguous", "clone", "detach", "alias", "dropout", "feature_dropout", "slice", "select",
    "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "repeat", "pixel_shuffle", "channel_shuffle", "upsample_nearest2d",
    "upsample_nearest1d", "index_select", "flip", "roll", "pad", "constant_pad_nd", "reflection_pad1d",
    "reflection_pad2d", "replication_pad1d", "replication_pad2d",
))  # fmt: skip
PRODUCTS = ("matmul", "bmm", "mm")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass
class Edge:
    """A value that is rounded.

    Attributes:
        readers: names of what reads it rounded; None for all that read it.
        symmetric: whether it has to be signed and symmetric.
        padded: whether it had better be, where its values lie about 0.
        floor, ceiling: bounds that the values never pass, where they are known.
    """

    readers: set[str] | None = field(default_factory=set)
    symmetric: bool = False
    padded: bool = False
    floor: float = -math.inf
    ceiling: float = math.inf


@dataclass(frozen=True)
class Placement:
    """What becomes of a network.

    Attributes:
        edges: the values that are rounded, by name, in calling order.
        weights: the tensors that integer layers multiply by, by name, with the axis of the layer's outputs.
        integer: names of the operations that then run on whole numbers.
        left: operations with a weight, or products, that stay as they are, with the reason.
    """

    edges: dict[str, Edge]
    weights: dict[str, int]
    integer: tuple[str, ...]
    left: dict[str, str]


def place(
    graph: ModelGraph,
    target: Target,
    refused: Callable[[str], str | None] = lambda name: None,
    norms: Collection[str] = (),
) -> Placement:
    """Where to round for a target.

    Args:
        graph: the network.
        target: the runtime.
        refused: of an operation's name, why it is to be left alone; None where it is not.
        norms: names of batch norms that will be folded into the layers in front of them.
    """
    return _Placing(graph, target, refused, norms).placement()


class _Placing:
    def __init__(
        self, graph: ModelGraph, target: Target, refused: Callable[[str], str | None], norms: Collection[str]
    ) -> None:
        self.graph, self.target = graph, target
        self.names = value_names(graph)
        self.norms = {node for node, name in self.names.items() if name in set(norms)}
        self.left: dict[str, str] = {}
        for node in graph.graph.nodes:
            if operation_of_any(node) in RECURRENT:
                self.left[module_of(node) or node.name] = f"there is no integer kernel for {operation_of(node)}"
        self.layers = {node for node in self.names if self._is_layer(node, refused)}
        self.between = {n for n in self.names if n.op == "call_function" and operation_of(n) in target.between}
        self.between = {n for n in self.between if refused(self.names[n]) is None and not _odd(n)}
        while gone := {node for node in self.between if not self._surrounded(node)}:
            self.between -= gone

    def placement(self) -> Placement:
        whole = self.layers | self.between
        edges: dict[fx.Node, Edge] = {}
        for node in (n for n in self.names if n in whole):
            kept = self._summed_with(node)
            for operand in (x for x in _operands(node) if x is not kept):
                self._round(operand, node, edges)
        for node in (n for n in self.names if n in whole and operation_of(n) in self.target.rounded_results):
            last = self._behind_fused(node)
            edges.setdefault(last, Edge()).readers = None
        ordered = {self.names[n]: edges[n] for n in self.names if n in edges}
        for node, edge in edges.items():
            edge.floor, edge.ceiling = _bounds(node)
        weights: dict[str, int] = {}
        for node in (n for n in self.names if n in self.layers):
            if (weight := weight_of(node)) is not None:
                weights[weight] = outputs_axis(node)
        return Placement(ordered, weights, tuple(self.names[n] for n in self.names if n in whole), self.left)

    def _is_layer(self, node: fx.Node, refused: Callable[[str], str | None]) -> bool:
        if node.op != "call_function":
            return False
        operation, name = operation_of(node), self.names[node]
        kind = operation in PRODUCTS or (operation != "batch_norm" and weight_of(node) is not None)
        if operation == "scaled_dot_product_attention":
            self.left[name] = "causal or grouped attention, and attention that drops out, is not taken apart"
            return False
        if not kind and operation not in self.target.layers:
            return False
        reason = refused(name)
        if reason is None and operation not in self.target.layers:
            reason = f"{self.target.name} has no integer kernel for {operation}"
        if reason is None and operation not in PRODUCTS:
            reason = self._weight_reason(node)
        if reason is None and not node.meta["val"].is_floating_point():
            reason = f"its numbers are {str(node.meta['val'].dtype).removeprefix('torch.')}"
        if reason is None and operation in PRODUCTS and any(read_by(operand) is not None for operand in node.args[:2]):
            reason = "one of its operands is a tensor that the model keeps"
        if reason is not None:
            self.left[name] = reason
        return reason is None

    def _weight_reason(self, node: fx.Node) -> str | None:
        weight = weight_of(node)
        if weight is None:
            return "its weight is computed"
        path, _, leaf = weight.rpartition(".")
        held = getattr(self.graph.get_submodule(path), leaf)
        names = [name for name, p in self.graph.named_parameters(remove_duplicate=False) if p is held]
        others = [name for name in names if name != f"{self.names[node]}.weight"]
        if len(names) > 1:
            return f"its weight is shared with {others[0]}"
        reads = [n for n in self.graph.graph.nodes if n.op == "get_attr" and n.target == weight]
        if any(weight_of(user) != weight for read in reads for user in read.users):
            return "its weight is used in other places too"
        return None

    def _surrounded(self, node: fx.Node) -> bool:
        """Whether all that an operation reads is whole already, and all that reads it can do with whole numbers."""
        whole = self.layers | self.between
        operands = _operands(node)
        if not operands or not node.meta["val"].is_floating_point():
            return False
        if len(operands) != len(_tensors_read(node)):
            return False  # it reads a tensor that the model keeps
        for operand in operands:
            source = _source(operand)
            if source.op == "placeholder":
                continue
            if source not in whole and self._in_front_of_fused(source) not in whole:
                return False
        return all(reader in whole for reader in _readers(self._behind_fused(node)))

    def _behind_fused(self, node: fx.Node) -> fx.Node:
        """The last of the operations that are computed as a part of this one."""
        while len(node.users) == 1 and self._is_fused(reader := next(iter(node.users))):
            node = reader
        if len(users := set(node.users)) == 2 and "silu" in self.target.fused:
            pair = _as_silu(node, users)
            if pair is not None:
                return pair
        return node

    def _in_front_of_fused(self, node: fx.Node) -> fx.Node:
        while self._is_fused(node) and isinstance(before := node.args[0], fx.Node) and len(before.users) == 1:
            node = before
        return node

    def _summed_with(self, node: fx.Node) -> fx.Node | None:
        """Of a sum's operands the one whose convolution computes the sum too: the first that can."""
        if not self.target.sums or operation_of(node) != "add":
            return None
        for operand in _operands(node):
            made = operand
            while made in self.norms and isinstance(before := made.args[0], fx.Node) and len(made.users) == 1:
                made = before
            if made in self.layers and operation_of(made) in CONVOLUTIONS and len(made.users) == 1:
                return operand
        return None

    def _is_fused(self, node: fx.Node) -> bool:
        return node in self.norms or (operation_of_any(node) in self.target.fused and not _odd(node))

    def _round(self, operand: fx.Node, reader: fx.Node, edges: dict[fx.Node, Edge]) -> None:
        """Round an operand, as near to its source as nobody else would read it rounded who should not."""
        whole = self.layers | self.between
        at, via = operand, reader
        while moves(at) and (before := _moved(at)) is not None:
            if not all(r in whole for r in _readers(at)):
                break
            at, via = before, at
        if at not in self.names:  # several tensors at once, as before a getitem
            at, via = operand, reader
        edge = edges.setdefault(at, Edge())
        if edge.readers is not None and via in self.names:
            edge.readers.add(self.names[via])
        elif edge.readers is not None:
            edge.readers = None
        if self.target.signed_products and operation_of(reader) in PRODUCTS and reader.args[1] is operand:
            edge.symmetric = True
        if self.target.signed_padded and operation_of(reader) in CONVOLUTIONS and _pads(reader):
            edge.padded = True


def operation_of_any(node: fx.Node) -> str:
    """The operation of a node; empty for inputs, tensors and the answer."""
    return operation_of(node) if node.op == "call_function" else ""


def outputs_axis(layer: fx.Node) -> int:
    """The axis of a layer's outputs in its weight."""
    return 1 if operation_of(layer).startswith("conv_transpose") else 0


def _pads(convolution: fx.Node) -> bool:
    padding: Any = arguments(convolution).get("padding", 0)
    return any(padding) if isinstance(padding, list | tuple) else padding not in (0, "valid")


def moves(node: fx.Node) -> bool:
    """Whether a node only moves numbers about, or chooses among them; zeros may come in, which every grid has."""
    operation = operation_of_any(node)
    if operation in ("pad", "constant_pad_nd") and arguments(node).get("value"):
        return False
    return operation in MOVING


def _operands(node: fx.Node) -> list[fx.Node]:
    """The activations that an operation computes with."""
    given = [node.args[0]] if weight_of(node) else [a for a in node.args[:2] if isinstance(a, fx.Node | list | tuple)]
    flat = [x for a in given for x in (a if isinstance(a, list | tuple) else [a]) if isinstance(x, fx.Node)]
    return [x for x in flat if isinstance(x.meta.get("val"), Tensor) and read_by(x) is None]


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _moved(node: fx.Node) -> fx.Node | None:
    """What an operation that only moves numbers has moved; None where it is several tensors."""
    given = node.args[0] if node.args else None
    return given if isinstance(given, fx.Node) and given.op in ("placeholder", "call_function") else None


def _source(node: fx.Node) -> fx.Node:
    while moves(node) and (before := _moved(node)) is not None:
        node = before
    return node


def _readers(node: fx.Node) -> list[fx.Node]:
    """All that computes with a value, wherever it is moved to; the answer of the model among them."""
    found: list[fx.Node] = []
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if moves(user):
            waiting += list(user.users)
        elif operation_of_any(user) not in ("sym_size", "_assert_tensor_metadata"):
            found.append(user)
    return found


def _odd(node: fx.Node) -> bool:
    """Whether an operation has arguments that no integer kernel takes."""
    given = arguments(node) if hasattr(node.target, "_schema") else {}
    operation = operation_of_any(node)
    if operation in ("add", "sub", "mul"):
        other = given.get("other")
        return not isinstance(other, fx.Node) or given.get("alpha", 1) != 1
    if operation == "mean":
        dims, shape = given.get("dim"), node.args[0].meta["val"].shape  # type: ignore[union-attr]
        return not dims or sorted(d % len(shape) for d in dims) != list(range(2, len(shape)))
    return operation in ("clamp", "hardtanh") and not all(math.isfinite(x) for x in _bounds(node)[:1])


def _bounds(node: fx.Node) -> tuple[float, float]:
    """The least and the greatest number that an operation can give, where that is known."""
    operation = operation_of_any(node)
    if operation in ("sigmoid", "softmax", "hardsigmoid"):
        return 0.0, 1.0
    if operation == "tanh":
        return -1.0, 1.0
    if operation not in CLIPS:
        return -math.inf, math.inf
    given = arguments(node)
    if operation == "relu6":
        return 0.0, 6.0
    if operation == "hardtanh":
        return float(given["min_val"]), float(given["max_val"])
    low, high = given.get("min"), given.get("max")
    if operation == "relu":
        return 0.0, math.inf
    numbers = [x if isinstance(x, int | float) else None for x in (low, high)]
    return (
        -math.inf if numbers[0] is None else float(numbers[0]),
        math.inf if numbers[1] is None else float(numbers[1]),
    )


def _as_silu(node: fx.Node, users: set[fx.Node]) -> fx.Node | None:
    """Where a value is multiplied by its own sigmoid: that product."""
    by = {operation_of_any(user): user for user in users}
    if {"sigmoid", "mul"} <= set(by) and set(by["sigmoid"].users) == {by["mul"]}:
        return by["mul"]
    return None
