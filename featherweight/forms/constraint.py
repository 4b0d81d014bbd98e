"""What the values of a tensor can be confined to: zeros in some places, a grid, a table.

A constraint is built as one of PyTorch's own parametrizations, so it stacks on others, trains (gradients go to the
tensor beneath), is copied with its layer, and its values travel in the state dict.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.errors import EditError
from featherweight.forms.form import Form, without_data


@dataclass(frozen=True)
class Stored:
    """What a tensor takes where it is kept, before entropy coding.

    Attributes:
        values: how many of its values are written.
        bits: of each of them.
        beside: bits of positions, scales and tables.
    """

    values: int
    bits: float
    beside: float = 0.0

    @property
    def bytes(self) -> int:
        """Whole bytes of all of it."""
        return -int(-(self.values * self.bits + self.beside) // 8)


class Constrained(nn.Module):
    """The base of every parametrization that a constraint builds: a tensor of any values → one that is confined.

    Attributes:
        all_its_own: whether the confined values come of its own parameters and buffers, whatever lies beneath.
    """

    all_its_own: ClassVar[bool] = False

    def forward(self, original: Tensor) -> Tensor:
        """The tensor beneath → the confined one, of the same shape and type."""
        raise NotImplementedError

    def right_inverse(self, value: Tensor) -> Tensor:
        """What lies beneath when a value is assigned: the value itself."""
        return value

    def stored(self, before: Stored) -> Stored:
        """What the tensor takes with this constraint, given what it takes with those beneath it."""
        raise NotImplementedError

    def codes(self, value: Tensor) -> Tensor | None:
        """Whole numbers, int64 and of the same shape, that stand for confined values; None where it has no such.

        Values that theirs stand for to the last bit are confined ones, which the constraint gives as they are.
        """
        return None

    def decoded(self, codes: Tensor) -> Tensor:
        """The values that the codes stand for: exactly those that `codes` was given."""
        raise NotImplementedError

    def numbers(self, value: Tensor, zeros: Tensor) -> Tensor | None:
        """The codes less those of zeros, of which files are made; `zeros` is a tensor of them like the value."""
        codes = self.codes(value)
        return None if codes is None else codes - cast(Tensor, self.codes(zeros))

    def numbered(self, numbers: Tensor, zeros: Tensor) -> Tensor:
        """The values that `numbers` was given."""
        return self.decoded(numbers + cast(Tensor, self.codes(zeros)))

    def check(self, shape: torch.Size) -> None:
        """See whether the values in the state dict are such as the form says.

        Args:
            shape: of the tensor that is confined.
        Raises:
            EditError: they are not.
        """


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, original: Tensor, confined: Tensor) -> Tensor:
        return confined.view_as(confined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def straight_through(original: Tensor, confined: Tensor) -> Tensor:
    """The confined values, whose gradients go to the original as they are.

    Bengio, Léonard & Courville, Estimating or propagating gradients through stochastic neurons, 2013,
    arxiv.org/abs/1308.3432.
    """
    given: Tensor = _StraightThrough.apply(original, confined)  # type: ignore[no-untyped-call]
    return given


@dataclass(frozen=True)
class Constraint(Form):
    """A layer as it is, one of its tensors confined.

    Attributes:
        tensor: the name of the tensor in its module.
    """

    tensor: str = field(default="weight", kw_only=True)

    @abstractmethod
    def parametrization(self, tensor: Tensor) -> Constrained:
        """The parametrization for a tensor like this one, on its device; its values come afterwards."""

    def blank(self, like: Tensor) -> Constrained:
        """The same before its values are there, which are about to be read from a file."""
        return self.parametrization(like)

    def build(self, layer: nn.Module, device: torch.device | str | None = None) -> nn.Module:
        """A copy of the layer with the constraint on its tensor, above those that are there."""
        meta = device is not None and torch.device(device).type == "meta"
        copied = without_data(layer) if meta else copy.deepcopy(layer)
        self.put_on(copied if meta or device is None else copied.to(device))
        return copied

    def put_on(self, layer: nn.Module) -> Constrained:
        """Put the constraint on the layer's tensor, in place, above those that are there; returns the parametrization.

        Raises:
            EditError: the layer has no such tensor.
        """
        tensor = getattr(layer, self.tensor, None)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise EditError(f"{type(layer).__name__} has no floating-point tensor {self.tensor!r} to put {self} on")
        made = self.parametrization(tensor.detach().requires_grad_(tensor.requires_grad)).to(tensor.device)
        with_own_class(layer, self.tensor)
        parametrize.register_parametrization(layer, self.tensor, made, unsafe=True)
        return made.train(layer.training)


def with_own_class(layer: nn.Module, tensor: str) -> None:
    """Before a parametrization is put on a tensor of a layer that others of its tensors have some: a class of its own.

    PyTorch is about to give the layer's class a property of the tensor's name, and copies of the layer share it.
    """
    if tensor not in getattr(layer, "parametrizations", {tensor: None}):
        own = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(type(layer).__name__, type(layer).__bases__, own)


def parametrized(module: nn.Module) -> Mapping[str, Any]:
    """A module's parametrizations, by the name of the tensor that they are on; also the user's own.

    In a captured graph a module of that name holds what they were made of, and none are left.
    """
    held = getattr(module, "parametrizations", None)
    return cast(Mapping[str, Any], held) if isinstance(held, nn.ModuleDict) else {}


def constraints_on(layer: nn.Module, tensor: str = "weight") -> list[Constrained]:
    """The constraints on a layer's tensor, from the lowest up."""
    held = parametrized(layer)
    return [c for c in held[tensor] if isinstance(c, Constrained)] if tensor in held else []


def beneath(layer: nn.Module, tensor: str = "weight") -> Tensor:
    """The parameter beneath the constraints of a layer's tensor; the tensor itself where there are none."""
    held = parametrized(layer)
    return cast(Tensor, held[tensor].original if tensor in held else getattr(layer, tensor))


def constrained_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every tensor that a constraint is on: the name of the module that has it, the module, and the tensor's name."""
    for name, module in model.named_modules():
        for tensor in parametrized(module):
            if constraints_on(module, tensor):
                yield name, module, tensor


def stored(layer: nn.Module, tensor: str) -> Stored:
    """What a confined tensor takes where it is kept."""
    original: Tensor = layer.parametrizations[tensor].original  # type: ignore[index, union-attr]
    taken = Stored(original.numel(), 8 * original.element_size())
    for constraint in constraints_on(layer, tensor):
        taken = constraint.stored(taken)
    return taken


def released(model: nn.Module) -> nn.Module:
    """A copy whose confined tensors are ordinary parameters of the same values; the model itself where none are."""
    if next(constrained_tensors(model), None) is None:
        return model
    plain = copy.deepcopy(model)
    for module in {id(module): module for _, module, _ in constrained_tensors(plain)}.values():
        _release(module)
    return plain


def _release(module: nn.Module) -> None:
    # Not torch's remove_parametrizations, which takes the tensor's property from a class that copies share.
    held = cast(Mapping[str, parametrize.ParametrizationList], module.parametrizations)
    values = {name: (getattr(module, name).detach().clone(), held[name].original) for name in held}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, (value, original) in values.items():
        if isinstance(original, nn.Parameter):
            module.register_parameter(name, nn.Parameter(value, original.requires_grad))
        else:
            module.register_buffer(name, value)
