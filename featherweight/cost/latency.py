"""Latency, measured: several networks or runtimes in turn, so that whatever drifts meanwhile hits all alike."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight import batch


@dataclass(frozen=True)
class Latency:
    """How long one call takes, in milliseconds.

    Attributes:
        median_ms: half of the calls took no longer.
        lower_ms, upper_ms: the quartiles; between them lies the middle half of the calls.
        repeats: how many calls were timed.
    """

    median_ms: float
    lower_ms: float
    upper_ms: float
    repeats: int

    def ratio(self, other: Latency) -> float:
        """How many times as long as the other a call takes, by the medians: 0.5 is twice as fast."""
        return self.median_ms / other.median_ms


def measure(
    runs: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    warmup: int = 5,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time every callable, in turn: a b c, c b a, a b c, …

    Every timed call follows one of its own that is not timed: what is measured is a model that is called again and
    again, its weights in the caches, rather than one that has to fetch them after the others' turns.

    Args:
        runs: by name, what to time; it has to return only when its work is done (see `torch_run`).
        repeats: timed calls of each.
        warmup: calls of each before any is timed.
        seconds: begin no further round after so long, so that slow callables get fewer repeats, but at least one.
        clock: gives the time in seconds.

    Raises:
        ValueError: fewer than one repeat, or a negative warm-up.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be 1 or more and warmup 0 or more, but got {repeats} and {warmup}")
    for _ in range(warmup):
        for run in runs.values():
            run()

    times: dict[str, list[float]] = {name: [] for name in runs}
    begun = clock()
    for index in range(repeats):
        if index and seconds is not None and clock() - begun > seconds:
            break
        for name in reversed(list(runs)) if index % 2 else list(runs):
            with _no_garbage_collection():
                runs[name]()
                start = clock()
                runs[name]()
                times[name].append(clock() - start)
    return {name: _latency(seconds_each) for name, seconds_each in times.items()}


def torch_run(model: nn.Module, inputs: batch.Inputs) -> Callable[[], Any]:
    """A call of the model in PyTorch, in evaluation and inference mode, that returns once its device is done.

    The inputs are moved to the model's device and type now, not in the timed call. The caller's model stays in its
    mode: what runs is a copy that shares its parameters, not its buffers, which a forward may write into.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    network = copy.deepcopy(model, shared).eval()
    inputs, device = inputs.on(model), batch.device_of(model)

    def run() -> Any:
        with torch.inference_mode():
            outputs = inputs.into(network)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return outputs

    return run


def _latency(seconds_each: list[float]) -> Latency:
    lower, median, upper = np.percentile(np.asarray(seconds_each) * 1e3, [25, 50, 75])
    return Latency(float(median), float(lower), float(upper), len(seconds_each))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
