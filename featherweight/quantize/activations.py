"""What steps that quantize activations share: their settings, the graph, the ranges, and the weights beside them."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from featherweight.batch import mode, sketch, tensors_in
from featherweight.curvature.lockstep import Lockstep
from featherweight.edits import Capture, Constrain, Edit, Leave, Quantize, as_graph
from featherweight.errors import EditError, FeatherweightError, TaskError
from featherweight.forms import Constrained, Grid, Rounded, Rounding, beneath, constraints_on, parametrized
from featherweight.forms.grid import WIDTHS, Gridded, least_error, min_max, short
from featherweight.graph import ModelGraph, factor_of, foldable, put_on_edges, value_names, weight_of
from featherweight.graph.rules import operation_of
from featherweight.graph.rules.call import arguments
from featherweight.graph.trace import attribute
from featherweight.layers import PerLayer, for_layer, layer_names, matches, unmatched
from featherweight.ledger import Choice, Point
from featherweight.machine import processor
from featherweight.progress import track
from featherweight.quantize.observers import Observer, range_of
from featherweight.quantize.placement import Edge, Placement, operation_of_any, place
from featherweight.quantize.targets import TARGETS, Target
from featherweight.settings import made, mistyped
from featherweight.step import Stage, Step
from featherweight.study import Study
from featherweight.task import Task, working_copy

# How far the nearer end of a range is from 0, as a share of the further one, for its values to lie about 0: a symmetric
# grid then loses less than half a bit.
ABOUT_ZERO = 0.5

# Samples that biases are corrected on: the means of two networks on the same samples differ by little else.
CORRECTED, TAPS = 16, "taps"

# Settings that are widths, and those by pattern of values' names; all others are by pattern of layers' names.
WIDTHS_OF = ("bits", "activation_bits")
OF_VALUES = ("activation_bits", "activation_symmetric", "ranges")


@dataclass(frozen=True)
class Activations(Step):
    """A technique that rounds activations and weights alike.

    Attributes:
        bits: of the weights, 2 to 8 or 16: for all layers, or by pattern of their names, where layers that no pattern
            names get 8; `ignore` is what leaves layers alone.
        target: the runtime that it is made for: it decides where numbers are rounded, and how. The name of one of
            `TARGETS`, or a `Target`, in recipes a mapping of its fields.
        granularity: what of a weight has a scale of its own: ``"channel"`` (every output) or ``"tensor"``; for all
            layers, or by pattern. None, and layers that no pattern names: what the target has.
        symmetric: whether weights have no zero point; for all layers, or by pattern, where layers that no pattern names
            have none. Zero points pay with few bits, and not every target has kernels for them.
        weight_ranges: ``"mse"`` (least squared error) or ``"min-max"``; for all layers, or by pattern, where layers
            that no pattern names get ``"mse"``.
        headroom: whether weights of 8 bits get 7, so that the sum of two products fits into 16 bits; None for where the
            target is one that would overflow and this machine's processor lacks the instructions that would not. A
            file made with it serves everywhere.
        ignore: patterns of layers and operations to leave alone.

    Patterns are held against the network that the recipe is given; one that matches nothing is an error.
    """

    bits: PerLayer[int] = 8
    target: Literal["onnxruntime-x86", "openvino", "generic-int8", "executorch"] | Target = "onnxruntime-x86"
    granularity: PerLayer[Literal["channel", "tensor"]] | None = None
    symmetric: PerLayer[bool] = True
    weight_ranges: PerLayer[Literal["mse", "min-max"]] = "mse"
    headroom: bool | None = None
    ignore: tuple[str, ...] = ()

    stage: ClassVar[Stage] = Stage.VALUES

    def __post_init__(self) -> None:
        super().__post_init__()
        target = made(Target, self.target) if isinstance(self.target, Mapping) else self.target
        if isinstance(target, Target) and TARGETS.get(target.name) == target:
            target = target.name  # type: ignore[assignment]
        object.__setattr__(self, "target", target)

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if isinstance(self.target, Target):
            found += [f"target: {problem}" for problem in mistyped(self.target)]
        if found:
            return found
        for setting in WIDTHS_OF:
            for bits in _given(getattr(self, setting, None)).values():
                if bits is not None and bits not in WIDTHS:
                    found.append(f"{setting} is {bits}: it can be 2 to 8, or 16")
        found += self._without_kernels()
        if not sketch(task.inputs()):
            found.append("the example's inputs are nested in other containers: give tensors and plain values")
        return found or self._against(model, task)

    def _without_kernels(self) -> list[str]:
        """A sentence for every setting that the target has no kernels for."""
        target, found = self.runtime(), []
        wanted = {
            "granularity": ("channel", target.per_channel, "have one scale for all of a weight"),
            "symmetric": (False, target.affine, "take no weights with zero points"),
            "activation_symmetric": (
                True, target.signed or target.both_signs, "take unsigned activations, with a zero point",
            ),
        }  # fmt: skip
        for setting, (value, can, kernels) in wanted.items():
            for pattern, given in _given(getattr(self, setting, None)).items():
                if given == value and not can:
                    found.append(f"{setting} is {given!r}{_where(pattern)}: {_kernels(target)} {kernels}; leave it out")
        return found

    def _against(self, model: nn.Module, task: Task) -> list[str]:
        """A sentence for every pattern that matches nothing in the network, and every value that it cannot reach."""
        names = [f.name for f in fields(self) if f.name not in ("target", "ignore")]
        given = {name: getattr(self, name) for name in (*names, "ignore")}
        patterns = {name: tuple(value) for name, value in given.items() if isinstance(value, Mapping | tuple)}
        affine = _given(given.get("activation_symmetric"))
        bound = self.runtime().signed_products and False in affine.values()
        if not any(patterns.values()) and not bound:
            return []
        try:
            graph = as_graph(working_copy(model).eval(), task.inputs().on(model))
        except FeatherweightError:
            return []  # what is wrong is said by the task, or when the step begins
        values, layers = value_names(graph), layer_names(model, inside=True)
        weights = [weight_of(node) for node in values if operation_of_any(node) != "batch_norm"]
        layers = list(dict.fromkeys([*layers, *(w.removesuffix(".weight") for w in weights if w is not None)]))
        every = list(values.values())
        found = []
        for setting, named in patterns.items():
            if setting == "ignore":
                found += unmatched(named, list(dict.fromkeys([*layers, *every])), "layers and values")
            elif setting in OF_VALUES:
                found += unmatched(named, every, "values")
            else:
                found += unmatched(named, layers)
        if bound:
            edges = place(graph, self.runtime(), self.refused).edges
            found += [
                f"activation_symmetric is False for {name!r}, the second operand of a product: "
                f"{_kernels(self.runtime())} want it symmetric; give True for it in front of that pattern"
                for name, edge in edges.items()
                if edge.symmetric and for_layer(given["activation_symmetric"], name, None) is False
            ]
        return found

    # What all of them do --------------------------------------------------------------------------------------------

    def edits(self, study: Study) -> Iterator[Edit]:
        """Make the model a graph, and round in it; nothing of that where nothing can be rounded."""
        if (idle := self.idle(study)) is not None:
            yield from leave(idle)
            return
        yield from self.capture(study)
        graph = study.model
        assert isinstance(graph, ModelGraph)
        yield from self.rounded(study, graph)

    @abstractmethod
    def rounded(self, study: Study, graph: ModelGraph) -> Iterator[Edit]:
        """The edits that round, in a graph, and what else the technique does; each is made when this resumes."""

    # Parts that steps are made of -----------------------------------------------------------------------------------

    def runtime(self) -> Target:
        """The target's data."""
        return self.target if isinstance(self.target, Target) else TARGETS[self.target]

    def idle(self, study: Study) -> dict[str, str] | None:
        """Where nothing can be rounded, so that the model need not become a graph: all that stays, with the reason."""
        names = layer_names(study.model, inside=True)
        if isinstance(study.model, ModelGraph) or any(not matches(name, self.ignore) for name in names):
            return None
        graph = as_graph(copy.deepcopy(study.model), study.task.inputs().on(study.model))
        placement = place(graph, self.runtime(), self.refused)
        return None if placement.integer else {**dict.fromkeys(names, "ignored, as asked"), **placement.left}

    def capture(self, study: Study) -> Iterator[Edit]:
        """Make the model a graph, where it is none yet."""
        if not isinstance(study.model, ModelGraph):
            yield Capture(sketch(study.task.inputs().on(study.model)))

    def refused(self, name: str) -> str | None:
        """Why an operation is left alone; None where it is not."""
        return "ignored, as asked" if matches(name, self.ignore) else None

    def reasons(self, study: Study, placement: Placement) -> dict[str, str]:
        """All layers that stay as they are, with the reason; those that the example never calls among them."""
        graph = study.model
        assert isinstance(graph, ModelGraph)
        left = dict(placement.left)
        known = set(value_names(graph).values())
        read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
        for name in layer_names(study.original, inside=True):
            if matches(name, self.ignore) and name not in known:
                left.setdefault(name, "ignored, as asked")
            elif name not in known:
                parts = any(tensor == name or tensor.startswith(f"{name}.") for tensor in read)
                why = "no operation takes it as it is: it is read in parts, or computed with first"
                left.setdefault(name, why if parts else "the example never calls it")
        return left

    def rounding(self, edge: Edge, bits: int, seen: Observer, symmetric: bool | None = None) -> Rounding:
        """How an edge is rounded for the target; symmetric or not as the target has it, where nothing else is asked."""
        target = self.runtime()
        if symmetric is None:
            nearer, further = sorted((-seen.lowest, seen.highest))
            symmetric = edge.symmetric or (edge.padded and nearer > ABOUT_ZERO * further)
        return Rounding(bits, signed=symmetric or target.signed, symmetric=symmetric)

    def grid(self, weight: str, axis: int) -> Grid:
        """The grid of a weight.

        Args:
            weight: its name.
            axis: of the layer's outputs in it.
        """
        layer = weight.removesuffix(".weight")
        asked = for_layer(self.bits, layer, default=8)
        bits = 7 if asked == 8 and self.has_headroom() else asked
        own = "channel" if self.runtime().per_channel else "tensor"
        whole = own if self.granularity is None else for_layer(self.granularity, layer, default=own)
        symmetric = for_layer(self.symmetric, layer, default=True)
        return Grid(bits, symmetric, axis=None if whole == "tensor" else axis, tensor=weight.rpartition(".")[2])

    def weights(self, study: Study, placement: Placement, scales: Mapping[str, Tensor]) -> Iterator[Edit]:
        """Put the layers' weights on grids, those left out that an earlier step has confined to whole numbers.

        Args:
            study: of the graph.
            placement: which weights.
            scales: of what reaches a layer, by the weight's name, where it is rounded.
        """
        graph = study.model
        assert isinstance(graph, ModelGraph)
        choices, narrowed = dict[str, Choice](), False
        for name, axis in placement.weights.items():
            path, _, leaf = name.rpartition(".")
            layer = name.removesuffix(".weight")
            holder = graph.get_submodule(path)
            held = [c for c in constraints_on(holder, leaf) if c.codes(getattr(holder, leaf).detach()) is not None]
            if held:
                study.notes.append(f"{layer} keeps the weights that an earlier step has put on a grid")
                continue
            grid = self.grid(name, axis)
            narrowed |= grid.bits != for_layer(self.bits, layer, default=8)
            weight = getattr(holder, leaf).detach()
            bias = getattr(holder, "bias", None)
            made = grid.build(holder)
            rows = grid.rows(weight)
            searched = for_layer(self.weight_ranges, layer, default="mse") == "mse" and grid.bits <= 8
            scale, zero_point = least_error(rows, grid, steps=20) if searched else min_max(rows, grid)
            if name in scales and isinstance(bias, Tensor) and (not scale.ndim or bias.shape == scale.shape):
                # The bias becomes a whole number of 32 bits, in steps of the two scales' product.
                least = bias.detach().abs().float() / (2.0**30 * scales[name].to(scale))
                scale = torch.maximum(scale, least if scale.ndim else least.amax())
            gridded = _gridded(made, leaf)
            gridded.scale.data.copy_(short(scale, grid))
            gridded.zero_point.copy_(zero_point)
            yield Constrain(path, grid, made.state_dict())
            choices[layer] = Choice(Point(str(grid), grid.bits / (8 * weight.element_size())))
        if narrowed:
            study.notes.append(
                f"weights have 7 bits, for sums of two products to fit into 16 on processors such as {processor()}"
            )
        study.findings["choices"] = choices
        study.findings["metric"] = "bytes"

    def has_headroom(self) -> bool:
        """Whether 8-bit weights use 7 of their bits."""
        if self.headroom is not None:
            return self.headroom
        return self.runtime().saturates and not processor().whole_products


