"""Suffix evaluation: with one layer changed, only the part of the network behind it is run.

A layer's change leaves all activations before it as they were. So the first time a network with a changed layer is
called on some inputs, the answers of the modules that finish before the layer begins are recorded; whenever it is
called on the same inputs again, those modules answer from the record. Code between modules (additions, concatenations,
reshapes) runs as always, on recorded answers. Whoever calls the network notices nothing but the time.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from featherweight import edits
from featherweight.search.recording import PLAIN, Following, Lost, Record, Recording, hooked

# What activations before a layer depend on: a hash of the model's state, and one of its inputs.
Key = tuple[int, bytes]


class Replay:
    """A working copy of a network, one layer of which can be changed at a time.

    Asking for layers in the order in which they are called is the cheapest: each layer's record is then made by
    following the one before, and records of one layer are all that has to fit.

    Attributes:
        limit: bytes of activations to keep; inputs for which there is no room are computed as without replay.
        obstacles: why nothing could be replayed, by layer; layers where all went well are not in it.
    """

    def __init__(self, model: nn.Module, limit: int = 1 << 30) -> None:
        """Args:
        model: the network; it is copied, and not changed.
        limit: bytes of activations to keep.
        """
        self.limit = limit
        self.obstacles: dict[str, str] = {}
        self._original = model
        self._careful = False  # how to record
        self._unfit: set[str] = set()  # layers that nothing will be replayed for
        self._cut: str | None = None  # the layer that is changed just now
        self._replacement: nn.Module | None = None
        self._thread = threading.local()
        self._start()

    @property
    def bytes(self) -> int:
        """Bytes of activations that are kept now."""
        return sum(record.bytes for record in self._records.values())

    @contextmanager
    def changed(self, edit: edits.Replace) -> Iterator[nn.Module]:
        """The working copy with one layer replaced; it replays what comes before. Afterwards the layer is put back.

        It replays in evaluation mode and without gradients; in all other circumstances the model just runs.

        Raises:
            EditError: the edit does not fit the model.
        """
        name = vars(edits.find(self._model, edit.layer))["forward"].name
        undo = _undo(self._model)
        edit.apply(self._model)
        replacement = edits.find(self._model, edit.layer)
        self._tap(name, replacement)
        self._cut, self._replacement = name, replacement
        try:
            yield self._model
        finally:
            self._cut = self._replacement = None
            undo()
            # What one trial leaves in the model must not reach the next one's.
            if self._state() != self._untouched or name in self._unfit:
                self._start()

    def _start(self) -> None:
        """A fresh working copy, and no records."""
        self._model = copy.deepcopy(self._original)
        self._modules = dict(self._model.named_modules())
        self._records: dict[tuple[str, Key], Record] = {}
        self._full: set[str] = set()  # layers whose records leave no room
        for name, module in self._modules.items():
            self._tap(name, module)
        self._untouched = self._state()

    def _tap(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, torch.jit.ScriptModule):
            vars(module)["forward"] = _Tap(self, name, module)

    def called(self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a module of the working copy answers."""
        run = getattr(self._thread, "run", None)
        if run is not None:
            return run.call(name, module, forward, args, kwargs)
        cut, key = self._cut, None
        if cut is not None and module is self._model and cut not in self._unfit:
            key = self._key(cut, args, kwargs)
        if cut is None or key is None:
            return forward(*args, **kwargs)
        record = self._records.get((cut, key))
        if record is None and cut in self._full:
            return forward(*args, **kwargs)
        run = self._thread.run = Following(record) if record is not None else self._recording(cut, key, (args, kwargs))
        try:
            with run.watching():
                answer = run.run(module, forward, args, kwargs)
            made = run.finish(answer)
        except Exception as error:
            # Either the model raises by itself, and will again; or it does not do the same as when it was recorded.
            if isinstance(error, Lost) and not self._careful:
                self._careful = True
            else:
                self._give_up(cut, f"{type(error).__name__}: {error}")
            if self._key(cut, args, kwargs) != key:  # it has written to its inputs, and cannot be run on them again
                raise
        else:
            if isinstance(made, str):
                self._give_up(cut, made)
            elif made is not None:
                self._keep(cut, key, made)
            return answer
        finally:
            self._thread.run = None
        return forward(*args, **kwargs)

    def _key(self, cut: str, args: Any, kwargs: Any) -> Key | None:
        """What the activations before the layer depend on; None where the model should just run."""
        if torch.is_grad_enabled():
            self.obstacles[cut] = "the model is called with gradients on: put torch.no_grad() around the evaluation"
            return None
        if any(module.training for module in self._modules.values()):
            self.obstacles[cut] = "the model is called in training mode"
            return None
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return None
        # Whoever watches all modules or all operations wants to see them run.
        watched = every_module._global_forward_hooks or every_module._global_forward_pre_hooks
        if watched or _get_current_dispatch_mode_stack():
            return None
        digest = _digest(args, kwargs)
        if digest is None:
            self.obstacles[cut] = "the model is called with something else than tensors and simple values"
            return None
        return self._state(), digest

    def _state(self) -> int:
        """A hash of what the modules hold: parameters and buffers by identity and version, hooks, simple attributes."""
        facts: list[Any] = []
        for module in self._modules.values():
            facts.append(hooked(module))
            facts += [v for k, v in vars(module).items() if type(v) in (bool, int, float, str) and k != "training"]
            for tensor in _tensors(module):
                facts += (id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
        return hash(tuple(facts))

    def _recording(self, cut: str, key: Key, inputs: Any) -> Recording:
        """A run that records; it follows the record of an earlier layer, where there is one."""
        usable = (record for (_, k), record in self._records.items() if k == key and not record.depends_on(cut))
        base = max(usable, key=lambda record: len(record.uses), default=None)
        assert self._replacement is not None
        parts = [(name, module) for name, module in self._modules.items()]
        parts += [(cut, module) for module in self._replacement.modules()]
        owners = {tensor.untyped_storage(): name for name, module in parts for tensor in _tensors(module)}
        keep_all = any(hooked(module) for _, module in parts)
        return Recording(cut, inputs, owners, base, keep_all=keep_all, careful=self._careful)

    def _keep(self, cut: str, key: Key, record: Record) -> None:
        """Keep the record within the limit, at the expense of other layers': first of the one it was made from."""
        records, room = dict(self._records), self.limit - self.bytes
        others = [k for k in records if k[0] != cut or k[1][0] != key[0]] if room < record.bytes else []
        for other in sorted(others, key=lambda k: k[1] != key):
            if room < record.bytes:
                room += records.pop(other).bytes
        if room >= record.bytes:
            self._records = {**records, (cut, key): record}
        else:
            self._full.add(cut)
            self.obstacles[cut] = f"its activations do not all fit into {self.limit} bytes"

    def _give_up(self, cut: str, reason: str) -> None:
        self.obstacles[cut] = reason
        self._unfit.add(cut)
        self._records = {k: record for k, record in self._records.items() if k[0] != cut}


class _Tap:
    """In place of a module's forward: lets the replay answer. In a copy of the module it is the forward again."""

    def __init__(self, replay: Replay, name: str, module: nn.Module) -> None:
        self.replay, self.name, self.module, self.forward = replay, name, module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replay.called(self.name, self.module, self.forward, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.forward,)


def _itself(value: Any) -> Any:
    return value


def _digest(args: Any, kwargs: Any) -> bytes | None:
    """A hash of a call's arguments and of how it is computed; None where the arguments hold anything unknown."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    devices = {"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))}
    lower = [(d, torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))) for d in sorted(devices)]
    digest = hashlib.sha256(repr((structure, lower, torch.get_default_dtype())).encode())
    for leaf in leaves:
        if isinstance(leaf, PLAIN):
            digest.update(repr((type(leaf), leaf)).encode())
        elif type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided and not _packed(leaf):
            digest.update(repr((leaf.shape, leaf.stride(), leaf.dtype, leaf.device)).encode())
            if leaf.numel():
                digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            return None
    return digest.digest()


def _packed(tensor: Tensor) -> bool:
    return tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()


def _tensors(module: nn.Module) -> list[Tensor]:
    """The module's own parameters and buffers."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _undo(model: nn.Module) -> Callable[[], None]:
    """Puts back, when called, every child and every simple attribute of every module as they are now."""
    held = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]

    def undo() -> None:
        for module, attributes, children in held:
            module._modules.update(children)
            vars(module).update({k: v for k, v in attributes.items() if type(v) in (bool, int, float, str)})

    return undo
