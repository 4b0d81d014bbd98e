"""The two multipliers of a MobileNet, for any network: how wide it is, and at what resolution it looks.

Howard et al., MobileNets: efficient convolutional neural networks for mobile vision applications, 2017,
arxiv.org/abs/1704.04861, sections 3.3 and 3.4. MACs fall by the square of either.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.batch import Inputs
from featherweight.compressed import Compressed
from featherweight.cost.count import profile
from featherweight.cost.latency import Latency, measure, torch_run
from featherweight.errors import TaskError
from featherweight.prune import Channels
from featherweight.recipe import compress
from featherweight.report import words
from featherweight.score import Scorer
from featherweight.task import Task, first_line, working_copy

# Of the paper: 224, 192, 160 and 128 pixels.
SHARES = (1.0, 0.857, 0.714, 0.571)


def widen(
    model: nn.Module,
    task: Task,
    alpha: float,
    *,
    multiple_of: int = 1,
    ignore: tuple[str, ...] = (),
    epochs: float = 0,
    seed: int = 0,
) -> Compressed:
    """The network with every width times alpha: the best channels stay, wherever layers share them.

    Uniform, as a MobileNet's multiplier; `prune.Channels` with a budget chooses layer by layer, and loses less.

    Args:
        model: the network; it is not changed.
        task: what it is for; with calibration data the layers that read fewer channels are refitted.
        alpha: the share of every width to keep, above 0 and at most 1.
        multiple_of: keep multiples of this many channels.
        ignore: patterns of layers that keep all their outputs.
        epochs: of fine-tuning with ``task.train`` afterwards.
        seed: of everything random.
    Raises:
        TaskError: alpha is no such share.
        GraphError: the network cannot be captured.
    """
    if not (math.isfinite(alpha) and 0 < alpha <= 1):
        raise TaskError(f"alpha is {alpha}: it is the share of every width to keep, above 0 and at most 1")
    step = Channels(ratio=1 - alpha, multiple_of=multiple_of, ignore=tuple(ignore), epochs=epochs)
    return compress(model, step, task=task, seed=seed)


@dataclass(frozen=True)
class Resolution:
    """A network at one resolution.

    Attributes:
        share: of the full resolution, in height and width.
        sizes: height and width of every image that goes in.
        score: the task's; None where it does not run.
        macs: of one call on the example; 0 where it does not run.
        latency: of the same, in PyTorch; None where it does not run.
        problem: why it does not run; empty where it does.
    """

    share: float
    sizes: tuple[tuple[int, int], ...]
    score: float | None = None
    macs: int = 0
    latency: Latency | None = None
    problem: str = ""


@dataclass(frozen=True)
class Resolutions:
    """A network at several resolutions: what each costs and scores.

    Attributes:
        model: the network's class name.
        scored_by: what the scores are.
        rows: one a resolution, as they were asked for.
    """

    model: str
    scored_by: str
    rows: tuple[Resolution, ...]

    def __rich__(self) -> RenderableType:
        """The table, for a rich console."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("resolution", "pixels", "score", "MACs", "latency"):
            table.add_column(heading, justify="right", no_wrap=True)
        problems = []
        for row in self.rows:
            pixels = ", ".join(f"{height}×{width}" for height, width in row.sizes)
            if row.problem or row.score is None or row.latency is None:
                table.add_row(f"{row.share:g}", pixels, "–", "–", "–")
                problems.append(f"Does not run at {pixels}: {row.problem}")
            else:
                latency = words.latency(row.latency.median_ms)
                table.add_row(f"{row.share:g}", pixels, f"{row.score:.4g}", words.count(row.macs), latency)
        return Group(table, Text("\n".join([f"{self.model}; the score is {self.scored_by}.", *problems])))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def resolutions(
    model: nn.Module, task: Task, shares: Iterable[float] = SHARES, *, repeats: int = 30, multiple_of: int = 1
) -> Resolutions:
    """What a network scores and costs when it looks at smaller images; it is not changed, nor trained for them.

    Args:
        model: the network. `evaluate` is called with a module that resizes images and calls a copy of it.
        task: what it is for. Images are its inputs of shape (samples, channels, height, width).
        shares: of the full resolution, above 0; 1 is the images as they are.
        repeats: timed calls of each.
        multiple_of: round heights and widths to multiples of it, such as a network's total stride.
    Returns:
        A row for each share; what the network cannot run at has the reason.
    Raises:
        TaskError: a share is not above 0, no input is an image, the network does not run at full resolution, or
            evaluate failed.
    """
    wanted = list(shares)
    if wrong := [share for share in wanted if not (math.isfinite(share) and share > 0)] or not wanted:
        raise TaskError(f"shares is {wrong or wanted}: give shares of the resolution, above 0, such as [1.0, 0.857]")
    if repeats < 1 or multiple_of < 1:
        raise TaskError(f"repeats is {repeats} and multiple_of {multiple_of}: both must be at least 1")
    network = working_copy(model).eval()
    example = task.inputs().on(network)
    images = [tensor for tensor in example.tensors() if _is_image(tensor)]
    if not images:
        raise TaskError(
            f"the example ({example}) has no image, which is a (samples, channels, height, width) of numbers"
        )
    profile(network, example)  # raises where it does not even run as it is
    scorer = Scorer(task, network)
    found: dict[int, Resolution] = {}
    runs = {}
    for index, share in enumerate(wanted):
        sized = Resized(network, share, multiple_of)
        sizes = tuple(sized.size_of(image) for image in images)
        try:
            small = sized.resized(example)
            macs = profile(network, small).total.macs
        except TaskError as error:
            problem = f"{first_line(error)}. A network that is to run at any size needs an adaptive pooling before its "
            found[index] = Resolution(share, sizes, problem=f"{problem}first Linear layer")
            continue
        found[index] = Resolution(share, sizes, scorer(sized), macs)
        runs[str(index)] = torch_run(network, small)
    timed = measure(runs, repeats=repeats) if runs else {}
    rows = [
        Resolution(row.share, row.sizes, row.score, row.macs, timed.get(str(index)), row.problem)
        for index, row in found.items()
    ]
    return Resolutions(type(model).__name__, scorer.name, tuple(rows))


class Resized(nn.Module):
    """A network that looks at its images in another resolution: bilinear, smoothed where they shrink.

    Args:
        network: the network.
        share: of the full resolution.
        multiple_of: what heights and widths are rounded to.
    """

    def __init__(self, network: nn.Module, share: float, multiple_of: int = 1) -> None:
        super().__init__()
        self.network, self.share, self.multiple_of = network, share, multiple_of

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer to the resized images; other inputs are passed on."""
        return self.resized(Inputs(args, kwargs)).into(self.network)

    def resized(self, inputs: Inputs) -> Inputs:
        """The same inputs, with images in the other resolution."""
        args, kwargs = pytree.tree_map(self._resize, (inputs.args, dict(inputs.kwargs)))
        return Inputs(args, kwargs)

    def size_of(self, image: Tensor) -> tuple[int, int]:
        """Height and width that images of this size are given."""
        height, width = (
            max(1, round(size * self.share / self.multiple_of)) * self.multiple_of for size in image.shape[-2:]
        )
        return height, width

    def _resize(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _is_image(value) or self.size_of(value) == tuple(value.shape[-2:]):
            return value
        return F.interpolate(value, self.size_of(value), mode="bilinear", antialias=True)


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point() and torch.numel(tensor) > 0
