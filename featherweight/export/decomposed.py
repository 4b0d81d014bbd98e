"""Whole numbers in a captured program, as XNNPACK and torch.compile look for them: values that go to int8 and back.

A layer between values that do is computed on the whole numbers themselves. Which neighbourhoods count as that is read
off ExecuTorch's partitioner, ``executorch/backends/xnnpack/partition/config`` in release 1.5: a layer's input and
weight have come back from int8, its result, behind at most one ReLU or clip, goes to int8 and nowhere else. What only
moves numbers has to leave their steps as they are. PyTorch's own patterns, ``torch/_inductor/fx_passes/quantization``,
want inputs of unsigned numbers, and leave it open what becomes of results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from featherweight.export.quantized import DOMAIN, Activation, Marks, Weight
from featherweight.forms import Grid
from featherweight.graph.rules.call import arguments, operation_of
from featherweight.quantize.placement import moves, operation_of_any, outputs_axis
from featherweight.quantize.targets import EXECUTORCH

LOW, HIGH = -128, 127  # of the weights' int8
INSIDE = ("relu", "relu6", "hardtanh")  # what the partitioner takes into a layer
GREATEST = torch.finfo(torch.float32).max
LEAST_STEP = 1e-7  # of ranges found at every call, for what is all zeros

Step = tuple[float, int]  # scale and zero point


@dataclass(frozen=True)
class Finder:
    """What looks for whole numbers in a program.

    Attributes:
        name: of it.
        layers: that it multiplies whole numbers in.
        type: of the activations.
        results: whether a layer's result has to be rounded too.
    """

    name: str
    layers: tuple[str, ...]
    type: torch.dtype
    results: bool

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the greatest activation."""
        info = torch.iinfo(self.type)
        return info.min, info.max

    def shift(self, grid: Grid) -> int:
        """What is taken from a grid's numbers to have them in this type."""
        if self.type == torch.uint8:
            return -128 if grid.signed else 0
        return 128 if grid.bits == 8 and not grid.signed else 0


XNNPACK = Finder("XNNPACK", EXECUTORCH.layers, torch.int8, results=True)
INDUCTOR = Finder("torch.compile", ("conv2d", "linear"), torch.uint8, results=False)


