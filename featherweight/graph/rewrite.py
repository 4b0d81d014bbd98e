"""The captured graph with some slices gone: smaller tensors, and every number in it that depends on their sizes.

Only numbers change: shapes of views, bounds of slices, numbers of groups, and what an operation derives from a size
(the scale of attention, the count of a mean).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from featherweight.graph.coupling import Coupling
from featherweight.graph.module import ModelGraph, copied, set_arguments, standing
from featherweight.graph.rules import Axis, operation_of
from featherweight.graph.rules.call import arguments, read_by
from featherweight.graph.rules.reduction import statistic
from featherweight.graph.trace import GraphError, module_of, size, source_of

Mask: TypeAlias = npt.NDArray[np.bool_]
Rewrite: TypeAlias = Callable[["Site"], None]

REWRITES: dict[str, Rewrite] = {}


def narrowed(coupling: Coupling, lost: Mask, tensors: Mapping[str, Tensor]) -> tuple[ModelGraph, dict[str, list[Any]]]:
    """The graph without the lost labels.

    Args:
        coupling: the graph and its labels.
        lost: by label, whether it goes.
        tensors: the tensors that the graph reads, by name, narrowed already.

    Returns:
        The graph as a module, and by module name the numbers written in its forward: pairs of old and new, those that
        did not change included.
    """
    trace = coupling.analysis.trace
    graph, new_of = copied(trace)
    numbers: dict[str, list[Any]] = {}
    for node in trace.graph.graph.nodes:
        if node.op == "call_function" and node in new_of and operation_of(node) in REWRITES:
            site = Site(coupling, lost, node, new_of, numbers.setdefault(module_of(node), []))
            REWRITES[operation_of(node)](site)
    return standing(trace, graph, tensors), numbers


class Site:
    """One operation of the graph and its copy in the narrowed one."""

    def __init__(
        self, coupling: Coupling, lost: Mask, old: fx.Node, new_of: Mapping[fx.Node, fx.Node], numbers: list[Any]
    ) -> None:
        self.coupling, self._lost, self.old, self._new_of, self._numbers = coupling, lost, old, new_of, numbers
        self.new = new_of[old]
        self.arguments = arguments(old)

    def compensated(self, why: str) -> None:
        """Note that the operation was changed so that it goes on as before; the model's own code would not."""
        self.new.meta["compensated"] = f"{why} ({source_of(self.old)})"

    def stays(self, axis: Axis) -> Mask:
        """Which indices of a dimension stay."""
        return self.coupling.stays(axis.rows, self._lost)

    def axes(self, argument: str) -> tuple[Axis, ...]:
        """The dimensions of a tensor argument."""
        value = self.coupling.analysis.values[self.arguments[argument]]
        assert isinstance(value, tuple)
        return value

    def result(self) -> tuple[Axis, ...]:
        """The dimensions of the result."""
        value = self.coupling.analysis.values[self.old]
        assert isinstance(value, tuple)
        return value

    def number(self, old: int, new: int) -> int:
        """Note that a number of the forward has become another."""
        self._numbers.append((int(old), int(new)))
        return int(new)

    def count(self, axis: Axis) -> int:
        """How many indices of a dimension stay."""
        return self.number(len(axis), int(self.stays(axis).sum()))

    def narrowed(self, axes: Sequence[Axis]) -> bool:
        """Whether any of the dimensions loses slices."""
        return any(not self.stays(axis).all() for axis in axes)

    def lengths(self, given: Sequence[Any] | None) -> list[Any]:
        """The shape of the result: symbolic lengths as they were given, or -1, which may stand once."""
        shape = self.old.meta["val"].shape
        made: list[Any] = []
        for d, (axis, length) in enumerate(zip(self.result(), shape, strict=True)):
            if not isinstance(length, torch.SymInt):
                made.append(self.count(axis))
            elif given is not None and len(given) == len(shape) and self.stays(axis).all():
                made.append(self.new_argument(given[d]))
            else:
                made.append(-1)
        if sum(1 for length in made if isinstance(length, int) and length == -1) > 1:
            raise GraphError(f"the shape of {self.old} has several lengths that depend on the batch")
        return made

    def new_argument(self, value: Any) -> Any:
        """An argument of the old operation as one of the new."""
        return self._new_of[value] if isinstance(value, fx.Node) else value


