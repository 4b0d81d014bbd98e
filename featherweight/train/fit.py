"""The default training loop: in place, resumable, and the same on one process or on many.

Built on accelerate (``pip install 'featherweight[train]'``): start a script with ``accelerate launch`` or ``torchrun``,
and its processes share every batch.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from featherweight.batch import Inputs, device_of, mode
from featherweight.errors import TaskError
from featherweight.progress import track
from featherweight.train.checkpoint import (
    Position,
    State,
    ctrl_c,
    generators_of,
    put_back,
    random_numbers_kept,
    set_random_state,
    until,
    values_of,
)
from featherweight.train.evaluate import LOSSES, NO_BATCHES, Loss, loss_of, name_of
from featherweight.train.evaluate import evaluate_loader as evaluate_loader
from featherweight.train.evaluate import split_target as split_target
from featherweight.train.processes import accelerator_for, over_processes, placed, share_buffers, share_of

Decay = Callable[[float], float]

DECAYS: dict[str, Decay] = {  # share of the time after the warm-up, 0 to 1 → share of the peak learning rate
    "one-cycle": lambda share: 1 - share,  # Smith & Topin, Super-Convergence, 2018, arxiv.org/abs/1708.07120
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,  # Loshchilov & Hutter, 2017, arxiv.org/abs/1608.03983
    "constant": lambda share: 1.0,
}
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class History:
    """What a training did.

    Attributes:
        losses: per epoch, the mean of its batches' losses; the last may be of a part of an epoch.
        steps: updates of the parameters.
        seconds: wall time, that of runs before an interruption included.
    """

    losses: tuple[float, ...] = ()
    steps: int = 0
    seconds: float = 0.0


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Stochastic gradient descent with Nesterov momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    epochs: float = 1,
    loss: Loss = "cross_entropy",
    *,
    lr: float = 0.01,
    optimizer: Callable[..., Optimizer] = sgd,
    schedule: str | Decay = "one-cycle",
    warm_up: float = 0.2,
    clip: float | None = None,
    mixed_precision: str = "no",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> History:
    """Train a model in place: every parameter that requires a gradient.

    Args:
        model: trained on its own device; its modules' training flags are put back afterwards.
        loader: batches (inputs..., target), or dicts of keyword inputs with the target under ``labels``, ``label`` or
            ``target``; a DataLoader, a list, or whatever can be gone through once an epoch (and once before, to count,
            where it has no length). Among several processes every batch is shared out.
        epochs: passes through the loader; 0.5 is half of one, 0 does nothing.
        loss: ``"cross_entropy"``, ``"mse"`` or a function (outputs, target) → scalar, the mean over the samples. It
            gets the ``.logits`` of outputs that have them.
        lr: the peak learning rate.
        optimizer: called as ``optimizer(parameters, lr=lr)``; ``torch.optim.AdamW`` and the like serve as they are.
        schedule: how the rate falls after the warm-up: ``"one-cycle"`` (in a line to 0), ``"cosine"``, ``"constant"``,
            or a function from the share of that time gone by to the share of the peak.
        warm_up: the share of all steps in which the rate rises to its peak in a line.
        clip: the greatest norm of all gradients together; None for no limit.
        mixed_precision: ``"no"``, ``"bf16"`` or (not on a CPU) ``"fp16"``, while parameters and loss stay as they are.
        seed: of the random numbers of torch, numpy and random, seeded anew each epoch; the caller's go on undisturbed.
        checkpoint: a folder, saved to after every epoch and on Ctrl-C. Where it holds something, the training resumes
            from there and ends as an uninterrupted one would have (on a CPU, to the last bit).

    Raises:
        TaskError: a setting, the loader or a batch cannot be used, nothing can be trained, or the loss became NaN or
            infinite. After this, as after any error of the loader's or the model's, the model has the values again
            that it had at the end of the last whole epoch, or when it came.
        ArtifactError: the checkpoint is damaged, or of a training with other settings.
        KeyboardInterrupt: Ctrl-C; with a checkpoint, once the step under way is done and saved.
        FeatherweightError: accelerate is missing.
    """
    if problems := _problems(loader, epochs, loss, lr, schedule, warm_up, clip, mixed_precision, seed):
        raise TaskError("fit cannot start: " + "; ".join(problems))
    if epochs == 0:
        return History()
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TaskError(f"{type(model).__name__} has no trainable parameter: set requires_grad on those to train")

    begun = time.perf_counter()
    file = None if checkpoint is None else Path(checkpoint) / "training.pt"
    decay = DECAYS[schedule] if isinstance(schedule, str) else schedule
    with (
        random_numbers_kept(),
        accelerator_for(device_of(model), mixed_precision) as accelerator,
        placed(model, accelerator),
        mode(model, training=True),
        torch.enable_grad(),
        ctrl_c(wait=file is not None) as interrupted,
    ):
        length = _length(loader)
        steps = max(1, round(epochs * length))
        made = optimizer(trained, lr=lr)
        peaks = [group["lr"] for group in made.param_groups]
        network, stepper = accelerator.prepare(_Network(model), made)
        stepper.zero_grad()
        batches = share_of(loader, accelerator.process_index, accelerator.num_processes)

        def step(batch: Any, rate: float) -> float:
            """Update the parameters once; the loss is returned, and nothing updated where it is not finite."""
            inputs, target = split_target(batch)
            inputs, (target,) = inputs.on(model), Inputs((target,)).on(model).args
            value = loss_of(loss, network(*inputs.args, **inputs.kwargs), target)
            if not value.requires_grad:
                raise TaskError("the loss depends on no trainable parameter: is something detached on the way to it?")
            whole, weight = over_processes(accelerator, value.detach(), inputs.batch_size)
            if math.isfinite(whole):
                accelerator.backward(value * weight)
                if clip is not None:
                    accelerator.clip_grad_norm_(trained, clip)
                for group, peak in zip(made.param_groups, peaks, strict=True):
                    group["lr"] = peak * rate
                stepper.step()
            stepper.zero_grad()
            return whole

        settings = {
            "epochs": epochs, "steps": steps, "loss": name_of(loss), "lr": lr, "optimizer": type(made).__name__,
            "schedule": name_of(schedule), "warm_up": warm_up, "clip": clip, "mixed_precision": mixed_precision,
            "seed": seed, "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        }  # fmt: skip
        state = State(model, made, accelerator.scaler, generators_of(loader))
        if file is not None and file.exists():
            state.load(file, settings)
        at, earlier = state.at, state.at.seconds

        def save() -> None:
            at.seconds = earlier + time.perf_counter() - begun
            if file is not None and accelerator.is_main_process:
                state.save(file, settings)

        good, good_step = values_of(model), at.step
        try:
            while at.step < steps:
                # Seeded by its number, an epoch is the same on every process, and can be gone through again.
                _seed(seed, at.epoch)
                state.begin_epoch()
                rest = until(interrupted, batches)
                if at.batch and state.random is not None:  # interrupted within this epoch: find the place in the data
                    deque(islice(rest, at.batch), maxlen=0)
                    set_random_state(state.random)
                doing, value = _label(at, epochs), 0.0
                for batch in track(rest, doing, length - at.batch) if accelerator.is_main_process else rest:
                    value = step(batch, learning_rate((at.step + 1) / (steps + 1), warm_up, decay))
                    if not math.isfinite(value):
                        break
                    at.total, at.step, at.batch = at.total + value, at.step + 1, at.batch + 1
                    if at.step == steps:
                        break
                if not math.isfinite(value):
                    raise _diverged(f"the loss became {value}", at, at.batch + 1, length, good_step)
                if interrupted.is_set() and at.step < steps:
                    save()
                    raise KeyboardInterrupt(f"after {at.step} of {steps} steps, saved in {file}")
                if not at.batch:
                    raise TaskError(NO_BATCHES)
                if not all(bool(torch.isfinite(p).all()) for p in trained):
                    raise _diverged("parameters became NaN or infinite", at, at.batch, length, good_step)
                at.epoch, at.batch, at.total, at.losses = at.epoch + 1, 0, 0.0, [*at.losses, at.total / at.batch]
                good, good_step = values_of(model), at.step
                state.begin_epoch()
                save()
        except Exception:
            put_back(model, good)
            raise
        if interrupted.is_set():
            raise KeyboardInterrupt(f"after the last step, saved in {file}")
        share_buffers(accelerator, model)
    return History(tuple(at.losses), at.step, at.seconds)


def learning_rate(share: float, warm_up: float, decay: Decay) -> float:
    """The learning rate as a share of its peak, when this share of all steps is done: up in a line, down by `decay`."""
    return share / warm_up if share < warm_up else decay((share - warm_up) / (1 - warm_up))


class _Network(nn.Module):
    """Stands between accelerate and the model: what gets wrapped and patched is this, not the caller's model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        return getattr(outputs, "logits", outputs)


