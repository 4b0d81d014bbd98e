"""The target of a batch, the loss of a model's outputs, and how good a model is on a loader's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.batch import Inputs, as_inputs, describe, mode
from featherweight.errors import TaskError
from featherweight.progress import track

Loss = str | Callable[[Any, Any], Tensor]

LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
TARGET_KEYS = ("labels", "label", "target")
NO_BATCHES = "the loader yields no batches: give it at least one batch of (inputs..., target)"


@torch.no_grad()
def evaluate_loader(model: nn.Module, loader: Iterable[Any], loss: Loss = "cross_entropy") -> float:
    """How good a model is on a loader's batches, higher is better.

    Returns:
        For ``"cross_entropy"`` the share of samples (of positions, for outputs (batch, classes, ...)) whose class is
        told rightly, targets of -100 left out as cross entropy does; for other losses minus the mean over the samples.

    Raises:
        TaskError: the loader yields no batches, or none of (inputs..., target).
    """
    total = count = 0.0
    with mode(model, training=False):
        for batch in track(loader, "Evaluating"):
            inputs, target = split_target(batch)
            inputs, (target,) = inputs.on(model), Inputs((target,)).on(model).args
            outputs = inputs.into(model)
            outputs = getattr(outputs, "logits", outputs)
            if loss == "cross_entropy":
                if outputs.ndim < 2:
                    raise TaskError(f"cross_entropy needs outputs (batch, classes, ...), not {describe(outputs)}")
                classes = target.argmax(1) if target.shape == outputs.shape else target
                counted = classes != -100
                total += int((outputs.argmax(1) == classes)[counted].sum())
                count += int(counted.sum())
            else:
                total -= float(loss_of(loss, outputs, target)) * inputs.batch_size
                count += inputs.batch_size
    if not count:
        raise TaskError("there is nothing to evaluate on: the loader yields no batches")
    return total / count


def split_target(batch: Any) -> tuple[Inputs, Any]:
    """A loader's batch as the model's inputs and the target.

    Args:
        batch: (inputs..., target), or a dict with the target under ``labels``, ``label`` or ``target``.

    Raises:
        TaskError: it is neither.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in TARGET_KEYS if key in batch), None)
        if key is None or len(batch) < 2:
            raise TaskError(f"a batch has the keys {sorted(batch)}: it needs inputs, and a target under {TARGET_KEYS}")
        return as_inputs({name: value for name, value in batch.items() if name != key}), batch[key]
    if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) < 2:
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else describe(batch)
        raise TaskError(f"a batch is a {what}: give (inputs..., target), or a dict with the key 'labels'")
    return as_inputs(tuple(batch[:-1])), batch[-1]


def loss_of(loss: Loss, outputs: Any, target: Any) -> Tensor:
    """The loss of a model's outputs, a scalar.

    Raises:
        TaskError: the loss cannot be computed from these, or is no scalar.
    """
    given = f"outputs {describe(outputs)} and target {describe(target)}"
    if loss == "mse" and describe(outputs) != describe(target):  # else they would be broadcast
        raise TaskError(f"mse needs outputs and targets alike, and there are {given}")
    function = LOSSES.get(loss) if isinstance(loss, str) else loss
    if function is None:
        raise TaskError(f"loss is {loss!r}: it must be of {[*LOSSES]} or a function (outputs, target) → scalar")
    try:
        value = function(outputs, target)
    except Exception as error:  # whatever the user's own loss raises
        raise TaskError(f"the loss {name_of(loss)} failed on {given}: {error}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TaskError(f"the loss {name_of(loss)} gave {describe(value)} for {given}: it must give a scalar tensor")
    return value.squeeze()


def name_of(function: Any) -> str:
    """A function's name, for messages and records."""
    return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__name__)
