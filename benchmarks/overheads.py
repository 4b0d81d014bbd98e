"""What looking at a network takes: the Gram pass in forward passes, `inspect`, and how well losses are predicted."""

from __future__ import annotations

import argparse
import random
import statistics

import fashion
import torch
from results import publish
from scipy.stats import spearmanr
from torch import Tensor, nn

import featherweight as fw
from featherweight import factorize
from featherweight.batch import Inputs
from featherweight.cost import measure
from featherweight.curvature import gather
from featherweight.forms import Layer, is_layer
from featherweight.score import Divergence


class Residual(nn.Module):
    """A block of `convolutions` 3×3 convolutions around a shortcut."""

    def __init__(self, width: int, convolutions: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) → the same."""
        return x + self.layers(x)


def convolutional(widths: tuple[int, ...], blocks: int) -> nn.Module:
    """Stages of residual blocks, each at half the resolution of the one before."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for width, after in zip(widths, (*widths[1:], 0), strict=True):
        layers += [Residual(width) for _ in range(blocks)]
        layers += [nn.Conv2d(width, after, 3, 2, 1)] if after else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


def gram_pass(network: nn.Module, batches: list[Tensor]) -> float:
    """Seconds of a Gram pass over seconds of the same forward passes, interleaved; the median of the repeats."""
    layers: dict[str, Layer] = {n: m for n, m in network.named_modules() if is_layer(m)}
    inputs = [Inputs((batch,)) for batch in batches]

    def forward() -> None:
        with torch.no_grad():
            for given in inputs:
                given.into(network)

    taken = measure({"gram": lambda: gather(network, layers, inputs), "forward": forward}, repeats=7, warmup=1)
    return taken["gram"].ratio(taken["forward"])


def predictions(plans: int) -> tuple[float, float]:
    """Spearman correlation of predicted and measured divergence, and the median of their ratio, over random plans."""
    network, task = fashion.load_network(), fashion.task(0)
    step = factorize.SpatialSVD(budget=fw.Budget(macs=0.5), asymmetric=False)
    held_out = fw.Task(task.example, calibration=fashion.calibration(99))
    choices = fw.Recipe(step).plan(network, task).steps[0].choices
    chance, predicted, measured = random.Random(0), [], []
    for _ in range(plans):
        picked = {name: chance.choice(choice.curve) for name, choice in choices.items() if chance.random() < 0.7}
        ranks = {name: int(p.setting.split()[-1]) for name, p in picked.items() if p.setting.startswith("rank")}
        predicted.append(sum(p.predicted_loss or 0 for n, p in picked.items() if n in ranks))
        plain = fw.Task(task.example, calibration=task.calibration)
        small = fw.compress(network, factorize.SpatialSVD(rank=ranks, asymmetric=False), task=plain)
        measured.append(Divergence(network, held_out)(small.model))
    ratio = statistics.median(p / m for p, m in zip(predicted, measured, strict=True))
    return float(spearmanr(predicted, measured)[0]), ratio


def main(threads: int, plans: int, write: bool) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), 4, enable_nested_tensor=False
    )
    networks = {
        "demo network, 28×28": (fashion.load_network(), list(fashion.calibration(0, 256))),
        "convolutions of widths 64 to 512, 64×64": (
            convolutional((64, 128, 256, 512), 2),
            list(torch.randn(4, 8, 3, 64, 64)),
        ),
        "transformer encoder, width 256, 64 tokens": (encoder.eval(), list(torch.randn(4, 16, 64, 256))),
    }
    rows = [f"| Gram pass over forward pass: {name} | {gram_pass(*given):.2f} |" for name, given in networks.items()]
    deep = convolutional((32, 64, 128), 16)
    count = sum(is_layer(module) for module in deep.modules())
    taken = measure({"inspect": lambda: fw.inspect(deep, torch.randn(1, 3, 64, 64))}, repeats=5, warmup=1)["inspect"]
    rows.append(f"| seconds of `inspect` on {count} convolutions and Linears | {taken.median_ms / 1000:.2f} |")
    order, ratio = predictions(plans)
    rows.append(f"| Spearman correlation of predicted and measured divergence, {plans} random plans | {order:.3f} |")
    rows.append(f"| predicted over measured divergence, median | {ratio:.2f} |")
    publish("overheads", __doc__ or "", [f"{threads} threads.", "", "| what | figure |", "|---|---|", *rows], write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="also keep the table in benchmarks/results")
    options = parser.parse_args()
    main(options.threads, options.plans, options.write)
