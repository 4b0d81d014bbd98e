"""One walk through the graph that gives every dimension of every tensor its labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from featherweight.graph.labels import Labels, Reason
from featherweight.graph.rules import RULES, Axes, Axis, Call, Unsupported, Value, operation_of
from featherweight.graph.rules.call import arguments, in_place, read_by
from featherweight.graph.trace import GraphError, Trace, attribute, size, source_of

# Operations whose result shares its memory with their input: what is written into it changes the input too.
_VIEWS = """
slice select view reshape transpose permute narrow unsqueeze squeeze expand split split_with_sizes chunk
unbind getitem t alias detach flatten unflatten movedim contiguous diagonal swapaxes view_as expand_as
"""

# Operations that leave out a part of what they are given.
_CROPS = "slice narrow select split split_with_sizes chunk tensor_split getitem index_select"

# Operations that say something of a tensor and give none.
_SILENT = "_assert_tensor_metadata sym_size _assert_scalar sym_constrain_range_for_size switch_gradients"


@dataclass(frozen=True, eq=False)
class Analysis:
    """A graph with its labels.

    Attributes:
        trace: the graph.
        labels: all labels.
        values: for every operation, the labels of its results.
        tensors: by name, the labels of parameters, buffers and constants that the graph reads.
        roles: by the id of a dimension's label rows, the part it plays: role and kind.
        sums: by operation, the dimensions it sums over.
        unknown: operations without a rule, or used in a way that theirs does not cover, with the reason.
    """

    trace: Trace
    labels: Labels = field(default_factory=Labels)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    tensors: dict[str, Axes] = field(default_factory=dict)
    roles: dict[int, tuple[str, str]] = field(default_factory=dict)
    sums: dict[fx.Node, list[Axis]] = field(default_factory=dict)
    unknown: list[tuple[str, Reason]] = field(default_factory=list)


def analyse(trace: Trace) -> Analysis:
    """Give every tensor of the graph its labels, from the inputs to the outputs."""
    analysis = Analysis(trace)
    for node in trace.graph.graph.nodes:
        analysis.values[node] = _STEPS[node.op](analysis, node) if node.op in _STEPS else None
    _keep_what_weights_depend_on(analysis)
    _keep_unread(analysis)
    _keep_something(analysis)
    return analysis


def _keep_what_weights_depend_on(analysis: Analysis) -> None:
    """Fix the dimensions of a weight which it depends on a sum over, such as its norm or its largest singular value.

    Without some of its slices the others would change. What is no weight, but a channel's values, may depend on others.
    """
    own: dict[fx.Node, set[fx.Node]] = {}  # what is computed from parameters alone, with the sums it depends on
    for node in analysis.trace.graph.graph.nodes:
        before = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and all(n in own for n in before)):
            own[node] = ({node} & analysis.sums.keys()).union(*(own[n] for n in before))
            continue
        for weight in (n for n in _weights(node) if own.get(n)):
            held = {n for axis in _axes_in(analysis.values[weight]) for n in analysis.labels.resolve(axis.rows).flat}
            for operation in own[weight]:
                reason = Reason(
                    "the weights that stay would change: they depend on a sum over it", source_of(operation)
                )
                for axis in analysis.sums[operation]:
                    rows = analysis.labels.resolve(axis.rows)
                    analysis.labels.fix(np.where(np.isin(rows, list(held)), rows, 0), reason)


def _weights(node: fx.Node) -> list[fx.Node]:
    """The operands of an operation that are its weights: named so, or the second factor of a product."""
    if node.op != "call_function" or getattr(node.target, "_schema", None) is None:
        return []
    given = arguments(node)
    found = [given.get("weight"), given.get("mat2"), given.get("batch2"), *(given.get("params") or ())]
    if operation_of(node) == "matmul":
        found.append(given["other"])
    return [n for n in found if isinstance(n, fx.Node)]


def _keep_unread(analysis: Analysis) -> None:
    """Fix slices of tensors that the example's run leaves out: inputs of another length may read them.

    Such are the rows of a table of positions beyond the example's length: that they are not read says nothing of them.
    """
    graph, labels = analysis.trace.graph.graph, analysis.labels
    held: dict[int, npt.NDArray[np.int64]] = {}

    def labels_of(value: Value) -> npt.NDArray[np.int64]:
        for axis in (axes := _axes_in(value)):
            if id(axis.rows) not in held:
                held[id(axis.rows)] = np.unique(labels.resolve(axis.rows))
        return np.unique(np.concatenate([np.zeros(1, np.int64), *(held[id(axis.rows)] for axis in axes)]))

    def crops(node: fx.Node) -> bool:
        return node.op == "call_function" and operation_of(node) in _CROPS.split()

    cropped = np.zeros(len(labels), bool)  # left out somewhere; of all others there is nothing to find out
    for node in graph.nodes:
        if crops(node) and isinstance(source := node.args[0], fx.Node):
            cropped[np.setdiff1d(labels_of(analysis.values[source]), labels_of(analysis.values[node]))] = True
    cropped[0] = False
    if not cropped.any():
        return
    read: dict[fx.Node, set[int]] = {}
    for node in reversed(graph.nodes):
        here = labels_of(analysis.values[node])
        passed_on = set(here[cropped[here]].tolist())
        silent = node.op == "call_function" and operation_of(node) in _SILENT.split()
        for source in () if silent else node.all_input_nodes:
            there = labels_of(analysis.values[source])
            of_source = set(there[cropped[there]].tolist())
            through = of_source & read.get(node, set())
            if node.op == "call_function" and in_place(node):  # whoever reads the target reads what was written
                through = of_source
            elif not crops(node):
                through |= of_source - passed_on
            read.setdefault(source, set()).update(through)
    used: dict[str, set[int]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and (name := analysis.trace.names.get(str(node.target))) in analysis.tensors:
            used.setdefault(name, set()).update(read.get(node, ()))
    for name, found in used.items():
        here = labels_of(analysis.tensors[name])
        if unread := sorted(set(here[cropped[here]].tolist()) - found):
            labels.fix(np.array(unread)[:, None], Reason("the example's run reads no more than a part of it"))


def _keep_something(analysis: Analysis) -> None:
    """Fix labels that a whole dimension has: without them nothing would be left of it."""
    seen: dict[int, Axis] = {}
    for value in analysis.values.values():
        for axis in _axes_in(value):
            seen.setdefault(id(axis.rows), axis)
    for axis in seen.values():
        if len(axis) and (common := analysis.labels.common(axis.rows)).any():
            analysis.labels.fix(common, Reason("nothing would be left of a tensor without it"))


def _placeholder(analysis: Analysis, node: fx.Node) -> Value:
    value = node.meta.get("val")
    return _fixed(analysis, value, Reason("it meets the network's input")) if isinstance(value, Tensor) else None


def _get_attr(analysis: Analysis, node: fx.Node) -> Value:
    tensor = attribute(analysis.trace.graph, str(node.target))
    if not isinstance(tensor, Tensor):
        return None
    name = analysis.trace.names[str(node.target)]
    if not node.users:  # of tied tensors, or tensors that nothing uses, the graph reads all and uses one
        return None
    if name not in analysis.tensors:
        alone = Reason("it has only one slice")
        analysis.tensors[name] = tuple(
            Axis(analysis.labels.allocate(n, name) if n > 1 else analysis.labels.fixed(n, alone)) for n in tensor.shape
        )
    return analysis.tensors[name]


def _output(analysis: Analysis, node: fx.Node) -> Value:
    for leaf in pytree.tree_leaves(node.args):
        value = analysis.values.get(leaf) if isinstance(leaf, fx.Node) else None
        for axis in value if isinstance(value, tuple) else ():
            analysis.labels.fix(axis.rows, Reason("it is the network's output"))
    return None


def _call_function(analysis: Analysis, node: fx.Node) -> Value:
    operation = operation_of(node)
    if operation in _SILENT.split():
        return None
    if operation == "getitem":
        held = analysis.values.get(node.args[0])  # type: ignore[arg-type]
        if isinstance(held, list):
            return cast(Value, held[cast(int, node.args[1])])
    carried = [v for n in node.all_input_nodes if (v := analysis.values.get(n)) is not None]
    result = node.meta.get("val")
    if not carried and not pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), result):
        return None  # arithmetic on lengths
    try:
        if operation not in RULES:
            raise Unsupported(f"no rule covers {node.target}")
        known = analysis.labels, analysis.values
        call = Call(node, *known, lambda n: _constant(analysis, n), analysis.roles, analysis.sums)
        made = _checked(RULES[operation](call), result)
    except (Unsupported, GraphError) as refusal:
        reason = Reason(str(refusal), source_of(node))
        analysis.unknown.append((str(node.target), reason))
        for value in carried:
            for axis in _axes_in(value):
                analysis.labels.fix(axis.rows, reason)
        made = _fixed_all(analysis, result, reason)
    if in_place(node):
        _write(analysis, node, made)
    return made


_STEPS = {"placeholder": _placeholder, "get_attr": _get_attr, "output": _output, "call_function": _call_function}


def _constant(analysis: Analysis, node: fx.Node) -> Tensor | None:
    read = read_by(node)
    value = attribute(analysis.trace.graph, str(read.target)) if read is not None else None
    return value if isinstance(value, Tensor) else None


def _checked(made: Value, result: object) -> Value:
    """What a rule made, held against the shapes of the results."""
    if isinstance(result, Tensor):
        if not isinstance(made, tuple) or [len(a) for a in made] != [size(s) for s in result.shape]:
            raise Unsupported("the result has another shape than its rule expects")
    elif isinstance(result, (tuple, list)):
        if not isinstance(made, list) or len(made) != len(result):
            raise Unsupported("the operation has other results than its rule expects")
        for axes, tensor in zip(made, result, strict=True):
            if isinstance(tensor, Tensor) and axes is not None:
                _checked(axes, tensor)
    return made


def _write(analysis: Analysis, node: fx.Node, made: Value) -> None:
    """Let the tensor that an operation overwrites carry what was written."""
    target = node.args[0]
    if not isinstance(target, fx.Node) or not isinstance(made, tuple):
        return
    before = analysis.values.get(target)
    views = any(_is_view(n) for n in (target, *target.users) if n in analysis.values)
    if views or target.op == "get_attr":
        reason = Reason("it is overwritten in place, in part or through a view", source_of(node))
        for axis, old in zip(made, before if isinstance(before, tuple) else (), strict=True):
            if target.op == "get_attr" or (old.zero and not axis.zero):
                analysis.labels.fix(axis.rows, reason)
    analysis.values[target] = made


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and operation_of(node) in _VIEWS.split()


def _axes_in(value: Value) -> list[Axis]:
    if isinstance(value, tuple):
        return list(value)
    return [axis for item in value or () for axis in _axes_in(item)]


def _fixed(analysis: Analysis, tensor: Tensor, reason: Reason) -> Axes:
    lengths = []
    for s in tensor.shape:
        try:
            lengths.append(size(s))
        except GraphError:  # a length that depends on values: whoever meets it is refused
            lengths.append(0)
    return tuple(Axis(analysis.labels.fixed(n, reason)) for n in lengths)


def _fixed_all(analysis: Analysis, result: object, reason: Reason) -> Value:
    if isinstance(result, Tensor):
        return _fixed(analysis, result, reason)
    if isinstance(result, (tuple, list)):
        return [_fixed_all(analysis, item, reason) for item in result]
    return None
