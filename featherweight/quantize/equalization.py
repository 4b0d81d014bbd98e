"""Cross-layer equalization: channels between two layers scaled so that both layers' weights reach equally far.

Nagel et al., Data-free quantization through weight equalization and bias correction, 2019, section 4.1,
arxiv.org/abs/1906.04721; Meller et al., Same, same but different, 2019, arxiv.org/abs/1902.01917. What the network
answers stays the same: what lies between the two layers, ReLU, pooling or a batch norm, passes a scale on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from featherweight.batch import Inputs, mode, tensors_in
from featherweight.graph import GraphError
from featherweight.graph.trace import Trace, capture

LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
# f(s x) = s f(x) for every s > 0, channel by channel.
HOMOGENEOUS = (
    "relu",
    "relu_",
    "leaky_relu",
    "leaky_relu_",
    "dropout",
    "dropout_",
    "clone",
    "contiguous",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
)
# A channel's two ranges may be brought nearer by this factor at most: beyond it they are noise.
MOST = 1e4
SWEEPS = 20


@dataclass(frozen=True)
class Link:
    """Two layers with nothing between them but what passes a scale on.

    Attributes:
        first: name of the weight before, (channels, inputs, *kernel).
        bias: name of its bias, or None.
        norm: names of weight, bias, running mean and running variance of a batch norm behind it, or None.
        epsilon: of that batch norm.
        second: name of the weight behind, (outputs, channels / groups, *kernel).
        groups: of the layer behind.
    """

    first: str
    bias: str | None
    norm: tuple[str, str, str, str] | None
    epsilon: float
    second: str
    groups: int


def equalize(model: nn.Module, inputs: Inputs) -> tuple[list[Link], str]:
    """Equalize all pairs of layers of a model, in place; its answers stay what they are.

    Args:
        model: the network; weights, biases and batch norms change their values.
        inputs: an example.
    Returns:
        The pairs, and why there are none, or none that were kept.
    """
    try:
        trace = capture(model, inputs)
    except GraphError as error:
        return [], str(error)
    found = links(trace)
    if not found:
        return [], "no two layers have only ReLU, pooling or batch norm between them"
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    touched = {name for link in found for name in (link.first, link.bias, *(link.norm or ()), link.second) if name}
    kept = {name: tensors[name].detach().clone() for name in touched}
    before = answers(model, inputs)
    with torch.no_grad():
        for _ in range(SWEEPS):
            if max(_balance(link, tensors) for link in found) < 1.01:
                break
    if alike(answers(model, inputs), before, kept.values()):
        return found, ""
    with torch.no_grad():
        for name, value in kept.items():
            tensors[name].copy_(value)
    return [], "the network's answers would not have stayed the same"


def links(trace: Trace) -> list[Link]:
    """All pairs of layers that can be equalized, in the graph's order."""
    return [link for node in trace.graph.graph.nodes if operation_of(node) in LAYERS for link in _behind(trace, node)]


def _behind(trace: Trace, node: fx.Node) -> Iterator[Link]:
    first, bias = name_of(trace, node, 1), name_of(trace, node, 2)
    if first is None or (bias is None and len(node.args) > 2 and node.args[2] is not None):
        return
    norm: tuple[str, str, str, str] | None = None
    epsilon, current, pooled = 0.0, node, False
    while len(current.users) == 1:
        (user,) = current.users
        if not user.args or user.args[0] is not current:
            return
        operation = operation_of(user)
        if operation == "batch_norm" and current is node:
            names = [name_of(trace, user, place) for place in (1, 2, 3, 4)]
            if any(name is None for name in names):
                return
            norm, epsilon = cast(tuple[str, str, str, str], tuple(names)), cast(float, user.args[7])
        elif operation in LAYERS:
            second = name_of(trace, user, 1)
            same = (operation == "linear") == (operation_of(node) == "linear") and not (
                pooled and operation == "linear"
            )
            if second is not None and same and second != first:
                groups = cast(int, user.args[6]) if operation != "linear" and len(user.args) > 6 else 1
                yield Link(first, bias, norm, epsilon, second, groups)
            return
        elif operation not in HOMOGENEOUS:
            return
        pooled |= "pool" in operation
        current = user


