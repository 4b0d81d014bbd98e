"""Budgets of latency: what was asked, what was measured while choosing, and what the result takes when timed again.

A network laid out as ResNet-18 with random weights, no data, on one thread in ONNX Runtime; medians of processor time
as shares of the original's in the same run.
"""

from __future__ import annotations

import argparse
import re
import time

import torch
import vision
from results import publish

import featherweight as fw
from featherweight import factorize, prune
from featherweight.batch import as_inputs
from featherweight.export.worth import beside
from featherweight.step import Step


def row(step: Step, asked: float, size: int, repeats: int) -> str:
    """Of one step: latency asked, told and timed again; MACs left, networks timed, CPU seconds."""
    network, example = vision.make("ResNet-18"), torch.randn(1, 3, size, size)
    begun = time.process_time()
    small = fw.compress(network, step, task=fw.Task(example))
    taken = time.process_time() - begun
    (note,) = (note for note in small.ledger.steps[0].notes if note.startswith("latency"))
    mine, original = (float(number) for number in re.findall(r"([\d.]+) ms \(", note))
    timed = 1 + len(re.findall(r" at \d", note))
    watch = beside(network, as_inputs(example), "onnx")
    again = [one.median_ms / other.median_ms for one, other in (watch(small.model) for _ in range(repeats))]
    macs = small.ledger.after.total.macs / small.ledger.before.total.macs
    times = f"{min(again):.3f} to {max(again):.3f}"
    return f"| {step.name} | {asked} | {mine / original:.3f} | {times} | {macs:.3f} | {timed} | {taken:.0f} |"


def main(size: int, repeats: int, write: bool) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    lines = [f"{size}×{size}, batch 1; timed again {repeats} times.", ""]
    lines += ["| step | asked | told | again | MACs | networks timed | CPU s |", "|---|---|---|---|---|---|---|"]
    for asked in (0.75, 0.5):
        for kind in (factorize.SVD, prune.Channels):
            lines.append(row(kind(budget=fw.Budget(latency=asked)), asked, size, repeats))
            print(lines[-1], flush=True)
    publish("latency_budgets", __doc__ or "", lines, write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="side of the images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="also keep the table in benchmarks/results")
    main(**vars(parser.parse_args()))
