"""What two networks give for the same inputs: their outputs, and what goes in and out of some of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featherweight.batch import Inputs, device_of, mode, named_tensors, tensors_in
from featherweight.errors import TaskError
from featherweight.score import class_dimension
from featherweight.task import Loss, first_line


@dataclass(frozen=True)
class Tap:
    """Where to look into a network.

    Attributes:
        layer: the module's name.
        side: ``output`` or ``input``.
    """

    layer: str
    side: str = "output"

    def __str__(self) -> str:
        return self.layer if self.side == "output" else f"what goes into {self.layer}"


@dataclass(frozen=True)
class Answer:
    """What a network gave for a batch.

    Attributes:
        outputs: its floating-point outputs by name; of a model with ``.logits`` these alone.
        taps: what was seen inside.
    """

    outputs: Mapping[str, Tensor]
    taps: Mapping[Tap, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One call of one module, as a run on the example showed it.

    Attributes:
        name: the module's.
        module: it.
        given: the shape of the first tensor that it gave; None where there is none.
        negative: whether any value of that was negative.
    """

    name: str
    module: nn.Module
    given: tuple[int, ...] | None
    negative: bool


@dataclass(frozen=True)
class Look:
    """A run of a network on the example.

    Attributes:
        raw: its outputs as they came.
        outputs: as in `Answer`.
        calls: of its modules, in the order in which they ended.
    """

    raw: Any
    outputs: Mapping[str, Tensor]
    calls: Sequence[Call]


def outputs_of(raw: Any) -> dict[str, Tensor]:
    """A model's floating-point outputs by name; its ``.logits`` alone where it has them."""
    logits = getattr(raw, "logits", None)
    if isinstance(logits, Tensor):
        return {"logits": logits.float()}
    return {name: tensor.float() for name, tensor in named_tensors(raw).items() if tensor.is_floating_point()}


def look(network: nn.Module, example: Inputs, who: str) -> Look:
    """Run a network on the example and see what its modules give; it stays as it is.

    Args:
        network: the network.
        example: inputs of one call.
        who: ``the teacher`` or ``the student``, for messages.
    Raises:
        TaskError: it does not run on them.
    """
    calls: list[Call] = []

    def seen(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = next(iter(tensors_in(output)), None)
        shape = None if tensor is None else tuple(tensor.shape)
        calls.append(Call(name, module, shape, tensor is not None and bool((tensor < 0).any())))

    handles = [m.register_forward_hook(partial(seen, name)) for name, m in network.named_modules() if name]
    try:
        with torch.no_grad(), mode(network, training=False):
            raw = example.on(network).into(network)
    except Exception as error:  # whatever a user's forward raises
        raise TaskError(
            f"{who}, a {type(network).__name__}, cannot run on the example ({example}): {type(error).__name__}: "
            f"{first_line(error)}. Teacher and student must take the same inputs"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return Look(raw, outputs_of(raw), calls)


def classes_in(look: Look, loss: Loss | None) -> int | None:
    """The dimension of a classifier's logits that holds its classes; None for what is no classifier."""
    if isinstance(getattr(look.raw, "logits", None), Tensor):
        return -1
    return class_dimension(look.raw, loss)


class Watch:
    """Hooks that hold what passes the taps of a network, until `close` takes them off.

    Args:
        network: the network.
        taps: where to look.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap]) -> None:
        self.seen: dict[Tap, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for tap in dict.fromkeys(taps):
            layer = network.get_submodule(tap.layer)
            self._handles.append(layer.register_forward_hook(partial(self._hold, tap), with_kwargs=True))

    def take(self) -> dict[Tap, Tensor]:
        """What passed since the last time, in float32; of a layer that was called more than once, the last."""
        taken = {tap: tensor.float() for tap, tensor in self.seen.items()}
        self.seen.clear()
        return taken

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.seen.clear()

    def _hold(self, tap: Tap, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = next(iter(tensors_in((args, kwargs) if tap.side == "input" else output)), None)
        if tensor is not None:
            self.seen[tap] = tensor


class LastCall:
    """A hook that holds the last call of the network that is trained, until `close` takes it off.

    Args:
        network: the student.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._call: tuple[Inputs, Any, bool] | None = None
        self._autocast = (False, torch.float32)
        self._handle = network.register_forward_hook(self._hold, with_kwargs=True)

    def take(self) -> tuple[Inputs, Any]:
        """The inputs and outputs of the call, once.

        Raises:
            TaskError: there was none since the last time, or it was in evaluation mode.
        """
        if self._call is None:
            raise TaskError(
                f"the student, a {type(self.network).__name__}, was not called since the loss was last asked for: call "
                "the very network that was given, as student(...), before every loss"
            )
        inputs, outputs, training = self._call
        self._call = None
        if not training:
            raise TaskError("the student is in evaluation mode: call student.train() before training it")
        return inputs, outputs

    def again(self, network: nn.Module, inputs: Inputs) -> Any:
        """Another network's outputs for these inputs, in the precision that the student was called in."""
        device = next((t.device for t in inputs.tensors()), device_of(network))
        if device_of(network) != device:
            network.to(device)
        enabled, dtype = self._autocast
        with torch.autocast(device.type, dtype, enabled):
            return inputs.into(network)

    def forget(self) -> None:
        """Hold nothing any more, as after a look at the example."""
        self._call = None

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()
        self._call = None

    def _hold(self, network: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._call = Inputs(args, kwargs), output, network.training
        kind = next((t.device.type for t in self._call[0].tensors()), "cpu")
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