class Watching(nn.Module):
    """Shows what goes along an edge to an observer.

    Args:
        histogram: whether the observer counts values.
    """

    def __init__(self, histogram: bool) -> None:
        super().__init__()
        self.seen, self.histogram = Observer(), histogram

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same."""
        self.seen.see(x, self.histogram)
        return x


def observe(study: Study, placement: Placement, samples: int, ranges: PerLayer[str]) -> dict[str, Observer]:
    """What goes along the placement's edges on the calibration data, by the values' names.

    Args:
        study: of the graph.
        placement: which edges.
        samples: how many to look at.
        ranges: how ranges will be chosen: most ways need a histogram.
    """
    graph = copy.deepcopy(study.model)
    assert isinstance(graph, ModelGraph)
    watching = {
        name: Watching(for_layer(ranges, name, default="mse") not in ("min-max", "average")) for name in placement.edges
    }
    put_on_edges(graph, {name: _readers(edge) for name, edge in placement.edges.items()}, watching.__getitem__)
    total = 0
    with torch.no_grad(), mode(graph, training=False):
        for inputs in track(study.task.batches(graph, samples), "watching activations"):
            try:
                inputs.into(graph)
            except RuntimeError as error:
                example = study.task.inputs()
                if [t.shape for t in inputs.tensors()] == [t.shape for t in example.tensors()]:
                    raise
                raise TaskError(
                    f"the network was captured as a graph with {example}, and its graph does not take a calibration "
                    f"batch of {inputs}: lengths that its code fixes, as all but the first may be, have to be the same "
                    "in both"
                ) from error
            total += inputs.batch_size
    if not study.task.has_calibration:
        study.notes.append("the ranges are those of the example: give calibration data")
    elif total < 32:
        study.notes.append(f"the ranges are those of {total} sample{'s' if total > 1 else ''}: give about 64")
    return {name: module.seen for name, module in watching.items()}


class Tap(nn.Module):
    """Stands behind a layer, and moves what it gives as its bias is moved.

    Args:
        bias: of the layer, (outputs,).
        axis: of the outputs, counted from the last.
    """

    def __init__(self, bias: Tensor, axis: int) -> None:
        super().__init__()
        self.axis, self.shift = axis, torch.zeros_like(bias)

    def means(self, x: Tensor) -> Tensor:
        """Of what the layer gives, (outputs,)."""
        return x.mean([d for d in range(x.ndim) if d != x.ndim + self.axis])

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same."""
        return x + self.shift.view([-1, *[1] * (-1 - self.axis)])


