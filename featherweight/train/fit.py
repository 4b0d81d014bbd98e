"""The default training loop: in place, resumable, and the same on one process or on many.

Built on accelerate (``pip install 'featherweight[train]'``): start a script with ``accelerate launch`` or ``torchrun``,
and its processes share every batch.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from featherweight.batch import Inputs, device_of, mode
from featherweight.errors import TaskError, did_you_mean
from featherweight.progress import track
from featherweight.train.average import Average
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
from featherweight.train.log import Log, writing
from featherweight.train.processes import accelerator_for, agreed, over_processes, placed, share_buffers, share_of

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
        scores: per epoch, what `evaluate` said; empty without one.
        best: the number, from 1, of the epoch whose values the model has: the last, or with `keep_best` the best; 0
            where nothing was trained.
    """

    losses: tuple[float, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    scores: tuple[float, ...] = ()
    best: int = 0


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
    optimizer: str | Callable[..., Optimizer] = sgd,
    schedule: str | Decay = "one-cycle",
    warm_up: float = 0.2,
    scheduler: Callable[[Optimizer], Any] | None = None,
    scheduler_every: Literal["update", "epoch"] = "update",
    clip: float | None = None,
    accumulate: int = 1,
    mixed_precision: str = "no",
    ema: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    keep_best: bool = False,
    patience: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Log = None,
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
        optimizer: called as ``optimizer(parameters, lr=lr)``: ``torch.optim.AdamW`` and the like serve as they are, as
            does the name of a class in ``torch.optim``, such as ``"AdamW"``.
        schedule: how the rate falls after the warm-up: ``"one-cycle"`` (in a line to 0), ``"cosine"``, ``"constant"``,
            or a function from the share of that time gone by to the share of the peak.
        warm_up: the share of all steps in which the rate rises to its peak in a line.
        scheduler: called with the optimizer, in place of `schedule` and `warm_up`: any of
            ``torch.optim.lr_scheduler``, such as ``functools.partial(StepLR, step_size=30)``.
        scheduler_every: whether the scheduler steps after every ``"update"`` or every ``"epoch"``;
            ``ReduceLROnPlateau`` needs epochs, and looks at the epoch's score, or without one at its loss.
        clip: the greatest norm of all gradients together; None for no limit.
        accumulate: how many batches make up one update, as if they were one batch.
        mixed_precision: ``"no"``, ``"bf16"`` or (not on a CPU) ``"fp16"``, while parameters and loss stay as they are.
        ema: the decay of an exponential moving average of all values, such as 0.999, which is what is evaluated and
            what the model has in the end; None for the values themselves.
        evaluate: ``evaluate(model) -> float``, higher is better, asked after every epoch.
        keep_best: whether the model ends with the values of its best epoch, by `evaluate`, or without one by the loss.
        patience: stop after so many epochs in a row that were no better than the best before; None to go on.
        seed: of the random numbers of torch, numpy and random, seeded anew each epoch; the caller's go on undisturbed.
        checkpoint: a folder, saved to after every epoch and on Ctrl-C. Where it holds something, the training resumes
            from there and ends as an uninterrupted one would have (on a CPU, to the last bit).
        log: a folder for TensorBoard to read (``pip install 'featherweight[tensorboard]'``), or a function
            (name, value, step), called with the ``loss`` and the learning ``rate`` of every update and the ``score`` of
            every epoch.

    Raises:
        TaskError: a setting, the loader or a batch cannot be used, nothing can be trained, or the loss became NaN or
            infinite. After this, as after any error of the loader's or the model's, the model has the values again
            that it had at the end of the last whole epoch, or when it came.
        ArtifactError: the checkpoint is damaged, or of a training with other settings.
        KeyboardInterrupt: Ctrl-C; with a checkpoint, once the step under way is done and saved.
        FeatherweightError: accelerate is missing.
    """
    if problems := _problems(loader, loss, locals()):
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
        writing(log if accelerator.is_main_process else None) as write,
    ):
        length = _length(loader)
        wanted = max(1, round(epochs * length))  # batches
        whole, rest_of = divmod(wanted, length)
        steps = whole * math.ceil(length / accumulate) + math.ceil(rest_of / accumulate)
        made = _optimizer(optimizer)(trained, lr=lr)
        planned = None if scheduler is None else scheduler(made)
        peaks = [group["lr"] for group in made.param_groups]
        network, stepper = accelerator.prepare(_Network(model), made)
        stepper.zero_grad()
        batches = share_of(loader, accelerator.process_index, accelerator.num_processes)
        average = None if ema is None else Average(model, ema)

        def step(group: list[Any], rate: float) -> float:
            """Update the parameters once; the sum of the batches' losses is returned, and where that is not finite
            nothing is updated."""
            given = [split_target(batch) for batch in group]
            parts = _parts([inputs.batch_size for inputs, _ in given], accelerator)
            total = 0.0
            for (inputs, target), part in zip(given, parts, strict=True):
                inputs, (target,) = inputs.on(model), Inputs((target,)).on(model).args
                value = loss_of(loss, network(*inputs.args, **inputs.kwargs), target)
                if not value.requires_grad:
                    raise TaskError("the loss depends on no trainable parameter: is something detached on the way?")
                mean, weight = over_processes(accelerator, value.detach(), inputs.batch_size)
                total += mean
                if not math.isfinite(total):
                    break
                accelerator.backward(value * (weight * part))
            if math.isfinite(total):
                if clip is not None:
                    accelerator.clip_grad_norm_(trained, clip)
                if planned is None:
                    for group_, peak in zip(made.param_groups, peaks, strict=True):
                        group_["lr"] = peak * rate
                stepper.step()
                if planned is not None and scheduler_every == "update":
                    planned.step()
                if average is not None:
                    average.update(model)
            stepper.zero_grad()
            return total

        settings = {
            "epochs": epochs, "steps": steps, "loss": name_of(loss), "lr": lr, "optimizer": type(made).__name__,
            "schedule": name_of(schedule), "warm_up": warm_up, "scheduler": type(planned).__name__,
            "scheduler_every": scheduler_every, "clip": clip, "accumulate": accumulate,
            "mixed_precision": mixed_precision, "ema": ema, "keep_best": keep_best, "patience": patience, "seed": seed,
            "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        }  # fmt: skip
        state = State(model, made, accelerator.scaler, generators_of(loader), scheduler=planned, average=average)
        if file is not None and file.exists():
            state.load(file, settings)
        at, earlier = state.at, state.at.seconds

        def save() -> None:
            at.seconds = earlier + time.perf_counter() - begun
            if file is not None and accelerator.is_main_process:
                state.save(file, settings)

        def judge() -> None:
            """Look at the epoch that was just done: its score, whether it is the best, what its rate should become."""
            share_buffers(accelerator, model)
            with mode(model, training=False), torch.no_grad(), nullcontext() if average is None else average.in_(model):
                score = None
                if evaluate is not None:
                    with random_numbers_kept():
                        score = agreed(accelerator, _score(evaluate, model))
                    at.scores.append(score)
                    write("score", score, at.step)
                merit = -at.losses[-1] if score is None else score
                if at.best == 0 or merit > at.merit:
                    at.best, at.merit = at.epoch, merit
                    state.best = values_of(model) if keep_best else {}
            if planned is not None and scheduler_every == "epoch":
                # Which way is up, ReduceLROnPlateau asks of its mode: a score rises, a loss falls.
                plateau = isinstance(planned, ReduceLROnPlateau)
                risen = merit if plateau and planned.mode == "max" else -merit
                planned.step(risen) if plateau else planned.step()

        good, good_step = values_of(model), at.step
        try:
            while at.step < steps and not _enough(at, patience):
                # Seeded by its number, an epoch is the same on every process, and can be gone through again.
                _seed(seed, at.epoch)
                state.begin_epoch()
                getattr(loss, "begin_epoch", _nothing)()
                rest = until(interrupted, batches)
                if at.batch and state.random is not None:  # interrupted within this epoch: find the place in the data
                    deque(islice(rest, at.batch), maxlen=0)
                    set_random_state(state.random)
                here = min(length, wanted - at.epoch * length)  # batches of this epoch
                doing, value = _label(at, epochs), 0.0
                shown = track(rest, doing, here - at.batch) if accelerator.is_main_process else rest
                for group in _groups(islice(shown, here - at.batch), accumulate):
                    value = step(group, learning_rate((at.step + 1) / (steps + 1), warm_up, decay))
                    if not math.isfinite(value):
                        break
                    at.total, at.step, at.batch = at.total + value, at.step + 1, at.batch + len(group)
                    write("loss", value / len(group), at.step)
                    write("rate", made.param_groups[0]["lr"], at.step)
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
                judge()
                state.begin_epoch()
                save()
        except Exception:
            put_back(model, good)
            raise
        if interrupted.is_set():
            raise KeyboardInterrupt(f"after the last step, saved in {file}")
        share_buffers(accelerator, model)
        if keep_best and state.best:
            put_back(model, state.best)
        elif average is not None:
            average.into(model)
    return History(
        tuple(at.losses), at.step, at.seconds, tuple(at.scores), at.best if keep_best and state.best else at.epoch
    )


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


def _problems(loader: Any, loss: Any, given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings, a clause each."""
    kind, decay, optimizer = type(loader).__name__, given["schedule"], given["optimizer"]
    epochs, lr, warm_up, clip = given["epochs"], given["lr"], given["warm_up"], given["clip"]
    precision, ema, patience, every = (given[k] for k in ("mixed_precision", "ema", "patience", "scheduler_every"))
    known = optimizers()
    hint = did_you_mean(str(optimizer), known) or f": it must be a function or of {sorted(known)}"
    rules = (
        (not isinstance(loader, Iterator), "the loader can be gone through only once: give a list or a DataLoader"),
        (isinstance(loader, Iterable), f"the loader is a {kind}: give a list or a DataLoader of batches"),
        (math.isfinite(epochs) and epochs >= 0, f"epochs is {epochs}: it must be 0 or more"),
        (callable(loss) or loss in LOSSES, f"loss is {loss!r}: it must be a function or of {[*LOSSES]}"),
        (math.isfinite(lr) and lr > 0, f"lr is {lr}: it must be more than 0"),
        (callable(optimizer) or str(optimizer).lower() in known, f"optimizer is {optimizer!r}{hint}"),
        (callable(decay) or decay in DECAYS, f"schedule is {decay!r}: it must be a function or of {[*DECAYS]}"),
        (0 <= warm_up < 1, f"warm_up is {warm_up}: it must be a share of the steps, 0 or more and less than 1"),
        (
            given["scheduler"] is None or decay == "one-cycle",
            "schedule and scheduler both say how the rate falls: give one of them",
        ),
        (every in ("update", "epoch"), f"scheduler_every is {every!r}: it must be 'update' or 'epoch'"),
        (clip is None or clip > 0, f"clip is {clip}: it must be more than 0, or None"),
        (given["accumulate"] >= 1, f"accumulate is {given['accumulate']}: it must be 1 or more"),
        (precision in PRECISIONS, f"mixed_precision is {precision!r}: it must be of {[*PRECISIONS]}"),
        (ema is None or 0 < ema < 1, f"ema is {ema}: it must be more than 0 and less than 1, or None"),
        (patience is None or patience >= 1, f"patience is {patience}: it must be 1 or more, or None"),
        (given["seed"] >= 0, f"seed is {given['seed']}: it must be 0 or more"),
    )
    return [problem for right, problem in rules if not right]


def optimizers() -> dict[str, Callable[..., Optimizer]]:
    """What an optimizer's name stands for: every class of ``torch.optim``, in small letters; ``sgd`` is `sgd`."""
    kinds = (kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer))
    return {**{kind.__name__.lower(): kind for kind in kinds if kind is not Optimizer}, "sgd": sgd}


