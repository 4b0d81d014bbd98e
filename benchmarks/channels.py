"""Channel pruning on two trained networks: what is met, what is lost before and after fine-tuning, what it takes.

The digits network (see digits.py; 300 test images) and the demo network of examples/fashion_mnist (10,000 test images),
pruned with unlabelled training images and without a look at the test images. Torch-Pruning, the best known tool for
this, is put beside it where there is an environment that has it:

    python -m venv peer
    peer/bin/pip install torch==2.13.0 scikit-learn torch-pruning==1.6.0
    python benchmarks/channels.py --peer-python peer/bin/python
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digits
import fashion
import torch
from data import load
from results import publish
from torch import nn
from torch.utils.data import DataLoader
from train import Photos, augment, smoothed

import featherweight as fw
from featherweight import distill, prune
from featherweight.batch import Inputs
from featherweight.compressed import Compressed
from featherweight.cost import profile

HERE = Path(__file__).resolve().parent
TARGETS = (0.45, 0.19)
# Of the two epochs on the demo network, at its peak.
LEARNING_RATE = 0.05
# Without data there is no refit, and batch norms keep what they had: the plain form of the papers.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "loss, refitted: the default": ({}, True),
    "loss, refitted, same share of every group": ({"select": "uniform"}, True),
    "lasso, refitted": ({"score": "lasso"}, True),
    "l2, refitted, same share of every group": ({"score": "l2", "select": "uniform"}, True),
    "l2, plain, same share of every group": ({"score": "l2", "select": "uniform"}, False),
    "random, plain, same share of every group": ({"score": "random", "select": "uniform"}, False),
}
PEER_WAYS = ("l2_local", "l2_global", "taylor_local", "taylor_global")


# What is measured of a pruned network --------------------------------------------------------------------------------


def timed(model: nn.Module, step: prune.Channels, task: fw.Task, seed: int) -> tuple[Compressed, float, float]:
    """The compressed network, and the seconds it took by the clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    small = fw.compress(model, step, task=task, seed=seed)
    return small, time.perf_counter() - wall, time.process_time() - cpu