def correct_biases(study: Study, placement: Placement, before: ModelGraph) -> None:
    """Move biases, in place and in calling order, so that integer layers give what they gave before on average.

    Nagel et al., 2019, section 4.2, with data.

    Args:
        study: of the graph as it is now.
        placement: which layers.
        before: the graph before anything was rounded.
    """
    graph = study.model
    assert isinstance(graph, ModelGraph)
    held = _biases(graph, placement)
    was, _ = _tapped(before, held)
    now, taps = _tapped(graph, held)
    lockstep = Lockstep(was, now, study.task.batches(graph, CORRECTED))
    for name, (bias, _) in track(held.items(), "correcting biases", total=len(held)):
        tap = taps[name]
        off = [tap.means(answer) - tap.means(x) for x, answer in lockstep.at(f"{TAPS}.{name}")]
        if off:
            tap.shift = torch.stack(off).mean(0)
            attribute(graph, bias).data.add_(tap.shift)
    lockstep.close()


def _tapped(graph: ModelGraph, held: Mapping[str, tuple[str, int]]) -> tuple[ModelGraph, dict[str, Tap]]:
    """A copy of a graph with taps, and these, by the names of what the layers give."""
    graph = copy.deepcopy(graph)
    taps = {name: Tap(attribute(graph, bias), axis) for name, (bias, axis) in held.items()}
    put_on_edges(graph, dict.fromkeys(taps), taps.__getitem__, room=TAPS)
    return graph, taps