def _problems(
    loader: Any, epochs: float, loss: Any, lr: float, decay: Any, warm_up: float, clip: Any, precision: str, seed: int
) -> list[str]:
    """What is wrong with the settings, a clause each."""
    kind = type(loader).__name__
    rules = (
        (not isinstance(loader, Iterator), "the loader can be gone through only once: give a list or a DataLoader"),
        (isinstance(loader, Iterable), f"the loader is a {kind}: give a list or a DataLoader of batches"),
        (math.isfinite(epochs) and epochs >= 0, f"epochs is {epochs}: it must be 0 or more"),
        (callable(loss) or loss in LOSSES, f"loss is {loss!r}: it must be a function or of {[*LOSSES]}"),
        (math.isfinite(lr) and lr > 0, f"lr is {lr}: it must be more than 0"),
        (callable(decay) or decay in DECAYS, f"schedule is {decay!r}: it must be a function or of {[*DECAYS]}"),
        (0 <= warm_up < 1, f"warm_up is {warm_up}: it must be a share of the steps, 0 or more and less than 1"),
        (clip is None or clip > 0, f"clip is {clip}: it must be more than 0, or None"),
        (precision in PRECISIONS, f"mixed_precision is {precision!r}: it must be of {[*PRECISIONS]}"),
        (seed >= 0, f"seed is {seed}: it must be 0 or more"),
    )
    return [problem for right, problem in rules if not right]


def _length(loader: Iterable[Any]) -> int:
    """The number of batches of an epoch, counted where the loader does not say it."""
    try:
        length = len(loader) if isinstance(loader, Sized) else sum(1 for _ in loader)
    except TypeError:  # a DataLoader over an iterable data set has a __len__ that fails
        length = sum(1 for _ in loader)
    if not length:
        raise TaskError(NO_BATCHES)
    return length


def _seed(seed: int, epoch: int) -> None:
    from accelerate.utils import set_seed

    set_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


def _label(at: Position, epochs: float) -> str:
    return f"Epoch {at.epoch + 1} of {math.ceil(epochs)}" + (f", loss {at.losses[-1]:.3f}" if at.losses else "")


def _diverged(what: str, at: Position, step: int, length: int, good: int) -> TaskError:
    return TaskError(
        f"{what} in epoch {at.epoch + 1}, step {step} of {length}: the model has its values of after step {good} in "
        "all again. Lower lr, set clip=1.0, or look for bad values in the data"
    )
