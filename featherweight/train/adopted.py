"""Training and judging as a Lightning module or a Hugging Face Trainer does it, without depending on either.

They are taken by what they can do: a module by its ``training_step`` and its like, a trainer by its settings and data.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.batch import Inputs, mode, tensors_in
from featherweight.errors import TaskError
from featherweight.progress import track
from featherweight.train.fit import History, fit

Score = str | Callable[[nn.Module], float] | None


class Steps(nn.Module):
    """A Lightning module as `fit` takes one: what goes in is a batch, and what comes out is the loss.

    Args:
        module: has ``training_step``.
        loss: a loss of ours that adds to the module's own; None for that alone.
    """

    def __init__(self, module: nn.Module, loss: Any) -> None:
        super().__init__()
        self.module, self.loss, self.index = module, loss, 0

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        given = self.module.training_step(batch, self.index)  # type: ignore[operator]
        self.index += 1
        value = given.get("loss") if isinstance(given, Mapping) else given
        if not isinstance(value, Tensor):
            raise TaskError(
                f"training_step returned a {type(value).__name__}: it must return a loss, or {{'loss': loss}}"
            )
        return value if self.loss is None else self.loss.on(value)


class Batches:
    """A loader's batches, each as one input, with a target that says nothing."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            first = next(iter(tensors_in(batch)), None)
            yield batch, torch.zeros(1 if first is None or not first.ndim else len(first))

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError("the loader has no length")
        return len(self.loader)


def train_lightning(
    module: nn.Module, loader: Iterable[Any], epochs: float, loss: Any = None, **settings: Any
) -> History:
    """Train a Lightning module in place with `fit`, its own ``training_step`` and ``configure_optimizers``.

    Args:
        module: the module, whatever was made of it.
        loader: the batches that ``training_step`` takes.
        epochs: passes through the loader.
        loss: a loss of ours with ``on``, or a function (outputs, target) → scalar, which takes the step's place.
        settings: of `fit`; with ``optimizer`` or ``lr`` the module's ``configure_optimizers`` is not asked.
    Raises:
        TaskError: the module has no ``training_step`` any more, or its optimizers cannot be used.
    """
    if loss is not None and not hasattr(loss, "on"):
        return fit(module, loader, epochs, loss, **settings)
    if not callable(getattr(module, "training_step", None)):
        raise TaskError(
            f"{type(module).__name__} has no training_step: an earlier step has made a captured graph of the module. "
            "Give Task(train=...) of your own"
        )
    if not {"optimizer", "lr", "scheduler", "schedule"} & set(settings):
        settings = {**_configured(module), **settings}
    begin = getattr(loss, "begin_epoch", None)
    value = _value if begin is None else _Begins(begin)
    with _quiet(module):
        return fit(Steps(module, loss), Batches(loader), epochs, value, **settings)


def score_lightning(module: nn.Module, loader: Iterable[Any], metric: str | None) -> float:
    """What a Lightning module logs of itself in ``validation_step``: the mean over the samples, or the metric's own.

    Args:
        module: has ``validation_step``.
        loader: the batches that it takes.
        metric: the name it logs; None for minus what it returns, or minus what it logs as a loss.
    Raises:
        TaskError: it logs no such metric; the message says what it logs.
    """
    sums: dict[str, float] = defaultdict(float)
    objects: dict[str, Any] = {}
    samples = 0
    with mode(module, training=False), torch.no_grad(), _logging(module) as logged:
        for index, batch in enumerate(track(loader, "Evaluating")):
            moved = Inputs((batch,)).on(module).args[0]
            logged.clear()
            given = module.validation_step(moved, index)  # type: ignore[operator]
            size = next((len(t) for t in tensors_in(moved) if t.ndim), 1)
            samples += size
            returned = given.get("loss") if isinstance(given, Mapping) else given
            for name, value in {**logged, "": returned}.items():
                if callable(getattr(value, "compute", None)):
                    objects[name] = value
                elif isinstance(value, Tensor | int | float):
                    sums[name] += float(value) * size
    if not samples:
        raise TaskError("there is nothing to evaluate on: the loader yields no batches")
    scores = {name: total / samples for name, total in sums.items()}
    scores |= {name: float(value.compute()) for name, value in objects.items()}
    for value in objects.values():
        value.reset()
    if metric is not None and metric not in scores:
        raise TaskError(f"validation_step logs no {metric!r}: it logs {sorted(filter(None, scores)) or 'nothing'}")
    if metric is not None:
        return scores[metric]
    found = next((name for name in ("", "val_loss", "loss") if name in scores), None)
    if found is None:
        raise TaskError(f"validation_step returns no loss: give score= one of {sorted(scores)}")
    return -scores[found]


