"""Where the constant of a layer's answers can go: its own bias, or the mean of the batch norm behind it.

A layer that is fitted to answers together with a constant need not spend its weights on their means. Convolutions in
front of batch norms have no bias as a rule, and what a norm subtracts does the same: ``norm(y + b)`` is the norm of y
with b less in its running mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from featherweight.batch import Inputs, mode, tensors_in
from featherweight.forms import Layer, Masked, beneath, parametrized


def norms_behind(model: nn.Module, layers: Collection[str], inputs: Inputs, biased: bool = False) -> dict[str, str]:
    """The batch norm that takes a layer's answer and alone reads it, by the layer's name, as one run shows.

    Args:
        model: the network; it stays as it is.
        layers: names of layers; of attention's own weights nothing is said.
        inputs: an example.
        biased: whether to look behind layers that have a bias too.
    """
    modules = dict(model.named_modules())
    wanted = {n: modules[n] for n in layers if n in modules and (biased or cast(Layer, modules[n]).bias is None)}
    norms = {n: m for n, m in modules.items() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not wanted or not norms:
        return {}
    watch, taken, calls = _Reads(), dict[str, str](), Counter[str]()
    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        stack.enter_context(torch.no_grad())

        def answered(name: str) -> Any:
            def hook(module: nn.Module, args: Any, answer: Any) -> None:
                calls[name] += 1
                watch.answers[id(answer)] = answer, name

            return hook

        def reached(norm: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                calls[norm] += 1
                name = watch.answers[id(args[0])][1] if args and id(args[0]) in watch.answers else None
                # What Linear layers give token by token, batch norms take for channels of something else.
                if name is not None and (not isinstance(wanted[name], nn.Linear) or args[0].ndim == 2):
                    taken[name] = norm

            return hook

        for name, module in wanted.items():
            stack.callback(module.register_forward_hook(answered(name)).remove)
        for name, module in norms.items():
            stack.callback(module.register_forward_pre_hook(reached(name)).remove)
        stack.enter_context(watch)
        inputs.on(model).into(model)
    once = {name for name, count in calls.items() if count == 1}
    return {n: norm for n, norm in taken.items() if n in once and norm in once and watch.reads[n] == 1}


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read the layers' answers."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers: dict[int, tuple[Tensor, str]] = {}  # held, so that no other tensor comes to have its place
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = {id(tensor) for tensor in tensors_in((args, kwargs))} & self.answers.keys()
        self.reads.update(self.answers[place][1] for place in found)
        return operation(*args, **(kwargs or {}))


def turn(model: nn.Module, layers: Collection[str], inputs: Inputs) -> list[str]:
    """Make the factors of the batch norms behind layers positive, in place: outputs of the layers change their signs.

    Folded into a layer whose weight lies on a grid, a negative factor would ask for opposites that the grid does not
    have. The model's answers stay as they are.

    Args:
        model: the network.
        layers: names of layers whose weights are their own; those that are confined to more than a mask stay.
        inputs: an example.
    Returns:
        Names of the layers that were turned.
    """
    found = []
    for name, behind in norms_behind(model, layers, inputs, biased=True).items():
        layer, norm = cast(Layer, model.get_submodule(name)), cast(_BatchNorm, model.get_submodule(behind))
        held = parametrized(layer)
        own = set(held) <= {"weight"} and all(isinstance(c, Masked) for each in held.values() for c in each)
        if not own or norm.weight is None or not bool((norm.weight < 0).any()):
            continue
        with torch.no_grad():
            signs = torch.where(norm.weight < 0, -1.0, 1.0)
            weight = beneath(layer, "weight")
            weight.mul_(signs.to(weight).reshape(-1, *(1 for _ in weight.shape[1:])))
            for tensor in (layer.bias, norm.weight, cast(Tensor, norm.running_mean)):
                if tensor is not None:
                    tensor.mul_(signs.to(tensor))
        found.append(name)
    return found


def with_bias(layer: Layer) -> Layer:
    """The layer itself with a bias of zeros: its tensors are the layer's own."""
    made = type(layer).__new__(type(layer))  # what is parametrized cannot be copied by copy.copy
    made.__dict__.update(layer.__dict__)
    zeros = layer.weight.new_zeros(layer.weight.shape[0])
    made.__dict__["_parameters"] = {**layer._parameters, "bias": nn.Parameter(zeros, requires_grad=False)}
    return made


def without_bias(values: Mapping[str, Tensor], known: Collection[str]) -> tuple[dict[str, Tensor], Tensor]:
    """A fitted layer's tensors without the bias that it was lent, and that bias.

    Args:
        values: of the layer with a bias.
        known: what the same has without.
    """
    (lent,) = values.keys() - set(known)
    return {key: value for key, value in values.items() if key != lent}, values[lent]


def moved(norm: nn.Module, constant: Tensor) -> None:
    """Let the norm's mean take up what was to be added to what reaches it, in place."""
    mean = cast(Tensor, norm.running_mean)
    mean.sub_(constant.to(mean))