def _biases(graph: ModelGraph, placement: Placement) -> dict[str, tuple[str, int]]:
    """Integer layers' biases, those that only one layer reads, by the names of what the layers give.

    Returns:
        The name of each, and the axis of the layer's outputs, counted from the last.
    """
    held = {}
    for node, name in value_names(graph).items():
        bias = arguments(node).get("bias") if weight_of(node) in placement.weights else None
        if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) != 1:
            continue
        path, _, leaf = str(bias.target).rpartition(".")
        if leaf not in parametrized(graph.get_submodule(path)):
            operation = operation_of(node)
            held[name] = (str(bias.target), -1 if operation == "linear" else -1 - int(operation[-2]))
    return held


def seen_edges(placement: Placement, observers: Mapping[str, Observer]) -> tuple[dict[str, Edge], dict[str, str]]:
    """The edges that can be given a range, and those that cannot, with the reason."""
    left = {}
    for name, seen in observers.items():
        if seen.infinite:
            left[name] = f"{seen.infinite} of its values were infinite, NaN or beyond 1e38 on the calibration data"
        elif not seen.batches:
            left[name] = "no calibration sample reached it"
        elif seen.lowest == seen.highest:
            left[name] = "a range never seen: all of its values were 0 on the calibration data"
    return {name: edge for name, edge in placement.edges.items() if name not in left}, left


