"""What a training is made of while it runs: saved, resumed and put back, with no pickle executed on reading."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.errors import ArtifactError
from featherweight.train.average import Average
from featherweight.train.values import put_back as put_back
from featherweight.train.values import values_of as values_of


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        epoch: whole epochs done.
        batch: batches done of the epoch under way.
        step: updates of the parameters, over all epochs.
        total: sum of the losses of the epoch under way.
        losses: mean losses of the epochs done.
        seconds: wall time so far.
        scores: of the epochs done, where they are evaluated.
        best: the number of the best epoch, from 1; 0 before any.
        merit: how good that one was.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    scores: list[float] = field(default_factory=list)
    best: int = 0
    merit: float = 0.0


@dataclass
class State:
    """Everything that must be the same again for a training to go on as if nothing had happened.

    Attributes:
        generators: the loader's own random generators.
        scaler: the gradient scaler of fp16 training; None without one.
        epoch_began: states of `generators` when the epoch under way began: its order of samples is drawn from them.
        random: states of the global random numbers at the saved position; None before anything was loaded.
        scheduler: of the learning rate; None without one of PyTorch's.
        average: the moving average of the model's values; None without one.
        best: the values of the best epoch, where they are to be kept.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: Any
    generators: list[torch.Generator]
    scheduler: Any = None
    average: Average | None = None
    best: Mapping[str, Tensor] = field(default_factory=dict)
    at: Position = field(default_factory=Position)
    epoch_began: list[Tensor] = field(default_factory=list)
    random: Mapping[str, Any] | None = None

    def begin_epoch(self) -> None:
        """Remember from where the loader draws its random numbers."""
        self.epoch_began = [generator.get_state() for generator in self.generators]

    def save(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Write it all into one file, which is there whole or not at all."""
        content = {
            "settings": dict(settings),
            "position": asdict(self.at),
            "model": values_of(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": dict(self.best),
            "generators": self.epoch_began,
            "random": random_state(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, file)

    def load(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Go back to what `save` wrote.

        Raises:
            ArtifactError: the file is damaged, holds anything but plain values, or belongs to other settings.
        """
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            saved = content["settings"]
        except Exception as error:  # whatever a damaged file makes of the reader
            raise ArtifactError(f"{file} is no checkpoint of a training, or damaged ({error}): delete it") from error
        if other := [f"{k} was {saved.get(k)} and is {v}" for k, v in settings.items() if saved.get(k) != v]:
            raise ArtifactError(
                f"{file} belongs to another training: {'; '.join(other)}. Use those settings, or another folder"
            )
        put_back(self.model, content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(content["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        self.best = content["best"]
        for generator, state in zip(self.generators, content["generators"], strict=True):
            generator.set_state(state)
        self.at, self.random = Position(**content["position"]), content["random"]


def generators_of(loader: Iterable[Any]) -> list[torch.Generator]:
    """The random generators that a DataLoader was given, or its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def random_state() -> dict[str, Any]:
    """The states of the global random numbers of torch, numpy and random, as tensors and numbers."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "random": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to a state that `random_state` told."""
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["random"])


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the caller's global random numbers go on as if it had not been."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def ctrl_c(wait: bool) -> Iterator[threading.Event]:
    """Whether Ctrl-C was pressed: with `wait` it interrupts no step, but is noted; pressed again, it interrupts."""
    pressed = threading.Event()
    if not wait or threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def note(*_: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def until(pressed: threading.Event, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches up to a Ctrl-C, which the terminal sends to a DataLoader's workers too: they end at once."""
    try:
        for batch in batches:
            yield batch
            if pressed.is_set():
                return
    except RuntimeError:
        if not pressed.is_set():
            raise
