"""Weights taken out at once, without training: OBS against Wanda and magnitude, by layer error and accuracy.

The demo network on Fashion-MNIST, the same share from every layer but the stem. The layer error is ‖(W − Ŵ) x‖ / ‖W x‖
over what each layer of the original sees on 512 training images that were not looked at, x about its mean, which biases
and norms make good; the root mean square over the layers. Accuracy is that of all 10,000 test images, a mean over
samples of 512 calibration images.
"""

from __future__ import annotations

import argparse
import statistics
import time

import fashion
import torch
from results import publish
from torch import nn

import featherweight as fw
from featherweight import prune
from featherweight.batch import Inputs
from featherweight.curvature import Statistics, gather, sweeps
from featherweight.forms import Layer, is_layer
from featherweight.step import Step

WAYS = {"magnitude": prune.Magnitude, "Wanda": prune.Wanda, "OBS": prune.OBS}
SHARES = {
    "50 %": {"sparsity": 0.5},
    "70 %": {"sparsity": 0.7},
    "90 %": {"sparsity": 0.9},
    "2:4": {"n": 2, "m": 4},
}


def error(layers: dict[str, Layer], seen: dict[str, Statistics], small: nn.Module) -> float:
    """The root mean square of the layers' relative output errors."""
    squares = []
    for name, layer in layers.items():
        of = sweeps.matrix(layer.weight, sweeps.groups_of(layer), seen[name].centred())
        of = sweeps.Matrix(of.weight, of.gram)  # the output's error, whatever it does to the loss
        squares.append(sweeps.loss(of, small.get_submodule(name).weight.detach().reshape(of.weight.shape)))
    return statistics.mean(squares) ** 0.5


def main(seeds: int, threads: int, write: bool) -> None:
    """Print a row for each share and way."""
    torch.set_num_threads(threads)
    network = fashion.load_network()
    first = next(name for name, module in network.named_modules() if is_layer(module))
    layers = {n: m for n, m in network.named_modules() if is_layer(m) and n != first}
    unseen = [Inputs((batch,)) for batch in fashion.calibration(1000)]
    seen = gather(network, layers, unseen, effort=4.0)
    rows = []
    for share, settings in SHARES.items():
        for way, technique in WAYS.items():
            errors, scores, seconds = [], [], []
            for seed in range(seeds):
                begun = time.process_time()
                step: Step = technique(**settings, ignore=(first,))
                small = fw.compress(network, step, task=fashion.task(seed))
                seconds.append(time.process_time() - begun)
                errors.append(error(layers, seen, small.model))
                scores.append(100 * (small.ledger.after.score or 0))
            spread = f" ± {statistics.stdev(scores):.2f}" if seeds > 1 else ""
            rows.append(
                f"| {share} | {way} | {statistics.mean(errors):.3f} | {statistics.mean(scores):.2f}{spread} | "
                f"{statistics.mean(seconds):.0f} |"
            )
            print(rows[-1], flush=True)
    table = ["| zero | by | layer error | accuracy % | CPU s, evaluations included |", "|---|---|---|---|---|", *rows]
    publish("sparsity", __doc__ or "", [f"Before: {fashion.accuracy(network):.2f} %.", "", *table], write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="samples of calibration images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="also keep the table in benchmarks/results")
    options = parser.parse_args()
    main(options.seeds, options.threads, options.write)
