"""SmoothQuant: what is hard to quantize in a Linear layer's inputs is moved into its weights.

Xiao et al., SmoothQuant: Accurate and efficient post-training quantization for large language models, 2023,
arxiv.org/abs/2211.10438. A layer norm's gain and bias are divided, channel by channel, by what the columns of all
Linear layers behind it are multiplied by; the network's answers stay what they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from featherweight.batch import Inputs, mode
from featherweight.edits import Edit, Leave
from featherweight.forms import parametrized
from featherweight.graph import GraphError
from featherweight.graph.trace import Trace, capture
from featherweight.layers import layer_names, matches, settled, unmatched
from featherweight.quantize.equalization import alike, answers, name_of, operation_of
from featherweight.step import Stage, Step
from featherweight.study import Study
from featherweight.task import Task

NORMS = ("layer_norm", "rms_norm")
# What hands every channel on as it is.
PASSING = ("dropout", "clone", "contiguous", "detach", "alias")


@dataclass(frozen=True)
class SmoothQuant(Step):
    """Even out what goes into the Linear layers behind layer norms, for `Static`, `Dynamic` or `QAT` after it.

    Values change and answers do not: channels that reach far are divided in the layer norm, and multiplied in the
    columns of all Linear layers that read it, the projections of `nn.MultiheadAttention` among them. A layer norm that
    anything else reads stays as it is. Nothing takes fewer bytes for it.

    Attributes:
        alpha: how much of the inputs' unevenness goes into the weights, from 0 to 1: the paper's α.
        samples: how many calibration samples to look at.
        ignore: patterns of layers to leave alone, and with them all that read the same layer norm.
    """

    alpha: float = 0.5
    samples: int = 64
    ignore: tuple[str, ...] = ()

    stage: ClassVar[Stage | None] = None

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if not 0 <= self.alpha <= 1:
            found.append(f"alpha is {self.alpha:g}: it must be from 0 to 1")
        if self.samples < 1:
            found.append("samples must be at least 1")
        names = [*layer_names(model, inside=True), *(_layer_of(name) for name, _ in model.named_parameters())]
        return found + unmatched(self.ignore, list(dict.fromkeys(names)))

    def edits(self, study: Study) -> Iterator[Edit]:
        """Smooth in place, and say which layers were left alone and why; no edits of form."""
        model, task = study.model, study.task
        try:
            found, left = fans(capture(model, task.inputs().on(model)))
        except GraphError as error:
            found, left = [], dict.fromkeys(layer_names(model, inside=True), str(error))
        kept = []
        for fan in found:
            layers = [_layer_of(name) for name in fan.linears]
            if stays := [name for name in layers if matches(name, self.ignore)]:
                left |= dict.fromkeys(layers, f"{stays[0]} reads the same layer norm, and is ignored")
            elif not isinstance(model.get_submodule(_layer_of(fan.weight)), nn.LayerNorm | nn.RMSNorm):
                left |= dict.fromkeys(layers, "the layer norm in front of it is no module")
            else:
                kept.append(fan)
        done = smooth(model, kept, task.batches(model, self.samples), self.alpha, task.inputs())
        lost = [_layer_of(name) for fan in kept if fan not in done for name in fan.linears]
        left |= dict.fromkeys(lost, "no calibration sample reached it, or the answers would not have stayed the same")
        smoothed = {_layer_of(name) for fan in done for name in fan.linears}
        for name in layer_names(model, inside=True):
            if name not in smoothed and name not in left:
                left[name] = _reason(model.get_submodule(name))
        yield from (
            Leave(name, "ignored, as asked" if matches(name, self.ignore) else reason) for name, reason in left.items()
        )
        study.trained = bool(done)
        if done:
            norms = f"{len(done)} layer norm{'s' if len(done) > 1 else ''}"
            study.notes.append(f"layers smoothed behind {norms}: {', '.join(sorted(smoothed))}")
            if not task.has_calibration:
                study.notes.append("how far inputs reach is that of the example: give calibration data")


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


def smooth(
    model: nn.Module, found: Collection[Fan], batches: Iterable[Inputs], strength: float, inputs: Inputs
) -> list[Fan]:
    """Smooth what goes into Linear layers behind layer norms, in place; the model's answers stay what they are.

    Args:
        model: the network; norms and Linear weights change their values.
        found: where.
        batches: calibration inputs, on the model's device.
        strength: how much of the inputs' unevenness goes into the weights, 0 to 1 (the paper's α).
        inputs: an example, that answers are compared on.
    Returns:
        What was smoothed: all that a batch has reached, or nothing where answers would not have stayed the same.
    """
    tensors = dict(model.named_parameters())
    reach = _reach(model, [_layer_of(fan.weight) for fan in found], batches)
    done = [fan for fan in found if _layer_of(fan.weight) in reach]
    touched = {name for fan in done for name in (fan.weight, fan.bias, *fan.linears) if name is not None}
    kept = {name: tensors[name].detach().clone() for name in touched}
    before = answers(model, inputs)
    with torch.no_grad():
        for fan in done:
            columns = torch.stack([tensors[name].abs().amax(0) for name in fan.linears]).amax(0)
            scale = smoothing(reach[_layer_of(fan.weight)], columns, strength)
            for name in (fan.weight, fan.bias):
                if name is not None:
                    tensors[name].div_(scale.to(tensors[name].dtype))
            for name in fan.linears:
                tensors[name].mul_(scale.to(tensors[name].dtype))
        if alike(answers(model, inputs), before, kept.values()):
            return done
        for name, value in kept.items():
            tensors[name].copy_(value)
    return []


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


def fans(trace: Trace) -> tuple[list[Fan], dict[str, str]]:
    """All layer norms that Linear layers alone read, in the graph's order; and other Linear layers, with the reason."""
    read: dict[fx.Node, list[fx.Node]] = {}
    left: dict[str, str] = {}
    for node in trace.graph.graph.nodes:
        if operation_of(node) != "linear":
            continue
        source = node.args[0]
        while _passes(source):
            source = source.args[0]
        if operation_of(source) in NORMS:
            read.setdefault(source, []).append(node)
        else:
            left |= _named(trace, [node], "no layer norm stands directly in front of it")
    found = []
    for norm, linears in read.items():
        names = [name_of(trace, linear, 1) for linear in linears]
        weight, bias = name_of(trace, norm, 2), name_of(trace, norm, 3)
        has_bias = operation_of(norm) == "layer_norm" and len(norm.args) > 3 and norm.args[3] is not None
        if set(_readers(norm)) != set(linears):
            left |= _named(trace, linears, "something else reads the layer norm in front of it too")
        elif weight is None or (has_bias and bias is None):
            left |= _named(trace, linears, "the layer norm in front of it has no gain of its own")
        elif not all(names):
            left |= _named(trace, linears, "a weight behind its layer norm is shared, or confined by an earlier step")
        else:
            found.append(Fan(weight, bias if has_bias else None, tuple(name for name in names if name)))
    return found, left


