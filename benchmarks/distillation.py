"""Distillation on Fashion-MNIST: every kind against training alone, healing what was compressed, compact rewriting.

Four tables: a student of a quarter of the demo network's MACs, trained alone and by every kind of distillation; that
network at 0.3 of its MACs, healed in three ways; a VGG-shaped network with depthwise-separable convolutions; and what a
step of distillation costs. Every run is kept in data/benchmarks, so that a table that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fashion
import torch
from network import ResNet
from results import publish
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import featherweight as fw
from featherweight import distill, factorize, prune, tune
from featherweight.batch import as_inputs
from featherweight.cost.count import profile
from featherweight.distill import Distillation

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
                trained = fw.compress(student(seed), dataclasses.replace(step, options=options), task=job, seed=seed)
                return [100 * (trained.ledger.after.score or 0), time.process_time() - begun]

            found.setdefault(name, []).append(kept.ask(f"{name}, {images} images, {epochs:g} epochs, seed {seed}", run))
    alone = [score for score, _ in found["alone"]]
    rows = []
    for name, runs in found.items():
        scores = [score for score, _ in runs]
        gain = [score - base for score, base in zip(scores, alone, strict=False)]
        rows.append(
            f"| {name} | {statistics.mean(scores):.2f} ± {statistics.pstdev(scores):.2f} "
            f"| {statistics.mean(gain):+.2f} ± {statistics.pstdev(gain):.2f} "
            f"| {statistics.mean(cpu for _, cpu in runs):.0f} |"
        )
    share = macs(student(0)) / macs(teacher)
    what = (
        f"Teacher: the demo network, {fashion.accuracy(teacher):.2f} %, {macs(teacher) / 1e6:.1f} M MACs. Student: a "
        f"residual network of 8 layers, {share:.2f} of the MACs. {images:,} of the 60,000 training images without "
        f"augmentation, {epochs:g} epochs, batches of 64, accuracy on the 10,000 test images; {seeds} seeds of first "
        "values and order, mean and deviation, gains against the same seeds. The teacher's answers are kept on disk "
        "and come from there, in all kinds that have a teacher. CPU seconds with the two evaluations."
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


# Healing ------------------------------------------------------------------------------------------------------------


def heals(network: nn.Module, epochs: float) -> dict[str, Any]:
    """The ways of healing; the teacher is the network before."""
    how = {"teacher": network, "epochs": epochs, "cache": str(KEPT / "teacher")}
    return {
        "none": None,
        "fine-tuning": tune.FineTune(epochs=epochs),
        "distillation: soft targets": distill.Response(**how),
        "distillation: soft targets and hints": distill.Response(**how) + distill.Feature(),
    }


def healed(
    kept: Kept, key: str, network: nn.Module, compress: Callable[[], fw.Compressed], how: dict[str, Any]
) -> dict[str, Any]:
    """A compressed network's accuracy as it is and healed in all ways, and what it costs.

    Args:
        kept: where results are.
        key: what they are kept under.
        network: before it was compressed.
        compress: makes the compressed one, where it is needed.
        how: images, epochs, learning rate and seed.
    """
    made: list[fw.Compressed] = []

    def small() -> fw.Compressed:
        made.extend([] if made else [compress()])
        return made[0]

    def cost() -> list[float]:
        ledger = small().ledger
        first = ledger.steps[0]
        rows = first.before.layers.items()
        each = [row.macs / first.after.layers[name].macs for name, row in rows if name in first.plan] or [1.0]
        return [ledger.after.total.macs / ledger.before.total.macs, min(each), max(each)]

    # Without evaluate: agreement on a few images is asked for instead, and accuracy once, at the end.
    train = task(how["images"], lr=how["lr"], seed=how["seed"]).train
    job = fw.Task(EXAMPLE, fashion.calibration(how["seed"], 64), train=train, loss="cross_entropy")
    found: dict[str, Any] = {"cost": kept.ask(f"{key}, cost", cost)}
    for name, step in heals(network, how["epochs"]).items():

        def run(step: Any = step) -> float:
            if step is None:
                return fashion.accuracy(small().model)
            return fashion.accuracy(fw.compress(small().model, step, task=job, seed=how["seed"]).model)

        found[name] = kept.ask(f"{key}, {how['images']} images, {how['epochs']:g} epochs, {name}", run)
    return found


def unlabelled(seed: int) -> fw.Task:
    """What compressing needs: images without labels."""
    return fw.Task(EXAMPLE, fashion.calibration(seed))


def rows_of(way: str, runs: Sequence[dict[str, Any]], before: float, cost: str) -> list[str]:
    """A row for each way of healing."""
    rows = []
    for heal in [name for name in runs[0] if name != "cost"]:
        scores = [run[heal] for run in runs]
        mean, spread = statistics.mean(scores), statistics.pstdev(scores)
        rows.append(f"| {way} | {cost} | {heal} | {mean:.2f} ± {spread:.2f} | {before - mean:.2f} |")
    return rows


def healing(images: int, seeds: int, epochs: float) -> list[str]:
    """The demo network at 0.3 of its MACs: before healing, after fine-tuning, after distillation."""
    kept = Kept("distillation_healing")
    network = fashion.load_network().to(memory_format=torch.channels_last)
    before = fashion.accuracy(network)
    ways = {
        "spatial SVD": factorize.SpatialSVD(budget=fw.Budget(macs=0.3)),
        "channel pruning": prune.Channels(budget=fw.Budget(macs=0.3)),
    }
    rows = []
    for way, step in ways.items():
        runs = []
        for seed in range(seeds):

            def compress(step: Any = step, seed: int = seed) -> fw.Compressed:
                return fw.compress(network, step, task=unlabelled(seed), seed=seed)

            how = {"images": images, "epochs": epochs, "lr": 0.01, "seed": seed}
            runs.append(healed(kept, f"{way}, seed {seed}", network, compress, how))
        rows += rows_of(way, runs, before, f"{statistics.mean(run['cost'][0] for run in runs):.3f}")
    what = (
        f"Before: {before:.2f} %. 512 images to compress with, without labels; then {epochs:g} epochs over {images:,} "
        "of the 60,000 training images, peak learning rate 0.01, the same for both. The teacher is the network before. "
        f"{seeds} seeds of samples and order."
    )
    head = "| compressed by | MACs | healed by | accuracy % | drop, points |"
    return ["## A residual network at 0.3 of its MACs", "", what, "", head, "|---|---|---|---|---|", *rows]


# Compact rewriting --------------------------------------------------------------------------------------------------


class VGG(nn.Module):
    """Three pairs of 3×3 convolutions of 32, 64 and 128 channels, and two Linear layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for outputs in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = 16 * width
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(36 * width, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) → (batch, 10)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def vgg() -> nn.Module:
    """The trained network: kept, or trained now, for five epochs over all images with shifts and flips."""
    from train import Photos as Shown
    from train import augment, smoothed

    file = KEPT / "vgg.pt"
    torch.manual_seed(0)
    network = VGG().to(memory_format=torch.channels_last)
    if not file.exists():
        images, labels = fashion.split("train")
        shown = Shown(type("Split", (), {"__iter__": lambda self: iter((images, labels))})())
        loader = DataLoader(shown, 128, shuffle=True, drop_last=True, collate_fn=augment)
        fw.fit(network, loader, 5, smoothed, lr=0.1)
        torch.save({name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}, file)
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval()


