"""The report as one page that opens anywhere: style, script and charts are inside, nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.resources import files

from featherweight.ledger import Entry, Ledger, Point
from featherweight.report import contents, plots, words
from featherweight.report.contents import Cell, Change, Layer
from featherweight.report.markup import Markup, tag, void
from featherweight.report.words import METRICS, Metric, Score


def html(ledger: Ledger, title: str = "") -> str:
    """A self-contained page; every option of every layer's curves takes about a quarter of a kilobyte.

    Args:
        ledger: all that was done.
        title: the page's title; the model's name by default.
    """
    title = words.plain(title or f"{ledger.model}, made lighter")
    head = tag(
        "head",
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: {words.headline(ledger)}"),
        tag("style", _inlined("page.css")),
    )
    body = tag("body", tag("main", *_sections(ledger, title)), tag("script", _inlined("page.js")))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(ledger: Ledger, title: str) -> Iterator[Markup]:
    steps = " → ".join(words.plain(entry.step) for entry in ledger.steps)
    made = " · ".join(filter(None, (steps, words.plain(ledger.created))))
    yield tag(
        "header", tag("p", title, class_="over"), tag("h1", words.headline(ledger)), tag("p", made, class_="quiet")
    )
    if ledger.steps:
        yield _section("Before and after", _changes(contents.changes(ledger)), *_notes(contents.notes(ledger)))
    if ledger.steps and ledger.before.layers:
        yield _section("Where the cost goes", *_costs(ledger))
    for number, entry in enumerate(ledger.steps, start=1):
        yield _step(ledger, entry, number)
    if ledger.timings:
        yield _section("Latency", *_timings(ledger))
    if ledger.checks:
        about = tag("p", "Each exported file, held against the PyTorch model.", class_="quiet")
        table = _table(*contents.check_table(ledger), words_first=2)
        yield _section("Exported files", about, table, *_notes(contents.check_notes(ledger)))
    if facts := contents.provenance(ledger):
        yield _section("Where these numbers come from", _facts(facts))


def _section(title: str, *parts: object) -> Markup:
    return tag("section", tag("h2", title), *parts)


def _changes(changes: Sequence[Change]) -> Markup:
    """Before → after, a line each, with a pair of bars where they say something."""

    def bars(change: Change) -> Markup:
        lengths = zip(("before", "after"), change.lengths or (), strict=False)
        return tag("div", *(tag("i", class_=when, style=f"width:{100 * part:.2f}%") for when, part in lengths))

    rows = (
        tag(
            "tr",
            tag("th", change.name, scope="row"),
            tag("td", bars(change), class_="pair"),
            tag("td", change.before, class_="number was"),
            tag("td", change.after, class_="number now"),
            tag("td", change.change, class_="change"),
        )
        for change in changes
    )
    titles = zip(("", "", "before", "after", "change"), (None, None, "number", "number", None), strict=True)
    head = tag("thead", tag("tr", *(tag("th", title, class_=kind) for title, kind in titles)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_="changes"), class_="scroll")


def _costs(ledger: Ledger) -> Iterator[Markup]:
    """Every layer's share of the whole network's cost before the first step, one drawing a metric."""
    before = ledger.before.layers
    after = contents.under_old_names(before, ledger.after.layers)
    names = list(dict.fromkeys((*before, *after)))
    shown = {key: metric for key, metric in METRICS.items() if metric.of(ledger.before.total)}
    first = next((key for key in ("macs", *shown) if key in shown), None)
    legend = tag("span", tag("i", class_="before"), "before", tag("i", class_="after"), "after", class_="legend")
    buttons = (
        tag("button", metric.name, data_pick=f"cost:{key}", class_="on" if key == first else None, type="button")
        for key, metric in shown.items()
    )
    yield tag("div", tag("div", *buttons, class_="switch"), legend, class_="bar-top")
    for key, metric in shown.items():
        whole = metric.of(ledger.before.total)
        bars = []
        for name in names:
            rows = before.get(name), after.get(name)
            was, now = (metric.of(row) / whole if row else 0.0 for row in rows)
            parts = f"{100 * was:.1f} % → {100 * now:.1f} %"
            tip = f"{words.name(name)}\n{' → '.join(metric.pair(*rows))} {metric.name}\n{parts} of the original's"
            bars.append(plots.Bar(words.name(name), was, now, tip))
        drawing = plots.bars(bars, lambda share: f"{100 * share:g} %")
        yield tag("figure", drawing, data_shown=f"cost:{key}", class_="wide on" if key == first else "wide")


def _step(ledger: Ledger, entry: Entry, number: int) -> Markup:
    score, several = Score.of(ledger), len(ledger.steps) > 1
    settings = [(words.plain(key), words.setting(value)) for key, value in entry.settings.items()]
    return _section(
        (f"Step {number}: " if several else "") + words.plain(entry.step),
        tag("p", contents.work(entry), class_="quiet"),
        _facts(settings) if settings else tag("p", "Every setting at its default.", class_="quiet"),
        _changes(contents.snapshot_changes(entry.before, entry.after, score)) if several else None,
        *_layers(entry, score, f"step{number}"),
        *_notes(entry.notes),
        *_left(entry),
    )


def _layers(entry: Entry, score: Score, group: str) -> Iterator[Markup]:
    """The chosen shares, the curves they were chosen from, and the table; picking a layer in one picks it in all."""
    layers = contents.layers(entry)
    if not layers:
        yield tag("p", "No layer changed.")
        return
    picks = [f"{group}:{number}" for number in range(len(layers))]
    chosen = [(layer, pick, layer.chosen) for layer, pick in zip(layers, picks, strict=True) if layer.chosen]
    metric = contents.metric_name(entry)
    tip = partial(_tip, metric, contents.metrics(entry), score)
    if chosen:
        bars = [plots.Bar(layer.name, 1.0, point.share, tip(layer, point), pick) for layer, pick, point in chosen]
        yield tag("h3", f"Share of {metric} kept, layer by layer")
        yield tag("figure", plots.bars(bars, lambda share: f"{share:g}"), class_="wide on")
    drawings = list(_curves(metric, score, tip, [(layer, pick) for layer, pick, _ in chosen if layer.curve]))
    if drawings:
        options = (tag("option", layer.name, value=pick) for layer, pick, _ in chosen if layer.curve)
        label = tag("label", "What there was to choose from for ", tag("select", *options, aria_label="layer"))
        yield tag("h3", label)
        yield tag(
            "p", "The large dot is what was chosen. The other layers' curves are in the background.", class_="quiet"
        )
        yield tag("div", *drawings, class_="side-by-side")
    titles, rows = contents.layer_table(entry, score)
    picked = [pick if layer.curve else None for layer, pick in zip(layers, picks, strict=True)]
    yield tag("h3", "Layers")
    yield _table(titles, rows, 3, picked)
    if loss := contents.predicted(entry):
        yield tag("p", "Predicted rise of the loss, summed over the layers: ", tag("b", loss))


def _curves(
    metric: str, score: Score, tip: Callable[[Layer, Point], str], layers: Sequence[tuple[Layer, str]]
) -> Iterator[Markup]:
    """Predicted loss and measured score against the share kept, each where there is any."""
    across = f"share of {metric} kept"
    measured = partial(plots.linear, say=score.mark)

    def drawn(value: Callable[[Point], float | None]) -> list[plots.Curve]:
        def dot(layer: Layer, point: Point) -> plots.Dot | None:
            y = value(point)
            if y is None or not math.isfinite(y):
                return None
            return plots.Dot(point.share, y, tip(layer, point))

        return [
            plots.Curve(
                layer.name,
                pick,
                tuple(filter(None, (dot(layer, point) for point in layer.curve))),
                dot(layer, layer.chosen) if layer.chosen else None,
            )
            for layer, pick in layers
        ]

    kinds = (
        ("predicted loss", drawn(lambda point: point.predicted_loss), plots.logarithmic),
        (f"{score.name} with only this layer changed", drawn(lambda point: point.score), measured),
    )
    seen = [kind for kind in kinds if any(curve.dots for curve in kind[1])]
    wide = len(seen) == 1
    for title, shown, scale in seen:
        drawing = plots.curves(shown, across, scale, wide)
        yield tag("figure", tag("figcaption", title), drawing, class_="wide on" if wide else "on")


def _tip(metric: str, costs: Sequence[Metric], score: Score, layer: Layer, point: Point) -> str:
    """What hovering over an option says; the cost before and after, where it is the chosen one."""
    lines = [layer.name, words.plain(point.setting), f"{words.share(point.share)} of its {metric}"]
    if point == layer.chosen:
        lines += [f"{' → '.join(m.pair(layer.before, layer.after))} {m.name}" for m in costs]
    if point.predicted_loss is not None:
        lines.append(f"predicted loss {words.loss(point.predicted_loss)}")
    if point.score is not None:
        lines.append(f"{score.name} {score.say(point.score)}")
    return "\n".join(lines)


def _left(entry: Entry) -> Iterator[Markup]:
    if entry.left:
        yield tag("h3", "Left as they were")
        reasons = (
            tag("div", tag("dt", reason), tag("dd", *(tag("code", name) for name in names)))
            for reason, names in contents.left(entry).items()
        )
        yield tag("dl", *reasons, class_="left")


def _notes(notes: Sequence[str]) -> Iterator[Markup]:
    return (tag("p", words.plain(note), class_="note") for note in notes)


def _timings(ledger: Ledger) -> Iterator[Markup]:
    """Median and quartiles of every network in every runtime, on one scale a runtime."""
    yield tag("p", "The median of the repeats as a dot, their middle half as a bar.", class_="quiet")
    for conditions, pair in contents.timings(ledger).items():
        longest = max(timing.upper_ms for timing in pair.values())
        rows = (
            tag(
                "tr",
                tag("th", words.plain(network), scope="row"),
                tag("td", plots.spread(t.lower_ms, t.median_ms, t.upper_ms, longest), class_=f"spread {network}"),
                tag("td", tag("b", words.latency(t.median_ms)), class_="number"),
                tag("td", f"{words.latency(t.lower_ms)} to {words.latency(t.upper_ms)}", class_="number"),
                tag("td", f"{t.repeats} repeats", class_="number"),
            )
            for network, t in pair.items()
        )
        yield tag("h3", conditions)
        yield tag("div", tag("table", tag("tbody", *rows), class_="timings"), class_="scroll")


def _table(
    titles: Sequence[str], rows: Sequence[Sequence[Cell]], words_first: int, picks: Sequence[str | None] = ()
) -> Markup:
    """A table whose first columns hold words and the others numbers; a click on a title sorts it.

    Args:
        picks: the curve that a click on each row picks.
    """
    kinds = [None if number < words_first else "number" for number in range(len(titles))]
    heads = (tag("th", tag("button", t, type="button"), class_=k) for t, k in zip(titles, kinds, strict=True))
    lines = (
        tag(
            "tr",
            *(tag("td", c.text, class_=kind, data_value=c.value) for c, kind in zip(row, kinds, strict=True)),
            data_pick=pick,
        )
        for row, pick in zip(rows, picks or [None] * len(rows), strict=True)
    )
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), class_="sortable")
    return tag("div", table, class_="scroll")


def _facts(facts: Sequence[tuple[str, str]]) -> Markup:
    return tag("dl", *(tag("div", tag("dt", label), tag("dd", value)) for label, value in facts), class_="facts")


def _inlined(file: str) -> Markup:
    return Markup(files(__package__).joinpath(file).read_text(encoding="utf-8"))
