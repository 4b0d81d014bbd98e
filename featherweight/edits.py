"""The closed vocabulary of changes of form. Nothing else changes what a network is made of."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.batch import Inputs, sketched
from featherweight.errors import ArtifactError, EditError, did_you_mean
from featherweight.forms import (
    Constraint,
    Form,
    Gridded,
    Masked,
    Rounded,
    Rounding,
    beneath,
    constrained_tensors,
    constraints_on,
    parametrized,
    place,
    released,
)
from featherweight.graph import GraphError, ModelGraph, Narrowing, fold, graph_module, put_on_edges


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
        values: the layer's state dict afterwards, or all of it that is the tensor's; None leaves it as it is, for a
            state dict loaded later.
    """

    layer: str
    constraint: Constraint
    values: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        layer = find(model, self.layer)
        made = self.constraint.put_on(layer)
        if self.values is not None:
            wrong = f"the values for {self.layer!r} are not those of {self.constraint}"
            try:
                missing, unknown = layer.load_state_dict(dict(self.values), strict=False)
            except RuntimeError as error:
                raise EditError(f"{wrong}: {error}") from error
            missing = [key for key in missing if key.startswith(f"parametrizations.{self.constraint.tensor}.")]
            if missing or unknown:
                raise EditError(f"{wrong}: missing are {missing}, and unknown {unknown}")
            # Not the confined tensor's, which cannot be made of such as they should not be.
            made.check(beneath(layer, self.constraint.tensor).shape)
        return model

    def describe(self) -> str:
        tensor = self.constraint.tensor
        return f"{self.layer}{'' if tensor == 'weight' else f'.{tensor}'}: {self.constraint}".removeprefix(".")

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