def quantized(
    step: Activations,
    edges: Mapping[str, Edge],
    observers: Mapping[str, Observer],
    bits: PerLayer[int],
    symmetric: PerLayer[bool] | None,
    ranges: PerLayer[str],
) -> Quantize:
    """The edit that rounds edges, their ranges chosen."""
    made, values = {}, {}
    for name, edge in edges.items():
        seen = observers[name]
        if edge.ceiling < math.inf:
            seen = replace(seen, highest=min(seen.highest, edge.ceiling))
        asked = None if symmetric is None else for_layer(symmetric, name, default=None)
        rounding = step.rounding(edge, for_layer(bits, name, default=8), seen, asked)
        values[name] = range_of(seen, rounding.grid, for_layer(ranges, name, default="mse"))
        readers = _readers(edge)
        made[name] = (rounding, None if readers is None else tuple(sorted(readers)))
    return Quantize(made, values)


def scales_read(graph: ModelGraph, placement: Placement) -> dict[str, Tensor]:
    """The scale of what reaches each layer rounded, by the name of the layer's weight."""
    found: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        weight = weight_of(node) if node.op == "call_function" else None
        if weight not in placement.weights:
            continue
        source = node.args[0]
        while source.op == "call_function" and source.args:
            source = source.args[0]
        if source.op == "call_module":
            module = graph.get_submodule(str(source.target))
            if isinstance(module, Rounded) and not module.form.dynamic:
                found[str(weight)] = module.scale.detach()
    return found


def round_biases(graph: ModelGraph, placement: Placement) -> None:
    """Round biases in place, as kernels have them: whole numbers of 32 bits in steps of the two scales' product.

    Rows of weights that are all zero are so at any scale, and get one in whose steps their bias is a whole number of 15
    bits.
    """
    scales = scales_read(graph, placement)
    for name, scale in scales.items():
        path, _, leaf = name.rpartition(".")
        holder = graph.get_submodule(path)
        grid = next((c for c in reversed(constraints_on(holder, leaf)) if isinstance(c, Gridded)), None)
        bias = getattr(holder, "bias", None)
        if grid is None or grid.form.bits > 8 or not isinstance(bias, Tensor):
            continue
        if grid.scale.numel() not in (1, bias.numel()):
            continue
        _scale_zeros(holder, leaf, grid, scale, bias.detach())
        step = (scale.detach().to(grid.scale) * grid.scale.detach()).flatten()
        bias.data.copy_((bias.detach().double() / step.double()).round() * step.double())


