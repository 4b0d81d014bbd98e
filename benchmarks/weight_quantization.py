"""Weights of 8 to 1 bits: what each way of rounding keeps, at the same bits, and the seconds it takes.

The demo network of examples/fashion_mnist (all 10,000 test images) and EfficientNet-Lite0 (see photographs.py:
agreement with the original, and divergence from it, on photographs that nothing was calibrated on). Calibrated on
unlabelled images alone; every output channel has one symmetric scale; activations stay floats. "To the nearest, no
data, min-max" is what most tools do by default.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import fashion
import photographs
import torch
from data import load
from results import publish
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader, TensorDataset

import featherweight as fw
from featherweight import quantize
from featherweight.layerwise import Layerwise

Score = Callable[[nn.Module], str]
Bits = int | dict[str, int]
WAYS: dict[str, Callable[[Bits], Layerwise]] = {
    "to the nearest, no data, min-max": lambda b: quantize.Weights(
        bits=b, effort="nearest", data_aware=False, ranges="min-max"
    ),
    "to the nearest, least error": lambda b: quantize.Weights(bits=b, effort="nearest"),
    "equalized, biases corrected": lambda b: quantize.Weights(bits=b, effort="equalized"),
    "GPTQ": lambda b: quantize.GPTQ(bits=b),
    "AdaRound": lambda b: quantize.AdaRound(bits=b),
    "blocks (BRECQ)": lambda b: quantize.BRECQ(bits=b),
}


def run(network: nn.Module, step: Layerwise, task: fw.Task, score: Score) -> tuple[str, float, float]:
    """Score, share of bytes and CPU seconds of a step. Without data nothing is re-estimated either."""
    if step.data_aware is False:
        task = fw.Task(task.example)
    begun = time.process_time()
    small = fw.compress(network, step, task=task)
    seconds = time.process_time() - begun
    (entry,) = small.ledger.steps
    if entry.left and step.budget is None and not step.ignore:
        raise SystemExit(f"{step.name} left layers alone: {dict(entry.left)}")
    return score(small.model), entry.after.total.bytes / entry.before.total.bytes, seconds


def table(
    network: nn.Module, task: fw.Task, score: Score, widths: Mapping[str, Bits], blocks: dict[str, Any]
) -> list[str]:
    """One row a way, one column a width."""
    lines = ["| way | " + " | ".join(widths) + " | CPU s at the last |"]
    lines += ["|---|" + "---:|" * (len(widths) + 1)]
    for name, way in WAYS.items():
        cells, seconds = [], 0.0
        for width, bits in widths.items():
            step = quantize.BRECQ(bits=bits, **blocks) if name.startswith("blocks") else way(bits)
            found, _, seconds = run(network, step, task, score)
            cells.append(found)
            print(f"{name}, {width}: {found} in {seconds:.0f} s", flush=True)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return lines


def mixed(network: nn.Module, task: fw.Task, score: Score, uniform: tuple[int, ...]) -> list[str]:
    """Bits chosen per layer, in as many bytes as the same bits everywhere take."""
    lines = ["| bytes | the same bits everywhere | bits chosen by layer | CPU s |", "|---:|---:|---:|---:|"]
    for bits in uniform:
        same, share, _ = run(network, quantize.GPTQ(bits=bits), task, score)
        step = quantize.GPTQ(budget=fw.Budget(bytes=min(1.0, share * (1 + 1e-6))), offer=(8, 6, 5, 4, 3, 2))
        chosen, _, seconds = run(network, step, task, score)
        print(f"mixed at {share:.4f}: {same}; {chosen}", flush=True)
        lines.append(f"| {share:.4f} ({bits} bits) | {same} | {chosen} | {seconds:.0f} |")
    return lines


def right(network: nn.Module) -> str:
    """Per cent of the test images of Fashion-MNIST."""
    return f"{fashion.accuracy(network):.2f}"


def agreement(network: nn.Module, images: Tensor) -> Score:
    """Per cent of the images to which a network gives the original's class, and the mean divergence from it in nats."""

    def answers(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model.eval()(batch) for batch in images.split(32)])

    wanted = answers(network)

    def score(model: nn.Module) -> str:
        given = answers(model)
        same = 100 * float((given.argmax(1) == wanted.argmax(1)).double().mean())
        apart = kl_div(given.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        return f"{same:.1f} ({float(apart):.3f})"

    return score


def few_bits(epochs: float) -> list[str]:
    """Binary and ternary weights of the demo network, but for its first and last layer, untrained and trained."""
    network, split = fashion.load_network(), load("train")
    loader = DataLoader(TensorDataset(split.images, split.labels), 128, shuffle=True)
    settings: dict[str, Any] = {"lr": 0.02, "mixed_precision": fashion.PRECISION}
    task = fw.Task.from_loaders(loader, [(split.images[:64], split.labels[:64])], **settings)
    lines = [f"| weights | untrained | after {epochs:g} epochs | bytes kept | CPU s |", "|---|---:|---:|---:|---:|"]
    for kind in (quantize.Binary, quantize.Ternary):
        ignore = ("conv", "classify")
        before, share, _ = run(network, kind(ignore=ignore), task, right)
        after, _, seconds = run(network, kind(ignore=ignore, epochs=epochs), task, right)
        lines.append(f"| {kind.__name__.lower()} | {before} | {after} | {share:.4f} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    parser.add_argument("--epochs", type=float, default=2, help="of training binary and ternary weights")
    parser.add_argument("--bits", type=int, nargs="+", help="widths of the tables; default: 8, 4, 3 and 2")
    parser.add_argument("--samples", type=int, default=256, help="photographs to calibrate on")
    parser.add_argument("--images", type=int, default=1000, help="photographs to judge EfficientNet-Lite0 on")
    parser.add_argument("--parts", nargs="+", choices=tuple(HEADINGS), default=tuple(HEADINGS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    if "fashion" in given.parts:
        network, task = fashion.load_network(), fw.Task(fashion.calibration(0)[0][:1], fashion.calibration(0))
        lines += [f"## {HEADINGS['fashion']}", "", f"float32: {right(network)} % right.", ""]
        lines += [*table(network, task, right, {f"{b} bits": b for b in given.bits or (8, 4, 3, 2)}, {}), ""]
        lines += ["Bits chosen by layer against the same bits everywhere, GPTQ:", ""]
        lines += [*mixed(network, task, right, (4, 3, 2)), ""]
    if "few" in given.parts:
        lines += [f"## {HEADINGS['few']}", "", *few_bits(given.epochs), ""]
    if "efficientnet" in given.parts:
        network = photographs.load_network()
        images = photographs.mixed(given.samples, seed=0)
        task = fw.Task(images[:1], images.split(16))
        score = agreement(network, photographs.mixed(given.images, seed=100))
        lines += [f"## {HEADINGS['efficientnet']}", ""]
        what = f"Agreement with float32 on {given.images:,} pictures of all kinds, per cent, and divergence, nats."
        lines += [f"{what} With ends: the first and the last layer have 8 bits.", ""]
        widths: dict[str, Bits] = {}
        for bits in given.bits or (8, 4, 3, 2):
            few = bits < 3
            ends = {"_conv_stem*": 8, "_fc": 8, "*": bits}
            widths[f"{bits} bits{', with ends' if few else ''}"] = ends if few else bits
        lines += [*table(network, task, score, widths, {"batch": 16}), ""]
        lines += ["Bits chosen by layer against the same bits everywhere, GPTQ:", ""]
        lines += [*mixed(network, task, score, (4,)), ""]
    chosen = [HEADINGS[part] for part in given.parts]
    publish("weight_quantization", __doc__ or "", lines[:-1], given.write, parts=chosen)


HEADINGS = {
    "fashion": "ResNet-14 on Fashion-MNIST",
    "few": "Binary and ternary weights",
    "efficientnet": "EfficientNet-Lite0",
}

if __name__ == "__main__":
    main()
