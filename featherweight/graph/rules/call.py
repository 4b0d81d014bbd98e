"""What a rule sees of one operation, and the table of rules by operation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from featherweight.graph.labels import Labels, Reason, Rows
from featherweight.graph.trace import size, source_of


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a tensor.

    Attributes:
        rows: the labels of its indices.
        zero: whether in the network with the removed slices of its parameters set to zero, the removed slices along
            this
            dimension are zero too. Where they are not, a sum over the dimension is not the same as without them.
    """

    rows: Rows
    zero: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Any) -> Axis:
        return replace(self, rows=self.rows[indices])

    def keeping(self, zero: bool) -> Axis:
        """The same labels; zero where it was zero and `zero` holds."""
        return self if zero or not self.zero else replace(self, zero=False)


Axes: TypeAlias = tuple[Axis, ...]  # of one tensor
Value: TypeAlias = "Axes | list[Any] | None"  # what a node carries: a tensor, several, or nothing with labels
Rule: TypeAlias = Callable[["Call"], Value]

_AS_IT_IS = frozenset(("detach", "alias", "clone", "contiguous", "lift_fresh_copy", "lift_fresh"))

RULES: dict[str, Rule] = {}


class Unsupported(Exception):
    """A rule does not cover this use of its operation; the message says what."""


