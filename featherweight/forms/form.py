"""What a layer can be made of. A form says how to build the cheaper layer; its values live in the state dict."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeGuard

import torch
from torch import nn

from featherweight.errors import ArtifactError, did_you_mean

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Form(ABC):
    """A frozen description of a layer's structure: enough to build it, without its values."""

    @abstractmethod
    def build(self, layer: nn.Module, device: torch.device | str | None = None) -> nn.Module:
        """A layer of this form that can stand in for `layer`, with uninitialised values.

        Args:
            layer: the layer to replace; gives sizes, strides, padding, dtype and which parameters are trained.
            device: where to allocate; the layer's own device by default, ``"meta"`` to only look at sizes.
        Raises:
            EditError: this form is not defined for such a layer.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The form in a few words, such as ``rank 12``."""

    def to_json(self) -> dict[str, Any]:
        """The form as JSON-ready data."""
        return {"form": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Form:
        """The form back from `to_json`.

        Raises:
            ArtifactError: no such form, or not its fields.
        """
        name, settings = data.get("form"), {k: v for k, v in data.items() if k != "form"}
        if name not in _KNOWN:
            _KNOWN.update((kind.__name__, kind) for kind in _kinds(Form))  # type: ignore[type-abstract]
        if name not in _KNOWN:
            raise ArtifactError(f"there is no form {name!r}{did_you_mean(str(name), _KNOWN)}")
        expected = {f.name for f in fields(_KNOWN[name])}
        if set(settings) != expected:
            raise ArtifactError(f"the form {name} has the fields {sorted(expected)}, not {sorted(settings)}")
        return _KNOWN[name](**settings)


# The forms that were looked for so far, and those beside them, by name.
_KNOWN: dict[str, type[Form]] = {}


def _kinds(kind: type[Form]) -> Iterator[type[Form]]:
    """All forms that can be built, derived from `kind` however far."""
    for derived in kind.__subclasses__():
        if not inspect.isabstract(derived):
            yield derived
        yield from _kinds(derived)


class FormModule(nn.Module):
    """The base of every layer we put in place of another; costs are counted for it as for one layer."""

    is_form: ClassVar[bool] = True


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether the module is a Linear or Conv layer, parametrized ones and subclasses included."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def without_data(module: nn.Module) -> nn.Module:
    """A copy on the meta device; the values are not copied on the way there."""
    empty: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    for parameter in module.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(module, empty)
