"""The report as Markdown, for a README or a pull request."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from featherweight.ledger import Entry, Ledger
from featherweight.report import contents, words


def markdown(ledger: Ledger) -> str:
    """The report as GitHub-flavoured Markdown. Nothing in the ledger can break the layout: names are escaped."""
    return "\n\n".join(_sections(ledger)) + "\n"


def _sections(ledger: Ledger) -> Iterator[str]:
    yield f"## {_text(ledger.model)}: {_text(words.headline(ledger))}"
    if ledger.steps:
        changes = contents.changes(ledger)
        rows = [tuple(map(_text, (c.name, c.before, c.after, c.change))) for c in changes]
        yield _table(("", "before", "after", "change"), "lrrl", rows)
    for number, entry in enumerate(ledger.steps, start=1):
        yield from _step(ledger, entry, f"Step {number}: " if len(ledger.steps) > 1 else "")
    if ledger.checks:
        yield "### Exported files, held against the model"
        titles, cells = contents.check_table(ledger)
        align = "ll" + "r" * (len(titles) - 2)
        yield _table(titles, align, [[_text(cell.text) for cell in row] for row in cells])
        yield from map(_text, contents.check_notes(ledger))
    yield from map(_text, contents.notes(ledger))
    if facts := contents.provenance(ledger):
        yield "\n".join(f"- {label}: {_text(value)}" for label, value in facts)


def _step(ledger: Ledger, entry: Entry, prefix: str) -> Iterator[str]:
    score = words.Score.of(ledger)
    yield f"### {prefix}{_code(words.call(entry.step, entry.settings))}"
    yield _text(contents.work(entry)) + "."
    if len(ledger.steps) > 1:
        changes = contents.snapshot_changes(entry.before, entry.after, score)
        rows = [tuple(map(_text, (c.name, c.before, c.after, c.change))) for c in changes]
        yield _table(("", "before", "after", "change"), "lrrl", rows)
    if contents.layers(entry):
        titles, cells = contents.layer_table(entry, score)
        rows = [(_code(name.text), *(_text(cell.text) for cell in rest)) for name, *rest in cells]
        yield _table(tuple(map(_text, titles)), "lll" + "r" * (len(titles) - 3), rows)
    else:
        yield "No layer changed."
    if loss := contents.predicted(entry):
        yield f"Predicted rise of the loss, summed over the layers: {loss}."
    if entry.left:
        reasons = [f"- {_text(why)}: {', '.join(map(_code, names))}" for why, names in contents.left(entry).items()]
        yield "\n".join(["Left as they were:", "", *reasons])
    if entry.notes:
        yield "\n".join(["Notes:", "", *(f"- {_text(words.plain(note))}" for note in entry.notes)])


def _table(titles: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; `align` has an ``l`` or an ``r`` for every column."""
    rule = [{"l": ":--", "r": "--:"}[side] for side in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))


def _text(words: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~#&$" else c for c in words)


def _code(words: str) -> str:
    """Text as code; written with entities where a character would end a code span or a table's cell."""
    if not set(words) & set("`|\\"):
        return f"`{words}`"
    entities: dict[str, str | int | None] = {c: f"&#{ord(c)};" for c in "`|\\*_[]~$"}
    return f"<code>{html.escape(words).translate(str.maketrans(entities))}</code>"