def _optimizer(given: str | Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    return optimizers()[given.lower()] if isinstance(given, str) else given


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The batches, so many at a time; the last time as many as are left."""
    left = iter(batches)
    while group := list(islice(left, size)):
        yield group


def _parts(rows: list[int], accelerator: Any) -> list[float]:
    """What share of an update each of its batches has: that of its rows."""
    if len(rows) == 1:
        return [1.0]
    counts = torch.tensor(rows, dtype=torch.float64, device=accelerator.device)
    counts = accelerator.reduce(counts, "sum") if accelerator.num_processes > 1 else counts
    return list((counts / counts.sum().clamp_min(1)).tolist())


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """What the user's function says of the model.

    Raises:
        TaskError: it raised, or said no finite number.
    """
    try:
        score = evaluate(model)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"evaluate(model) raised {type(error).__name__}: {error}") from error
    if isinstance(score, Tensor) or not math.isfinite(score):
        raise TaskError(f"evaluate(model) returned {score!r}: return a finite number, higher is better")
    return float(score)


def _enough(at: Position, patience: int | None) -> bool:
    """Whether the last epochs were no better than the best one."""
    return patience is not None and at.batch == 0 and at.epoch - at.best >= patience and at.best > 0


def _nothing() -> None:
    """What a loss has to do that does not care when an epoch begins."""


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
    known = f", loss {at.losses[-1]:.3f}" if at.losses else ""
    known += f", score {at.scores[-1]:.4g}" if at.scores else ""
    return f"Epoch {at.epoch + 1} of {math.ceil(epochs)}{known}"


def _diverged(what: str, at: Position, step: int, length: int, good: int) -> TaskError:
    return TaskError(
        f"{what} in epoch {at.epoch + 1}, step {step} of {length}: the model has its values of after step {good} in "
        "all again. Lower lr, set clip=1.0, or look for bad values in the data"
    )
