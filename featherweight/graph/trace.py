"""A model as one graph of ATen operations, captured by torch.export and kept undecomposed.

Layers stay whole (`linear`, `layer_norm`, `scaled_dot_product_attention`), every operation knows the line of the
user's code and the module it comes from, and parameters keep their names.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from featherweight import batch
from featherweight.batch import Inputs, as_inputs
from featherweight.errors import FeatherweightError

# What torch.export says where a length that may be any became a number.
_FIXED = re.compile(r"specialized it to be a constant")


class GraphError(FeatherweightError):
    """A model could not be captured as a graph, or what was asked of its graph does not fit it."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A model as a graph.

    Attributes:
        graph: the captured module in evaluation mode; its parameters and buffers are the model's own.
        names: for every tensor that the graph reads, by the name it reads it under, the one name that all tensors
            tied to
            it share: the first under which the model registers it.
        inputs: the example it was captured with, on the model's device.
        dynamic: whether the graph takes batches of any size.
        note: why it does not; empty where it does.
        tensors: the tensors the graph reads, by those shared names.
        registered: every name the model registers one of these tensors under, in its order, with the shared name.
        transient: names of buffers that the model keeps out of its state dict.
    """

    graph: fx.GraphModule
    names: dict[str, str]
    inputs: Inputs
    dynamic: bool
    note: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    registered: dict[str, str] = field(default_factory=dict, repr=False)
    transient: frozenset[str] = frozenset()


def capture(model: nn.Module, inputs: Any, *, dynamic_batch: bool = True) -> Trace:
    """The model in evaluation mode as a graph; the model stays as it is, and may be on the meta device.

    Args:
        model: any model torch.export can follow.
        inputs: an example of its inputs, as `Task.example` or as `Inputs`.
        dynamic_batch: let the first dimension of every input that has the example's batch size take any length. Where
            the model fixes it, the graph is captured for the example's size and the trace notes why.

    Raises:
        GraphError: torch.export cannot follow the model.
    """
    inputs = _as_declared(model, as_inputs(inputs).on(model))
    note = "as asked" if not dynamic_batch else "no input has a batch dimension"
    program = None
    with batch.mode(model, training=False), quiet():
        if dynamic_batch and any(t.ndim for t in inputs.tensors()):
            try:
                program, note = _dynamic(model, inputs, strict=False), ""
            except Exception as error:  # the tracer and the model's own code may raise anything
                note = _reason(error)
                if _FIXED.search(str(error)):  # as by len(x), which is symbolic only where the bytecode is followed
                    with suppress(Exception):
                        program, note = _dynamic(model, inputs, strict=True), ""
        dynamic = program is not None
        if program is None:
            try:
                program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)
            except Exception as error:
                raise GraphError(_refusal(model, inputs, error)) from error
        graph = _module_of(program)
    for node in [n for n in graph.graph.nodes if n.op == "call_function"]:
        _inline(graph, node)
    graph.graph.lint()
    graph.recompile()
    return _named(model, graph, inputs, dynamic, note)


def switch_gradients(enabled: bool) -> bool:
    """Switch gradients on or off, and say what they were: an operation of graphs with regions that have their own."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return before


def source_of(node: fx.Node) -> str:
    """Where an operation comes from: the line of the user's code and the module, as far as the graph knows."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/" not in f[0] and not f[0].startswith("torch/")] or frames
    places = [f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}"] if own else []
    if module := module_of(node):
        places.append(f"in {module}")
    return " ".join(places)


def module_of(node: fx.Node) -> str:
    """The name of the innermost of the model's modules whose forward runs the operation; empty for the model itself."""
    stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    name = stack[-1] if stack else ""
    return "" if name.startswith("_empty") else name.split("@")[0]  # a second call of a module is marked module@1


def size(value: Any) -> int:
    """A length as a number: of a symbolic one, the example's."""
    if isinstance(value, torch.SymInt):
        hint = value.node.hint
        if hint is None:
            raise GraphError(f"the length {value} depends on the values that go in")
        return int(hint)
    return int(value)


def _as_declared(model: nn.Module, inputs: Inputs) -> Inputs:
    """Keyword arguments in the order of the model's own `forward`: a graph takes them in the order given."""
    try:
        declared = list(inspect.signature(model.forward).parameters)
    except ValueError:  # of scripted models, which the capture itself refuses
        return inputs
    known = {name: inputs.kwargs[name] for name in declared if name in inputs.kwargs}
    return Inputs(inputs.args, {**known, **inputs.kwargs})


def _dynamic(model: nn.Module, inputs: Inputs, *, strict: bool) -> ExportedProgram:
    length = inputs.batch_size

    def repeated(value: Any) -> Any:
        """A batch of one twice: torch.export would take a length of 1 for a constant of the model."""
        alone = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1
        return torch.cat([value, value]) if alone else value

    args, kwargs = inputs.args, dict(inputs.kwargs)
    if length == 1:
        args, kwargs = pytree.tree_map(repeated, (args, kwargs))
        length = 2
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in batch.tensors_in((args, kwargs)):
        if tensor.ndim and tensor.shape[0] == length:
            shapes[tensor] = {0: torch.export.Dim("batch")}
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)  # type: ignore[arg-type]


def _module_of(program: ExportedProgram) -> fx.GraphModule:
    try:
        module: Any = program.module(check_guards=False)
    except TypeError:  # before torch 2.9 there were no guards to leave out
        module = program.module()
    return module  # type: ignore[no-any-return]


def _inline(graph: fx.GraphModule, node: fx.Node) -> None:
    """Put the operations of a region with gradients switched on or off in the region's place."""
    if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
        return
    enabled, region, *operands = node.args
    inner = graph.get_submodule(str(region.target))  # type: ignore[union-attr]
    assert isinstance(inner, fx.GraphModule)
    holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
    with graph.graph.inserting_before(node):
        before = graph.graph.call_function(switch_gradients, (enabled,))
        values: dict[fx.Node, Any] = dict(zip(holes, operands, strict=True))
        results = graph.graph.graph_copy(inner.graph, values)
        graph.graph.call_function(switch_gradients, (before,))
    for user in list(node.users):
        index = user.args[1]
        user.replace_all_uses_with(results[index])  # type: ignore[index, arg-type]
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)
    for copied in [n for n in graph.graph.nodes if n.op == "call_function"]:
        _inline(graph, copied)


def _named(model: nn.Module, graph: fx.GraphModule, inputs: Inputs, dynamic: bool, note: str) -> Trace:
    """The trace, with one name for all the names of a tensor."""
    first: dict[int, str] = {}
    registered = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in registered:
        first.setdefault(id(tensor), name)
    names, tensors = {}, {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = attribute(graph, node.target)
            if isinstance(value, Tensor):
                name = first.setdefault(id(value), node.target)
                names[node.target] = name
                tensors[name] = value
    held = {name: first[id(tensor)] for name, tensor in registered if first[id(tensor)] in tensors}
    transient = frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    )
    return Trace(graph, names, inputs, dynamic, note, tensors, held, transient)


def attribute(module: nn.Module, path: str) -> Any:
    """What `module` holds under a dotted path."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _reason(error: Exception) -> str:
    if _FIXED.search(str(error)):
        return "its code makes a fixed number of the batch's length"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def _refusal(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    text = str(error)
    data_dependent = "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__ or "unbacked" in text
    why = (
        "its code branches on the values that go through it (an `if`, a loop or a length that depends on a tensor)"
        if data_dependent
        else f"torch.export says: {_reason(error)}"
    )
    where = ""
    own: list[tuple[str, str]] = re.findall(r'File "([^"]+)", line (\d+), in forward', text)
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        own.append((code.co_filename, str(trace.tb_lineno)))
        trace = trace.tb_next
    own = [
        (file, line) for file, line in own if "/torch/" not in file and "/featherweight/" not in file and file[0] != "<"
    ]
    if own:
        where = f", at {own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}"
    return (
        f"the graph of {type(model).__name__} called with {inputs} cannot be captured{where}: {why}. Pruning "
        "of channels and whole numbers for activations need it; masks and quantized weights alone do not, and all can "
        "run once that code is written without the branch (for instance with torch.where or torch.cond)"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch warns of and logs during every capture, where nobody can act on it."""
    said = {
        "torch._subclasses.fake_tensor": "failed while attempting to run meta",
        "torch._guards": "",  # every attempt that fails, which is noted
        "torch.fx.experimental.symbolic_shapes": "Unable to find user code",  # the refusal says where
    }
    filters = [(logging.getLogger(name), partial(_other_than, part)) for name, part in said.items()]
    for logger, wanted in filters:
        logger.addFilter(wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The tensor attributes? .* (was|were) assigned during export", UserWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        try:
            yield
        finally:
            for logger, wanted in filters:
                logger.removeFilter(wanted)


def _other_than(part: str, record: logging.LogRecord) -> bool:
    return part not in record.getMessage()
