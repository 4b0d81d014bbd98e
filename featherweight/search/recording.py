"""Recording a call of a network up to one of its layers, and following the record in later calls on the same inputs.

While recording, every operation is watched beneath Python, storage by storage. A module can answer from the record only
if that cannot be told from running it. One that writes to what it was given, or answers with part of it, is run, except
for activations that work in place: what they wrote to is recorded as they left it. Where random numbers are drawn
before the layer, or a module keeps something from one call to the next, there is no record at all. The same watching
tells which answers are read by anything but modules that will not run: only those are kept.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What an answer or an argument may hold beside tensors: values that are equal where they look equal.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Record:
    """One call of a model, up to a layer.

    Attributes:
        steps: the modules called, in order, those inside recorded ones left out; with the answer, or None to run it.
        uses: the modules whose parameters or buffers are read.
    """

    steps: list[Step]
    uses: frozenset[str]

    @cached_property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        leaves = (leaf for _, answer in self.steps if isinstance(answer, Answer) for leaf in answer.leaves)
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    def depends_on(self, layer: str) -> bool:
        """Whether a change of this layer may change what is recorded."""
        return belongs(self.uses, layer)


def belongs(names: Iterable[str], layer: str) -> bool:
    """Whether any of the names is the layer's, or that of a part of it."""
    return any(name == layer or name.startswith(f"{layer}.") for name in names)


@dataclass(frozen=True)
class Answer:
    """What a module answered.

    Attributes:
        leaves: its tensors as copies of our own, or blanks for those that nobody reads; and whatever else is in it.
        structure: how they are put together.
    """

    leaves: list[Any]
    structure: pytree.TreeSpec

    def hand_out(self) -> Any:
        """The answer once more, free to be written to."""
        return pytree.tree_unflatten([_handed_out(leaf) for leaf in self.leaves], self.structure)


@dataclass(frozen=True)
class Same:
    """Says that a module answered with its first argument itself."""


# A module's name, and its answer; or None to run it.
Step = tuple[str, Answer | Same | None]


def _handed_out(leaf: Any) -> Any:
    if isinstance(leaf, Blank):
        return Unread(leaf)
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Blank:
    """A tensor without its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Diverged(Exception):
    """The model does not do the same as when it was recorded."""


class Lost(Diverged):
    """An activation is needed that was not saved before it was written to: a careful recording would have."""


class Unread(Tensor):
    """Stands for a tensor that nobody read while recording: it has a shape, but no values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Blank) -> Unread:
        made: Unread = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride, dtype=like.dtype, device=like.device
        )
        return made

    def __init__(self, like: Blank) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise Diverged(f"{func} reads an activation that was not read when it was recorded")

    def data_ptr(self) -> int:
        raise Diverged("an activation is read that was not read when it was recorded")


