"""Runs that wait: a network on many batches, all of which stand still at one layer, then go on to the next.

A method that fits layer after layer to what the layers before it have become needs every layer's inputs once those are
in place. Starting each run anew for each layer costs as many half passes as there are layers; runs that wait cost one.
A waiting run is a greenlet: its forward, whatever the model's code is, stands still in the middle of a layer's call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from featherweight.batch import Inputs, mode
from featherweight.machine import free_memory


@dataclass(frozen=True)
class Reached:
    """One call of a layer: what goes in and, where the run was asked to go through it, what comes out."""

    x: Tensor
    answer: Tensor | None = None


class Waiting:
    """A network's runs on some batches, side by side.

    Between calls the network may be changed behind the layer that was reached last, and at that layer itself: runs go
    on with the module that is in its place by then. Whatever lies before has been run, and is not run again.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Inputs], *, through: bool) -> None:
        """Args:
        model: the network.
        batches: its inputs, on its device.
        through: whether to run a layer that is reached, and give its answer, before standing still.
        """
        self.model, self.batches, self.through = model, batches, through
        self._runs: list[greenlet | None] = [None] * len(batches)

    def at(self, name: str, calls: int, limit: int) -> Iterator[list[Reached]]:
        """What reaches a layer, batch by batch: a list of its calls, empty where a batch does not reach it.

        Args:
            name: the layer; to be asked for in the order in which the model calls them.
            calls: how often a run calls it. Only runs that call it once can stand still at it.
            limit: how many of the runs may wait there; the others are started anew, now and at the next layer.
        """
        self._end(limit)
        with mode(self.model, training=False):
            for index, inputs in enumerate(self.batches):
                if calls != 1 or index >= limit:
                    yield self._once(name, inputs, calls)
                    continue
                run = self._runs[index]
                found = [] if run is None else self._onward(name, run)
                if not found:  # it has not begun, or ended without reaching this layer: not all batches go one way
                    run = self._runs[index] = greenlet(partial(inputs.into, self.model))
                    found = self._onward(name, run)
                yield found

    def answers(self) -> list[Any]:
        """What the network answers, batch by batch: runs that wait go on to their end."""
        given = []
        with mode(self.model, training=False):
            for index, inputs in enumerate(self.batches):
                run, self._runs[index] = self._runs[index], None
                if run is None or run.dead:
                    with torch.no_grad():
                        given.append(inputs.into(self.model))
                else:
                    run.parent = getcurrent()
                    with _surroundings(), torch.no_grad():
                        given.append(run.switch())
        return given

    def close(self) -> None:
        """End all runs; the next layer asked for is reached from the start."""
        self._end(0)

    def _end(self, first: int) -> None:
        """End the runs of the batches from the first one on."""
        for index in range(first, len(self._runs)):
            run, self._runs[index] = self._runs[index], None
            if run is not None and not run.dead:
                with _surroundings():
                    run.throw(GreenletExit)

    def _onward(self, name: str, run: greenlet) -> list[Reached]:
        """Let a run go on until it reaches the layer; nothing where it ends before."""
        if run.dead:
            return []
        found: list[Reached] = []
        run.parent = getcurrent()

        def note(reached: Reached) -> None:
            found.append(reached)
            if torch.is_inference_mode_enabled() or _get_current_dispatch_mode_stack():
                raise GreenletExit  # what the forward has switched on for everybody can only be left by its end
            with _surroundings():
                run.parent.switch()

        with self._tapped(name, note), _surroundings(), torch.no_grad():
            run.switch()
        return found

    def _once(self, name: str, inputs: Inputs, calls: int) -> list[Reached]:
        """The calls of a layer in one run, which ends there."""
        found: list[Reached] = []

        def note(reached: Reached) -> None:
            if len(found) + 1 == calls:
                found.append(reached)
                raise GreenletExit
            answer = None if reached.answer is None else reached.answer.clone()
            found.append(Reached(reached.x.clone(), answer))  # what runs on may write into it

        with self._tapped(name, note), torch.no_grad(), suppress(GreenletExit):
            inputs.into(self.model)
        return found

    @contextmanager
    def _tapped(self, name: str, note: Callable[[Reached], None]) -> Iterator[None]:
        """Tells of calls of the layer, then lets what is in its place by then answer."""
        layer = self.model.get_submodule(name)
        held, forward = vars(layer).get("forward"), layer.forward

        def tap(*args: Any, **kwargs: Any) -> Any:
            x = (args[0] if args else kwargs["input"]).detach()
            answer = forward(*args, **kwargs) if self.through else None
            note(Reached(x, answer))
            if answer is not None:
                return answer
            now = self.model.get_submodule(name)
            return forward(*args, **kwargs) if now is layer else now(*args, **kwargs)

        vars(layer)["forward"] = tap
        try:
            yield
        finally:
            del vars(layer)["forward"]
            if held is not None:
                vars(layer)["forward"] = held


