"""Finding layers: by kind, by name pattern, and saying why one cannot be touched."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar, Union

from torch import nn

from featherweight.errors import did_you_mean
from featherweight.forms import (
    FormModule,
    Layer,
    Masked,
    attention_of,
    constraints_on,
    is_layer,
    place,
    projections,
)
from featherweight.graph import ModelGraph

T = TypeVar("T")

# A setting for all layers, or {name pattern: setting}: the first pattern that matches a layer's name wins.
PerLayer: TypeAlias = Union[T, Mapping[str, T]]  # noqa: UP007 - the | of a TypeVar is no type to a checker

# Kinds of layers whose weights a user may expect to be compressed, beyond Linear and Conv.
_WEIGHTED = (nn.modules.conv._ConvTransposeNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)

_IN_ATTENTION = (
    "nn.MultiheadAttention multiplies by it and calls no layer: what changes values alone reaches it, such as "
    "quantize.Weights and prune.Magnitude, and what works on the network's graph, such as quantize.Static and "
    "prune.Heads"
)


def for_layer(setting: PerLayer[T], name: str, default: T) -> T:
    """The setting that holds for the layer `name`; `default` where no pattern matches."""
    if not isinstance(setting, Mapping):
        return setting
    return next((value for pattern, value in setting.items() if fnmatchcase(name, pattern)), default)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns (``*`` and ``?`` as in file names) matches the layer's name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(patterns: Iterable[str], names: Sequence[str], what: str = "layers") -> list[str]:
    """A sentence for every pattern that matches none of the names, which are of what is said."""
    return [
        f"the pattern {pattern!r} matches none of {len(names)} {what}{did_you_mean(pattern, names)}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def layer_names(model: nn.Module, inside: bool = False) -> list[str]:
    """The names of all Linear and Conv layers, in the order the model registers them.

    Args:
        model: the network.
        inside: whether those that a replaced layer is made of are among them.
    """
    return [name for name, module in weighted_layers(model, inside).items() if is_layer(module)]


def weighted_layers(model: nn.Module, inside: bool = False) -> dict[str, nn.Module]:
    """Linear and Conv layers, and other kinds of layers that multiply by a weight, by name.

    Args:
        model: the network.
        inside: for what changes values and no shapes: whether to give, of a layer that was replaced, those that it is
            made of, where otherwise it is one whole; and each of attention's own weights as a layer (`Projection`).
    """
    forms = [module for module in model.modules() if isinstance(module, FormModule)]
    hidden = {id(part) for form in forms for part in ([form] if inside else form.children())}
    weighted, found = (*_WEIGHTED, FormModule), dict[str, nn.Module]()
    for name, module in model.named_modules():
        if inside and isinstance(module, nn.MultiheadAttention):
            found |= {f"{name}.{own}".removeprefix("."): layer for own, layer in projections(module).items()}
        if name and id(module) not in hidden and (is_layer(module) or isinstance(module, weighted)):
            found[name] = module
    return found


def nearest(name: str, names: Container[str]) -> str | None:
    """The longest part of a layer's dotted name that is among the names; None where there is none."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name or None


def obstacles(model: nn.Module, called: Iterable[str], ignore: Iterable[str], inside: bool = False) -> dict[str, str]:
    """Layers that no technique may change, with the reason; with `inside`, tensors that belong to none as well.

    Args:
        model: the network.
        called: names of the layers that the example calls.
        ignore: patterns of layers that the user wants left alone.
        inside: for techniques that change values and no shapes: look at the layers that a replaced one is made of, and
            not at that one as a whole.
    """
    called, found = set(called), _apart(model, ignore) if inside else {}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in weighted_layers(model, inside).items():
        if matches(name, ignore):
            found[name] = "ignored, as asked"
        elif isinstance(layer, FormModule):
            found[name] = "an earlier step has replaced it"
        elif not is_layer(layer):
            found[name] = _other_kind(layer)
        elif (reason := _own_behaviour(layer)) is not None:
            found[name] = reason
        elif (shared := _shared_with(model, name, layer, owners)) is not None:
            found[name] = shared
        elif (attention := attention_of(model, name)) is not None and not inside and nearest(name, called) is None:
            found[name] = _IN_ATTENTION
        elif attention is not None and _forward_of_its_own(attention):
            found[name] = f"{type(attention).__name__} has a forward of its own, which may not read it where it is"
        elif attention is None and nearest(name, called) is None:
            found[name] = "the example never calls it: it is unused, or another module uses its weight directly"
        elif not layer.weight.is_floating_point() or layer.weight.is_complex():
            found[name] = f"its weight is {str(layer.weight.dtype).removeprefix('torch.')}"
    return found