def rewritten(
    program: ExportedProgram, marks: Marks, finder: Finder = XNNPACK
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """A program of the same answers, in which a finder finds all that it can compute.

    Marks become values of 8 bits, and means over all positions keep their dimensions, which XNNPACK's pool does.

    Args:
        program: as `featherweight.export.program.capture` gives it, for one batch size.
        marks: what of it is whole numbers, as `featherweight.export.quantized.marked` gives it.
        finder: who is to find them.
    Returns:
        The program, and what the reader of the file should know, a sentence each.
    """
    import torch.ao.quantization.fx._decomposed  # registers the operations

    writer = _Writer(program, marks, finder)
    if not writer.run():
        return program, ()
    args, kwargs = _example(program)
    return torch.export.export(writer.module, args, kwargs), tuple(dict.fromkeys(writer.notes))


class _Writer:
    def __init__(self, program: ExportedProgram, marks: Marks, finder: Finder) -> None:
        self.finder = finder
        self.module: Any = program.module(check_guards=False)
        self.graph: fx.Graph = self.module.graph
        self.marks = marks
        self.notes: list[str] = []
        self.left: dict[str, list[str]] = {}

    def run(self) -> bool:
        """Rewrite the graph, in place; returns whether there was anything to do."""
        for node in [node for node in self.graph.nodes if operation_of_any(node) in ("clamp", "clamp_min")]:
            self._clip(node)
        own = [(node, self.marks[_name(node)]) for node in self.graph.nodes if _is_mark(node)]
        means = [node for node in self.graph.nodes if _is_pool(node)]
        if not own and not means:
            return False
        for node, mark in own:
            if isinstance(mark, Activation):
                self._activation(node, mark)
                self.graph.erase_node(node)
        for node in means:
            self._pool(node)
        self._keep_steps()
        for node, mark in own:
            if isinstance(mark, Weight):
                self._weight(node, _name(node).removesuffix(".weight"), mark)
                self.graph.erase_node(node)
        for reason, names in self.left.items():
            self.notes.append(f"in floating point, {reason}: {', '.join(dict.fromkeys(names))}")
        self._unused()
        self.graph.lint()
        self.module.recompile()
        return True

    def _clip(self, node: fx.Node) -> None:
        """A clip between two numbers by the one name under which the partitioner takes it into a layer."""
        given = arguments(node)
        low, high = (given.get(end) for end in ("min", "max"))
        numbers = isinstance(low, int | float | None) and isinstance(high, int | float | None)
        if numbers and node.meta["val"].is_floating_point():
            node.target, node.kwargs = torch.ops.aten.hardtanh.default, {}
            node.args = (node.args[0], -GREATEST if low is None else low, GREATEST if high is None else high)

    # Activations ----------------------------------------------------------------------------------------------------

    def _activation(self, node: fx.Node, mark: Activation) -> None:
        x, grid = _marked_value(node), mark.form.grid
        if mark.form.dynamic:
            self._dynamic(node, x)
            return
        if grid.bits > 8:
            name = self.finder.name
            self.notes.append(f"activations of {grid.bits} bits are left in float32: {name} has whole numbers of 8")
            node.replace_all_uses_with(x)
            return
        shift = self.finder.shift(grid)  # the same numbers, counted from elsewhere
        scale, low, high = mark.scale, grid.low - shift, grid.high - shift
        zero_point = mark.zero_point - shift
        if (low, high) != self.finder.ends:
            x = self._clipped(node, x, (low - zero_point) * scale, (high - zero_point) * scale)
        self._round(node, x, (scale, zero_point), list(node.users), node)

    def _clipped(self, before: fx.Node, x: fx.Node, low: float, high: float) -> fx.Node:
        """A value within the ends of a grid that is narrower than int8, as one clip with a ReLU or clip in front."""
        clip = torch.ops.aten.hardtanh.default
        if operation_of_any(x) in INSIDE and len(x.users) == 1:
            given = arguments(x)
            ends = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}.get(operation_of(x)) or (
                given["min_val"],
                given["max_val"],
            )
            x.target, x.args, x.kwargs = clip, (x.args[0], max(low, ends[0]), min(high, ends[1])), {}
            return x
        with self.graph.inserting_before(before):
            return self.graph.call_function(clip, (x, low, high))

    def _round(self, at: fx.Node, x: fx.Node, step: Step, readers: list[fx.Node], read: fx.Node) -> None:
        """Bring `x` to int8 in front of `at`, and let every reader of `read` have it back for itself."""
        operations = torch.ops.quantized_decomposed
        arguments = (*step, *self.finder.ends, self.finder.type)
        with self.graph.inserting_before(at):
            whole = self.graph.call_function(operations.quantize_per_tensor.default, (x, *arguments))
            for reader in readers:
                back = self.graph.call_function(operations.dequantize_per_tensor.default, (whole, *arguments))
                reader.replace_input_with(read, back)

    def _dynamic(self, node: fx.Node, x: fx.Node) -> None:
        """Whole numbers in the range of each call, for every Linear that reads the value."""
        operations = torch.ops.quantized_decomposed
        ends = (*self.finder.ends, self.finder.type)
        for reader in list(node.users):
            if operation_of_any(reader) != "linear":
                reader.replace_input_with(node, x)
                continue
            with self.graph.inserting_before(reader):
                found = self.graph.call_function(operations.choose_qparams.tensor, (x, *ends[:2], LEAST_STEP, ends[2]))
                step = [self.graph.call_function(getitem, (found, index)) for index in (0, 1)]
                whole = self.graph.call_function(operations.quantize_per_tensor.tensor, (x, *step, *ends))
                back = self.graph.call_function(operations.dequantize_per_tensor.tensor, (whole, *step, *ends))
            reader.replace_input_with(node, back)
        if self.finder is XNNPACK:
            self.notes.append("ranges that are found at every call are those of each row, not of the whole batch")

    def _pool(self, node: fx.Node) -> None:
        """A mean over all positions that drops their dimensions, as one that keeps them and a reshape."""
        (x,) = node.all_input_nodes
        readers = list(node.users)
        with self.graph.inserting_before(node):
            kept = self.graph.call_function(torch.ops.aten.mean.dim, (x, [2, 3], True))
            flat = self.graph.call_function(torch.ops.aten.flatten.using_ints, (kept, 1))
        flat.meta["val"] = node.meta["val"]
        if len(readers) == 1 and (step := _step_to(readers[0])) is not None:  # round first, then only move
            self._round(flat, kept, step, [flat], kept)
        node.replace_all_uses_with(flat)
        self.graph.erase_node(node)

    def _keep_steps(self) -> None:
        """Round behind what moves whole numbers, in the steps in front; before what joins them, in those behind.

        XNNPACK computes moves and concatenations on whole numbers of one step only. Nothing is changed by it:
        the numbers in front are on that grid, and those behind a concatenation are put on it all the same.
        """
        several: dict[fx.Node, Step] = {}  # tensors at once: what takes one of them is rounded behind
        for node in list(self.graph.nodes):
            operation = operation_of_any(node)
            before = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            step = None if before is None else several.get(before) or _step_from(before)
            if step is not None and moves(node):
                if not isinstance(node.meta["val"], Tensor):
                    several[node] = step
                else:
                    self._round(node.next, node, step, list(node.users), node)
            elif operation == "cat" and len(node.users) == 1:
                step = _step_to(next(iter(node.users)))
                given = node.all_input_nodes
                if step is not None and all(_step_from(x) is not None for x in given):
                    for x in given:
                        if _step_from(x) != step:
                            self._round(node, x, step, [node], x)

    # Weights --------------------------------------------------------------------------------------------------------

    def _weight(self, node: fx.Node, name: str, mark: Weight) -> None:
        for reader in list(node.users):
            reason = _reason(reader, node, mark, self.finder)
            if reason is None:
                reader.replace_input_with(node, self._codes(reader, name, mark))
                self._own_bias(reader)
            else:
                self.left.setdefault(reason, []).append(name)
                reader.replace_input_with(node, _marked_value(node))

    def _codes(self, reader: fx.Node, name: str, mark: Weight) -> fx.Node:
        """The whole numbers of a weight with a scale for every output, brought to float in front of its reader."""
        axis = outputs_axis(reader)
        outputs = mark.codes.shape[axis]
        scale = torch.from_numpy(np.broadcast_to(mark.scale.astype(np.float32), (outputs,)).copy())
        held = {
            "codes": torch.from_numpy(mark.codes.astype(np.int8)),
            "scale": scale,
            "zero_point": torch.zeros(outputs, dtype=torch.int64),
        }
        with self.graph.inserting_before(reader):
            read = []
            for kind, value in held.items():
                attribute = f"{name.replace('.', '_')}_{reader.name}_{kind}"
                self.module.register_buffer(attribute, value)
                read.append(self.graph.get_attr(attribute))
            return self.graph.call_function(
                torch.ops.quantized_decomposed.dequantize_per_channel.default,
                (*read, axis, LOW, HIGH, torch.int8),
            )

    def _own_bias(self, layer: fx.Node) -> None:
        """A bias that several layers read, for one of them: its whole numbers are in the steps of that layer's input.

        ExecuTorch 1.5 writes one tensor for all of them, in the steps of the first.
        """
        bias = arguments(layer).get("bias")
        if isinstance(bias, fx.Node) and len(bias.users) > 1:
            attribute = f"{layer.name}_bias"
            path, _, leaf = str(bias.target).rpartition(".")
            self.module.register_buffer(attribute, getattr(self.module.get_submodule(path), leaf).detach().clone())
            with self.graph.inserting_before(layer):
                layer.replace_input_with(bias, self.graph.get_attr(attribute))

    def _unused(self) -> None:
        """Take out what nothing reads any more, weights in floating point among them."""
        self.graph.eliminate_dead_code()
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name, _ in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if name not in read:
                path, _, leaf = name.rpartition(".")
                delattr(self.module.get_submodule(path), leaf)


