"""How long it takes to find what goes together in a deep network, and to narrow it, by the number of layers.

Residual networks of 3×3 convolutions with batch norms, 16 channels, on 16×16 images, half of every group removed; CPU
seconds, the least of so many runs. Narrowing includes the comparison with the masked original, and that of the module
form with the graph.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from results import publish
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.graph import capture, couple, narrow


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) → the same."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def network(layers: int, width: int = 16) -> nn.Module:
    """A stem, blocks, and a classifier: so many layers with weights."""
    blocks = [Block(width) for _ in range((layers - 2) // 2)]
    stem = nn.Conv2d(3, width, 3, padding=1)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def seconds(layers: int) -> tuple[float, float, float, int, str]:
    """To capture, to analyse, to narrow; the number of groups, and the form."""
    torch.manual_seed(0)
    model, inputs = network(layers), Inputs((torch.randn(2, 3, 16, 16),))
    times = [time.process_time()]
    trace = capture(model, inputs)
    times.append(time.process_time())
    coupling = couple(trace)
    times.append(time.process_time())
    made = narrow(model, coupling, {group.name: range(group.size // 2) for group in coupling.groups})
    times.append(time.process_time())
    first, second, third = (after - before for before, after in pairwise(times))
    return first, second, third, len(coupling.groups), made.narrowing.form


def main(layers: list[int], runs: int, write: bool) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    seconds(layers[0])  # what PyTorch loads at the first export is nobody's time
    lines = [
        "| layers | groups | torch.export s | analysis s | narrowing, checks s | both, ms a layer | form |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in layers:
        found = [seconds(count) for _ in range(runs)]
        export, analysis, narrowing = (min(run[i] for run in found) for i in range(3))
        each = 1000 * (analysis + narrowing) / count
        _, _, _, groups, form = found[0]
        lines.append(f"| {count} | {groups} | {export:.1f} | {analysis:.2f} | {narrowing:.2f} | {each:.1f} | {form} |")
    publish("pruning_speed", __doc__ or "", lines, write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[50, 100, 200, 500, 1000])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="also keep the table in benchmarks/results")
    given = parser.parse_args()
    main(given.layers, given.runs, given.write)