def apart(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Parameters of two or more dimensions that belong to no layer: by name what to call them, and whose they are."""
    layers = {**weighted_layers(model), **weighted_layers(model, inside=True)}
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, tensor = name.removesuffix(".original").replace(".parametrizations.", ".").rpartition(".")
        if parameter.ndim >= 2 and parameter.is_floating_point() and nearest(owner, layers) is None:
            called = f"{owner}.{tensor}".removeprefix(".").removesuffix(".weight")
            found[name] = called, model.get_submodule(owner)
    return found


def _apart(model: nn.Module, ignore: Iterable[str]) -> dict[str, str]:
    """What is `apart`, by what it is called, with the reason why it stays; without attention's own weights."""
    found, reached = {}, weighted_layers(model, inside=True)
    for name, module in apart(model).values():
        if name in reached:
            continue
        if matches(name, ignore):
            found[name] = "ignored, as asked"
        elif isinstance(model, ModelGraph):
            found[name] = "an earlier step has made the network a graph, which has no layers: move this step above it"
        elif isinstance(module, nn.MultiheadAttention):
            appended = name.rpartition(".")[2] in ("bias_k", "bias_v")
            own = "attention appends it to keys or values, and multiplies nothing by it"
            found[name] = own if appended else f"{_IN_ATTENTION}; here a parametrization of your own is on it"
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found[name] = _other_kind(module)
        else:
            found[name] = "it belongs to no Linear or Conv layer: where it is multiplied by, put it into an nn.Linear"
    return found


def _other_kind(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"a{'n' if kind[0] in 'AEIOU' else ''} {kind} is neither a Linear nor a Conv layer"


def settled(layer: Layer) -> str | None:
    """Why a layer's values are not to be changed: it has none, or they are confined by more than masks."""
    if not layer.weight.numel():
        return "its weight is empty"
    confined = [constraint for constraint in constraints_on(layer) if not isinstance(constraint, Masked)]
    return f"an earlier step has settled its values: {confined[-1].extra_repr()}" if confined else None


def without_values(layer: Layer) -> str | None:
    """Why a layer has no values to give others to: as in `settled`, or all of them are zero, and stay so."""
    if (reason := settled(layer)) is not None:
        return reason
    return None if bool(layer.weight.detach().count_nonzero()) else "all of its weights are zero"


def _forward_of_its_own(attention: nn.MultiheadAttention) -> bool:
    return (
        "forward" in vars(attention) or getattr(type(attention), "forward", None) is not nn.MultiheadAttention.forward
    )


def _own_behaviour(layer: Layer) -> str | None:
    """What a replacement would lose: a forward of the user's own, or hooks."""
    standard = next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
    # A convolution's forward is in two parts, either of which a subclass may have its own of.
    own = any(
        getattr(type(layer), part, None) is not getattr(standard, part, None) for part in ("forward", "_conv_forward")
    )
    if own or "forward" in vars(layer):
        return f"{type(layer).__name__} has a forward of its own, which a replacement would lose"
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks, which a replacement would lose"
    return None


def _shared_with(model: nn.Module, name: str, layer: Layer, owners: Mapping[int, Sequence[str]]) -> str | None:
    """Which of the layer's parameters is another's too; the same layer under two names is no other."""
    owner, tensor = place(model, name)
    holder = model.get_submodule(owner)
    for part, parameter in layer.named_parameters():
        own = _held(part)[1] if holder is layer else tensor
        for other in owners.get(id(parameter), ()):
            module, leaf = _held(other)
            if model.get_submodule(module) is not holder or leaf != own:
                return f"its {'bias' if part == 'bias' else 'weight'} is shared with {other}"
    return None


def _held(parameter: str) -> tuple[str, str]:
    """The module that has a tensor, and the tensor's name; a parametrized one's, of a parameter beneath."""
    module, parametrized, tensor = f".{parameter}".partition(".parametrizations.")
    if not parametrized:
        module, _, tensor = module.rpartition(".")
    return module.removeprefix("."), tensor.partition(".")[0]