def rule(*operations: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for ATen operations, named as `operation_of` names them."""

    def register(function: Rule) -> Rule:
        for operation in operations:
            assert operation not in RULES, operation
            RULES[operation] = function
        return function

    return register


def operation_of(node: fx.Node) -> str:
    """An operation's name without overload and without the _ of in-place forms: ``add`` of ``aten.add_.Tensor``."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    name = str(schema.name).split("::")[1]
    return name if name.startswith("__") or not name.endswith("_") else name[:-1]


def in_place(node: fx.Node) -> bool:
    """Whether an operation overwrites its first argument."""
    name = str(getattr(getattr(node.target, "_schema", None), "name", ""))
    return name.endswith("_") and not name.endswith("__")


def read_by(node: object) -> fx.Node | None:
    """The node that reads the tensor which another passes on as it is; None where it is computed."""
    while isinstance(node, fx.Node) and node.op == "call_function" and operation_of(node) in _AS_IT_IS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "get_attr" else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen operation by name, those left out with their defaults."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


class Call:
    """One operation of the graph, as a rule sees it: arguments by name, labels, and what it may do to them.

    Args:
        node: the operation.
        labels: the labels of the whole network.
        values: what the nodes before it carry.
        constant: the tensor behind a node that reads a parameter, buffer or constant; None for others.
        roles: the parts that dimensions of weights play, to note more of them in.
        sums: by operation, the dimensions it sums over, to note more of them in.
    """

    def __init__(
        self,
        node: fx.Node,
        labels: Labels,
        values: dict[fx.Node, Value],
        constant: Callable[[fx.Node], Tensor | None],
        roles: dict[int, tuple[str, str]],
        sums: dict[fx.Node, list[Axis]],
    ) -> None:
        self.node, self.labels, self.constant = node, labels, constant
        self.operation = operation_of(node)
        self._values, self._roles, self._sums = values, roles, sums
        self._arguments = {} if node.target is operator.getitem else arguments(node)

    def __getitem__(self, name: str) -> Any:
        """An argument; symbolic lengths as the example's numbers."""
        return _number(self._arguments[name])

    def get(self, name: str) -> Any:
        """An argument, or None where the operation has none of that name."""
        return _number(self._arguments.get(name))

    def computed(self, name: str) -> bool:
        """Whether an argument is no number of the code, but depends on what goes in."""
        return isinstance(self._arguments.get(name), fx.Node)

    def axes(self, argument: str | fx.Node) -> Axes:
        """The dimensions of a tensor argument."""
        node = self._arguments[argument] if isinstance(argument, str) else argument
        value = self._values.get(node)
        if not isinstance(value, tuple):
            raise Unsupported(f"argument {argument} is no tensor with labels")
        return value

    def given(self, argument: str) -> Axes | None:
        """The dimensions of an optional tensor argument; None where it is not given."""
        return self.axes(argument) if isinstance(self._arguments.get(argument), fx.Node) else None

    def is_tensor(self, value: Any) -> bool:
        """Whether an argument is a tensor with labels."""
        return isinstance(value, fx.Node) and isinstance(self._values.get(value), tuple)

    def number(self, value: Any) -> Any:
        """An argument's value, where it is a symbolic length the example's."""
        return _number(value)

    def tensors(self) -> list[Axes]:
        """The dimensions of every tensor argument, lists of tensors included."""
        values = [self._values.get(node) for node in self.node.all_input_nodes]
        return [v for v in values if isinstance(v, tuple)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, or of the first of several."""
        value = self.node.meta["val"]
        first = value[0] if isinstance(value, (tuple, list)) else value
        return tuple(size(s) for s in first.shape)

    @property
    def results(self) -> list[tuple[int, ...]]:
        """The shapes of all results."""
        return [tuple(size(s) for s in v.shape) for v in self.node.meta["val"]]

    def dim(self, value: int, ndim: int) -> int:
        """A dimension counted from the front."""
        return value % ndim if ndim else 0

    def dims(self, value: int | Sequence[int] | None, ndim: int) -> list[int]:
        """Dimensions counted from the front; all where none are named."""
        if value is None or (isinstance(value, Sequence) and not value):
            return list(range(ndim))
        return [self.dim(d, ndim) for d in ([value] if isinstance(value, int) else value)]

    def fixed(self, length: int, text: str = "") -> Axis:
        """A dimension whose indices are always kept."""
        return Axis(self.labels.fixed(length, self.reason(text or f"{self.operation} makes it")))

    def stretched(self, d: int, length: int, *, zero: bool = False) -> Axis:
        """Dimension d of a result, as long as what it meets: labels of its own, unless its length is symbolic.

        What is repeated along it is not zero where its labels go, unless it is known to be.
        """
        value = self.node.meta["val"]
        first = value[0] if isinstance(value, (tuple, list)) else value
        if length == 1 or isinstance(first.shape[d], torch.SymInt):
            return self.fixed(length, "the size of a batch")
        return Axis(self.labels.allocate(length, self.operation), zero)

    def fix(self, axes: Iterable[Axis], text: str) -> None:
        """Never narrow these dimensions, for that reason."""
        for axis in axes:
            if len(axis):
                self.labels.fix(axis.rows, self.reason(text))

    def join(self, one: Axis, other: Axis) -> Axis:
        """Narrow two dimensions together only."""
        if len(one) != len(other):
            raise Unsupported(f"lengths {len(one)} and {len(other)} meet")
        if one is not other:
            self.labels.join(one.rows, other.rows)
        return one

    def split(self, axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis]:
        """The two dimensions that one of length outer · inner falls into."""
        first, second = self.labels.split(axis.rows, outer, inner, self.operation)
        return Axis(first, axis.zero), Axis(second, axis.zero)

    def tie(self, axis: Axis, outer: int) -> Axis:
        """Let each of `outer` equal parts of a dimension keep the same indices: the dimension of those."""
        return replace(axis, rows=self.labels.tie(axis.rows, outer, len(axis) // outer))

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """The dimension that runs over several, the first being the slowest."""
        made = axes[0]
        for axis in axes[1:]:
            made = Axis(self.labels.merge(made.rows, axis.rows), made.zero and axis.zero)
        return made

    def sums(self, axis: Axis) -> None:
        """Note that what every element of the result is depends on all indices of a dimension."""
        self._sums.setdefault(self.node, []).append(axis)

    def role(self, axis: Axis, role: str, kind: str) -> None:
        """Note which part a dimension of a weight plays: producer or consumer, of what kind of slices."""
        self._roles.setdefault(id(axis.rows), (role, kind))

    def reason(self, text: str) -> Reason:
        """A reason that names this operation's place."""
        return Reason(text, source_of(self.node))

    def broadcast(self, tensors: Sequence[Axes], shape: Sequence[int] | None = None) -> list[list[Axis | None]]:
        """Join dimensions that meet; per dimension what each tensor has there, None where it is stretched."""
        shape = self.shape if shape is None else shape
        aligned: list[list[Axis | None]] = []
        for d, length in enumerate(shape):
            here: list[Axis | None] = []
            for axes in tensors:
                k = d - (len(shape) - len(axes))
                axis = axes[k] if k >= 0 else None
                here.append(axis if axis is not None and (len(axis) == length) else None)
            present = [axis for axis in here if axis is not None]
            for axis in present[1:]:
                self.join(present[0], axis)
            aligned.append(here)
        return aligned


def _number(value: Any) -> Any:
    if isinstance(value, fx.Node):
        held = value.meta.get("val")
        return size(held) if isinstance(held, (int, torch.SymInt)) and not isinstance(held, bool) else value
    if isinstance(value, (list, tuple)):
        return [_number(v) for v in value]
    return value
