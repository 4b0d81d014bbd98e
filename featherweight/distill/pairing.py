"""Which layer of the student learns from which layer of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.distill.watching import Call, Look, Tap
from featherweight.errors import TaskError, did_you_mean
from featherweight.forms import FormModule, is_layer
from featherweight.layers import matches

# How deep into an isotropic network, whose layers all give the same shape, hints are given.
DEPTHS = (1 / 3, 2 / 3, 1.0)
# Modules whose answers have channels before positions also where there are but three dimensions.
_CHANNELS_FIRST = (nn.Conv1d, nn.BatchNorm1d)


def pairs(student: Look, teacher: Look, layers: Any, negative: bool = False) -> list[tuple[str, str]]:
    """Names of layers that belong together: (student's, teacher's).

    Args:
        student, teacher: both networks on the example.
        layers: {student's pattern: teacher's pattern}, or patterns that hold for both; None to find pairs by depth and
            shape.
        negative: leave out layers, when looking by depth and shape, that give nothing negative: those behind a ReLU.
    Raises:
        TaskError: a pattern matches nothing, or patterns match different numbers of layers, or nothing was found.
    """
    if layers is not None:
        named = layers if isinstance(layers, Mapping) else {p: p for p in layers}
        return [pair for item in named.items() for pair in _named(student, teacher, *item)]
    mine, its = (_by_positions(net, negative) for net in (student, teacher))
    shared = [shape for shape in mine if shape in its]
    if len(mine) == 1 and len(its) == 1:
        (own,), (other,) = mine.values(), its.values()
        found = [(_at(own, depth), _at(other, depth)) for depth in DEPTHS]
    elif shared:
        found = [(mine[shape][-1], its[shape][-1]) for shape in shared]
    else:  # other resolutions: the ends of their stages, by depth
        own, other = ([group[-1] for group in groups.values()] for groups in (mine, its))
        depths = [(n + 1) / len(own) for n in range(len(own))]
        found = [(_at(own, depth), _at(other, depth)) for depth in depths if other]
    if not found:
        raise TaskError("no layers were found that could be paired: give layers={student's pattern: teacher's pattern}")
    return list(dict.fromkeys(found))


def last_layer(network: Look) -> str:
    """The weighted layer that is called last, which makes the outputs.

    Raises:
        TaskError: there is none.
    """
    inside = {
        id(part) for call in network.calls if isinstance(call.module, FormModule) for part in call.module.modules()
    }
    for call in reversed(network.calls):
        whole = isinstance(call.module, FormModule)
        if whole or (is_layer(call.module) and id(call.module) not in inside):
            return call.name
    raise TaskError("the network has no Linear or Conv layer to look at: give layers={student's: teacher's}")


def channel_dim(module: nn.Module, shape: Sequence[int]) -> int:
    """Where a layer's answer has its channels: behind the samples for convolutions, last for everything else."""
    if len(shape) == 3:
        return 1 if any(isinstance(part, _CHANNELS_FIRST) for part in module.modules()) else 2
    return 1 if len(shape) > 3 else len(shape) - 1


def channels_last(features: Tensor, dim: int) -> Tensor:
    """(samples, *positions, channels)."""
    return features.movedim(dim, -1)


def _named(student: Look, teacher: Look, own: str, other: str) -> list[tuple[str, str]]:
    found = []
    for who, network, pattern in (("student", student, own), ("teacher", teacher, other)):
        names = list(dict.fromkeys(call.name for call in network.calls))
        matching = [name for name in names if matches(name, [pattern])]
        if not matching:
            raise TaskError(
                f"the pattern {pattern!r} matches none of the {len(names)} layers that the {who} calls"
                f"{did_you_mean(pattern, names)}"
            )
        found.append(matching)
    if len(found[0]) != len(found[1]):
        raise TaskError(
            f"{own!r} matches {len(found[0])} layers of the student ({', '.join(found[0][:4])}), and {other!r} "
            f"{len(found[1])} of the teacher ({', '.join(found[1][:4])}): they must be as many"
        )
    return list(zip(*found, strict=True))


def _by_positions(network: Look, negative: bool) -> dict[tuple[int, ...], list[str]]:
    """The layers in calling order by the positions that they answer at, up to the one that makes the outputs."""
    groups: dict[tuple[int, ...], list[str]] = {}
    try:
        end = last_layer(network)
    except TaskError:
        end = ""
    for call in network.calls:
        if call.name == end or end.startswith(f"{call.name}."):
            break
        if call.given is not None and len(call.given) >= 2 and (call.negative or not negative):
            shape = list(call.given[1:])
            shape.pop(channel_dim(call.module, call.given) - 1)
            groups.setdefault(tuple(shape), []).append(call.name)
    # Behind the pooling a network of convolutions has vectors: what has positions says more.
    return {shape: names for shape, names in groups.items() if shape} or groups


def _at(names: Sequence[str], depth: float) -> str:
    return names[max(0, round(depth * len(names)) - 1)]


def called(network: Look, name: str) -> Call:
    """The last call of the layer."""
    return next(call for call in reversed(network.calls) if call.name == name)


def tap_of_inputs(network: Look) -> Tap:
    """What the outputs are made from: the network's embedding of a sample."""
    return Tap(last_layer(network), "input")


def shallow(network: Look, wanted: int | Sequence[str]) -> list[str]:
    """Layers on the way, for heads to stand on.

    Args:
        network: on the example.
        wanted: how many at most: the ends of the stages before the last, or where there is one stage only, evenly
            spread ones; or patterns.
    Raises:
        TaskError: there are none, or a pattern matches nothing.
    """
    if not isinstance(wanted, int):
        return [own for pattern in wanted for own, _ in _named(network, network, pattern, pattern)]
    stages = list(_by_positions(network, negative=False).values())
    if len(stages) > 1:
        found = [stage[-1] for stage in stages[:-1]][-wanted:]
    else:
        found = [_at(names, (n + 1) / (wanted + 1)) for names in stages for n in range(wanted)]
    if not found:
        raise TaskError("no layer was found on the way to the outputs: give heads=[patterns of layers]")
    return list(dict.fromkeys(found))
