"""The closed vocabulary of changes of form. Nothing else changes what a network is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from featherweight.errors import ArtifactError, EditError, did_you_mean
from featherweight.forms import Constraint, Form, beneath
from featherweight.graph import GraphError, Narrowing


class Edit(ABC):
    """One change of a network's form, as data. Values travel in the state dict, not in the edit's JSON."""

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """Make the change, and return the changed model: the same one, changed in place, wherever that can be done.

        Raises:
            EditError: the edit does not fit this model.
        """

    @abstractmethod
    def describe(self) -> str:
        """The change in a few words."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The change as JSON-ready data."""


@dataclass(frozen=True)
class Replace(Edit):
    """Put a layer of another form in the place of a layer, wherever the model holds it.

    Attributes:
        layer: the layer's name.
        form: what to put there.
        values: the new layer's state dict; None leaves it uninitialised, for a state dict loaded later.
    """

    layer: str
    form: Form
    values: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        layer = find(model, self.layer)
        if getattr(layer, "is_form", False):
            raise EditError(f"{self.layer!r} is a {type(layer).__name__} already: it was replaced before")
        replacement = self.form.build(layer)
        if self.values is not None:
            try:
                replacement.load_state_dict(dict(self.values))
            except RuntimeError as error:
                raise EditError(f"the values for {self.layer!r} are not those of {self.form}: {error}") from error
        put(model, layer, replacement)
        return model

    def describe(self) -> str:
        return f"{self.layer}: {self.form}"

    def to_json(self) -> dict[str, Any]:
        return {"edit": "Replace", "layer": self.layer, "form": self.form.to_json()}


@dataclass(frozen=True)
class Constrain(Edit):
    """Confine the values of one tensor of a layer, above the constraints that are on it.

    Attributes:
        layer: the layer's name.
        constraint: what to confine its tensor to.
        values: the layer's whole state dict afterwards; None leaves it as it is, for a state dict loaded later.
    """

    layer: str
    constraint: Constraint
    values: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        layer = find(model, self.layer)
        made = self.constraint.put_on(layer)
        if self.values is not None:
            try:
                layer.load_state_dict(dict(self.values))
            except RuntimeError as error:
                raise EditError(f"the values for {self.layer!r} are not those of {self.constraint}: {error}") from error
            # Not the confined tensor's, which cannot be made of such as they should not be.
            made.check(beneath(layer, self.constraint.tensor).shape)
        return model

    def describe(self) -> str:
        return f"{self.layer}: {self.constraint}"

    def to_json(self) -> dict[str, Any]:
        return {"edit": "Constrain", "layer": self.layer, "constraint": self.constraint.to_json()}


@dataclass(frozen=True)
class Leave(Edit):
    """Leave a layer as it is, and say why.

    Attributes:
        layer: the layer's name.
        reason: why, as the user should read it.
    """

    layer: str
    reason: str

    def apply(self, model: nn.Module) -> nn.Module:
        return model

    def describe(self) -> str:
        return f"{self.layer}: left as it is ({self.reason})"

    def to_json(self) -> dict[str, Any]:
        return {"edit": "Leave", "layer": self.layer, "reason": self.reason}


@dataclass(frozen=True)
class Narrow(Edit):
    """Take slices that go together out of every tensor they lie in.

    Attributes:
        narrowing: what goes, where, and in which form the narrowed model is kept.
    """

    narrowing: Narrowing

    def apply(self, model: nn.Module) -> nn.Module:
        try:
            return self.narrowing.apply(model)
        except GraphError as error:
            raise EditError(str(error)) from error

    def describe(self) -> str:
        form = "" if self.narrowing.form == "module" else f", as a graph: {self.narrowing.why}"
        return f"{len(self.narrowing.kept)} groups narrowed{form}"

    def to_json(self) -> dict[str, Any]:
        return {"edit": "Narrow", "narrowing": self.narrowing.to_json()}


def remade(layer: str, form: Form, values: Mapping[str, Tensor] | None = None) -> Replace | Constrain:
    """The edit that gives a layer this form: in its place, or on one of its tensors."""
    return Constrain(layer, form, values) if isinstance(form, Constraint) else Replace(layer, form, values)


def from_json(data: Mapping[str, Any]) -> Edit:
    """The edit back from its JSON.

    Raises:
        ArtifactError: not an edit of this version.
    """
    match data:
        case {"edit": "Replace", "layer": str(layer), "form": Mapping() as form, **rest} if not rest:
            return Replace(layer, Form.from_json(form))
        case {"edit": "Constrain", "layer": str(layer), "constraint": Mapping() as form, **rest} if not rest:
            constraint = Form.from_json(form)
            if isinstance(constraint, Constraint):
                return Constrain(layer, constraint)
        case {"edit": "Leave", "layer": str(layer), "reason": str(reason), **rest} if not rest:
            return Leave(layer, reason)
        case {"edit": "Narrow", "narrowing": Mapping() as narrowing, **rest} if not rest:
            return Narrow(Narrowing.from_json(narrowing))
    raise ArtifactError(f"this is not an edit that this version knows: {dict(data)}")


def replay(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """A model in the form that the edits made of its like, changed in place where it can be; values come afterwards."""
    for edit in edits:
        model = edit.apply(model)
    return model


def find(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name.

    Raises:
        EditError: the model has none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in model.named_modules() if known]
        message = f"{type(model).__name__} has no layer {name!r}{did_you_mean(name, known)}"
        raise EditError(message) from None


def put(model: nn.Module, layer: nn.Module, replacement: nn.Module) -> None:
    """Put `replacement` in every place that holds `layer`."""
    if layer is model:
        raise EditError("the model itself is one layer: wrap it in nn.Sequential to have a place to put another")
    for parent in list(model.modules()):
        # Not named_children: of a layer that a module holds twice it gives the first name only.
        for name, child in list(parent._modules.items()):
            if child is layer:
                setattr(parent, name, replacement)
    for parent in model.modules():
        # The fused paths of PyTorch's encoder would take the layer's dense weight past the layer: these flags of theirs
        # switch them off where they would.
        if isinstance(parent, nn.TransformerEncoderLayer) and replacement in set(parent.modules()):
            parent.activation_relu_or_gelu = 0
        if isinstance(parent, nn.TransformerEncoder) and replacement in set(parent.modules()):
            parent.use_nested_tensor = False
