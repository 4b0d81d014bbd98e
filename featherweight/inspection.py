"""Looking at a model before anything is done to it: what costs what, and what could be replaced."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from featherweight import artifact
from featherweight.code.entropy import entropy_bytes
from featherweight.compressed import time_side_by_side
from featherweight.cost.count import Profile, profile
from featherweight.errors import TaskError
from featherweight.layers import obstacles
from featherweight.ledger import Entry, Ledger, machine
from featherweight.report import words
from featherweight.score import Scorer
from featherweight.snapshot import snapshot
from featherweight.task import Task, fingerprint, no_task, working_copy


@dataclass(frozen=True)
class Inspection:
    """What a model costs, layer by layer.

    Attributes:
        model: the model's class name.
        example: the inputs that the costs are of, described.
        profile: the costs.
        fixed: layers with weights that no step could replace, with the reason.
    """

    model: str
    example: str
    profile: Profile
    fixed: Mapping[str, str]

    def __rich__(self) -> RenderableType:
        """The table, for a rich console."""
        total = self.profile.total
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading, justify in (("layer", "left"), ("kind", "left")):
            table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for heading in ("parameters", "MACs", "share", "bytes", "activations", "energy"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, row in self.profile.layers.items():
            cost = row.cost
            share = f"{cost.macs / total.macs:.1%}" if total.macs else ""
            numbers = (words.count(cost.params), words.count(cost.macs), share, words.size(cost.bytes))
            written, energy = words.size(cost.activation_bytes), words.energy(cost.energy_joules)
            table.add_row(words.name(name), row.kind, *numbers, written, energy)
        table.add_section()
        numbers = (words.count(total.params), words.count(total.macs), "100%", words.size(total.bytes))
        written, energy = words.size(total.activation_bytes), words.energy(total.energy_joules)
        table.add_row("total", self.model, *numbers, written, energy, style="bold")
        peak = words.size(self.profile.peak_activation_bytes)
        lines = [f"Costs of one call on {self.example}. Activations are bytes written; most alive at once: {peak}."]
        lines += ["Energy is an estimate."]
        if self.fixed:
            lines.append("Cannot be replaced:")
            lines += [f"  {words.name(name)}: {reason}" for name, reason in self.fixed.items()]
        if self.profile.uncalled:
            lines.append(f"Never called by the example: {', '.join(self.profile.uncalled)}")
        if total.uncounted:
            lines.append(f"Not counted: {', '.join(total.uncounted)}")
        return Group(table, Text("\n".join(lines)))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


@dataclass(frozen=True)
class Part:
    """What one layer takes in a file.

    Attributes:
        values: how many it has.
        positions: bytes that say which of them are kept.
        numbers: bytes of the values, or of the numbers that stand for them.
        tables: bytes of what makes values of numbers: scales, zero points, centroids.
        bound: bytes that all of these take at least where each is coded by nothing but how often it comes: the entropy
            of order 0. What is coded by its surroundings can take less.
    """

    values: int
    positions: int
    numbers: int
    tables: int
    bound: float

    @property
    def bytes(self) -> int:
        """All that the layer takes."""
        return self.positions + self.numbers + self.tables


@dataclass(frozen=True)
class FileInspection:
    """Where every byte of a file went.

    Attributes:
        path: the file.
        size: its bytes.
        header: bytes before the first tensor, less short tensors that stand there.
        record: bytes of the ledger.
        layers: what each layer takes, in the order of the file.
        plain: bytes of the same tensors as they are in memory.
    """

    path: str
    size: int
    header: int
    record: int
    layers: Mapping[str, Part]
    plain: int

    def __rich__(self) -> RenderableType:
        """The table, for a rich console."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("layer", overflow="fold")
        for heading in ("values", "bytes", "share", "positions", "numbers", "tables", "bits each", "entropy", "above"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, part in self.layers.items():
            table.add_row(words.name(name), *self._cells(part))
        rows = self.layers.values()
        total = Part(*(sum(getattr(row, field.name) for row in rows) for field in fields(Part)))
        for name, taken in (("header", self.header), ("record", self.record)):
            if taken:
                table.add_row(name, "", words.size(taken), f"{taken / self.size:.1%}")
        table.add_section()
        cells = self._cells(total)
        table.add_row("total", cells[0], words.size(self.size), "100%", *cells[3:], style="bold")
        times = f"{self.plain / self.size:.1f}" if self.size else ""
        line = f"{self.path}: {self.size:,} bytes; the same tensors uncoded are {words.size(self.plain)}"
        return Group(table, Text(f"{line}, {times} times that."))

    def _cells(self, part: Part) -> tuple[str, ...]:
        each = f"{8 * part.bytes / part.values:.2f}" if part.values else ""
        above = words.signed(f"{part.bytes / part.bound - 1:+.1%}") if part.bound >= 1 else ""
        numbers = (words.size(taken) for taken in (part.positions, part.numbers, part.tables))
        share = f"{part.bytes / self.size:.1%}"
        bound = words.size(round(part.bound))
        return words.count(part.values), words.size(part.bytes), share, *numbers, each, bound, above

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def inspect_file(path: str | os.PathLike[str]) -> FileInspection:
    """Where every byte of a .fw file went, layer by layer, and how near that is to the entropy of what is in it.

    Args:
        path: a file that `Compressed.save` or `pack` wrote.
    Raises:
        ArtifactError: the file is missing, foreign, newer, truncated or damaged.
    """
    with artifact.open(path) as file:
        sizes, layers, plain = file.sizes(), dict[str, Part](), 0
        for name, (dtype, shape) in file.stored.items():
            if name in file.aliases:
                continue
            place, inner, rest = name.rpartition("parametrizations.")
            layer = (place if inner else name.rpartition(".")[0]).removesuffix(".") or name
            written, values = file.written(name), math.prod(shape)
            confines = bool(inner) and not rest.endswith(".original")
            if confines and dtype == torch.bool:
                where = "positions"
            elif confines and values != math.prod(file.stored[f"{place}{inner}{rest.split('.')[0]}.original"][1]):
                where = "tables"
            else:
                where = "numbers"
            old = layers.get(layer, Part(0, 0, 0, 0, 0.0))
            added = {where: getattr(old, where) + sizes[name], "bound": old.bound + entropy_bytes(written)}
            layers[layer] = replace(old, **added, values=old.values + (0 if confines else values))
            plain += 0 if confines else values * dtype.itemsize
        record = file.bytes - file.header - sum(sizes[name] for name in file.stored if name not in file.aliases)
        return FileInspection(str(path), file.bytes, file.header, record, layers, plain)


def inspect(model: nn.Module, task_or_example: Any) -> Inspection:
    """What a model costs on an example, layer by layer, and what could be replaced. The model stays as it is.

    Args:
        model: the network.
        task_or_example: a Task, or an example of its inputs: a tensor, a tuple, or a dict of keyword inputs.
    Raises:
        TaskError: the model does not run on the example.
    """
    task = task_or_example if isinstance(task_or_example, Task) else Task(task_or_example)
    inputs = task.inputs()
    counted = profile(model, inputs)
    called = [name for name, row in counted.layers.items() if row.calls]
    return Inspection(type(model).__name__, str(inputs.on(model)), counted, obstacles(model, called, ()))


def compare(model: nn.Module, other: nn.Module, task: Task, runtimes: Sequence[str] = ()) -> Ledger:
    """Two models side by side, whatever turned one into the other: costs, scores and, when asked for, latencies.

    Copies are run, so that a forward that writes into buffers leaves the models as they are.

    Args:
        model: the model before; without an evaluate, the score is agreement with it.
        other: the model after.
        task: what both are for.
        runtimes: where to time both: ``torch``, ``onnxruntime``.
    Returns:
        A ledger of one entry, for `featherweight.report` to show.
    Raises:
        TaskError: a model cannot be copied, or does not run on the task's inputs.
    """
    if problems := no_task(task):
        raise TaskError(problems[0])
    model, other = working_copy(model), working_copy(other)
    name, identity = type(model).__name__, fingerprint(model)
    scorer = Scorer(task, model)
    before = snapshot(model, task, scorer.of_original(model))
    after = snapshot(other, task, scorer(other))
    entry = Entry("compare", {}, (), {}, before, after, evaluations=scorer.count, seconds=scorer.seconds)
    timings = time_side_by_side(model, other, task.inputs(), runtimes) if runtimes else ()
    return Ledger(name, identity, scorer.name, (entry,), timings=timings, machine=machine())
