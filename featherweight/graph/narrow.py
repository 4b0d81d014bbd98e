"""Narrowing: the units that stay, carried out on a copy of the model.

In *module form* the model's own parameters, buffers and integer attributes are narrowed, and its class stays; that is
tried first, and holds if the copy runs and answers as the graph does. In *graph form* the captured graph takes the
model's place, for models that have sizes written into their code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from featherweight import batch
from featherweight.batch import Inputs, copied
from featherweight.errors import ArtifactError
from featherweight.graph import rewrite, verify
from featherweight.graph.coupling import Coupling, couple
from featherweight.graph.rewrite import Mask
from featherweight.graph.rules import Axes, operation_of
from featherweight.graph.rules.call import arguments
from featherweight.graph.rules.layers import lengthened
from featherweight.graph.trace import GraphError, capture, source_of

Form = Literal["module", "graph"]
_Value: TypeAlias = int | tuple[int, ...]  # what an attribute says
_Name: TypeAlias = tuple[str, str]  # of a class, and of an attribute of it

_SMALL = 30_000_000  # parameters: up to here answers are compared in float64
_TRIES = 64  # choices of attributes that are tried where not all of those that equal a width can change
_NO_VALUES = "_assert_tensor_metadata contiguous"  # operations that change no values, and may be left out of a capture
_SAME = 1e-6  # largest relative difference of both forms there: code that casts to float32 by name rounds differently


class Unfaithful(GraphError):
    """A narrowed network does not answer as the masked original does, because of one group.

    Args:
        group: its name.
        difference: of the answers, relative to the original's largest.
    """

    def __init__(self, group: str, difference: float) -> None:
        self.group, self.difference = group, difference
        super().__init__(
            f"without some of group {group!r}, the narrowed network does not answer as the original with those slices "
            f"set to zero does (relative difference {difference:.1e}): leave that group whole, and report it"
        )


@dataclass(frozen=True)
class Narrowing:
    """What to cut from a model, as plain data.

    Attributes:
        form: "module" or "graph".
        why: why it is that form.
        kept: by group, the units that stay.
        tensors: by tensor name and dimension, the indices that stay.
        values: by tensor name, the new numbers of tensors that hold indices into dimensions which lost slices.
        attributes: by module name and attribute, the new number or list of numbers.
        inputs: of the graph form, the example's shapes and types, to capture the graph with.
        lengths: of weight norms that lose some of what their norm is over, by the length's name (g of g · v / ‖v‖), the
            direction's (v) and the dimension that the norm is not over, -1 where it is over all: g is multiplied by
            what stays of ‖v‖, so that the weights that stay are as they were.
    """

    form: Form
    why: str
    kept: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Mapping[int, tuple[int, ...]]]
    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, _Value]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The narrowing as JSON-ready data."""
        lengths = {name: list(of) for name, of in self.lengths.items()}
        return {
            "form": self.form,
            "why": self.why,
            "kept": {name: list(units) for name, units in self.kept.items()},
            "tensors": {n: {str(d): list(i) for d, i in dims.items()} for n, dims in self.tensors.items()},
            "values": {name: list(numbers) for name, numbers in self.values.items()},
            "attributes": {
                module: {name: list(v) if isinstance(v, tuple) else v for name, v in changes.items()}
                for module, changes in self.attributes.items()
            },
            "inputs": dict(self.inputs),
            **({"lengths": lengths} if lengths else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Narrowing:
        """The narrowing back from its JSON.

        Raises:
            ArtifactError: not a narrowing of this version.
        """
        try:
            if set(data) - {"lengths"} != {"form", "why", "kept", "tensors", "values", "attributes", "inputs"}:
                raise ValueError(f"its fields are {sorted(data)}")
            if data["form"] not in ("module", "graph"):
                raise ValueError(f"its form is {data['form']!r}")
            return cls(
                data["form"],
                str(data["why"]),
                {str(name): _integers(units) for name, units in data["kept"].items()},
                {str(n): {int(d): _integers(i) for d, i in dims.items()} for n, dims in data["tensors"].items()},
                {str(name): _integers(numbers) for name, numbers in data["values"].items()},
                {
                    str(module): {
                        str(n): _integers(v) if isinstance(v, list) else _integers([v])[0] for n, v in c.items()
                    }
                    for module, c in data["attributes"].items()
                },
                dict(data["inputs"]),
                {str(g): (str(v), *_integers([dim])) for g, (v, dim) in data.get("lengths", {}).items()},  # type: ignore[misc]
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"this is not a narrowing that this version knows: {error}") from error

    def apply(self, model: nn.Module, inputs: Any = None) -> nn.Module:
        """A narrowed copy of a model like the one this was made for; its values are cut, the model stays as it is.

        Args:
            model: the same class with the same sizes; its values may be others, or on the meta device. Or such a model
                in PyTorch's `AveragedModel`, which goes on averaging.
            inputs: for the graph form, an example of its inputs, as `Task.example`; made up from the narrowing's own
                where not given.

        Raises:
            GraphError: the narrowing does not fit the model.
        """
        if isinstance(model, AveragedModel) and {name for name, _ in _registered(model)}.isdisjoint(self.tensors):
            averaged = copied(model)
            averaged.module = self.apply(model.module, inputs)
            return averaged
        if self.form == "module":
            return _module_form(model, self)
        coupling = couple(model, batch.sketched(self.inputs) if inputs is None else inputs)
        lost = coupling.lost(self.kept)
        if _indices(coupling, lost) != {n: dict(dims) for n, dims in self.tensors.items()}:
            raise GraphError(f"this narrowing was made for another {type(model).__name__}: the slices do not agree")
        return rewrite.narrowed(coupling, lost, _cut(coupling, self))[0]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A narrowed model.

    Attributes:
        module: the copy that was narrowed.
        narrowing: what was done, as data.
        error: the largest difference from the masked original, relative to its largest answer; None where it could
            not be
            run (meta device).
    """

    module: nn.Module
    narrowing: Narrowing
    error: float | None


def narrow(
    model: nn.Module,
    coupling: Coupling,
    kept: Mapping[str, Sequence[int]],
    *,
    form: Form | None = None,
    check: bool = True,
) -> Narrowed:
    """A narrowed copy of a model, held against the original with the same slices set to zero.

    Args:
        model: the model that was coupled, unchanged since.
        coupling: what goes together.
        kept: by group name, the units that stay; groups that are not named stay whole.
        form: the form to use; None for the module form where it is enough, and the graph form otherwise.
        check: whether to compare the answers, and the module form's code with the graph; its answers always are.

    Raises:
        GraphError: a group or unit that is not there, or a group that would be empty.
        Unfaithful: the narrowed model does not answer as the masked one does; it names the group.
    """
    lost = coupling.lost(kept)
    _refuse_empty(coupling, lost, kept)
    plan = Narrowing(
        "graph",
        "as asked" if form == "graph" else "",
        {name: tuple(sorted({int(u) for u in units})) for name, units in kept.items()},
        _indices(coupling, lost),
        {name: tuple(numbers) for name, numbers in rewrite.renumbered(coupling, lost).items()},
        {},
        _sketch(coupling.analysis.trace.inputs),
        _lengths(coupling, lost),
    )
    graph, numbers = rewrite.narrowed(coupling, lost, _cut(coupling, plan))
    device = batch.device_of(model)
    error: float | None = None
    if device.type != "meta" and check:
        error = _checked(coupling, graph, plan, lost)
    if form != "graph":
        module, narrowing, why_not = _as_module(model, coupling, plan, numbers, graph, check=check)
        if module is not None:
            module.train(model.training)
            return Narrowed(module, narrowing, error)
        if form == "module":
            raise GraphError(f"{type(model).__name__} cannot be narrowed in module form: {why_not}")
        plan = replace(plan, why=why_not)
    graph.train(model.training)
    return Narrowed(graph, plan, error)


def _as_module(
    model: nn.Module,
    coupling: Coupling,
    plan: Narrowing,
    numbers: Mapping[str, list[Any]],
    graph: nn.Module,
    *,
    check: bool,
) -> tuple[nn.Module | None, Narrowing, str]:
    """The module form if it answers as the graph does, with as few changes of attributes as that takes.

    With `check`, its code is captured too where it computes with numbers that have changed.
    """
    registered = {name for name, _ in _registered(model)}
    loose = [name for name in (*plan.tensors, *plan.values, *plan.lengths) if name not in registered]
    if loose:
        return None, plan, f"its code holds a tensor that is neither a parameter nor a buffer ({loose[0]})"
    assert isinstance(graph, fx.GraphModule)
    changed = [why for node in graph.graph.nodes if (why := node.meta.get("compensated"))]
    if changed:
        return None, plan, changed[0]
    meta = batch.device_of(model).type == "meta"
    small = sum(t.numel() for t in model.parameters()) <= _SMALL
    small = small and not meta
    inputs = coupling.analysis.trace.inputs if meta else _inputs(coupling, double=small)
    expected = verify.answers(verify.in_double(graph) if small else graph, inputs)
    sure, likely = _attributes(model, plan, numbers)
    refused: list[str] = []

    def candidate(names: Collection[_Name]) -> Narrowing:
        made = {path: dict(changes) for path, changes in sure.items()}
        for name in names:
            for path, value in likely[name].items():
                made.setdefault(path, {})[name[1]] = value
        return replace(plan, form="module", why="its own parameters and attributes are enough", attributes=made)

    def works(names: Collection[_Name]) -> bool:
        """Whether the module answers as the graph does; if not, why is noted."""
        try:
            module = _module_form(model, candidate(names))
            with batch.mode(module, training=False):
                given = verify.answers(verify.in_double(module) if small else module, inputs)
            if meta:
                same = [t.shape for t in given] == [t.shape for t in expected]
            else:
                same = verify.distance(given, expected) <= (_SAME if small else 1e-4)
            if same:
                return True
            refused.append("sizes that its code computes with have changed the answer")
        except Exception as error:  # the model's own code may raise anything when its sizes change
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            refused.append(f"its code has sizes written into it: {(lines or [type(error).__name__])[0][:160]}")
        return False

    needed = _fewest(sorted(likely), works)
    if needed is None:
        return None, plan, refused[0]
    own = {name: pairs for name, pairs in numbers.items() if not _is_layer_of_pytorch(model.get_submodule(name))}
    renumbered = any(old != new for pairs in own.values() for old, new in pairs)
    why = ""
    # What the example does not need may be read where the model is captured or trained, of some models by other code.
    for names in [needed] + ([sorted(likely)] if len(needed) < len(likely) and works(sorted(likely)) else []):
        module = _module_form(model, candidate(names))
        otherwise = _otherwise(coupling, plan, module) if check and (names or renumbered) else ""
        if not otherwise:
            return module, candidate(names), ""
        if names:
            said = ", ".join(sorted({f"{_prefix(likely[name])}{name[1]}" for name in names}))
            otherwise = f"{otherwise}, with {said} rewritten"
        why = why or otherwise
    return None, plan, why


def _is_layer_of_pytorch(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's own layers, whose code computes with the sizes that its attributes say."""
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def _prefix(changes: Mapping[str, Any]) -> str:
    """How names of the first of some modules begin."""
    path = min(changes)
    return f"{path}." if path else ""


def _fewest(names: Sequence[_Name], works: Callable[[Collection[_Name]], bool]) -> list[_Name] | None:
    """Names without any of which it would not work; None if no choice that is tried works.

    A number that equals a width may mean something else, which an example need not show: what can stay as it is stays.
    """
    needed = list(names)
    if not works(needed):
        tried = (list(some) for count in range(len(names)) for some in itertools.combinations(names, count))
        return next((some for some in itertools.islice(tried, _TRIES) if works(some)), None)
    for name in names:
        if works(fewer := [other for other in needed if other != name]):
            needed = fewer
    return needed


def _otherwise(coupling: Coupling, plan: Narrowing, module: nn.Module) -> str:
    """Where a narrowed module computes otherwise than the narrowed graph, by the numbers in its code; empty if nowhere.

    The example's answers may well be the same: with a window of 8 in the place of one of 16 over 8 positions, or where
    what differs is behind units that never fire.
    """
    analysis = coupling.analysis
    lost = coupling.lost(plan.kept)
    try:
        again = capture(module, analysis.trace.inputs, dynamic_batch=analysis.trace.dynamic)
    except GraphError as error:
        return f"narrowed as its own class, it could not be captured again: {error}"

    def calls(graph: fx.GraphModule) -> list[fx.Node]:
        return [n for n in graph.graph.nodes if n.op == "call_function" and operation_of(n) not in _NO_VALUES.split()]

    before, after = calls(analysis.trace.graph), calls(again.graph)
    if [operation_of(node) for node in before] != [operation_of(node) for node in after]:
        return "its code takes another way"

    def written(node: fx.Node) -> list[Any]:
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        return [type(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]

    for old, new in zip(before, after, strict=True):
        if written(old) != written(new) and not rewrite.resized(coupling, lost, old):
            return f"a number that says a width is used for something else too ({source_of(old)})"
        if not rewrite.same_slices(coupling, lost, old, new):
            return f"its code has sizes written into it ({source_of(old)})"
    return ""


def _registered(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under all of its names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _module_form(model: nn.Module, plan: Narrowing) -> nn.Module:
    """A copy of the model with narrowed parameters, buffers and attributes."""
    module = copied(model)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    named: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        for leaf, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((part, leaf))
                named[f"{path}.{leaf}" if path else leaf] = tensor
    for name in {*plan.tensors, *plan.values, *plan.lengths}:
        if name not in named:
            raise GraphError(f"{type(model).__name__} has no tensor {name!r}: the narrowing was made for another model")
        old = named[name]
        new = _cut_tensor(old, name, plan, named)
        for part, leaf in owners[id(old)]:
            if leaf in part._parameters:
                setattr(part, leaf, new)
            else:
                part._buffers[leaf] = new
    for path, changes in plan.attributes.items():
        try:
            part = module.get_submodule(path)
        except AttributeError:
            raise GraphError(f"{type(model).__name__} has no module {path!r}") from None
        for name, value in changes.items():
            present = getattr(part, name, None)
            if not isinstance(present, (int, tuple, list)):
                raise GraphError(f"{path or type(model).__name__} has no number {name!r} to change")
            made: Any = list(value) if isinstance(present, list) and isinstance(value, tuple) else value
            setattr(part, name, made)
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    return module


def _attributes(
    model: nn.Module, plan: Narrowing, numbers: Mapping[str, list[Any]]
) -> tuple[dict[str, dict[str, _Value]], dict[_Name, dict[str, _Value]]]:
    """The attributes that may change with the sizes.

    Returns:
        Of PyTorch's own layers those that say their sizes, by module name; and of other modules every number that
        equals one which has changed in their forward, by class and attribute (modules of a class are alike), and
        module name.
    """
    sure: dict[str, dict[str, _Value]] = {}
    likely: dict[_Name, dict[str, _Value]] = {}
    lengths = {name: {d: len(kept) for d, kept in dims.items()} for name, dims in plan.tensors.items()}
    first: dict[int, str] = {}
    for name, tensor in _registered(model):
        first.setdefault(id(tensor), name)

    def shape(tensor: Tensor) -> list[int]:
        changed = lengths.get(first.get(id(tensor), ""), {})
        return [changed.get(d, n) for d, n in enumerate(tensor.shape)]

    for path, module in model.named_modules(remove_duplicate=False):
        pairs = set(numbers.get(path, ()))
        changes = _sizes_of(module, shape, pairs)
        present = {n: getattr(module, n, None) for n in changes}
        if different := {
            n: v for n, v in changes.items() if (tuple(p) if isinstance(p := present[n], list) else p) != v
        }:
            sure[path] = different
        if not type(module).__module__.startswith("torch.nn."):
            for name, value in vars(module).items():
                if name in changes or (name.startswith("_") and not name.startswith("_num")):
                    continue
                if (new := _translated(value, pairs)) is not None:
                    likely.setdefault((type(module).__qualname__, name), {})[path] = new
    return sure, likely


def _sizes_of(module: nn.Module, shape: Any, pairs: set[tuple[int, int]]) -> dict[str, _Value]:
    """What PyTorch's own layers say of their sizes, from the new shapes of their weights."""
    weight = getattr(module, "weight", None) if "weight" in module._parameters else None
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        rows, columns, *_ = shape(weight)
        groups = next((new for old, new in pairs if old == module.groups), module.groups)
        sizes = (rows, columns * groups) if module.transposed else (columns * groups, rows)
        return {"in_channels": sizes[0], "out_channels": sizes[1], "groups": groups}
    if isinstance(module, nn.modules.conv._ConvNd):  # a parametrized weight
        groups = next((new for old, new in pairs if old == module.groups), module.groups)
        return {"groups": groups}
    if isinstance(module, nn.Linear) and weight is not None:
        rows, columns = shape(weight)
        return {"in_features": columns, "out_features": rows}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": shape(module.weight)[1]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if weight is not None:
            return {"normalized_shape": tuple(shape(weight))}
        old = tuple(module.normalized_shape)
        return {"normalized_shape": tuple(next((new for o, new in pairs if o == n), n) for n in old)}
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return {"num_channels": shape(weight)[0]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.running_mean if module.running_mean is not None else module.weight
        return {} if tensor is None else {"num_features": shape(tensor)[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape(module.weight)[0]}
    if isinstance(module, nn.RNNBase):
        return {"input_size": shape(module.weight_ih_l0)[1], "hidden_size": shape(module.weight_hh_l0)[1]}
    if isinstance(module, nn.MultiheadAttention):
        width = shape(module.out_proj.weight)
        return {"embed_dim": width[0], "head_dim": width[1] // module.num_heads} | (
            {"kdim": width[0], "vdim": width[0]} if module._qkv_same_embed_dim else {}
        )
    if isinstance(module, nn.Unflatten) and isinstance(module.unflattened_size, (tuple, list)):
        new = _translated(tuple(module.unflattened_size), pairs)
        return {} if new is None else {"unflattened_size": new}
    return {}


def _translated(value: Any, pairs: set[tuple[int, int]]) -> _Value | None:
    """A number, or several, with those that changed replaced; None where none did."""
    if isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
        made = tuple(_translated(v, pairs) or v for v in value)
        return made if made != tuple(value) else None  # type: ignore[return-value]
    if type(value) is not int or value < 2:
        return None
    became = {new for old, new in pairs if old == value}
    became -= {value}
    return became.pop() if len(became) == 1 else None


def _checked(coupling: Coupling, graph: nn.Module, plan: Narrowing, lost: Mask) -> float:
    """How far the narrowed graph is from the masked original.

    Raises:
        GraphError: too far; the message names the first group that is so alone.
    """
    error, allowed = _error(coupling, graph, plan, lost)
    if error <= allowed:
        return error
    for name, units in plan.kept.items():
        alone = coupling.lost({name: units})
        lengths = _lengths(coupling, alone)
        one = Narrowing("graph", "", {}, _indices(coupling, alone), _numbers(coupling, alone), lengths=lengths)
        single, _ = rewrite.narrowed(coupling, alone, _cut(coupling, one))
        far, allowed = _error(coupling, single, one, alone)
        if far > allowed:
            raise Unfaithful(name, far)
    raise GraphError(
        f"the network narrowed in {len(plan.kept)} groups does not answer as the original with those slices set to "
        f"zero does (relative difference {error:.1e}), although it does for every group alone: "
        "narrow fewer groups, and report it"
    )


def _error(coupling: Coupling, graph: nn.Module, plan: Narrowing, lost: Mask) -> tuple[float, float]:
    small = sum(t.numel() for t in coupling.analysis.trace.tensors.values()) <= _SMALL
    inputs = _inputs(coupling, double=small)
    masked = verify.masked_answers(coupling, lost, inputs, double=small)
    if small:
        graph = verify.in_double(graph)
        tensors = coupling.analysis.trace.tensors
        wide = {
            name: tensors[name].detach().double() for pair in plan.lengths.items() for name in (pair[0], pair[1][0])
        }
        for name in plan.lengths:  # what was computed, and not cut, was rounded
            graph.get_parameter(name).data = _cut_tensor(wide[name], name, plan, wide)
    given = verify.answers(graph, inputs)
    return verify.distance(given, masked), 1e-7 if small else 1e-3


def _inputs(coupling: Coupling, *, double: bool) -> Inputs:
    trace = coupling.analysis.trace
    return verify.random_like(trace.inputs, seed=0, dynamic=trace.dynamic, double=double)


def _sketch(inputs: Inputs) -> dict[str, Any]:
    """The example's shapes and types; of inputs on the meta device, as if they were zeros."""

    def held(value: Any) -> Any:
        return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) and value.is_meta else value

    args, kwargs = pytree.tree_map(held, (inputs.args, dict(inputs.kwargs)))
    return batch.sketch(Inputs(args, kwargs))


def _indices(coupling: Coupling, lost: Mask) -> dict[str, dict[int, tuple[int, ...]]]:
    made: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, axes in coupling.analysis.tensors.items():
        for d, axis in enumerate(axes):
            stays = coupling.stays(axis.rows, lost)
            if not stays.all():
                made.setdefault(name, {})[d] = tuple(np.flatnonzero(stays).tolist())
    return made


def _lengths(coupling: Coupling, lost: Mask) -> dict[str, tuple[str, int]]:
    """Of weight norms that lose some of what their norm is over, the lengths, as `Narrowing` has them."""
    made = {}
    trace = coupling.analysis.trace
    for node in trace.graph.graph.nodes:
        if (read := lengthened(node)) is None:
            continue
        dim = int(arguments(node)["dim"])
        over = [axis for d, axis in enumerate(cast(Axes, coupling.analysis.values[node])) if d != dim]
        if any(not coupling.stays(axis.rows, lost).all() for axis in over):
            direction, length = (trace.names[str(tensor.target)] for tensor in read)
            made[length] = direction, dim
    return made


def _numbers(coupling: Coupling, lost: Mask) -> dict[str, tuple[int, ...]]:
    return {name: tuple(numbers) for name, numbers in rewrite.renumbered(coupling, lost).items()}


def _refuse_empty(coupling: Coupling, lost: Mask, kept: Mapping[str, Sequence[int]]) -> None:
    """No dimension of any tensor may lose everything, be it a part that a split takes out of a longer one."""
    for node, value in coupling.analysis.values.items():
        pieces = value if isinstance(value, list) else [value]
        for axes in pieces:
            for axis in axes if isinstance(axes, tuple) else ():
                if len(axis) and not coupling.stays(axis.rows, lost).any():
                    labels = set(np.unique(coupling.analysis.labels.resolve(axis.rows)).tolist())
                    name = next((n for n in kept if labels & set(coupling.group(n).labels.tolist())), "?")
                    raise GraphError(f"nothing would be left of a dimension of {node}: keep more of group {name!r}")


def _cut(coupling: Coupling, plan: Narrowing) -> dict[str, Tensor]:
    tensors = coupling.analysis.trace.tensors
    return {name: _cut_tensor(tensor, name, plan, tensors) for name, tensor in tensors.items()}


def _cut_tensor(tensor: Tensor, name: str, plan: Narrowing, others: Mapping[str, Tensor]) -> Tensor:
    """A copy of a tensor with the slices that stay; parameters stay parameters.

    Args:
        tensor: as it was.
        name: its name.
        plan: what stays.
        others: the model's tensors as they were, by name.
    """

    def stays(tensor: Tensor, name: str) -> Tensor:
        for d, kept in plan.tensors.get(name, {}).items():
            if d >= tensor.ndim or (kept and kept[-1] >= tensor.shape[d]):
                raise GraphError(f"{name} is {tuple(tensor.shape)}: the narrowing was made for another model")
            tensor = tensor.index_select(d, torch.tensor(kept, device=tensor.device))
        return tensor

    made = stays(tensor.detach(), name)
    if name in plan.lengths:
        direction, dim = plan.lengths[name]
        if direction not in others:
            raise GraphError(f"there is no tensor {direction!r}: the narrowing was made for another model")
        whole = others[direction].detach()
        whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
        before, after = (torch.norm_except_dim(v, 2, dim) for v in (whole, stays(whole, direction)))
        made = (made * (after / stays(before, name))).to(tensor.dtype)
    if name in plan.values:
        made = torch.tensor(plan.values[name], dtype=made.dtype, device=made.device)
    made = made.clone() if made.data_ptr() == tensor.data_ptr() else made
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(v) is int for v in values):
        raise ValueError(f"{values} are not whole numbers")
    return tuple(values)