def rewrites(*operations: str) -> Callable[[Rewrite], Rewrite]:
    """Register what has to change in operations, named as rules are."""

    def register(function: Rewrite) -> Rewrite:
        for operation in operations:
            REWRITES[operation] = function
        return function

    return register


@rewrites("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias")
def _view(site: Site) -> None:
    given = site.arguments.get("size", site.arguments.get("shape"))
    lengths = site.lengths(given)
    if site.narrowed(site.result()):
        view = torch.ops.aten.view.default if operation_of(site.old) == "view" else torch.ops.aten.reshape.default
        site.new.target, site.new.args, site.new.kwargs = view, (site.new.args[0], lengths), {}


@rewrites("expand", "broadcast_to")
def _expand(site: Site) -> None:
    lengths = site.lengths(site.arguments["size"])
    if site.narrowed(site.result()):
        set_arguments(site.new, size=lengths)


@rewrites("repeat")
def _repeat(site: Site) -> None:
    x, made = site.axes("self"), site.result()
    times = list(site.new.args[1])  # type: ignore[arg-type]
    for d, axis in enumerate(made):
        k = d - (len(made) - len(x))
        if (k < 0 or len(x[k]) == 1) and site.narrowed([axis]):
            times[d] = site.count(axis)
    set_arguments(site.new, repeats=times)


