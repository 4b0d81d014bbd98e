"""Statistics that must come out alike on one process and on two; run by test_gram.py, on two of them as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.curvature.gram import Statistics, gather, gather_paired, my_share
from featherweight.curvature.lockstep import Lockstep


class Sometimes(nn.Module):
    """Calls its second layer only where the inputs are large: not every process gets there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rare, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        if x.max() > 1.5:
            x = self.rare(x)
        return self.head(x)


def network() -> Sometimes:
    torch.manual_seed(0)
    return Sometimes()


def batches(count: int) -> list[Inputs]:
    """Of different sizes; only the first one is large enough for the layer that is called seldom."""
    generator = torch.Generator().manual_seed(1)
    return [Inputs((torch.randn(3 + n, 2, 5, 5, generator=generator) * (4 if n == 0 else 0.1),)) for n in range(count)]


def all_statistics() -> dict[str, Statistics]:
    """Of five batches, of one alone, and of a changed network's, by name."""
    model, changed = network(), network()
    with torch.no_grad():
        changed.conv.weight.mul_(0.9)
    layers = {"conv": model.conv, "rare": model.rare, "head": model.head}
    # Every process would draw labels of its own: a loss without labels is the same for all.
    found = {f"five {n}": s for n, s in gather(model, layers, batches(5), gradients=squares, effort=99).items()}
    found |= {f"one {n}": s for n, s in gather(model, layers, batches(1), gradients=squares, effort=99).items()}
    for name, count in (("paired", 5), ("paired one", 1)):
        lockstep = Lockstep(model, changed, my_share(batches(count)))
        paired = gather_paired(model.head, lockstep.at("head"), samples=lockstep.samples, effort=99)
        assert paired is not None
        found[name] = paired
    return found


def squares(outputs: Tensor, generator: torch.Generator) -> Tensor:
    return outputs.square().sum()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.save(all_statistics(), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