def _scale_zeros(holder: nn.Module, leaf: str, grid: Gridded, scale: Tensor, bias: Tensor) -> None:
    """Give rows of weights that are all zero, in place, a scale that is fine enough for their biases.

    Args:
        holder: of the weight.
        leaf: the weight's name in it.
        grid: that the weight is on: with one scale, or one for every output.
        scale: of what reaches the layer.
        bias: (outputs,).
    """
    most = bias.abs().reshape(*grid.scale.shape, -1).amax(-1)
    fine = short((most / (2.0**14 * scale.to(most))).to(grid.scale), grid.form)
    zero = ~grid.form.rows(getattr(holder, leaf).detach()).any(-1) & (fine >= torch.finfo(fine.dtype).tiny)
    if not bool(zero.any()):
        return
    # What was rounded to zero would not be in finer steps.
    original = beneath(holder, leaf)
    original.data.masked_fill_(grid.form.spread(zero, original.shape), 0)
    grid.scale.data.copy_(torch.where(zero, fine, grid.scale))


def check_folded(study: Study, before: nn.Module) -> None:
    """See that folding has changed no answer.

    Raises:
        EditError: it has.
    """
    inputs = study.task.inputs().on(before)
    with torch.no_grad(), mode(before, training=False), mode(study.model, training=False):
        then, now = tensors_in(inputs.into(before)), tensors_in(inputs.into(study.model))
    for a, b in zip(now, then, strict=True):
        allowed = 64 * torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
        if b.numel() and float((a - b).abs().max()) > max(allowed, 1e-4) * max(1e-6, float(b.abs().max())):
            raise EditError("folding the batch norms has changed the answers: give fold=False, and report it")


def leave(left: Mapping[str, str]) -> Iterator[Edit]:
    """The edits that leave things as they are."""
    yield from (Leave(name, reason) for name, reason in left.items())


def norms_of(graph: ModelGraph) -> tuple[list[str], dict[str, str]]:
    """Batch norms that can be folded, and those that cannot, with the reason."""
    able, left = foldable(graph)
    return able, {name: f"a batch norm that stays: {reason}" for name, reason in left.items()}


def on_weight(graph: ModelGraph, norm: str) -> list[Constrained]:
    """What the weight in front of a batch norm that can be folded is confined to."""
    path, _, leaf = factor_of(graph, norm)[0].rpartition(".")
    return constraints_on(graph.get_submodule(path), leaf)


def told_apart(graph: ModelGraph, norms: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Batch norms that change no answer when they are folded, and those that would, with the reason.

    A symmetric grid has no opposite of its lowest value, should a negative factor ask for it.
    """
    exact, left = [], {}
    for norm in norms:
        weight, factor, spread = factor_of(graph, norm)
        path, _, leaf = weight.rpartition(".")
        turned = spread(factor) < 0
        for grid in on_weight(graph, norm):
            if isinstance(grid, Gridded) and grid.form.symmetric and bool(turned.any()):
                numbers = grid.numbers(beneath(graph.get_submodule(path), leaf))
                if bool((((-numbers < grid.form.low) | (-numbers > grid.form.high)) & turned).any()):
                    left[norm] = (
                        "a batch norm that stays: a factor of it is negative, and the weight in front of it has the "
                        "lowest value of its grid, which has no opposite; symmetric=False gives it one"
                    )
        if norm not in left:
            exact.append(norm)
    return exact, left


def _readers(edge: Edge) -> Any:
    return None if edge.readers is None else sorted(edge.readers)


def _gridded(layer: nn.Module, tensor: str) -> Gridded:
    found = constraints_on(layer, tensor)[-1]
    assert isinstance(found, Gridded)
    return found


def _given(setting: Any) -> Mapping[str | None, Any]:
    """What a setting gives by pattern; what it gives to all stands under None."""
    return setting if isinstance(setting, Mapping) else {None: setting}


def _where(pattern: str | None) -> str:
    return "" if pattern is None else f" for {pattern!r}"


def _kernels(target: Target) -> str:
    return f"the kernels of {target.name}"