def _free(batches: Sequence[Inputs]) -> int:
    """Bytes of memory that are free where the batches are."""
    device = next((tensor.device for inputs in batches for tensor in inputs.tensors()), torch.device("cpu"))
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


class Lockstep:
    """An original network and a changed one on the same batches, both of which wait at the same layer."""

    def __init__(
        self,
        original: nn.Module,
        changed: nn.Module,
        batches: Iterable[Inputs],
        *,
        sample_bytes: Callable[[str], float] = lambda name: 0.0,
        memory_limit: int | None = None,
    ) -> None:
        """Args:
        original: the network before the changes.
        changed: the same network, changed as it goes.
        batches: their inputs, on their device.
        sample_bytes: by a layer's name, the bytes of activations that a run which waits there holds for each sample.
        memory_limit: bytes of activations that runs may hold while they wait; those beyond are started anew for
            every layer. None for a third of the memory that is free: there may be two at once, of layers and of blocks.
        """
        given = list(batches)
        largest = max((inputs.batch_size for inputs in given), default=1)
        room = _free(given) // 3 if memory_limit is None else memory_limit
        self._room, self._bytes_at = room / (2 * largest), sample_bytes
        self.samples = sum(inputs.batch_size for inputs in given)
        self._original = Waiting(original, given, through=True)
        self._changed = Waiting(changed, given, through=False)

    def at(self, name: str, calls: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Call by call: what goes into a layer of the changed network, and what the original answers in its place.

        Args:
            name: the layer, which is still the original's in both; to be asked for in calling order.
            calls: how often one run calls it.
        """
        for was, now in self.reached(name, calls):
            assert was.answer is not None
            yield now.x, was.answer

    def reached(self, name: str, calls: int = 1) -> Iterator[tuple[Reached, Reached]]:
        """Call by call: what goes into a module of the original, with its answer, and into that of the changed network.

        Args:
            name: the module, whose first argument is a tensor; to be asked for in calling order.
            calls: how often one run calls it.
        """
        limit = int(self._room // max(1.0, self._bytes_at(name)))
        for was, now in zip(self._original.at(name, calls, limit), self._changed.at(name, calls, limit), strict=True):
            yield from zip(was, now, strict=False)

    def alone(self, name: str, calls: int = 1) -> Iterator[Reached]:
        """Call by call: what goes into a layer of the original, with its answer; the changed network does not run.

        Args:
            name: the layer; to be asked for in calling order.
            calls: how often one run calls it.
        """
        for was in self._original.at(name, calls, int(self._room // max(1.0, self._bytes_at(name)))):
            yield from was

    def answers(self) -> tuple[list[Any], list[Any]]:
        """What the original and the changed network answer, batch by batch."""
        return self._original.answers(), self._changed.answers()

    def restart(self) -> None:
        """Run the changed network anew: it was changed before the layer that was reached last."""
        self._changed.close()

    def close(self) -> None:
        """End all runs."""
        self._original.close()
        self._changed.close()


@contextmanager
def _surroundings() -> Iterator[None]:
    """Puts back afterwards whether gradients and lower precision are on: a run waits in the midst of its own.

    Runs share one thread, and these belong to the thread.
    """
    gradients = torch.is_grad_enabled()
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    lower = {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices}
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        for device, (enabled, dtype) in lower.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
