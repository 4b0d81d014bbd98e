"""Batch norms folded into the layer in front of them, exactly: one layer then gives what the two gave.

Jacob et al., 2018, arxiv.org/abs/1712.05877, section 3.2: in evaluation a batch norm multiplies each output by
``γ / √(variance + ε)`` and adds a constant, and so can the layer's weight and bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from featherweight.graph.edges import value_names, weight_of
from featherweight.graph.module import ModelGraph, register
from featherweight.graph.rules.call import arguments, operation_of, read_by
from featherweight.graph.trace import GraphError, attribute

FOLDED_INTO = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# Factors of a layer's outputs → the same, to broadcast against its weight.
Spread = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Pair:
    """A batch norm and the layer in front of it."""

    layer: fx.Node
    norm: fx.Node
    weight: str


def foldable(graph: ModelGraph) -> tuple[list[str], dict[str, str]]:
    """Names of the batch norms that can be folded, and of those that cannot, with the reason."""
    able, left = [], {}
    for node, name in value_names(graph).items():
        if node.op == "call_function" and operation_of(node) == "batch_norm":
            found = _pair(node)
            if isinstance(found, str):
                left[name] = found
            else:
                able.append(name)
    return able, left


def fold(graph: ModelGraph, norms: Iterable[str], scaled: Callable[[str, Tensor, Spread], None]) -> None:
    """Fold batch norms into the layers in front of them, in place.

    Args:
        graph: the model.
        norms: names of the batch norms, as `foldable` gives them.
        scaled: multiplies a layer's weight; called with the tensor's name, a factor for every output (outputs,), and
            a function that spreads such factors over the weight.
    Raises:
        GraphError: there is no such batch norm, or it cannot be folded.
    """
    nodes = {name: node for node, name in value_names(graph).items()}
    for name in norms:
        pair = _pair(nodes[name]) if name in nodes else "there is no batch norm of this name"
        if isinstance(pair, str):
            raise GraphError(f"{name} cannot be folded into a layer: {pair}")
        norm = arguments(pair.norm)
        parts = [norm[part] for part in ("weight", "bias", "running_mean", "running_var")]
        _fold_one(graph, pair, scaled)
        unread = [str(part.target) for part in parts if part is not None]
        counter = f"{unread[-1].rpartition('.')[0]}.num_batches_tracked"
        _drop(graph, [*unread, counter])
    graph.recompile()


def factor_of(graph: ModelGraph, norm: str) -> tuple[str, Tensor, Spread]:
    """What folding a batch norm would multiply: the weight's name, a factor for every output, how to spread those.

    Args:
        graph: the model.
        norm: name of a batch norm, as `foldable` gives it.
    """
    pair = _pair(next(node for node, name in value_names(graph).items() if name == norm))
    assert isinstance(pair, _Pair)
    _, factor, spread = _factor(graph, pair)
    return pair.weight, factor, spread


def turn(graph: ModelGraph, norms: Iterable[str]) -> None:
    """Make the factors of batch norms positive, in place, answers unchanged: a layer's output changes its sign instead.

    A batch norm whose tensors others read too stays.

    Args:
        graph: the model.
        norms: names of batch norms, as `foldable` gives them, behind layers whose weights may change their signs.
    """
    readers: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] += len(node.users)
    nodes = {name: node for node, name in value_names(graph).items()}
    for name in norms:
        pair = _pair(nodes[name])
        assert isinstance(pair, _Pair)
        given = arguments(pair.norm)
        parts = (arguments(pair.layer).get("bias"), given["weight"], given["running_mean"])
        turned = [str(part.target) for part in parts if part is not None]
        if any(readers[target] > 1 for target in turned):
            continue
        _, factor, spread = _factor(graph, pair)
        signs = torch.where(factor < 0, -1.0, 1.0)
        with torch.no_grad():
            weight = _beneath(graph, pair.weight)
            weight.mul_(spread(signs).to(weight.dtype))
            for target in turned:
                tensor = attribute(graph, target)
                tensor.mul_(signs.to(tensor.dtype))


def _pair(norm: fx.Node) -> _Pair | str:
    layer = norm.args[0]
    if not isinstance(layer, fx.Node) or layer.op != "call_function" or operation_of(layer) not in FOLDED_INTO:
        return "no layer stands in front of it"
    if len(layer.users) > 1:
        return "the layer in front of it is read by others too"
    given = arguments(norm)
    if given["running_mean"] is None or given["running_var"] is None:
        return "it keeps no running statistics"
    if operation_of(layer) == "linear" and layer.meta["val"].ndim != 2:
        return "it normalises another dimension than the layer's outputs"
    weight = weight_of(layer)
    if weight is None:
        return "the weight of the layer in front of it is computed"
    bias = arguments(layer).get("bias")
    readers = [layer.args[1], *([bias] if bias is not None else [])]
    if any(read_by(node) is not node or len(node.users) != 1 for node in readers if isinstance(node, fx.Node)):
        return "the layer in front of it shares its weight or its bias"
    return _Pair(layer, norm, weight)


def _factor(graph: ModelGraph, pair: _Pair) -> tuple[Tensor, Tensor, Spread]:
    """The mean that a batch norm takes off, its factor for every output, and how to spread that over the weight."""
    given, own = arguments(pair.norm), arguments(pair.layer)
    mean = attribute(graph, str(given["running_mean"].target)).detach().double()
    factor = _held(graph, given["weight"], torch.ones_like(mean))
    factor = factor / (_held(graph, given["running_var"], torch.ones_like(mean)) + given["eps"]).sqrt()
    shape, groups = attribute(graph, pair.weight).shape, own.get("groups", 1)
    transposed = operation_of(pair.layer).startswith("conv_transpose")

    def spread(factors: Tensor) -> Tensor:
        """Factors of the outputs over the weight's shape."""
        ones = [1] * (len(shape) - 2)
        if not transposed:
            return factors.reshape(-1, 1, *ones)
        each = factors.reshape(groups, 1, -1).expand(groups, shape[0] // groups, -1)
        return each.reshape(shape[0], -1, *ones)

    return mean, factor, spread


def _held(graph: ModelGraph, node: fx.Node | None, default: Tensor) -> Tensor:
    return default if node is None else attribute(graph, str(node.target)).detach().double()


def _fold_one(graph: ModelGraph, pair: _Pair, scaled: Callable[[str, Tensor, Spread], None]) -> None:
    own = arguments(pair.layer)
    mean, factor, spread = _factor(graph, pair)
    shift = _held(graph, arguments(pair.norm)["bias"], torch.zeros_like(mean)) - mean * factor
    scaled(pair.weight, factor, spread)
    bias = own.get("bias")
    had = _held(graph, bias, torch.zeros_like(mean))
    learns = isinstance(parameter := _beneath(graph, pair.weight), nn.Parameter) and parameter.requires_grad
    new = nn.Parameter((had * factor + shift).to(parameter.dtype), requires_grad=learns)
    name = str(bias.target) if bias is not None else pair.weight.rpartition(".")[0] + ".bias"
    register(graph, name.removeprefix("."), new)
    if bias is None:
        with graph.graph.inserting_before(pair.layer):
            read = graph.graph.create_node("get_attr", name.removeprefix("."))
        read.meta["val"] = new
        names = [a.name for a in pair.layer.target._schema.arguments]  # type: ignore[union-attr]
        at = names.index("bias")
        if len(pair.layer.args) > at:
            pair.layer.update_arg(at, read)
        else:
            pair.layer.update_kwarg("bias", read)
    pair.norm.replace_all_uses_with(pair.layer)
    graph.graph.erase_node(pair.norm)


def _beneath(graph: ModelGraph, name: str) -> Tensor:
    """The tensor under a name, beneath the parametrizations on it."""
    path, _, leaf = name.rpartition(".")
    holder = graph.get_submodule(path)
    stack = getattr(holder, "parametrizations", {})
    found: Tensor = stack[leaf].original if leaf in stack else getattr(holder, leaf)
    return found


def _drop(graph: ModelGraph, names: Collection[str]) -> None:
    """Take tensors out that nothing reads any more, and modules that are left empty."""
    for node in [n for n in graph.graph.nodes if n.op == "get_attr" and not n.users and n.target in names]:
        graph.graph.erase_node(node)
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name in set(names) - read:
        path, _, leaf = name.rpartition(".")
        try:
            holder = graph.get_submodule(path)
        except AttributeError:  # left empty and gone already
            continue
        holder._parameters.pop(leaf, None)
        holder._buffers.pop(leaf, None)
        while path and not (holder._parameters or holder._buffers or holder._modules):
            path, _, leaf = path.rpartition(".")
            holder = graph.get_submodule(path)
            del holder._modules[leaf]
