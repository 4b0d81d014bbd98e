"""One training on several processes: who they are, and which rows of a batch are whose."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from featherweight.batch import device_of
from featherweight.errors import FeatherweightError, TaskError


@contextmanager
def accelerator_for(device: torch.device, mixed_precision: str) -> Iterator[Any]:
    """An `accelerate.Accelerator` of our own; the caller's, and later ones, are not affected by it.

    Accelerate keeps its settings in three states shared by the whole process, so that a second Accelerator with
    another precision fails, and any second one resets the first one's gradient accumulation. They are emptied here
    and filled again afterwards.

    Args:
        device: where the model is. A single process trains there; several train where accelerate puts them.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import GradientAccumulationPlugin
    except ImportError as error:
        raise FeatherweightError("fit needs accelerate: pip install 'featherweight[train]'") from error

    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    shared = [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available() if launched else device.type == "cpu",
            device_placement=False,
            mixed_precision=mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever the environment says
        )
        kind = accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise TaskError(f"fit shares batches among processes, but was launched for {kind}: launch it without")
        if mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise TaskError("fp16 needs a GPU: use mixed_precision='bf16' on a CPU")
        yield accelerator
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)


def share_of(loader: Iterable[Any], process: int, processes: int) -> Iterable[Any]:
    """One process's rows of every batch; all of them together are the batch.

    A DataLoader over indices loads only those rows; from anything else every process takes its rows of what it loads.

    Raises:
        TaskError: the loader has been shared out already.
    """
    if processes == 1:
        return loader
    samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    if any(hasattr(s, "num_replicas") or getattr(s, "num_processes", 1) > 1 for s in samplers):
        raise TaskError("the loader is shared out among processes already: give the plain one, fit shares it out")
    if (
        not isinstance(loader, DataLoader)
        or loader.batch_sampler is None
        or isinstance(loader.dataset, IterableDataset)
    ):
        return _Share(loader, process, processes)
    return DataLoader(
        loader.dataset,
        batch_sampler=_Share(loader.batch_sampler, process, processes),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def over_processes(accelerator: Any, loss: Tensor, rows: int) -> tuple[float, float]:
    """The loss of the whole batch, and the weight of this process's, whose gradients are averaged unweighted.

    Args:
        accelerator: what knows the other processes.
        loss: the mean over this process's rows.
        rows: how many they are.
    """
    if accelerator.num_processes == 1:
        return float(loss), 1.0
    total, count = accelerator.reduce(torch.stack((loss.double() * rows, loss.double() * 0 + rows)), "sum").tolist()
    return total / count, rows * accelerator.num_processes / count


def agreed(accelerator: Any, number: float) -> float:
    """What the first process found, on every process: they must decide alike."""
    if accelerator.num_processes == 1:
        return number
    from accelerate.utils import broadcast

    return float(broadcast(torch.tensor(number, dtype=torch.float64, device=accelerator.device)))


def share_buffers(accelerator: Any, model: nn.Module) -> None:
    """Give every process the first one's buffers: batch norms' statistics are of what each process has seen."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))


@contextmanager
def placed(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """The model on this process's device, where there are several processes, and back on its own afterwards."""
    home = device_of(model)
    if accelerator.num_processes == 1:
        yield
        return
    try:
        model.to(accelerator.device)
        yield
    finally:
        model.to(home)


class _Share:
    """Every `processes`-th row of each batch, which is a list of indices or what a model takes."""

    def __init__(self, batches: Iterable[Any], process: int, processes: int) -> None:
        self.batches, self.process, self.processes = batches, process, processes

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if isinstance(batch, list) and all(isinstance(index, int) for index in batch):
                yield self.rows(batch)
            else:
                yield pytree.tree_map_only(Tensor, lambda t: self.rows(t) if t.ndim else t, batch)

    def rows(self, batch: Any) -> Any:
        """This process's part. Of a batch too small for every process to have a row, all compute the whole."""
        return batch if len(batch) < self.processes else batch[self.process :: self.processes]
