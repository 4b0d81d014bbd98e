"""Trainings that must end alike on one process and on two; run by test_fit.py, on two of them as a script."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from featherweight import distill
from featherweight.distill import Distillation
from featherweight.errors import TaskError
from featherweight.train.fit import fit


class Stream(IterableDataset[tuple[Tensor, ...]]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self.data[index] for index in range(len(self.data)))


def loaders() -> dict[str, Iterable[Any]]:
    """25 samples in batches of 8: the last one is too small for two processes to share."""
    points = torch.randn(25, 6, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(points, points[:, :3].argmax(1))
    return {
        "shuffled": DataLoader(data, 8, shuffle=True),
        "odd": DataLoader(data, 7, shuffle=True, generator=torch.Generator().manual_seed(2)),
        "stream": DataLoader(Stream(data), 8),
        "list": [{"input": points[:5], "labels": data.tensors[1][:5]}] * 3,
    }


def train_all(folder: Path) -> dict[str, tuple[Tensor, list[float]]]:
    """Every loader's name, with the values of a linear layer trained on it and the losses on the way.

    More: ``norm`` has batch norms, whose statistics differ among processes, ``killed`` dies on the way and is started
    again from its checkpoint in `folder`, ``averaged`` uses what else there is, ``distilled`` learns from a teacher.
    """
    given = loaders()
    results = {name: train(nn.Linear(6, 3), loader) for name, loader in given.items()}
    results["norm"] = train(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), given["list"])
    more = {"accumulate": 2, "ema": 0.9, "keep_best": True, "optimizer": "AdamW", "evaluate": size}
    results["averaged"] = train(nn.Linear(6, 3), given["odd"], **more)
    results["distilled"] = distilled(given["odd"])
    with suppress(TaskError):
        train(nn.Linear(6, 3), given["shuffled"], dies_at=6, checkpoint=folder)
    results["killed"] = train(nn.Linear(6, 3), given["shuffled"], checkpoint=folder)
    return results


def train(model: nn.Module, loader: Iterable[Any], dies_at: int = -1, **settings: Any) -> tuple[Tensor, list[float]]:
    """The values of a trained model, buffers too, and the losses; an error at one of the steps if wanted."""
    calls = 0

    def entropy(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise RuntimeError("died")
        return F.cross_entropy(outputs, target)

    for index, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    history = fit(model, loader, epochs=2.5, loss=entropy, lr=0.1, clip=1.0, **settings)
    return torch.cat([t.detach().flatten().float() for t in model.state_dict().values()]), list(history.losses)


def distilled(loader: Iterable[Any]) -> tuple[Tensor, list[float]]:
    """A student trained on soft targets and, with an adapter, on what the teacher gives on the way."""

    def made(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))

    student, teacher = made(4), made(8)
    for network in (student, teacher):
        for index, parameter in enumerate(network.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    torch.manual_seed(0)
    # Each process has hints as a share of its own rows' spread, so that they are close on both, but not the same.
    kinds = [distill.Response(), distill.Feature(layers=["1"], weight=1e-4)]
    with Distillation(student, teacher, kinds, example=torch.zeros(1, 6)) as loss, loss.attached():
        history = fit(student, loader, epochs=2, loss=loss, lr=0.05)
    return torch.cat([t.detach().flatten() for t in student.state_dict().values()]), list(history.losses)


def size(model: nn.Module) -> float:
    """A score that rises and falls on the way."""
    return float(torch.stack([p.square().sum() for p in model.parameters()]).sum().sin())


if __name__ == "__main__":
    rank, folder = os.environ["RANK"], Path(sys.argv[1])
    torch.save(train_all(folder / "both"), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    # Without the interpreter's end, at which PyTorch 2.13 aborts now and then, with plain gradients over gloo too.
    os._exit(0)