def _reason(layer: fx.Node, weight: fx.Node, mark: Weight, finder: Finder) -> str | None:
    """Why a finder cannot multiply a weight's whole numbers in this layer; None where it can."""
    operation, name = operation_of_any(layer), finder.name
    if operation not in finder.layers or len(layer.args) < 2 or layer.args[1] is not weight:
        return f"for {name} does not multiply whole numbers in {operation or 'the answer'}"
    if mark.group or mark.bits > 8 or not mark.signed or bool(mark.zero_point.any()):
        return f"for {name} wants weights of at most 8 signed bits with one scale for every output and no zero point"
    if mark.axis is not None and mark.axis % mark.codes.ndim != outputs_axis(layer):
        return "for their scales are not those of outputs"
    if operation == "conv_transpose2d" and len(layer.args) > 6 and layer.args[6] != 1:
        return f"for {name} has no whole numbers for transposed convolutions with groups"
    (x, *_) = layer.all_input_nodes
    if operation_of_any(x) != "dequantize_per_tensor":
        return "for what they read is not rounded"
    if _step_from(x) is None:  # of each call: XNNPACK answers in floating point
        return None
    if finder.results and _step_to(_behind(layer)) is None:
        return f"for their results are not rounded, which target={EXECUTORCH.name!r} would do"
    return None


