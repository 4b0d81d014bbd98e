"""Data-aware against plain at the same ranks: each layer's output error, and the network's accuracy.

The demo network by spatial SVD. Ranks are the optimal selector's, the same for all rows of a share. Output errors are
‖(W − Ŵ) x‖ / ‖W x‖ over what each layer of the original sees on 256 test images, the root mean square over the layers.
"""

from __future__ import annotations

import argparse

import fashion
import torch
from results import publish
from torch import nn

import featherweight as fw
from featherweight import factorize
from featherweight.batch import Inputs
from featherweight.curvature import gather
from featherweight.forms import ConvPair, is_layer
from featherweight.search.options import Plan

WAYS = {
    "plain": {"data_aware": False},
    "whitened": {"asymmetric": False},
    "whitened, asymmetric": {},
}


def errors(original: nn.Module, small: nn.Module) -> dict[str, float]:
    """Each replaced layer's relative output error on test images."""
    pairs = {name: module for name, module in small.named_modules() if isinstance(module, ConvPair)}
    layers = {name: layer for name in pairs if is_layer(layer := original.get_submodule(name))}
    seen = gather(original, layers, [Inputs((fashion.calibration(0)[0],))], effort=100.0)
    found = {}
    for name, layer in layers.items():
        gram = seen[name].gram[0].double()
        whole = layer.weight.detach().double().flatten(1)
        lost = whole - pairs[name].weight.detach().double().flatten(1)
        found[name] = float((((lost @ gram) * lost).sum() / ((whole @ gram) * whole).sum()).sqrt())
    return found


def main(threads: int, write: bool) -> None:
    """Print a row for each share of the MACs and way of fitting."""
    torch.set_num_threads(threads)
    network, task = fashion.load_network(), fashion.task(0)
    rows, per_layer = [], []
    for share in (0.5, 0.4, 0.3):
        plan: Plan = fw.compress(network, factorize.SpatialSVD(budget=fw.Budget(macs=share)), task=task).plan
        found = {}
        for way, settings in WAYS.items():
            for mended in (False, True):
                # Without calibration data in the task, a plain step has nothing to re-estimate batch norms on.
                if not mended and way != "plain":
                    continue
                given = task if mended else fw.Task(task.example, evaluate=task.evaluate)
                small = fw.compress(network, factorize.SpatialSVD(select=plan, **settings), task=given)
                of = found[way] = errors(network, small.model)
                mean = sum(e * e for e in of.values()) / len(of)
                score = 100 * (small.ledger.after.score or 0)
                rows.append(f"| {share} | {way} | {'yes' if mended else 'no'} | {mean**0.5:.3f} | {score:.2f} |")
        if share == 0.5:
            per_layer = [
                f"| {name} | {plan.layers[name]} | " + " | ".join(f"{found[way][name]:.3f}" for way in WAYS) + " |"
                for name in plan.layers
            ]
    table = [
        "| MACs | factors | batch norms re-estimated | output error | accuracy % |",
        "|---|---|---|---|---|",
        *rows,
    ]
    layers = [
        "",
        "Layer by layer at 0.5:",
        "",
        f"| layer | rank | {' | '.join(WAYS)} |",
        "|---|---|---|---|---|",
        *per_layer,
    ]
    before = f"Before: {fashion.accuracy(network):.2f} %."
    publish("data_aware", __doc__ or "", [before, "", *table, *layers], write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="also keep the table in benchmarks/results")
    options = parser.parse_args()
    main(options.threads, options.write)
