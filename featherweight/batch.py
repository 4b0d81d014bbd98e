"""What goes into a model and what comes out: positional or keyword inputs, moved, measured and described."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import TaskError


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a model.

    Attributes:
        args: positional arguments, usually tensors.
        kwargs: keyword arguments, usually tensors.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, nested ones included, in order."""
        return tensors_in((self.args, dict(self.kwargs)))

    def on(self, model: nn.Module) -> Inputs:
        """The same inputs on the model's device, floating-point ones in the model's floating-point type."""
        device, dtype = device_of(model), dtype_of(model)

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)

        args, kwargs = pytree.tree_map(move, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def into(self, model: nn.Module) -> Any:
        """The model's answer to these inputs, as they are."""
        return model(*self.args, **self.kwargs)

    @property
    def batch_size(self) -> int:
        """The length of the first tensor's first dimension; 1 where there is none."""
        first = next((t for t in self.tensors() if t.ndim), None)
        return 1 if first is None else first.shape[0]

    @property
    def empty(self) -> bool:
        """Whether it is tensors, and none of them holds a number."""
        tensors = self.tensors()
        return bool(tensors) and not any(t.numel() for t in tensors)

    def each(self) -> Iterator[Inputs]:
        """The samples one by one, each as a batch of one; tensors of another length go with all of them."""
        length = self.batch_size

        def taken(value: Any, index: int) -> Any:
            alike = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == length
            return value[index : index + 1] if alike else value

        for index in range(length):
            args, kwargs = pytree.tree_map(lambda v, i=index: taken(v, i), (self.args, dict(self.kwargs)))
            yield Inputs(args, kwargs)

    def __str__(self) -> str:
        named = [describe(a) for a in self.args] + [f"{k}={describe(v)}" for k, v in self.kwargs.items()]
        return ", ".join(named) or "nothing"


def as_inputs(batch: Any, like: Inputs | None = None) -> Inputs:
    """One call's inputs out of what a user or a loader gives.

    A tensor is one positional argument, a tuple or list several, a mapping keyword arguments.
    With `like` (the task's example), a loader's extras are left out: of a tuple the leading elements that the
    example has too, of a mapping the example's keys; so a loader of (images, labels) serves as it is.

    Raises:
        TaskError: the batch holds fewer inputs, or other keys, than the example.
    """
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, Mapping):
        if like is None:
            return Inputs((), dict(batch))
        if like.args:
            raise TaskError(f"a batch is a dict with {sorted(batch)} but the example is positional ({like})")
        if missing := [k for k in like.kwargs if k not in batch]:
            raise TaskError(f"a batch has the keys {sorted(batch)} but the example needs {missing} too")
        return Inputs((), {k: batch[k] for k in like.kwargs})
    given = tuple(batch) if isinstance(batch, Sequence) and not isinstance(batch, str) else (batch,)
    if like is None:
        return Inputs(given, {})
    if like.kwargs:
        raise TaskError(f"a batch is a {type(batch).__name__} but the example is a dict with {sorted(like.kwargs)}")
    if len(given) < len(like.args):
        raise TaskError(f"a batch has {len(given)} inputs but the example has {len(like.args)}")
    return Inputs(given[: len(like.args)], {})


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts, dataclasses and model outputs, in order."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):  # model outputs of other libraries that are dicts but no pytree nodes
            found.extend(tensors_in(dict(leaf)))
        elif hasattr(leaf, "__dataclass_fields__") and not isinstance(leaf, type):
            found.extend(tensors_in([getattr(leaf, name) for name in leaf.__dataclass_fields__]))
    return found


