"""The demo network at half and at 0.3 of its MACs, without fine-tuning: what is met, what is lost, what it takes.

The residual network of examples/fashion_mnist, compressed by spatial SVD and by weight SVD with 512 unlabelled training
images, three samples of them; accuracy on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import statistics
import time

import fashion
import torch
from results import publish

import featherweight as fw
from featherweight import factorize


def main(seeds: int, threads: int, write: bool) -> None:
    """Print a row for each technique and share of the MACs: means over samples of calibration images, with spread."""
    torch.set_num_threads(threads)
    network = fashion.load_network()
    before = fashion.accuracy(network)
    rows = []
    for kind in (factorize.SpatialSVD, factorize.SVD):
        for share in (0.5, 0.3):
            met, scores, evaluations, walls, cpus = [], [], [], [], []
            for seed in range(seeds):
                task = fashion.task(seed)
                wall, cpu = time.perf_counter(), time.process_time()
                small = fw.compress(network, kind(budget=fw.Budget(macs=share)), task=task, seed=seed)
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
                entry = small.ledger.steps[0]
                met.append(entry.after.total.macs / entry.before.total.macs)
                scores.append(100 * (entry.after.score or 0))
                evaluations.append(entry.evaluations)
            mean, spread = statistics.mean(scores), statistics.pstdev(scores)
            rows.append(
                f"| {kind.__name__} | {share} | {statistics.mean(met):.4f} | {mean:.2f} ± {spread:.2f} "
                f"| {before - mean:.2f} | {max(evaluations)} "
                f"| {statistics.mean(walls):.0f} | {statistics.mean(cpus):.0f} |"
            )
    head = "| step | MACs asked | MACs met | accuracy % | drop, points | evaluations | wall s | CPU s |"
    note = f"Before: {before:.2f} %. {seeds} samples of calibration images, {threads} threads; evaluations included."
    publish("factorization", __doc__ or "", [note, "", head, "|---|---|---|---|---|---|---|---|", *rows], write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="also keep the table in benchmarks/results")
    options = parser.parse_args()
    main(options.seeds, options.threads, options.write)
