"""Distillation on Fashion-MNIST: every kind against training alone, healing what was compressed, compact rewriting.

Four tables: a student of a quarter of the demo network's MACs, trained alone and by every kind of distillation; that
network at 0.3 of its MACs, healed in three ways; a VGG-shaped network with depthwise-separable convolutions; and what a
step of distillation costs. Every run is kept in data/benchmarks, so that a table that was interrupted goes on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fashion
import torch
from network import ResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import featherweight as fw
from featherweight import distill, tune
from featherweight.batch import as_inputs
from featherweight.cost.count import profile

KEPT = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
EXAMPLE = torch.zeros(1, 1, 28, 28)


class Photos(Dataset[tuple[Tensor, Tensor]]):
    """The first images of a split, fetched a whole batch at a time, in channels-last memory."""

    def __init__(self, split: str, count: int) -> None:
        images, labels = fashion.split(split)
        self.images = images[:count].contiguous(memory_format=torch.channels_last)
        self.labels = labels[:count]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def task(images: int, **settings: Any) -> fw.Task:
    """Classify; train on so many images, without augmentation, so that a teacher's answers can be kept."""
    loader = DataLoader(Photos("train", images), 64, shuffle=True, collate_fn=tuple, drop_last=True)
    return fw.Task.from_loaders(loader, DataLoader(Photos("test", 10_000), 500, collate_fn=tuple), **settings)


def student(seed: int) -> nn.Module:
    """A residual network of 8 layers that sees the image at half its resolution: a quarter of the teacher's MACs."""
    torch.manual_seed(seed)
    network = ResNet(8, width=22)
    network.conv.stride = (2, 2)
    return network.to(memory_format=torch.channels_last)


def macs(network: nn.Module) -> int:
    """Multiply-accumulates for one image."""
    return profile(network, as_inputs(EXAMPLE)).total.macs


class Kept:
    """Results by name, in a file that grows run by run."""

    def __init__(self, name: str) -> None:
        self.file = KEPT / f"{name}.json"
        self.known: dict[str, Any] = json.loads(self.file.read_text("utf-8")) if self.file.exists() else {}

    def ask(self, key: str, run: Callable[[], Any]) -> Any:
        """What the run gives, or gave before."""
        if key not in self.known:
            self.known[key] = run()
            print(key, self.known[key], flush=True)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
        return self.known[key]


# A student of a quarter of the MACs -----------------------------------------------------------------------------------


def kinds(epochs: float) -> dict[str, Any]:
    """Every way of training the student; the teacher is the demo network."""
    teacher = fashion.load_network().to(memory_format=torch.channels_last)
    how = {"teacher": teacher, "epochs": epochs, "cache": str(KEPT / "teacher")}
    return {
        "alone": tune.FineTune(epochs=epochs),
        "response: soft targets": distill.Response(**how),
        "response: standardized logits": distill.Response(**how, standardize=True, temperature=2.0, weight=9.0),
        "response: decoupled": distill.Response(**how, by="decoupled"),
        "response: DIST": distill.Response(**how, by="dist"),
        "feature: hints": distill.Feature(**how, layers={"group2": "group2", "group3": "group3"}),
        "feature: attention": distill.Feature(**how, by="attention", weight=10.0, layers=["group2", "group3"]),
        "relation: distances and angles": distill.Relation(**how),
        "mutual: one peer": distill.Mutual(epochs=epochs),
        "self: heads": distill.SelfDistill(epochs=epochs),
        "response + feature": distill.Response(**how) + distill.Feature(layers=["group3"]),
    }


def students(images: int, seeds: int, epochs: float) -> list[str]:
    """The table of the kinds."""
    kept, job = Kept("distillation_students"), task(images, lr=0.1)
    teacher = fashion.load_network()
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, step in kinds(epochs).items():

            def run(step: Any = step, seed: int = seed) -> list[float]:
                begun = time.process_time()
                options = {**(step.options or {}), "seed": seed}
                trained = fw.compress(student(seed), _with(step, options=options), task=job, seed=seed)
                return [100 * (trained.ledger.after.score or 0), time.process_time() - begun]

            found.setdefault(name, []).append(kept.ask(f"{name}, {images} images, {epochs} epochs, seed {seed}", run))
    alone = [score for score, _ in found["alone"]]
    rows = []
    for name, runs in found.items():
        scores = [score for score, _ in runs]
        gain = [score - base for score, base in zip(scores, alone, strict=True)]
        rows.append(
            f"| {name} | {statistics.mean(scores):.2f} ± {statistics.pstdev(scores):.2f} "
            f"| {statistics.mean(gain):+.2f} | {statistics.mean(cpu for _, cpu in runs):.0f} |"
        )
    share = macs(student(0)) / macs(teacher)
    what = (
        f"Teacher: the demo network, {fashion.accuracy(teacher):.2f} %, {macs(teacher) / 1e6:.1f} M MACs. Student: a "
        f"residual network of 8 layers, {share:.2f} of the MACs. {images:,} of the 60,000 training images without "
        f"augmentation, {epochs:g} epochs, batches of 64, accuracy on the 10,000 test images; {seeds} seeds of initial "
        "values and order, mean and deviation. The teacher's answers are kept on disk and come from there, in all "
        "kinds that have a teacher. CPU seconds with the two evaluations."
    )
    return [
        "## A student of a quarter of the MACs",
        "",
        what,
        "",
        "| trained by | accuracy % | against alone, points | CPU s |",
        "|---|---|---|---|",
        *rows,
    ]


def _with(step: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(step, **changes)
