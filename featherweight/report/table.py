"""The report for a terminal: what printing a compressed model shows."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from featherweight.ledger import Entry, Ledger
from featherweight.report import contents, words
from featherweight.report.contents import Cell


def table(ledger: Ledger) -> RenderableType:
    """The report as something a rich console prints."""
    return Group(*_sections(ledger))


def text(ledger: Ledger, width: int = 100) -> str:
    """The report as plain text of at most `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(table(ledger))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def checks(ledger: Ledger) -> RenderableType:
    """The exported files alone: what each is worth, and what is to be known of it."""
    notes = (Text(note) for note in contents.check_notes(ledger))
    return Group(_cells(*contents.check_table(ledger), words_first=2), *notes)


def _sections(ledger: Ledger) -> Iterator[RenderableType]:
    yield Text(f"{words.plain(ledger.model)}: {words.headline(ledger)}", style="bold")
    if ledger.steps:
        yield Text()
        rows = [(change.name, change.before, change.after, change.change) for change in contents.changes(ledger)]
        yield _columns(("", "before", "after", "change"), "lrrl", rows)
    for number, entry in enumerate(ledger.steps, start=1):
        yield Text()
        yield from _step(ledger, entry, f"Step {number}: " if len(ledger.steps) > 1 else "")
    if ledger.checks:
        yield Text()
        yield Text("Exported files, held against the model", style="bold")
        yield checks(ledger)
    if facts := contents.provenance(ledger):
        yield Text()
        yield from (Text(note) for note in contents.notes(ledger))
        yield Text("; ".join(f"{label} {value}" for label, value in facts), style="dim")


def _step(ledger: Ledger, entry: Entry, prefix: str) -> Iterator[RenderableType]:
    yield Text(prefix + words.call(entry.step, entry.settings), style="bold")
    yield Text(contents.work(entry), style="dim")
    if len(ledger.steps) > 1:
        changes = contents.snapshot_changes(entry.before, entry.after, words.Score.of(ledger))
        told = [f"{c.name} {c.before} → {c.after}" for c in changes if c.change not in ("unchanged", "not asked")]
        yield Text("; ".join(told) or "No cost and no score changed.")
    if contents.layers(entry):
        yield _cells(*contents.layer_table(entry, words.Score.of(ledger)), words_first=3)
    else:
        yield Text("No layer changed.")
    if loss := contents.predicted(entry):
        yield Text(f"Predicted rise of the loss, summed over the layers: {loss}")
    if entry.left:
        yield Text("Left as they were:")
        for reason, names in contents.left(entry).items():
            yield Padding(Text(f"{reason}: {', '.join(names)}"), (0, 0, 0, 2))
    for note in entry.notes:
        yield Text(f"Note: {words.plain(note)}")


def _cells(titles: Sequence[str], rows: Sequence[Sequence[Cell]], words_first: int) -> Table:
    align = "l" * words_first + "r" * (len(titles) - words_first)
    return _columns(titles, align, [[cell.text for cell in row] for row in rows])


def _columns(titles: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of plain text; `align` has an ``l`` or an ``r`` for every column."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title, side in zip(titles, align, strict=True):
        grid.add_column(Text(title), justify="right" if side == "r" else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid
