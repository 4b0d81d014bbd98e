"""A captured graph in the model's place: it trains, copies, and keeps the model's names for its tensors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from featherweight.batch import Inputs
from featherweight.graph.rules.call import arguments, operation_of
from featherweight.graph.trace import Trace, attribute, capture, quiet

# The argument that says whether a layer trains; in evaluation mode all of them were captured as False.
_TRAINING = {
    "batch_norm": "training", "instance_norm": "use_input_stats", "dropout": "train", "feature_dropout": "train",
    "alpha_dropout": "train", "feature_alpha_dropout": "train", "lstm": "train", "gru": "train", "rnn_tanh": "train",
    "rnn_relu": "train", "rrelu": "training",
}  # fmt: skip


class ModelGraph(fx.GraphModule):
    """A captured graph that trains: dropout and batch norm follow `train` and `eval`; names are the model's.

    What the model's own code does only while it trains (auxiliary heads, dropped paths) is not in it: it was captured
    in evaluation mode.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelGraph:
        # Not as GraphModule has it, which looks for what the graph reads among the registered tensors: a confined one
        # of the model itself is a property of the class that its parametrization derived.
        own = type(self)
        plain: Any = own.__bases__[0] if parametrize.is_parametrized(self) else own
        copied: ModelGraph = plain.__new__(plain)
        if plain is not own:
            kept = {name: it for name, it in vars(own).items() if isinstance(it, property) or name == "__getstate__"}
            copied.__class__ = type(own.__name__, (type(copied),), kept)
        memo[id(self)] = copied
        with quiet():  # torch warns of what it does itself
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
            copied.graph = copied.__dict__["_graph"]
        return copied

    def recompile(self) -> Any:
        # In the class that a parametrization derived its own from: that is what stays when it is removed, and calls of
        # GraphModule's never end in a class that was derived from a compiled one.
        own = type(self)
        if parametrize.is_parametrized(self):
            self.__class__ = own.__bases__[0]
        code = super().recompile()
        self.__class__ = own
        return code

    @property
    def training(self) -> bool:
        """Whether dropout and batch norm train, however that was switched."""
        return bool(self.__dict__.get("_trains", False))

    @training.setter
    def training(self, mode: bool) -> None:
        changed = False
        for node in self.graph.nodes if "_graph" in self.__dict__ else ():
            name = node.meta.get("trains")
            if name and arguments(node)[name] != mode:
                set_arguments(node, **{name: mode})
                changed = True
        if changed:
            self.recompile()
        self.__dict__["_trains"] = bool(mode)


def graph_module(model: nn.Module, inputs: Inputs) -> ModelGraph:
    """The model as a graph that holds the model's own parameters and buffers; one that is a graph already as it is.

    Attention is spelled out as the products and the softmax that it is made of.

    Args:
        model: any model torch.export can follow; in evaluation mode while it is captured.
        inputs: an example of its inputs.
    Raises:
        GraphError: torch.export cannot follow the model.
    """
    if isinstance(model, ModelGraph):
        return model
    trace = capture(model, inputs)
    graph, _ = copied(trace)
    for node in list(graph.nodes):
        if node.op == "call_function" and operation_of(node) == "scaled_dot_product_attention":
            _spell_out(node)
    made = standing(trace, graph, trace.tensors)
    made.train(model.training)
    return made


def left_behind(model: nn.Module) -> dict[str, list[str]]:
    """What a captured graph of a model does not do in training though the model does: by what it is, the modules."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        name = name or type(module).__name__
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            found.setdefault("attention is without dropout", []).append(name)
        if isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats:
            found.setdefault("statistics of batch norms with momentum=None stay as they are", []).append(name)
        if not type(module).__module__.startswith("torch.nn.") and _asks_for_training(module):
            what = "what the code does only in training, other than dropout and batch norms, is not in it"
            found.setdefault(what, []).append(name)
    return found


def _asks_for_training(module: nn.Module) -> bool:
    try:
        return ".training" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # code that is in no file
        return False


def copied(trace: Trace) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a captured graph to be changed, and by old node the new one; checks of types are left out."""
    old = trace.graph.graph
    graph = fx.Graph()
    new_of: dict[fx.Node, fx.Node] = {}
    graph._codegen = old._codegen  # how arguments and answers are packed; nothing changes it
    output = graph.graph_copy(old, new_of, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0])
    for node in old.nodes:
        if node.op != "call_function" or node not in new_of:
            continue
        operation = operation_of(node)
        if operation == "_assert_tensor_metadata":
            graph.erase_node(new_of[node])
        if (name := _TRAINING.get(operation)) and arguments(node)[name] is False:
            new_of[node].meta["trains"] = name
    return graph, new_of


def standing(trace: Trace, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> ModelGraph:
    """A changed copy of a captured graph as a module in evaluation mode.

    Args:
        trace: what was captured.
        graph: the changed copy.
        tensors: the tensors that it reads, by their shared names.
    """
    held: dict[str, Any] = {name: tensors[shared] for name, shared in trace.registered.items()}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in held:
            name = trace.names.get(node.target)
            held[node.target] = tensors[name] if name is not None else attribute(trace.graph, node.target)
    graph.lint()
    module = ModelGraph({node.target: held[node.target] for node in graph.nodes if node.op == "get_attr"}, graph)
    for registry in (module._modules, module._parameters, module._buffers):
        registry.clear()  # and once more, in the model's order and under all of its names
    for name, value in held.items():
        register(module, name, value, persistent=name not in trace.transient)
    nn.Module.train(module, False)
    return module


def register(module: nn.Module, name: str, value: Any, *, persistent: bool = True) -> None:
    """Put a tensor, a module or a region's graph under a dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module().train(module.training))
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    elif isinstance(value, Tensor):
        module.register_buffer(leaf, value, persistent=persistent)
    else:
        setattr(module, leaf, value)


def set_arguments(node: fx.Node, **changes: Any) -> None:
    """Change arguments of an operation by name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, value in changes.items():
        at = names.index(name)
        if at < len(node.args):
            node.update_arg(at, value)
        else:
            node.update_kwarg(name, value)


def _spell_out(node: fx.Node) -> None:
    """Put matmul, softmax and matmul in the place of one attention operation, where its arguments allow."""
    given = arguments(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if given["is_causal"] or given["dropout_p"] or given["enable_gqa"]:
        return
    width = query.meta["val"].shape[-1]
    if not isinstance(width, int):
        return
    aten, graph = torch.ops.aten, node.graph
    scale = width**-0.5 if given["scale"] is None else given["scale"]

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = {k: v for k, v in node.meta.items() if k not in ("val", "trains")}
        with quiet(), torch.no_grad():
            made.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return made

    with graph.inserting_before(node):
        scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
        scores = call(aten.mul.Tensor, scores, scale)
        if mask is not None:
            if mask.meta["val"].dtype == torch.bool:
                barred = call(aten.logical_not.default, mask)
                scores = call(aten.masked_fill.Scalar, scores, barred, float("-inf"))
            else:
                scores = call(aten.add.Tensor, scores, mask)
        made = call(aten.matmul.default, call(aten.softmax.int, scores, -1), value)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
