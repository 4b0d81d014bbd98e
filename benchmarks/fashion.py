"""The demo network and its data, as the benchmarks use them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.machine import processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist"))

from data import FASHION_MNIST, load
from network import load_network

__all__ = ["PRECISION", "accuracy", "calibration", "load_network", "split", "task"]


# Of training: where the processor multiplies in bfloat16 that is several times faster, and elsewhere much slower.
PRECISION = "bf16" if processor().bf16 else "no"


@cache
def split(name: str) -> tuple[Tensor, Tensor]:
    split = load(name)
    if split.name != FASHION_MNIST:
        raise SystemExit("Fashion-MNIST is not to be had here, and the figures are of that: see examples/fashion_mnist")
    return split.images, split.labels


def accuracy(network: nn.Module) -> float:
    """Per cent of the 10,000 test images classified right."""
    images, labels = split("test")
    network.eval()
    with torch.no_grad():
        answers = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    return 100 * float((answers == labels).double().mean())


def calibration(seed: int, samples: int = 512) -> tuple[Tensor, ...]:
    """Unlabelled training images in batches of 64, another sample of them for every seed."""
    images, _ = split("train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    return images[chosen].split(64)


def task(seed: int) -> fw.Task:
    """Classify; calibrate on a sample of training images."""
    batches = calibration(seed)
    return fw.Task(batches[0][:1], calibration=batches, evaluate=lambda network: accuracy(network) / 100)
