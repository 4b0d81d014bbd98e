"""SmoothQuant: what is hard to quantize in a Linear layer's inputs is moved into its weights.

Xiao et al., SmoothQuant: Accurate and efficient post-training quantization for large language models, 2023,
arxiv.org/abs/2211.10438. A layer norm's gain and bias are divided, channel by channel, by what the columns of all
Linear layers behind it are multiplied by; the network's answers stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs, mode
from featherweight.graph import GraphError
from featherweight.graph.trace import Trace, capture
from featherweight.quantize.equalization import name_of, operation_of


@dataclass(frozen=True)
class Fan:
    """A layer norm and the Linear layers that read it, and nothing else does.

    Attributes:
        weight: name of the norm's gain.
        bias: name of its bias, or None.
        linears: names of the layers' weights, (outputs, channels).
    """

    weight: str
    bias: str | None
    linears: tuple[str, ...]


def smooth(model: nn.Module, inputs: Inputs, batches: Iterable[Inputs], strength: float = 0.5) -> tuple[list[Fan], str]:
    """Smooth what goes into all Linear layers behind layer norms, in place; the model's answers stay what they are.

    Args:
        model: the network; norms and Linear weights change their values.
        inputs: an example.
        batches: calibration inputs, on the model's device.
        strength: how much of the inputs' unevenness goes into the weights, 0 to 1 (the paper's α).
    Returns:
        What was smoothed, and why nothing was.
    """
    try:
        trace = capture(model, inputs)
    except GraphError as error:
        return [], str(error)
    found = fans(trace)
    if not found:
        return [], "no layer norm is read by Linear layers alone"
    tensors = dict(model.named_parameters())
    reach = _input_reach(model, [fan.linears[0].rpartition(".")[0] for fan in found], batches)
    done = []
    with torch.no_grad():
        for fan in found:
            most = reach.get(fan.linears[0].rpartition(".")[0])
            if most is None:
                continue
            columns = torch.stack([tensors[name].abs().amax(0) for name in fan.linears]).amax(0)
            scale = smoothing(most, columns, strength)
            for name in (fan.weight, fan.bias):
                if name is not None:
                    tensors[name].div_(scale.to(tensors[name].dtype))
            for name in fan.linears:
                tensors[name].mul_(scale.to(tensors[name].dtype))
            done.append(fan)
    return done, "" if done else "no calibration batch reached a Linear layer behind a layer norm"


def smoothing(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """What inputs are divided and weights multiplied by: ``max|x|^α / max|w|^(1 − α)``, equation 4.

    Args:
        inputs: the greatest magnitude of every channel of the inputs, (channels,).
        weights: the greatest magnitude of every column of the weights, (channels,).
        strength: α.
    Returns:
        (channels,), 1 where a channel or a column is all zero.
    """
    usable = (inputs > 0) & (weights > 0)
    scale = inputs.double().pow(strength) / weights.double().clamp_min(1e-300).pow(1 - strength)
    return torch.where(usable, scale.clamp(1e-5, 1e5), 1)


def fans(trace: Trace) -> list[Fan]:
    """All layer norms whose readers are Linear layers, in the graph's order."""
    found = []
    for node in trace.graph.graph.nodes:
        if operation_of(node) != "layer_norm" or len(node.args) < 3:
            continue
        weight, bias = name_of(trace, node, 2), name_of(trace, node, 3)
        has_bias = len(node.args) > 3 and node.args[3] is not None
        readers = list(node.users)
        linear = [r for r in readers if operation_of(r) == "linear" and r.args[0] is node]
        names = [name_of(trace, reader, 1) for reader in linear]
        if weight and (bias or not has_bias) and readers and len(linear) == len(readers) and all(names):
            found.append(Fan(weight, bias, tuple(name for name in names if name)))
    return found


def _input_reach(model: nn.Module, layers: Iterable[str], batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """The greatest magnitude of every channel that goes into some Linear layers."""
    reach: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            most = x.detach().abs().reshape(-1, x.shape[-1]).amax(0)
            reach[name] = torch.maximum(reach[name], most) if name in reach else most

        return hook

    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        stack.enter_context(torch.no_grad())
        for name in layers:
            handle = model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)  # type: ignore[arg-type]
            stack.callback(handle.remove)
        for given in batches:
            given.into(model)
    return reach