class Following:
    """A call of the model that follows a record."""

    def __init__(self, record: Record) -> None:
        self.record, self.done = record, 0

    def watching(self) -> AbstractContextManager[Any]:
        """What to run the model in."""
        return nullcontext()

    def run(self, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        """The model itself answers."""
        return forward(*args, **kwargs)

    def call(self, name: str, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        """A module is called: what it answers."""
        answer = next_step(self.record, self.done, name)
        self.done += 1
        if answer is None:
            return forward(*args, **kwargs)
        return answer.hand_out() if isinstance(answer, Answer) else args[0]

    def finish(self, answer: Any) -> None:
        """The model has answered.

        Raises:
            Diverged: it did not get as far as the record, or answers with what was not kept.
        """
        if self.done < len(self.record.steps):
            raise Diverged(f"{self.record.steps[self.done][0]} is not called")
        _leaves(answer)


def next_step(record: Record | None, done: int, name: str) -> Answer | Same | None:
    """The answer of the next module in a record; None where it is run, as are all behind the record's end.

    Raises:
        Diverged: another module is next.
    """
    if record is None or done >= len(record.steps):
        return None
    expected, answer = record.steps[done]
    if name != expected:
        raise Diverged(f"{name} is called where {expected} was called when it was recorded")
    return answer


@dataclass(eq=False)
class _Call:
    """One call of a module, while recording.

    Attributes:
        name: the module's.
        caller: the call it was made in; None for the model's own.
        begun: when.
        first: its first argument, where that is a tensor.
        clean: whether a record of its answer can stand for it.
        same: whether it does no more than answer with its first argument, perhaps changed in place.
        finished: whether it returned before the layer was reached.
        inside: the calls it made; none where it is left out on replay.
        waiting: kept tensors that its own code read, which are needed if it turns out to be run.
        changed: kept tensors that it changed in place, which are lost if it turns out to be run.
        leaves: its answer, where it is clean.
        structure: of the answer.
    """

    name: str
    caller: _Call | None
    begun: int
    first: Tensor | None = None
    clean: bool = True
    same: bool = True
    finished: bool = False
    inside: list[_Call] = field(default_factory=list)
    waiting: list[_Kept] = field(default_factory=list)
    changed: list[_Kept] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    structure: pytree.TreeSpec | None = None

    def outwards(self) -> Iterator[_Call]:
        """This call, the one it was made in, and so on to the model's own."""
        call: _Call | None = self
        while call is not None:
            yield call
            call = call.caller

    @property
    def left_out(self) -> bool:
        """Whether a replay does not run it."""
        return self.finished and (self.clean or self.same)

    def steps(self) -> Iterator[Step]:
        """What a replay finds inside this call."""
        for call in self.inside:
            if not call.left_out:
                yield call.name, None
                yield from call.steps()
            elif call.same:
                yield call.name, Same()
            else:
                assert call.structure is not None
                leaves = [leaf.recorded() if isinstance(leaf, _Kept) else leaf for leaf in call.leaves]
                yield call.name, Answer(leaves, call.structure)


class _Kept:
    """A tensor of a clean call's answer, held weakly until somebody reads it who will run on replay.

    Args:
        call: the call.
        tensor: the tensor, which others may write to.
        own: a copy that nobody writes to, or a blank, where there is one already.
    """

    def __init__(self, call: _Call, tensor: Tensor, own: Tensor | Blank | None = None) -> None:
        self.call, self.tensor, self.own = call, weakref.ref(tensor), own
        self.blank = Blank(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        self.held: Tensor | None = None
        self.lost = False

    def hold(self) -> None:
        """From now on the values are needed."""
        self.held = self.own if isinstance(self.own, Tensor) else self.tensor()
        if self.lost:
            raise Lost("an activation is read after it was written to")
        if self.held is None:
            raise Diverged("an activation is read after it was let go of")

    def save(self) -> None:
        """Copy the tensor, which is about to be written to."""
        tensor = self.tensor()
        if self.own is None and tensor is not None:
            self.own = tensor.clone()
            self.held = self.own if self.held is not None else None

    def lose(self) -> None:
        """Do without the tensor, which is about to be written to."""
        self.lost = self.own is None

    def recorded(self) -> Tensor | Blank:
        """What goes into the record."""
        if self.held is None:
            return self.blank
        if self.lost:
            raise Lost("an activation was read before it was written to")
        return self.held if self.held is self.own else self.held.clone()


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A call of the model that is recorded, up to a layer.

    Args:
        layer: where the record ends.
        inputs: the model's arguments.
        owners: the names of modules by the storages of their parameters and buffers.
        base: a record of an earlier layer on the same inputs, to follow as far as it goes.
        keep_all: whether to keep answers too that nobody is seen to read.
        careful: whether to save all that is written to, not just what is likely to be needed.
    """

    def __init__(
        self,
        layer: str,
        inputs: Any,
        owners: Mapping[UntypedStorage, str],
        base: Record | None,
        *,
        keep_all: bool,
        careful: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.owners, self.base, self.keep_all, self.careful = layer, owners, base, keep_all, careful
        self.inputs = _storages(inputs)
        self.uses = set(base.uses) if base is not None else set()
        self.done = 0  # steps of the base
        self.clock = 0
        self.reached = False
        self.in_place = False  # whether the present call is of a module that says it works in place
        self.spoilt: str | None = None
        self.root = self.here = _Call("", None, 0)
        self.random = _random_state()
        # When, and in which call, a storage was made; and which answer it belongs to.
        self.born: weakref.WeakKeyDictionary[UntypedStorage, tuple[int, _Call]] = weakref.WeakKeyDictionary()
        self.kept: weakref.WeakKeyDictionary[UntypedStorage, _Kept] = weakref.WeakKeyDictionary()

    def watching(self) -> AbstractContextManager[Any]:
        """What to run the model in."""
        return self

    def finish(self, answer: Any) -> Record | str:
        """The model has answered: the record, or why there can be none.

        Raises:
            Diverged: the answer holds something that cannot be looked into.
        """
        for storage in _storages(_leaves(answer)):
            self._reads(storage)
        steps: list[Step] = [(self.layer, None)] if self.reached else []
        if not self.reached:
            self._reach()
        return self.spoilt or Record([*self.root.steps(), *steps], frozenset(self.uses))

    def _spoil(self, reason: str) -> None:
        """There can be no record."""
        self.spoilt = self.spoilt or reason

    # Modules --------------------------------------------------------------------------------------------------------

    def run(self, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        """A module answers, and is not to change by it."""
        before = _held(module)
        try:
            answer = forward(*args, **kwargs)
        except Exception as error:
            self._spoil(f"a module raises {type(error).__name__}")  # which its caller may catch
            raise
        after = _held(module)
        if not _same(before, after):
            self._spoil(f"a {type(module).__name__} keeps something from one call to the next")
        return answer

    def call(self, name: str, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        """A module is called: what it answers."""
        if self.reached:
            return self.run(module, forward, args, kwargs)
        if name == self.layer:
            self._reach()
            return forward(*args, **kwargs)
        self.clock += 1
        call = _Call(name, self.here, self.clock, args[0] if args and isinstance(args[0], Tensor) else None)
        self.here.inside.append(call)
        recorded = next_step(self.base, self.done, name)
        self.done += 1
        if isinstance(recorded, Answer):
            call.same = False
            answer = recorded.hand_out()
            self._finish(call, answer, recorded.leaves)
            return answer
        if isinstance(recorded, Same):
            call.clean = False
            self._finish(call, args[0])
            return args[0]
        if hooked(module):
            for outer in call.outwards():
                outer.clean = outer.same = False
        self.in_place = bool(getattr(module, "inplace", False))
        given = pytree.tree_leaves((args, kwargs))
        self.here = call
        answer = self.run(module, forward, args, kwargs)
        if not self.reached:
            if not _same(given, pytree.tree_leaves((args, kwargs))):
                call.clean = call.same = False
            self._returned(call, answer)
        return answer

    def _returned(self, call: _Call, answer: Any) -> None:
        """A module has answered by itself, before the layer."""
        leaves = pytree.tree_leaves(answer)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        storages = _storages(leaves)
        for storage in storages:
            self._reads(storage)
        alone = len(storages) == len(tensors) and all(self._age(storage) >= call.begun for storage in storages)
        known = all(_ordinary(leaf) if isinstance(leaf, Tensor) else isinstance(leaf, PLAIN) for leaf in leaves)
        call.clean &= alone and known
        self._finish(call, answer)

    def _finish(self, call: _Call, answer: Any, own: list[Any] | None = None) -> None:
        """The call is over before the layer; `own` is the record that it came from, where it did."""
        assert call.caller is not None
        call.finished = True
        call.same &= not call.clean and call.first is not None and answer is call.first
        call.first = None  # only while it is in use
        self.here = call.caller
        self.in_place = False
        leaves, call.structure = pytree.tree_flatten(answer)
        for storage in _storages(leaves):
            if storage in self.born and self.born[storage][1] is call:
                self.born[storage] = self._age(storage), self.here  # what is answered is the caller's from now on
        if not call.left_out:
            for kept in call.changed:
                kept.lose()
            for kept in call.waiting:
                self._wanted(kept)
            return
        call.inside.clear()
        call.waiting.clear()
        if call.same:
            return
        for leaf, copied in zip(leaves, own or [None] * len(leaves), strict=True):
            kept = _Kept(call, leaf, copied) if isinstance(leaf, Tensor) else leaf
            call.leaves.append(kept)
            if isinstance(leaf, Tensor) and not isinstance(leaf, Unread):
                self.kept[leaf.untyped_storage()] = kept
                if self.keep_all:
                    kept.hold()

    def _reach(self) -> None:
        """The layer is called, or the model ends without having called it."""
        if _random_state() != self.random:
            self._spoil("random numbers are drawn before the layer")
        if belongs(self.uses, self.layer):
            self._spoil("the layer's weights are used before the layer is called")
        self.reached = True
        for call in self.here.outwards():
            for kept in call.waiting:
                kept.hold()
        self.here = self.root

    # Operations -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.clock += 1
        given = _arguments((*args, *kwargs.values()))
        for storage in given:
            self._reads(storage)
        for storage in _arguments(_targets(func, args, kwargs)):
            self._writes(storage)
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            self._spoil("random numbers are drawn from a generator")
        result = func(*args, **kwargs)
        for storage in _arguments(result if isinstance(result, tuple | list) else (result,)):
            # A constant such as torch.tensor(1.0) is made without an operation, and then lifted.
            if storage not in given or func is torch.ops.aten.lift_fresh.default:
                self.born[storage] = self.clock, self.here
        return result

    def _age(self, storage: UntypedStorage) -> int:
        """When the storage was made; −1 for before the model was called."""
        return self.born[storage][0] if storage in self.born else -1

    def _reads(self, storage: UntypedStorage) -> None:
        if not self.reached and storage in self.owners:
            self.uses.add(self.owners[storage])
        if storage in self.born:
            maker = self.born[storage][1]
            if any(call.left_out for call in maker.outwards()):
                self._spoil(f"something made in {maker.name} reaches others otherwise than by its answer")
        if storage in self.kept:
            self._wanted(self.kept[storage])

    def _wanted(self, kept: _Kept) -> None:
        """Code of the present call reads it: needed on replay, unless a record comes to stand for that call too."""
        assert kept.call.caller is not None
        reader = next(call for call in kept.call.caller.outwards() if not call.finished)
        if self.reached or reader is self.here:
            kept.hold()
        else:
            self.here.waiting.append(kept)

    def _writes(self, storage: UntypedStorage) -> None:
        if storage not in self.born and storage not in self.inputs:
            self._spoil("the model writes to its own buffers")
        kept = self.kept.get(storage)
        changed = kept is not None and self._changes(kept)
        for call in self.here.outwards():
            if self._age(storage) < call.begun:
                call.clean = False
                call.same &= changed
        if kept is None:
            return
        if changed:
            self.here.changed.append(kept)
            return
        del self.kept[storage]
        caller = kept.call.caller
        assert caller is not None
        # A module that does not contain the layer is likely to be over before it: its insides will not be needed.
        contains = caller is self.root or self.layer.startswith(f"{caller.name}.")
        if self.careful or contains or caller.finished or not caller.clean:
            kept.save()
        else:
            kept.lose()

    def _changes(self, kept: _Kept) -> bool:
        """Whether an activation is at work in place on a tensor that nobody needs as it was."""
        needed = kept.held is not None or kept.own is not None or kept.lost
        waited_for = any(kept in call.waiting for call in self.here.outwards() if call is not self.here)
        return self.in_place and not self.careful and not needed and not waited_for


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks on its forward: whoever set them wants to see it run."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _storages(tree: Any) -> set[UntypedStorage]:
    """The storages of all tensors in a tree; those without values have none."""
    leaves = pytree.tree_leaves(tree)
    return {leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Unread)}


def _arguments(values: Iterable[Any]) -> set[UntypedStorage]:
    """The same for what operations take and give, which is no deeper than lists of tensors, and faster."""
    found = set()
    for value in values:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and not isinstance(tensor, Unread):
                found.add(tensor.untyped_storage())
    return found


def _leaves(answer: Any) -> list[Any]:
    """What the model's answer is made of.

    Raises:
        Diverged: something that cannot be looked into, or a tensor without values, is among it.
    """
    leaves = pytree.tree_leaves(answer)
    for leaf in leaves:
        if isinstance(leaf, Unread) or not isinstance(leaf, (Tensor, *PLAIN)):
            raise Diverged(f"the model's answer holds a {type(leaf).__name__}")
    return leaves


def _targets(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes to."""
    places, names = _written(func)
    return [args[place] for place in places if place < len(args)] + [kwargs[name] for name in names if name in kwargs]


@lru_cache(maxsize=4096)
def _written(func: Any) -> tuple[list[int], list[str]]:
    """Which arguments an operation writes to, by place and by name."""
    arguments = enumerate(func._schema.arguments)
    written = [(i, argument.name) for i, argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return [i for i, _ in written], [name for _, name in written]


def _ordinary(tensor: Tensor) -> bool:
    """Whether a copy of the tensor is like it in every way."""
    return (
        type(tensor) in (Tensor, Unread)
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.requires_grad)
        and tensor.storage_offset() == 0
        and _dense(tensor)
    )


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _random_state() -> tuple[Any, ...]:
    """Where the random number generators are."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    numpy = np.random.get_state(legacy=False)["state"]
    return (*(s.numpy().tobytes() for s in states), numpy["key"].tobytes(), numpy["pos"], random.getstate())


def _held(module: nn.Module) -> list[Any]:
    """What a module holds: its attributes, what is in those that are dicts, and the lengths of lists and sets."""
    held = [*vars(module), *vars(module).values()]
    for value in vars(module).values():
        if isinstance(value, dict):
            held += [*value, *value.values()]
        elif isinstance(value, list | set):
            held.append(len(value))
    return held


def _same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether two series hold the same objects, or equal simple ones."""
    return len(before) == len(after) and all(
        a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)
        for a, b in zip(before, after, strict=True)
    )