@rewrites("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _made(site: Site) -> None:
    lengths = site.lengths(site.arguments["size"])
    if site.narrowed(site.result()):
        set_arguments(site.new, size=lengths)


@rewrites("split", "split_with_sizes", "chunk", "tensor_split")
def _split(site: Site) -> None:
    pieces = site.coupling.analysis.values[site.old]
    assert isinstance(pieces, list)
    d = site.arguments["dim"] % len(pieces[0])
    given = site.arguments.get("split_size", site.arguments.get("split_sizes"))
    if isinstance(given, int):
        site.number(given, int(site.stays(pieces[0][d]).sum()))
    lengths = [site.count(piece[d]) for piece in pieces]
    if site.narrowed([piece[d] for piece in pieces]):
        site.new.target = torch.ops.aten.split_with_sizes.default
        site.new.args, site.new.kwargs = (site.new.args[0], lengths, d), {}


@rewrites("slice", "narrow")
def _slice(site: Site) -> None:
    x = site.axes("self")
    d = site.arguments["dim"] % len(x)
    stays = site.stays(x[d])
    start, stop, step = _bounds(site.old, len(x[d]))
    begin, end = int(stays[:start].sum()), int(stays[:stop].sum())
    site.number(start, begin)
    site.number(stop, end)
    if not stays.all():
        site.new.target = torch.ops.aten.slice.Tensor
        site.new.args, site.new.kwargs = (site.new.args[0], d, begin, end, step), {}


def _bounds(node: fx.Node, length: int) -> tuple[int, int, int]:
    """First index, end and step of what a slice, narrow or select takes of a dimension of that length."""
    given = arguments(node)
    if operation_of(node) != "slice":
        first = int(given["start" if "start" in given else "index"]) % length
        return first, first + int(given.get("length", 1)), 1
    ends = [size(b.meta["val"]) if isinstance(b, fx.Node) else b for b in (given["start"], given["end"])]
    return slice(ends[0], ends[1], given["step"]).indices(length)


@rewrites("select")
def _select(site: Site) -> None:
    x = site.axes("self")
    d = site.arguments["dim"] % len(x)
    stays = site.stays(x[d])
    if not stays.all():
        index = site.arguments["index"] % len(x[d])
        set_arguments(site.new, index=site.number(index, int(stays[:index].sum())))


@rewrites("layer_norm", "rms_norm")
def _layer_norm(site: Site) -> None:
    count = len(site.arguments["normalized_shape"])
    set_arguments(site.new, normalized_shape=[site.count(axis) for axis in site.result()[-count:]])


@rewrites(
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "_convolution",
)
def _groups(site: Site) -> None:
    """Of a depthwise convolution, a group goes with its channel."""
    groups, inputs = site.arguments["groups"], site.axes("input")[1]
    if isinstance(groups, int) and groups > 1 and groups == len(inputs):
        set_arguments(site.new, groups=site.count(inputs))


@rewrites("scaled_dot_product_attention")
def _attention(site: Site) -> None:
    """The default scale is that of the original's head width: another would change how attention weighs."""
    width = site.axes("query")[-1]
    if site.narrowed([width]) and site.arguments["scale"] is None:
        set_arguments(site.new, scale=1 / math.sqrt(len(width)))
        site.compensated("its code leaves the scale of attention to the width of a head, which has changed")


@rewrites("mean")
def _mean(site: Site) -> None:
    """A mean counts removed slices as the zeros they would be; a norm's statistic is over what is kept."""
    x, given = site.axes("self"), site.arguments.get("dim")
    dims = [d % len(x) for d in given] if given else list(range(len(x)))
    if not site.narrowed([x[d] for d in dims]) or statistic(site.old):
        return
    site.compensated("its code takes a mean over slices of which some went")
    share = math.prod(float(site.stays(x[d]).mean()) for d in dims)
    with site.new.graph.inserting_after(site.new):
        scaled = site.new.graph.call_function(torch.ops.aten.mul.Tensor, (site.new, share))
    scaled.meta = dict(site.new.meta)
    site.new.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


@rewrites("squeeze")
def _squeeze(site: Site) -> None:
    """A dimension that has become one long stays."""
    x, given = site.axes("self"), site.arguments.get("dim")
    dims = range(len(x)) if given is None else [d % len(x) for d in ([given] if isinstance(given, int) else given)]
    site.new.target = torch.ops.aten.squeeze.dims
    site.new.args, site.new.kwargs = (site.new.args[0], [d for d in dims if len(x[d]) == 1]), {}


def resized(coupling: Coupling, lost: Mask, node: fx.Node) -> bool:
    """Whether numbers of an operation say sizes that the lost labels change: of a slice, along its own dimension."""
    if operation_of(node) not in REWRITES:
        return False
    values = [coupling.analysis.values.get(n) for n in (*node.all_input_nodes, node)]
    tensors = [v for value in values for v in (value if isinstance(value, list) else [value]) if isinstance(v, tuple)]
    if operation_of(node) in ("slice", "narrow", "select"):
        tensors = [axes[arguments(node)["dim"] % len(axes) :][:1] for axes in tensors[:1]]
    return any(not coupling.stays(axis.rows, lost).all() for axes in tensors for axis in axes)


def same_slices(coupling: Coupling, lost: Mask, old: fx.Node, new: fx.Node) -> bool:
    """Whether an operation of a narrowed model gives the slices that stay of what it gave: as many, from the same on.

    Args:
        coupling: of the original.
        lost: by label, whether it goes.
        old: the operation in the original's graph.
        new: the same in the narrowed model's.
    """
    value, made = coupling.analysis.values.get(old), new.meta.get("val")
    pairs = zip(value, made or (), strict=False) if isinstance(value, list) else [(value, made)]
    for axes, tensor in pairs:
        lengths = tensor.shape if isinstance(tensor, Tensor) and isinstance(axes, tuple) else ()
        for axis, length in zip(axes or (), lengths, strict=False):
            stays = coupling.stays(axis.rows, lost)
            if not stays.all() and int(stays.sum()) != length:
                return False
    if operation_of(old) not in ("slice", "narrow", "select"):
        return True
    source = old.args[0]
    assert isinstance(source, fx.Node)
    axes = coupling.analysis.values[source]
    assert isinstance(axes, tuple)
    d = arguments(old)["dim"] % len(axes)
    stays = coupling.stays(axes[d].rows, lost)
    if stays.all():
        return True
    return int(stays[: _bounds(old, len(stays))[0]].sum()) == _bounds(new, int(stays.sum()))[0]


def renumbered(coupling: Coupling, lost: Mask) -> dict[str, list[int]]:
    """Tensors of indices into dimensions that lose slices: their numbers, counted anew, by tensor name."""
    made: dict[str, list[int]] = {}
    trace = coupling.analysis.trace
    for node in trace.graph.graph.nodes:
        if node.op != "call_function" or operation_of(node) != "index_select":
            continue
        index = read_by(node.args[2])
        if index is None:
            continue
        x = coupling.analysis.values[node.args[0]]
        assert isinstance(x, tuple)
        stays = coupling.stays(x[node.args[1] % len(x)].rows, lost)
        if stays.all():
            continue
        name = trace.names[str(index.target)]
        position = np.cumsum(stays) - 1
        picked = trace.tensors[name].numpy(force=True).reshape(-1)
        numbers = [int(position[i]) for i in picked if stays[i]]
        if made.setdefault(name, numbers) != numbers:
            raise GraphError(f"{name} indexes several tensors that no longer agree")
    return made