def separable(images: int, seeds: int, epochs: float) -> list[str]:
    """The VGG-shaped network with depthwise-separable convolutions, healed in two ways."""
    kept = Kept("distillation_separable")
    network = vgg()
    before = fashion.accuracy(network)
    # The first convolution has one channel only, and the wide Linear layer is by then an eighth of all that is left.
    steps = [
        factorize.DepthwiseSeparable(terms=1, ignore=("features.0",)),
        factorize.SVD(rank={"classifier.1": 64}),
    ]
    runs = []
    for seed in range(seeds):

        def compress(seed: int = seed) -> fw.Compressed:
            return fw.compress(network, *steps, task=unlabelled(seed), seed=seed)

        how = {"images": images, "epochs": epochs, "lr": 0.05, "seed": seed}
        runs.append(healed(kept, f"seed {seed}", network, compress, how))
    _, least, most = runs[0]["cost"]
    what = (
        f"Six 3×3 convolutions and two Linear layers, {macs(network) / 1e6:.1f} M MACs, {before:.2f} %. The first "
        "convolution, of one channel, stays; the first Linear layer is cut to rank 64. Convolutions cost "
        f"{least:.1f} to {most:.1f} times less each. {epochs:g} epochs over {images:,} of the "
        f"60,000 training images, peak learning rate 0.05. {seeds} seeds of samples and order."
    )
    head = "| | MACs fewer | healed by | accuracy % | drop, points |"
    rows = rows_of("depthwise-separable", runs, before, f"{1 / runs[0]['cost'][0]:.2f}×")
    title = "## A VGG-shaped network with depthwise-separable convolutions"
    return [title, "", what, "", head, "|---|---|---|---|---|", *rows]