def named_tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor in nested tuples, lists, dicts, dataclasses and model outputs, by where it is, such as ``0.boxes``.

    A tensor by itself is called ``output``.
    """
    if isinstance(value, Tensor):
        return {name or "output": value}
    if isinstance(value, Mapping):
        parts = {str(key): item for key, item in value.items()}
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        parts = {key: getattr(value, key) for key in value.__dataclass_fields__}
    elif hasattr(value, "_fields"):  # a named tuple
        parts = {key: getattr(value, key) for key in value._fields}
    elif isinstance(value, tuple | list):
        parts = {str(index): item for index, item in enumerate(value)}
    else:
        parts = getattr(value, "__dict__", {})
    return {
        path: tensor
        for key, item in parts.items()
        for path, tensor in named_tensors(item, f"{name}.{key}" if name else key).items()
    }


def sketch(inputs: Inputs) -> dict[str, Any]:
    """The shapes, types and ranges of inputs as JSON-ready data, without their values."""

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return {"value": value}
        if value.is_floating_point() or value.is_complex():
            flat = torch.view_as_real(value) if value.is_complex() else value
            flat = flat.detach().double()
            moments = (flat.mean(), flat.std(correction=0)) if value.numel() else (0.0, 0.0)
            spread = [float(f"{float(moment):.6g}") for moment in moments]  # short, for small files
        else:
            spread = [int(value.min()), int(value.max())] if value.numel() else [0, 0]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "spread": spread}

    simple = (Tensor, str, int, float, bool, type(None))
    if not all(isinstance(value, simple) for value in (*inputs.args, *inputs.kwargs.values())):
        return {}
    return {"args": [drawn(a) for a in inputs.args], "kwargs": {k: drawn(v) for k, v in inputs.kwargs.items()}}


def sketched(data: Mapping[str, Any]) -> Inputs:
    """Made-up inputs of the shapes, types and ranges of a `sketch`; always the same ones."""
    generator = torch.Generator().manual_seed(0)

    def draw(item: Mapping[str, Any]) -> Any:
        if "value" in item:
            return item["value"]
        dtype, shape, (one, other) = getattr(torch, item["dtype"]), item["shape"], item["spread"]
        if dtype.is_complex:
            parts = torch.randn([*shape, 2], generator=generator) * other + one
            return torch.view_as_complex(parts).to(dtype)
        if dtype.is_floating_point:
            return (torch.randn(shape, generator=generator) * other + one).to(dtype)
        return torch.randint(one, other + 1, shape, generator=generator).to(dtype)

    return Inputs(tuple(draw(a) for a in data.get("args", ())), {k: draw(v) for k, v in data.get("kwargs", {}).items()})


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU where it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The type of the model's first floating-point parameter or buffer; None where it has none."""
    return next((t.dtype for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), None)


def describe(value: Any) -> str:
    """A tensor as ``float32[8, 3, 224, 224]``, anything else by its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that holds tensors it has computed with gradients, as the older weight norm does.

    Of these the copy has the values alone. What is no module is copied as it is, for others to refuse.
    """
    computed = [
        value
        for module in (model.modules() if isinstance(model, nn.Module) else ())
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


# Of every `plain_attention` that is not over, whether fused attention was on before the first.
_PLAIN: list[bool] = []


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run `nn.TransformerEncoder` and `nn.MultiheadAttention` by their ordinary operations.

    The fused inference kernel takes layers' dense weights past the layers, hides its work from counting, answers zeros
    at padded positions, and has no counterpart in other runtimes; models are only comparable without it. It is switched
    off for the whole process, and on again by the last that leaves: runs that wait for each other do not end in turn.
    """
    _PLAIN.append(_PLAIN[0] if _PLAIN else torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        fused = _PLAIN.pop()
        if not _PLAIN:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[nn.Module]:
    """The model in training or evaluation mode, without fused attention; all is put back as it was afterwards."""
    flags = {module: module.training for module in model.modules()}
    if training:
        model.train()
    else:
        # Not model.eval(), which exported modules refuse and others use to change themselves.
        for module in (module for module, flag in flags.items() if flag):
            module.training = False
    try:
        with plain_attention():
            yield model
    finally:
        for module, flag in flags.items():
            if module.training != flag:
                module.training = flag