def _behind(layer: fx.Node) -> fx.Node | None:
    """The only operation that reads a layer's result, behind what is computed as a part of the layer."""
    for _ in range(2):
        if len(layer.users) != 1:
            return None
        (layer,) = layer.users
        if operation_of_any(layer) not in INSIDE:
            break
    return layer


def _step_to(node: fx.Node | None) -> Step | None:
    """The step in which a node brings what it reads to int8; None where it does no such thing."""
    if node is None or operation_of_any(node) != "quantize_per_tensor":
        return None
    return _step(node)


def _step_from(node: fx.Node) -> Step | None:
    """The step of the int8 numbers that a node brings back; None where it does no such thing."""
    return _step(node) if operation_of_any(node) == "dequantize_per_tensor" else None


def _step(node: fx.Node) -> Step | None:
    scale, zero_point = node.args[1:3]
    if not isinstance(scale, float) or not isinstance(zero_point, int):  # of each call
        return None
    return scale, zero_point


def _is_pool(node: fx.Node) -> bool:
    """Whether a node is a mean over all positions of images that does not keep their dimensions."""
    if operation_of_any(node) != "mean" or len(node.args) != 2 or node.kwargs:
        return False
    shape = node.all_input_nodes[0].meta["val"].shape
    dims: Any = node.args[1]
    return len(shape) == 4 and isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]


def _is_mark(node: fx.Node) -> bool:
    return operation_of_any(node) == "_symbolic" and node.kwargs.get("domain") == DOMAIN


def _name(node: fx.Node) -> str:
    names: Any = node.kwargs["attr_strs"]
    return str(names[0])


def _marked_value(node: fx.Node) -> fx.Node:
    (x,) = node.all_input_nodes
    return x


def _example(program: ExportedProgram) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Arguments of the shapes that a program was captured with."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    leaves = [
        argument.value
        if isinstance(argument, ConstantArgument)
        else torch.zeros(tuple(values[argument.name].shape), dtype=values[argument.name].dtype)
        for argument in given
    ]
    assert program.call_spec.in_spec is not None
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return args, kwargs