# Overhead -----------------------------------------------------------------------------------------------------------


def overhead(rounds: int = 30) -> list[str]:
    """What one step of distillation costs beside one of plain fine-tuning, in CPU time, in turn."""
    network = fashion.load_network().to(memory_format=torch.channels_last)
    x, y = (part[:64] for part in fashion.split("train"))
    x = x.contiguous(memory_format=torch.channels_last)
    pruned = fw.compress(network, prune.Channels(budget=fw.Budget(macs=0.5)), task=fashion.task(0)).model
    rows = []
    for name, made in (("a student of the teacher's own size", network), ("a student of half its MACs", pruned)):
        students = [copy.deepcopy(made).train() for _ in range(3)]
        with tempfile.TemporaryDirectory() as folder:
            losses = [
                lambda outputs, target: nn.functional.cross_entropy(outputs, target),
                Distillation(students[1], network, distill.Response(), example=EXAMPLE),
                Distillation(students[2], network, distill.Response(), example=EXAMPLE, cache=folder),
            ]
            times: list[list[float]] = [[], [], []]
            for number in range(rounds + 3):
                for index, (model, loss) in enumerate(zip(students, losses, strict=True)):
                    begun = time.process_time()
                    loss(model(x), y).backward()
                    model.zero_grad()
                    if number >= 3:
                        times[index].append(time.process_time() - begun)
            for loss in losses[1:]:
                loss.close()
        alone, asked, cached = (statistics.median(part) for part in times)
        rows.append(f"| {name} | {1e3 * alone:.0f} | {asked / alone:.2f}× | {cached / alone:.2f}× |")
    what = (
        "CPU time of forward, loss and backward of a batch of 64, medians of "
        f"{rounds} each, in turn; soft targets, the demo network as teacher."
    )
    head = "| | alone, ms | with the teacher run | with cached answers |"
    return ["## What a step of distillation costs", "", what, "", head, "|---|---|---|---|", *rows]


HEADINGS = {
    "students": "A student of a quarter of the MACs",
    "separable": "A VGG-shaped network",
    "healing": "A residual network at 0.3",
    "overhead": "What a step of distillation costs",
}


def main(images: int, seeds: int, epochs: float, parts: Sequence[str], write: bool) -> None:
    """The tables asked for."""
    torch.set_num_threads(1)
    tables: dict[str, Callable[[], list[str]]] = {
        "students": lambda: students(images, seeds, epochs),
        "separable": lambda: separable(images, seeds, epochs),
        "healing": lambda: healing(2 * images // 5, seeds, epochs),
        "overhead": overhead,
    }
    lines = [line for part in parts for line in (*tables[part](), "")]
    publish("distillation", __doc__ or "", lines[:-1], write, parts=[HEADINGS[part] for part in parts])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="of the 60,000 to train on (default: 5000)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--parts", nargs="+", choices=tuple(HEADINGS), default=tuple(HEADINGS))
    parser.add_argument("--write", action="store_true", help="also keep the tables in benchmarks/results")
    main(**vars(parser.parse_args()))