def operation_of(node: fx.Node) -> str:
    """The name of an ATen operation, without its overload; empty for what is none."""
    return str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else ""


def name_of(trace: Trace, node: fx.Node, place: int) -> str | None:
    """The one name of the tensor that an operation takes there, where nothing else reads it."""
    given = node.args[place] if len(node.args) > place else None
    if not isinstance(given, fx.Node) or given.op != "get_attr" or len(given.users) != 1:
        return None
    name = trace.names[str(given.target)]
    others = [key for key, shared in trace.registered.items() if shared == name]
    reads = [n for n in trace.graph.graph.nodes if n.op == "get_attr" and trace.names[str(n.target)] == name]
    return name if len(others) <= 1 and len(reads) == 1 else None


def _balance(link: Link, tensors: dict[str, Tensor]) -> float:
    """Equalize one pair; how unequal the most unequal channel was."""
    first, second = tensors[link.first], tensors[link.second]
    channels = first.shape[0]
    columns = second.reshape(link.groups, second.shape[0] // link.groups, channels // link.groups, -1)
    reach = _reach(first.flatten(1), 1)
    if link.norm is not None:
        weight, bias, mean, variance = (tensors[name] for name in link.norm)
        spread = (variance.double() + link.epsilon).sqrt()
        gain = (weight.double().abs() / spread).clamp_min(1e-12)
        reach = reach * gain
    taken = _reach(columns, (1, 3)).flatten()
    usable = (reach > 0) & (taken > 0)
    ratio = torch.where(usable, (reach / taken.clamp_min(1e-300)).clamp(1 / MOST, MOST), 1)
    scale = ratio.sqrt()
    if link.norm is None:
        first.copy_(_rows(first, 1 / scale))
        if link.bias is not None:
            tensors[link.bias].div_(scale.to(first.dtype))
    else:
        # As if the batch norm were folded: its gain goes into the weight, whose statistics change with it.
        rows = torch.where(gain > 1e-12, gain / scale, 1)
        first.copy_(_rows(first, rows))
        if link.bias is not None:
            tensors[link.bias].mul_(rows.to(first.dtype))
        mean.copy_(mean.double() * rows)
        variance.copy_(variance.double() * rows.square())
        now = (variance.double() + link.epsilon).sqrt()
        weight.copy_(weight.double() * now / (rows * spread) / scale)
        bias.copy_(bias.double() / scale)
    wider = scale.reshape(link.groups, 1, -1, 1).to(columns)
    second.copy_((columns * wider).reshape(second.shape))
    return float(torch.maximum(ratio, 1 / ratio).max())


def _reach(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return x.detach().abs().amax(dims).double()


def _rows(x: Tensor, factors: Tensor) -> Tensor:
    return x * factors.to(x.dtype).reshape(-1, *(1 for _ in x.shape[1:]))


def answers(model: nn.Module, inputs: Inputs) -> Sequence[Tensor]:
    """What a model answers to an example, in float64."""
    with torch.no_grad(), mode(model, training=False):
        found = tensors_in(inputs.on(model).into(model))
    return [t.double() for t in found if t.is_floating_point()]


def alike(after: Sequence[Tensor], before: Sequence[Tensor], changed: Iterable[Tensor]) -> bool:
    """Whether answers are the same, as far as the types of the tensors that were changed hold them."""
    wide = 1e-3 if all(t.dtype in (torch.float32, torch.float64) for t in changed) else 3e-2
    return all(float((a - b).norm()) <= wide * float(b.norm()) + 1e-12 for a, b in zip(after, before, strict=True))