def shares(small: nn.Module, whole: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Its multiply-accumulates and parameters, as shares of the original's."""
    before, after = (profile(model, Inputs((images[:1],))).total for model in (whole, small))
    return {"macs": after.macs / before.macs, "params": after.params / before.params}


def pruned_digits(seed: int, target: float, settings: dict[str, Any], aware: bool, samples: int) -> dict[str, Any]:
    """The digits network of a seed at a share of its MACs: accuracy on test images, costs, and what it took."""
    model, (training, selection, test) = digits.base(seed), digits.data()
    task = fw.Task(
        training.images[:1],
        calibration=training.images[:samples].split(128) if aware else (),
        evaluate=lambda network: digits.accuracy(network, selection),
    )
    step = prune.Channels(budget=fw.Budget(macs=target), samples=samples, **settings)
    small, wall, cpu = timed(model, step, task, seed)
    return {
        "model": small.model,
        "raw": 100 * digits.accuracy(small.model, test),
        "evaluations": small.ledger.steps[0].evaluations,
        "wall": wall,
        "cpu": cpu,
        **shares(small.model, model, training.images),
    }


def tuned_digits(model: nn.Module, seed: int) -> float:
    """Per cent of the test images classified right after four epochs of fine-tuning, in place."""
    training, _, test = digits.data()
    return 100 * digits.accuracy(digits.train(model, training, 4, 0.02, seed), test)


def peer_digits(seed: int, target: float, way: str, python: str) -> dict[str, Any]:
    """Torch-Pruning's, from `torch_pruning_peer.py`, judged here."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned.pt"
        command = [python, str(HERE / "torch_pruning_peer.py"), way, str(target), str(seed), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        model: nn.Module = torch.load(out, weights_only=False)  # the peer's own file: a pickled network
    training, _, test = digits.data()
    raw = 100 * digits.accuracy(model, test)
    return {"model": model, "raw": raw, **shares(model, digits.base(seed), training.images)}


def mean(results: Sequence[dict[str, Any]], key: str) -> float:
    """Over runs."""
    return statistics.mean(result[key] for result in results)


def accuracy(results: Sequence[dict[str, Any]], key: str) -> str:
    """Mean and spread over runs."""
    return f"{mean(results, key):.1f} ± {statistics.pstdev(result[key] for result in results):.1f}"


def base_accuracy(seeds: int) -> float:
    """Of the digits networks before, in per cent."""
    return statistics.mean(100 * digits.accuracy(digits.base(seed), digits.data()[2]) for seed in range(seeds))


# The tables ----------------------------------------------------------------------------------------------------------


def digits_table(seeds: int, samples: int) -> list[str]:
    """Without fine-tuning, at two shares of the MACs."""
    rows = []
    for target in TARGETS:
        runs = [pruned_digits(seed, target, {}, True, samples) for seed in range(seeds)]
        rows.append(
            f"| {target} | {mean(runs, 'macs'):.3f} | {mean(runs, 'params'):.3f} | {accuracy(runs, 'raw')} "
            f"| {mean(runs, 'evaluations'):.0f} | {mean(runs, 'wall'):.1f} | {mean(runs, 'cpu'):.1f} |"
        )
    return [
        "## The digits network, without fine-tuning",
        "",
        f"Before: {base_accuracy(seeds):.1f} % of the 300 test images. {seeds} trainings, {samples} images to look at.",
        "",
        "| MACs asked | MACs met | parameters | accuracy % | evaluations | wall s | CPU s |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def ways_table(seeds: int, samples: int, python: str | None) -> list[str]:
    """Scores and tools at equal MACs, before and after equal fine-tuning."""
    rows = []
    for target in TARGETS:
        found = {
            f"Featherweight | {way}": [pruned_digits(seed, target, *settings, samples) for seed in range(seeds)]
            for way, settings in WAYS.items()
        }
        for way in PEER_WAYS if python else ():
            runs = [peer_digits(seed, target, way, python) for seed in range(seeds)]
            found[f"Torch-Pruning | {way.replace('_', ', ')}"] = runs
        for way, runs in found.items():
            for seed, run in enumerate(runs):
                run["tuned"] = tuned_digits(run["model"], seed)
            rows.append(
                f"| {target} | {way} | {mean(runs, 'macs'):.3f} | {mean(runs, 'params'):.3f} "
                f"| {accuracy(runs, 'raw')} | {accuracy(runs, 'tuned')} |"
            )
    return [
        "## Ways of pruning the digits network, at equal MACs",
        "",
        f"Before: {base_accuracy(seeds):.1f} %. {seeds} trainings; four epochs of the same fine-tuning for all.",
        "",
        "| MACs asked | tool | way | MACs met | parameters | accuracy % | after 4 epochs % |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def imitating(model: nn.Module, network: nn.Module, seed: int) -> nn.Module:
    """The pruned network after ten passes over the images it was pruned with, learning the original's answers."""
    step = distill.Response(teacher=network, epochs=10, options={"lr": 1e-3, "optimizer": "Adam"})
    batches = fashion.calibration(seed)
    return fw.compress(model, step, task=fw.Task(batches[0][:1], batches), seed=seed).model


def tuned_fashion(model: nn.Module, network: nn.Module, seed: int) -> nn.Module:
    """The pruned network after two epochs over the training images, as it was trained and from the original too."""
    loader = DataLoader(Photos(load("train")), batch_size=128, shuffle=True, drop_last=True, collate_fn=augment)

    def train(model: nn.Module, epochs: float, loss: Any = smoothed) -> None:
        fw.fit(model, loader, epochs, loss, lr=LEARNING_RATE, mixed_precision=fashion.PRECISION, seed=seed)

    batches = fashion.calibration(seed, 64)
    task = fw.Task(batches[0][:1], batches, train=train, loss=smoothed)
    model, network = (m.to(memory_format=torch.channels_last) for m in (model, network))
    return fw.compress(
        model, distill.Response(teacher=network, epochs=2, by="soft_targets"), task=task, seed=seed
    ).model


def fashion_table(seeds: int, tuned: int) -> list[str]:
    """The demo network at half of its MACs, without fine-tuning and after two ways of healing."""
    network = fashion.load_network()
    before, rows = fashion.accuracy(network), []

    def shown(model: nn.Module) -> str:
        score = fashion.accuracy(model)
        return f"{score:.2f} | {before - score:.2f}"

    for seed in range(seeds):
        small, wall, cpu = timed(network, prune.Channels(budget=fw.Budget(macs=0.5)), fashion.task(seed), seed)
        run = shares(small.model, network, fashion.calibration(0)[0])
        healed = shown(tuned_fashion(small.model, network, seed)) if seed < tuned else "– | –"
        rows.append(
            f"| {seed} | {run['macs']:.4f} | {run['params']:.3f} | {shown(small.model)} "
            f"| {shown(imitating(small.model, network, seed))} | {healed} | {wall:.0f} | {cpu:.0f} |"
        )
        print(rows[-1], file=sys.stderr)
    what = (
        f"Before: {before:.2f} % of the 10,000 test images. Seeds are of calibration images (512) and of training. "
        "Without labels: ten passes of `distill.Response` over the same 512 images. Two epochs: of the same over the "
        "60,000 training images with their labels."
    )
    head = "| seed | MACs met | parameters | accuracy % | drop, points | without labels % | drop | after 2 epochs % "
    return [
        "## The demo network at half of its MACs",
        "",
        what,
        "",
        f"{head}| drop | wall s | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def latency_table(repeats: int) -> list[str]:
    """The exported demo network in ONNX Runtime, before and after, timed in turn."""
    network, task = fashion.load_network(), fashion.task(0)
    rows = []
    for share in (0.5, 0.25):
        for multiple in (1, 8):
            step = prune.Channels(budget=fw.Budget(macs=share), multiple_of=multiple)
            small = fw.compress(network, step, task=task)
            met = shares(small.model, network, fashion.calibration(0)[0])["macs"]
            score = 100 * (small.ledger.after.score or 0)
            for batch in (1, 64):
                timed_on = dataclasses.replace(small, example=Inputs((fashion.calibration(0)[0][:batch],)))
                took = {t.network: t for t in timed_on.time(network, ("onnxruntime",), repeats)}
                old, new = took["before"].median_ms, took["after"].median_ms
                rows.append(
                    f"| {share} | {multiple} | {met:.3f} | {score:.2f} | {batch} | {old:.2f} | {new:.2f} "
                    f"| {new / old:.2f} | {old / new:.2f}× |"
                )
    return [
        "## Latency of the demo network in ONNX Runtime",
        "",
        f"Medians of {repeats} calls each, the two networks in turn; no fine-tuning.",
        "",
        "| MACs asked | multiple_of | MACs met | accuracy % | batch | before ms | after ms | time | faster |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def main(options: argparse.Namespace) -> None:
    """Print the tables asked for."""
    torch.set_num_threads(options.threads)
    fw.inspect(digits.base(), digits.data()[0].images[:1])  # what PyTorch loads at the first count is nobody's time
    lines = [f"Threads: {options.threads}."]
    tables: dict[str, Callable[[], list[str]]] = {
        "digits": lambda: digits_table(options.seeds, options.samples),
        "fashion": lambda: fashion_table(min(3, options.seeds), options.tuned),
        "latency": lambda: latency_table(options.repeats),
        "ways": lambda: ways_table(min(3, options.seeds), options.samples, options.peer_python),
    }
    for name in options.parts:
        table = tables[name]()
        print("\n".join(table), "\n", file=sys.stderr)  # as they come: the whole takes half an hour
        lines += ["", *table]
    publish("channels", __doc__ or "", lines, options.write, parts=[HEADINGS[part] for part in options.parts])


HEADINGS = {
    "digits": "The digits network",
    "fashion": "The demo network",
    "latency": "Latency",
    "ways": "Ways of pruning",
}
PARTS = tuple(HEADINGS)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which tables (default: all)")
    parser.add_argument("--peer-python", help="the Python of an environment with torch-pruning")
    parser.add_argument("--seeds", type=int, default=5, help="at most 3 in the tables of ways and of the demo network")
    parser.add_argument("--tuned", type=int, default=1, help="how often to fine-tune the demo network, minutes each")
    parser.add_argument("--samples", type=int, default=512, help="calibration images of the digits network, of 1,200")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="also keep these tables in benchmarks/results")
    given = parser.parse_args()
    main(given)
