"""What a model's layers cost: multiply-accumulates, parameters, bytes and activations, counted over one real run.

The run is watched operation by operation beneath Python's modules and functions, so functional calls, raw parameters,
modules called twice and recurrent layers are counted as they run. What counts as a multiply-accumulate, and what by
convention has none, says `featherweight.cost.operations`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from featherweight import batch
from featherweight.cost import operations
from featherweight.cost.cost import Cost
from featherweight.errors import TaskError
from featherweight.forms import Constrained, Rounded, constraints_on, parametrized, stored, without_data

Shape = tuple[int, ...]
# The name of the row of the model itself.
MODEL = "(model)"


@dataclass(frozen=True)
class Blank:
    """A tensor without its values."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Such a tensor on the meta device, where it takes no memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, as far as its price depends on it.

    Attributes:
        inputs: shapes of the tensors among its arguments.
        dtype: type of the first of them.
        output: shape of the first tensor it returned; () where it returned none.
        arguments: its positional and keyword arguments with every tensor a `Blank`, which also has the tensor's strides
            and type; None stands for contiguous tensors of `inputs` and `dtype`.
    """

    inputs: tuple[Shape, ...]
    dtype: torch.dtype
    output: Shape
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class LayerProfile:
    """One layer's row.

    Attributes:
        name: path of the module; ``(model)`` for the model itself.
        kind: its class, followed by `` (functional)`` where the row holds what a module with child modules does itself.
        cost: over all its calls; parameters and bytes once.
        calls: every call of the layer; empty for functional rows and for layers the run never called.
    """

    name: str
    kind: str
    cost: Cost
    calls: tuple[LayerCall, ...] = ()


@dataclass(frozen=True)
class Profile:
    """What a model costs on given inputs.

    Attributes:
        layers: rows by name, in the order of first calls, the never called last: every module without child modules,
            and every compressed layer, that has parameters, buffers or counted work; and every other module that has
            parameters, buffers or counted work of its own.
        total: the whole model; its activations include those of what has no row, such as ReLU and residual additions.
        peak_activation_bytes: most bytes of intermediate results and outputs alive at once. Inputs, parameters, buffers
            and what an operation needs inside itself are not among them.
        held_bytes: of these what is alive when a call of a module ends, by the module's path; of many calls the most.
        uncalled: layers with parameters that the run neither called nor read.
    """

    layers: Mapping[str, LayerProfile]
    total: Cost
    peak_activation_bytes: int
    held_bytes: Mapping[str, int]
    uncalled: tuple[str, ...]


def profile(model: nn.Module, inputs: batch.Inputs) -> Profile:
    """Count what one call of the model costs, on its own device and in evaluation mode; the model stays as it is.

    A parameter that several layers share belongs to the one called first. A compressed layer of ours (``is_form``) and
    a layer with parametrized weights are one row each, whatever they are made of.

    Args:
        model: any model that runs on the inputs.
        inputs: one call's inputs. The batch counts as it is: MACs of one sample need a batch of one.

    Raises:
        TaskError: the model fails on the inputs, or has parameters that its first call has yet to make.
    """
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise TaskError(
            f"{type(model).__name__} has parameters without a shape yet ({', '.join(lazy)}): "
            "call it once on an example before it is counted"
        )
    inputs = _copied(inputs.on(model))
    with batch.mode(model, training=False), _nothing_lasting(model), _watching(model) as watch:
        try:
            inputs.into(model)
        except Exception as error:
            raise TaskError(
                f"{type(model).__name__} fails on the example ({inputs}): {_first_line(error)}. "
                "Check the example's shapes and types against what the model's forward takes"
            ) from error
    return watch.profile()


def price(module: nn.Module, calls: Sequence[LayerCall]) -> Cost:
    """Cost of a module over the calls of the layer whose place it takes, without computing and without memory.

    It equals the row that `profile` has for the module in that place, where the module owns all its parameters. Two
    things differ by their nature: `uncounted` names the module's class for want of its place, and attention inside the
    module is priced as it runs without data, with its scores written out.

    Args:
        module: on any device; already on the meta device it need not be copied.
        calls: `LayerProfile.calls`. MACs and activations are summed over them; parameters and bytes count once.

    Raises:
        TaskError: the module does not take such inputs, or must see values to know what to do.
    """
    if any(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module = without_data(module)
    with batch.mode(module, training=False), _watching(module) as watch:
        for call in calls:
            args, kwargs = _arguments(call)
            try:
                module(*args, **kwargs)
            except Exception as error:
                raise TaskError(
                    f"{type(module).__name__} cannot be priced on inputs of shapes {list(call.inputs)}: "
                    f"{_first_line(error)}. Check that it fits the place of the layer whose calls these are"
                ) from error
    total = watch.profile().total
    kind = type_before_parametrizations(module).__name__
    return replace(total, uncounted=tuple(sorted({f"{name.split(' in ')[0]} in {kind}" for name in total.uncounted})))


@dataclass
class _Row:
    """A module while it is watched; `whole` where its child modules, if any, are part of it."""

    name: str
    module: nn.Module
    whole: bool
    called: bool = False
    macs: int = 0
    written: int = 0
    uncounted: set[str] = field(default_factory=set)
    calls: list[LayerCall] = field(default_factory=list)

    @property
    def kind(self) -> str:
        name: str = type_before_parametrizations(self.module).__name__
        return name if self.whole else f"{name} (functional)"

    def modules(self) -> list[nn.Module]:
        """The module, and those inside it that have no rows of their own."""
        if self.whole:
            return list(self.module.modules())
        inside = getattr(self.module, "parametrizations", None)
        return [self.module, *(inside.modules() if inside is not None else ())]

    def confined(self) -> list[tuple[nn.Module, str]]:
        """The modules with a tensor that a constraint is on, and that tensor's name."""
        held = [(module, name) for module in self.modules() for name in parametrized(module)]
        return [(module, name) for module, name in held if constraints_on(module, name)]

    def _plain(self) -> list[nn.Module]:
        """The modules without what a confined tensor is made of, which is stored in a form of its own."""
        confined = {id(part) for module, name in self.confined() for part in module.parametrizations[name].modules()}  # type: ignore[index, union-attr]
        return [module for module in self.modules() if id(module) not in confined]

    def parameters(self) -> list[Tensor]:
        return [parameter for module in self._plain() for parameter in module.parameters(recurse=False)]

    def buffers(self) -> list[Tensor]:
        """The persistent ones."""
        return [
            buffer
            for module in self._plain()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    """A watch over all that the model does meanwhile, without gradients."""
    watch = _Watch(model)
    hooks = (
        register_module_forward_pre_hook(watch.enter_module),
        register_module_forward_hook(watch.leave_module, with_kwargs=True, always_call=True),
    )
    try:
        with torch.no_grad(), batch.plain_attention(), watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()
            # PyTorch's handle leaves this entry behind, and torch.compile would then warn of global hooks for ever.
            _global_forward_hooks_with_kwargs.pop(hook.id, None)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books every operation on the module that is running."""

    supports_higher_order_operators = True  # such as torch.cond: PyTorch runs them only under modes that say so

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        rows = list(_rows(model))
        self.rows = {id(row.module): row for row in rows}
        self.running = [(rows[0], 0)]  # rows, the innermost call last, with what they had written before that call
        self.order: dict[str, _Row] = {}
        self.of_graph = isinstance(model, fx.GraphModule)
        self.owners = {id(part): row for row in rows for part in row.modules()}
        # Of a tensor that several hold, the first layer's, or else the first module's.
        by_right = sorted(rows, key=lambda row: not row.whole)
        self.weights = {_place(p): row for row in reversed(by_right) for p in row.parameters()}
        self.read: set[int | None] = set()
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.alive_bytes = 0
        self.peak_bytes = 0
        self.names = {id(module): name for name, module in model.named_modules()}
        self.held_bytes: dict[str, int] = {}
        self.confining = 0  # how many constraints are just now at work on a tensor: weights, not activations

    def enter_module(self, module: nn.Module, args: Any) -> None:
        self.confining += isinstance(module, Constrained | Rounded)
        current, _ = self.running[-1]
        row = current if current.whole else self.rows.get(id(module), current)
        if row.module is module:
            row.called = True
            self.order.setdefault(row.name, row)
        self.running.append((row, row.written))

    def leave_module(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
        row, written_before = self.running.pop()
        self.confining -= isinstance(module, Constrained | Rounded)
        if len(kwargs_and_output) < 2:  # how PyTorch calls the hook where the module raised
            return
        kwargs, output = kwargs_and_output
        if (name := self.names.get(id(module))) is not None:
            self.held_bytes[name] = max(self.held_bytes.get(name, 0), self.alive_bytes)
        if isinstance(module, Constrained) and (owner := self.owners.get(id(module))) is not None:
            self.weights |= {_place(tensor): owner for tensor in batch.tensors_in(output)}
        if isinstance(module, nn.RNNBase):
            # What is written on the way depends on the device's kernel, what is returned does not.
            row.written = written_before + sum(map(_bytes, batch.tensors_in(output)))
        if row.module is module and row.whole:
            row.calls.append(_call(args, kwargs, output))

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operations.has_parts(operation):
            with self:
                return operation.decompose(*args, **kwargs)
        out = operation(*args, **kwargs)
        self._book(operation, args, kwargs, out)
        return out

    def _book(self, operation: Any, args: Any, kwargs: Any, out: Any) -> None:
        row, _ = self.running[-1]
        macs = operations.macs(operation, args, kwargs, out)
        if self.of_graph and macs and not self.confining:
            row = self._holder(row, args)
        if macs is None:
            row.uncounted.add(f"{operations.name_of(operation)} in {row.name}")
        row.macs += macs or 0

        read = {_place(tensor) for tensor in batch.tensors_in((args, kwargs))}
        self.read |= read
        for tensor in batch.tensors_in(operations.results(operation, out)):
            if (place := _place(tensor)) not in read:
                self.weights.pop(place, None)  # a tensor that a constraint had made was there, and is gone
        if self.confining:
            return
        writes, in_place = not operations.writes_nothing(operation), operations.is_in_place(operation)
        for tensor in batch.tensors_in(operations.results(operation, out)):
            is_new = (place := _place(tensor)) not in read
            if writes and (is_new or in_place):
                row.written += _bytes(tensor)
            if is_new and place is not None and place not in self.alive:
                self._follow(place, tensor.untyped_storage())

    def _holder(self, row: _Row, args: Any) -> _Row:
        """In a captured graph, which calls no layers: the layer whose weight an operation multiplies by."""
        for tensor in batch.tensors_in(args):
            found = self.weights.get(_place(tensor))
            if found is not None:
                found.called = True
                return self.order.setdefault(found.name, found)
        return row

    def _follow(self, place: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            self.alive_bytes -= size
            del self.alive[place]

        self.alive[place] = weakref.ref(storage, gone)
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)

    def profile(self) -> Profile:
        """What has been watched so far."""
        layers: dict[str, LayerProfile] = {}
        total = Cost()
        owned: set[object] = set()
        for row in (*self.order.values(), *(row for row in self.rows.values() if not row.called)):
            parameters, buffers = row.parameters(), row.buffers()
            own_parameters, own_buffers = _not_in(owned, parameters), _not_in(owned, buffers)
            confined = row.confined()
            kept = [stored(module, name) for module, name in confined if (id(module), name) not in owned]
            owned |= {(id(module), name) for module, name in confined}
            cost = Cost(
                macs=row.macs,
                params=sum(p.numel() for p in own_parameters) + sum(tensor.values for tensor in kept),
                bytes=sum(map(_bytes, own_parameters + own_buffers)) + sum(tensor.bytes for tensor in kept),
                activation_bytes=row.written,
                uncounted=tuple(sorted(row.uncounted)),
            )
            total += cost
            if parameters or buffers or confined or row.macs or row.uncounted:
                layers[row.name] = LayerProfile(row.name, row.kind, cost, tuple(row.calls))
        return Profile(layers, total, self.peak_bytes, self.held_bytes, self._uncalled())

    def _uncalled(self) -> tuple[str, ...]:
        silent = [row for row in self.rows.values() if row.whole and not row.called]
        held = {row.name: [p for module in row.modules() for p in module.parameters(recurse=False)] for row in silent}
        return tuple(name for name, own in held.items() if own and not any(_place(p) in self.read for p in own))


def _not_in(owned: set[object], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that are not in `owned`, by where their values are stored; they are added to it."""
    new = []
    for tensor in tensors:
        place = _place(tensor)
        identity = (
            id(tensor) if place is None or is_traceable_wrapper_subclass(tensor) else (place, tensor.storage_offset())
        )
        if identity not in owned:
            owned.add(identity)
            new.append(tensor)
    return new


def _rows(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[_Row]:
    """A row for every module that is not part of another row's, each module once, under its first name."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    children = dict(module.named_children())
    whole = getattr(module, "is_form", False) or set(children) <= {"parametrizations"}
    yield _Row(name or MODEL, module, whole)
    if not whole:
        children.pop("parametrizations", None)
        for child_name, child in children.items():
            yield from _rows(child, f"{name}.{child_name}" if name else child_name, seen)


def _call(args: Any, kwargs: Any, output: Any) -> LayerCall:
    def blank(value: Any) -> Any:
        if isinstance(value, PackedSequence):  # the lengths of its sequences are part of its shape
            return value._replace(
                data=blank(value.data),
                sorted_indices=blank(value.sorted_indices),
                unsorted_indices=blank(value.unsorted_indices),
            )
        return Blank(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value

    inputs, outputs = batch.tensors_in((args, kwargs)), batch.tensors_in(output)
    return LayerCall(
        inputs=tuple(tuple(tensor.shape) for tensor in inputs),
        dtype=inputs[0].dtype if inputs else torch.get_default_dtype(),
        output=tuple(outputs[0].shape) if outputs else (),
        arguments=pytree.tree_map(blank, (args, kwargs), is_leaf=lambda value: isinstance(value, PackedSequence)),
    )


def _arguments(call: LayerCall) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The call's arguments with tensors on the meta device."""
    if call.arguments is None:
        return tuple(torch.empty(shape, dtype=call.dtype, device="meta") for shape in call.inputs), {}
    args, kwargs = pytree.tree_map(lambda v: v.tensor() if isinstance(v, Blank) else v, call.arguments)
    return args, kwargs


def _place(tensor: Tensor) -> int | None:
    """Where the tensor's storage is, by which views are known; None for tensors without one, such as sparse ones."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _bytes(tensor: Tensor) -> int:
    """Bytes of its elements; of a tensor that wraps others, theirs."""
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, part)) for part in parts)
    return tensor.numel() * tensor.element_size()


@contextmanager
def _nothing_lasting(model: nn.Module) -> Iterator[None]:
    """Put back buffers that the run changes, such as counters and caches, and the state of the random numbers."""
    kept = [
        (module, name, buffer, buffer.clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    device = batch.device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, name, buffer, values, version in kept:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                if version is None or _version(buffer) != version:
                    with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(values)


def _copied(inputs: batch.Inputs) -> batch.Inputs:
    """The same inputs in memory of their own, for models that write into theirs."""
    args, kwargs = pytree.tree_map(
        lambda value: value.clone() if isinstance(value, Tensor) else value, (inputs.args, dict(inputs.kwargs))
    )
    return batch.Inputs(args, kwargs)


def _version(tensor: Tensor) -> int | None:
    """How often it was written to; None where PyTorch does not keep count."""
    return None if tensor.is_inference() else tensor._version


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