@dataclass(frozen=True)
class Capture(Edit):
    """Keep the model as its graph from now on, in which every operation can be reached.

    Attributes:
        inputs: the example's shapes and types, to capture the graph with.
    """

    inputs: Mapping[str, Any] = field(repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        return as_graph(model, sketched(self.inputs))

    def describe(self) -> str:
        return "kept as a graph"

    def to_json(self) -> dict[str, Any]:
        return {"edit": "Capture", "inputs": dict(self.inputs)}


@dataclass(frozen=True)
class Fold(Edit):
    """Fold batch norms of a graph into the layers in front of them.

    Attributes:
        norms: the batch norms' names in the graph.
    """

    norms: tuple[str, ...]

    def apply(self, model: nn.Module) -> nn.Module:
        graph = _graph(model)
        try:
            fold(graph, self.norms, lambda name, factor, spread: _scale(graph, name, factor, spread))
        except GraphError as error:
            raise EditError(str(error)) from error
        return graph

    def describe(self) -> str:
        return f"{len(self.norms)} batch norms folded into the layers in front of them"

    def to_json(self) -> dict[str, Any]:
        return {"edit": "Fold", "norms": list(self.norms)}


@dataclass(frozen=True)
class Quantize(Edit):
    """Round what goes along edges of a graph.

    Attributes:
        edges: by the name of a value, how it is rounded, and the names of what reads it rounded; None for all that
            read it.
        values: by the name of a value, scale and zero point; None leaves them, for a state dict loaded later.
    """

    edges: Mapping[str, tuple[Rounding, tuple[str, ...] | None]]
    values: Mapping[str, tuple[Tensor, Tensor]] | None = field(default=None, compare=False, repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        graph = _graph(model)
        device = next((t.device for t in graph.parameters()), None)

        def make(name: str) -> Rounded:
            made = Rounded(self.edges[name][0], device)
            if self.values is not None and name in self.values:
                made.set_range(*self.values[name])
            return made

        try:
            put_on_edges(graph, {name: readers for name, (_, readers) in self.edges.items()}, make)
        except GraphError as error:
            raise EditError(str(error)) from error
        return graph

    def describe(self) -> str:
        kinds = Counter(str(rounding) for rounding, _ in self.edges.values())
        each = ", ".join(f"{count} to {kind}" for kind, count in kinds.items())
        return f"{len(self.edges)} activations rounded{f': {each}' if each else ''}"

    def to_json(self) -> dict[str, Any]:
        edges = {
            name: {"rounding": rounding.to_json(), "readers": None if readers is None else list(readers)}
            for name, (rounding, readers) in self.edges.items()
        }
        return {"edit": "Quantize", "edges": edges}

    @staticmethod
    def of_json(edges: Mapping[str, Any]) -> Quantize:
        """The edit back from its edges as JSON.

        Raises:
            ArtifactError: not such an edit of this version.
        """
        made: dict[str, tuple[Rounding, tuple[str, ...] | None]] = {}
        for name, edge in edges.items():
            match edge:
                case {"rounding": Mapping() as rounding, "readers": None | list() as readers, **rest} if not rest:
                    made[name] = (Rounding.from_json(rounding), None if readers is None else tuple(map(str, readers)))
                case _:
                    raise ArtifactError(f"this is not an edge that this version knows: {edge}")
        return Quantize(made)


def _graph(model: nn.Module) -> ModelGraph:
    if not isinstance(model, ModelGraph):
        raise EditError(f"{type(model).__name__} is no graph yet: Capture comes first")
    return model


def as_graph(model: nn.Module, inputs: Inputs) -> ModelGraph:
    """The model as a graph, its constraints on their tensors as before; one that is a graph already as it is.

    Args:
        model: the model.
        inputs: an example of its inputs.
    Raises:
        EditError: the graph cannot be captured.
    """
    if isinstance(model, ModelGraph):
        return model
    if not inputs.tensors():
        raise EditError(
            f"the graph of {type(model).__name__} cannot be captured without an example of its inputs: they have to be "
            "tensors and plain values, not nested in other containers"
        )
    held = [(name, tensor, constraints_on(module, tensor)) for name, module, tensor in constrained_tensors(model)]
    under = {(n, t): model.get_submodule(n).parametrizations[t].original for n, t, _ in held}  # type: ignore[index, union-attr]
    try:
        graph = graph_module(released(model), inputs)
    except GraphError as error:
        raise EditError(str(error)) from error
    for name, tensor, constraints in held:
        try:
            holder = graph.get_submodule(name)
        except AttributeError:  # a layer that the example never calls is not in the graph
            continue
        if tensor not in holder._parameters:
            continue
        setattr(holder, tensor, nn.Parameter(under[name, tensor].detach().clone(), under[name, tensor].requires_grad))
        for constraint in constraints:
            parametrize.register_parametrization(holder, tensor, copy.deepcopy(constraint), unsafe=True)
    return graph


UNFOLDED = (
    "the batch norm behind it cannot be folded into it; ignore the layer in the earlier step, or round it there by "
    "quantize.Weights or its kin with a scale for every output, or, for quantize.Static, give fold=False"
)


def _scale(graph: ModelGraph, name: str, factor: Tensor, spread: Callable[[Tensor], Tensor]) -> None:
    """Multiply a layer's weight by a factor for every output, exactly where the weight lies on a grid.

    Raises:
        EditError: a constraint would not hold any more.
    """
    path, _, leaf = name.rpartition(".")
    holder = graph.get_submodule(path)
    constraints = constraints_on(holder, leaf)
    for constraint in constraints:
        if isinstance(constraint, Gridded):
            form = constraint.form
            if form.axis is None or spread(factor).shape[form.axis] != len(factor):
                raise EditError(
                    f"{name} lies on a grid of {form}, which does not let every output have its own scale: {UNFOLDED}"
                )
            with torch.no_grad():
                each = factor.abs().to(constraint.scale.dtype)
                each = each.reshape(-1, *(1 for _ in constraint.scale.shape[1:]))
                constraint.scale.mul_(torch.where(each > 0, each, 1))
                if not form.symmetric:  # what changes its sign is counted from the other end
                    turned = (factor < 0).reshape(each.shape)
                    zero = (form.low + form.high - constraint.zero_point.long()).to(constraint.zero_point.dtype)
                    constraint.zero_point.copy_(torch.where(turned, zero, constraint.zero_point))
        elif not isinstance(constraint, Masked):
            raise EditError(
                f"{name} is confined to {constraint.extra_repr() or constraint}, and would not be after it is "
                f"multiplied: {UNFOLDED}"
            )
    stack = parametrized(holder)
    old = stack[leaf].original if leaf in stack else getattr(holder, leaf)
    with torch.no_grad():
        new = nn.Parameter((old.double() * spread(factor)).to(old.dtype), requires_grad=old.requires_grad)
    if leaf in stack:
        stack[leaf].original = new
    else:
        setattr(holder, leaf, new)


def remade(model: nn.Module, layer: str, form: Form, values: Mapping[str, Tensor] | None = None) -> Replace | Constrain:
    """The edit that gives a layer this form: in its place, or on one of its tensors.

    Args:
        model: the network.
        layer: the layer's name, or that of one of attention's own weights, which only a constraint can be put on.
        form: what it is to become; of one of attention's own weights, as of the layer that stands for it.
        values: the state dict of the layer in its new form.
    """
    if not isinstance(form, Constraint):
        return Replace(layer, form, values)
    owner, tensor = place(model, layer)
    if owner == layer:
        return Constrain(layer, form, values)
    before, after = f"parametrizations.{form.tensor}.", f"parametrizations.{tensor}."
    if values is not None:
        values = {f"{after}{key.removeprefix(before)}": value for key, value in values.items()}
    return Constrain(owner, replace(form, tensor=tensor), values)


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
        case {"edit": "Capture", "inputs": Mapping() as inputs, **rest} if not rest:
            return Capture(dict(inputs))
        case {"edit": "Fold", "norms": list(norms), **rest} if not rest:
            return Fold(tuple(map(str, norms)))
        case {"edit": "Quantize", "edges": Mapping() as edges, **rest} if not rest:
            return Quantize.of_json(edges)
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