def train_trainer(trainer: Any, model: nn.Module, epochs: float, loss: Any = None, **settings: Any) -> Any:
    """Train a model in place with a Hugging Face Trainer like the given one.

    Args:
        trainer: whose class, arguments, data, collator and callbacks are taken; it is not changed.
        model: the model, whatever was made of it.
        epochs: passes through its data.
        loss: a loss of ours with ``on``, which adds to the trainer's, or a function (outputs, target) → scalar.
        settings: of its arguments, such as ``learning_rate``.
    Raises:
        TaskError: its arguments have no such setting.
    """
    if unknown := [name for name in settings if not hasattr(trainer.args, name)]:
        raise TaskError(f"the trainer's arguments have no {', '.join(unknown)}")
    # What it keeps of its own training stays as it is.
    wanted = {"save_strategy": "no", "load_best_model_at_end": False, "num_train_epochs": epochs, "max_steps": -1}
    arguments = copy.copy(trainer.args)
    for name, value in {**wanted, **settings}.items():
        if hasattr(arguments, name):
            setattr(arguments, name, value)
    given = {"model": model, "args": arguments, "train_dataset": trainer.train_dataset}
    for name in ("data_collator", "eval_dataset", "processing_class", "compute_loss_func"):
        if getattr(trainer, name, None) is not None:
            given[name] = getattr(trainer, name)
    if loss is not None and not hasattr(loss, "on"):
        given["compute_loss_func"] = lambda outputs, labels, **_: loss(getattr(outputs, "logits", outputs), labels)
    made = type(trainer)(**given)
    if loss is not None and hasattr(loss, "on"):
        own = made.compute_loss

        def compute_loss(network: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            value, outputs = own(network, inputs, return_outputs=True, **more)
            value = loss.on(value) if network.training else value
            return (value, outputs) if return_outputs else value

        made.compute_loss = compute_loss
    flags = {module: module.training for module in model.modules()}
    done = made.train()
    for module, flag in flags.items():
        module.training = flag
    for parameter in model.parameters():
        parameter.grad = None
    return done


def score_trainer(trainer: Any, model: nn.Module, metric: str | None) -> float:
    """What a Hugging Face Trainer like the given one says of the model.

    Args:
        trainer: whose class, arguments, data, collator and metrics are taken.
        model: the model to judge.
        metric: the name among what ``evaluate`` returns, with or without ``eval_``; None for minus its loss.
    Raises:
        TaskError: there is no such metric; the message says which there are.
    """
    given = {"model": model, "args": trainer.args, "eval_dataset": trainer.eval_dataset}
    for name in ("data_collator", "processing_class", "compute_metrics", "compute_loss_func"):
        if getattr(trainer, name, None) is not None:
            given[name] = getattr(trainer, name)
    said = type(trainer)(**given).evaluate()
    found = {name: value for name, value in said.items() if isinstance(value, int | float)}
    if metric is None:
        if "eval_loss" not in found:
            raise TaskError(f"evaluate gives no loss: give score= one of {sorted(found)}")
        return -float(found["eval_loss"])
    key = metric if metric in found else f"eval_{metric}"
    if key not in found:
        raise TaskError(f"evaluate gives no {metric!r}: there are {sorted(found)}")
    return float(found[key])


def _value(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs


class _Begins:
    """The value as it is, and word of a new epoch to a loss that wants to know."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin_epoch = begin

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        return outputs


def _configured(module: nn.Module) -> dict[str, Any]:
    """The optimizer and scheduler that the module asks for, as settings of `fit`.

    Raises:
        TaskError: there are several.
    """
    found = getattr(module, "configure_optimizers", lambda: None)()
    if found is None:
        return {}
    every = "epoch"
    schedulers: Any = None
    match found:
        case {"optimizer": optimizer, **rest}:
            schedulers = rest.get("lr_scheduler")
        case [list() as optimizers, list() as schedulers]:
            optimizer = optimizers
        case _:
            optimizer = found
    for name, several in (("optimizers", optimizer), ("schedulers", schedulers)):
        if isinstance(several, list | tuple) and len(several) > 1:
            raise TaskError(f"configure_optimizers gives {len(several)} {name}, and the loop has one: give optimizer=")
    optimizer = optimizer[0] if isinstance(optimizer, list | tuple) else optimizer
    scheduler = schedulers[0] if isinstance(schedulers, list | tuple) and schedulers else schedulers or None
    if isinstance(scheduler, Mapping):
        every = "update" if scheduler.get("interval") == "step" else "epoch"
        scheduler = scheduler["scheduler"]
    if not isinstance(optimizer, Optimizer):
        raise TaskError(f"configure_optimizers gives a {type(optimizer).__name__}, no optimizer of PyTorch's")

    def made(parameters: Any, lr: float) -> Optimizer:
        return optimizer

    if scheduler is None:
        return {"optimizer": made, "schedule": "constant", "warm_up": 0.0}
    return {"optimizer": made, "scheduler": lambda _: scheduler, "scheduler_every": every}


@contextmanager
def _logging(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Inside, what the module logs is kept, and goes nowhere else."""
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        logged[name] = value

    def log_dict(values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        logged.update(values)

    before = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    object.__setattr__(module, "log", log)
    object.__setattr__(module, "log_dict", log_dict)
    try:
        yield logged
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
            if name in before:
                object.__setattr__(module, name, before[name])


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    with _logging(module):
        yield