def _named(trace: Trace, linears: Iterable[fx.Node], reason: str) -> dict[str, str]:
    """The reason by the names of those layers whose weight the model keeps as it is."""
    reads = [node.args[1] for node in linears]
    return {
        _layer_of(trace.names[str(x.target)]): reason for x in reads if isinstance(x, fx.Node) and x.op == "get_attr"
    }


def _passes(node: fx.Node) -> bool:
    """Whether every channel of what goes in comes out, and the last axis is theirs as before."""
    operation = operation_of(node)
    if operation == "transpose":
        axes = node.meta["val"].ndim
        return all(axis % axes != axes - 1 for axis in node.args[1:3])
    return operation in PASSING


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """All that computes with a value, behind what only passes it on."""
    for user in node.users:
        if _passes(user):
            yield from _readers(user)
        else:
            yield user


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _reason(layer: nn.Module) -> str:
    """Why a layer stays of which the graph tells nothing."""
    if not isinstance(layer, nn.Linear):
        return "only Linear layers behind a layer norm are smoothed"
    return settled(layer) or ("its weight is computed" if parametrized(layer) else "the example never calls it")


def _reach(model: nn.Module, norms: Iterable[str], batches: Iterable[Inputs]) -> Mapping[str, Tensor]:
    """The greatest magnitude of every channel that comes out of some layer norms."""
    reach: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            most = output.detach().abs().reshape(-1, output.shape[-1]).amax(0)
            reach[name] = torch.maximum(reach[name], most) if name in reach else most

        return hook

    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        stack.enter_context(torch.no_grad())
        for name in norms:
            stack.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)  # type: ignore[arg-type]
        if stack:
            for given in batches:
                given.into(model)
    return reach
