"""What a report contains, in words and in order; the terminal, the README and the page only lay it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from featherweight.ledger import Check, Choice, Entry, Ledger, Point, Row, Snapshot, Timing
from featherweight.report import words
from featherweight.report.words import METRICS, NOTHING, Metric, Score


@dataclass(frozen=True)
class Change:
    """One line of before → after, in words.

    Attributes:
        lengths: before and after as shares of the longer one, for bars; None where a bar would say nothing.
    """

    name: str
    before: str
    after: str
    change: str
    lengths: tuple[float, float] | None = None


@dataclass(frozen=True)
class Layer:
    """What became of one layer, or of one group of layers that change together, in one step.

    Attributes:
        chosen: the chosen option; None for a layer that changed without a choice of its own.
        curve: what it was chosen from, by rising cost.
        before, after: its cost; None where there is no layer of this name.
    """

    name: str
    kind: str
    chosen: Point | None
    curve: tuple[Point, ...]
    before: Row | None
    after: Row | None

    @property
    def setting(self) -> str:
        """What was chosen, in a few words."""
        return words.plain(self.chosen.setting) if self.chosen else "with another layer"


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it says, and the number it is sorted by where it says a number."""

    text: str
    value: float | None = None


def changes(ledger: Ledger) -> tuple[Change, ...]:
    """Everything before → after: costs, score, files, latencies. Empty where no step was run."""
    if not ledger.steps:
        return ()
    return (
        *snapshot_changes(ledger.before, ledger.after, Score.of(ledger)),
        *(_file(name, size, ledger.before.total.bytes) for name, size in ledger.file_bytes.items()),
        *(_latency(conditions, pair) for conditions, pair in timings(ledger).items()),
    )


def snapshot_changes(before: Snapshot, after: Snapshot, score: Score) -> tuple[Change, ...]:
    """Costs and score of a network at two moments."""
    costs = [
        _cost(metric.name, metric, metric.of(before.total), metric.of(after.total))
        for key, metric in METRICS.items()
        if key != "activation_bytes"
    ]
    peaks = before.peak_activation_bytes, after.peak_activation_bytes
    costs.insert(-1, _cost("activation memory, peak", METRICS["activation_bytes"], *peaks))
    scored = before.score is not None or after.score is not None
    lengths = (before.score or 0.0, after.score or 0.0) if scored and score.percent else None
    change = score.change(before.score, after.score) if scored else "not asked"
    return (*costs, Change(score.name, score.say(before.score), score.say(after.score), change, lengths))


def layers(entry: Entry) -> tuple[Layer, ...]:
    """Every layer with a choice and every layer whose cost changed, in the order the network calls them."""
    after = under_old_names(entry.before.layers, entry.after.layers)
    changed = [name for name, row in entry.before.layers.items() if not _same_cost(row, after.get(name))]
    known = [name for name in entry.before.layers if name in entry.choices or name in set(changed)]
    groups = [name for name in entry.choices if name not in entry.before.layers]
    return tuple(
        _layer(name, entry.choices.get(name), entry.before.layers.get(name), after.get(name))
        for name in (*known, *groups)
    )


def under_old_names(before: Mapping[str, Row], after: Mapping[str, Row]) -> dict[str, Row]:
    """Costs afterwards, under the names the layers had before.

    What replaced ``conv1`` may consist of ``conv1.vertical`` and ``conv1.horizontal``: their costs are summed.
    A layer that belongs to none of the old ones keeps its own name; a layer that is gone is left out.
    """
    old: dict[str, Row] = {}
    for name, row in after.items():
        ancestor = name
        while ancestor and ancestor not in before:
            ancestor = ancestor.rpartition(".")[0]
        key = ancestor if ancestor in before else name
        old[key] = _sum(old[key], row) if key in old else row
    return old


def metrics(entry: Entry) -> tuple[Metric, ...]:
    """The costs its layers are listed with: the one the choice was made by, and MACs where any layer's changed."""
    fewer = any(layer.before and (not layer.after or layer.before.macs != layer.after.macs) for layer in layers(entry))
    named = ("macs", entry.metric) if fewer or entry.metric not in METRICS else (entry.metric,)
    return tuple(METRICS[key] for key in dict.fromkeys(named) if key in METRICS)


def metric_name(entry: Entry) -> str:
    """What the cost is called that `Point.share` is a share of."""
    return METRICS[entry.metric].name if entry.metric in METRICS else words.plain(entry.metric)


def left(entry: Entry) -> dict[str, tuple[str, ...]]:
    """Layers left as they were, by reason."""
    reasons: dict[str, tuple[str, ...]] = {}
    for layer, reason in entry.left.items():
        reasons[words.plain(reason)] = (*reasons.get(words.plain(reason), ()), words.name(layer))
    return reasons


def layer_table(entry: Entry, score: Score) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    """Titles and rows of a step's layers: three columns of words, then numbers; a column nobody fills is left out.

    The score ``alone`` is that of the network with only this layer changed.
    """
    shown = layers(entry)
    columns: dict[str, list[Cell]] = {
        "layer": [Cell(layer.name, place) for place, layer in enumerate(shown)],
        "kind": [Cell(layer.kind) for layer in shown],
        "chosen": [Cell(layer.setting) for layer in shown],
    }
    chosen = [layer.chosen for layer in shown]
    shares = [point.share if point else None for point in chosen]
    losses = [point.predicted_loss if point else None for point in chosen]
    scores = [point.score if point else None for point in chosen]
    if any(chosen):
        columns[f"{metric_name(entry)} kept"] = [Cell(words.share(value), value) for value in shares]
    for metric in metrics(entry):
        columns[metric.name] = [
            Cell(" → ".join(metric.pair(layer.before, layer.after)), metric.of(layer.after) if layer.after else 0.0)
            for layer in shown
        ]
    if any(value is not None for value in losses):
        columns["predicted loss"] = [Cell(words.loss(value), value) for value in losses]
    if any(value is not None for value in scores):
        columns[f"{score.name} alone"] = [Cell(score.say(value), value) for value in scores]
    return tuple(columns), tuple(zip(*columns.values(), strict=True))


def work(entry: Entry) -> str:
    """How the step was done: ``chosen by optimal selection, 14 edits, 6 evaluations, 21 s``."""
    parts = [
        f"{words.plain(entry.selected_by)} selection" if entry.selected_by else "",
        _many(len(entry.edits), "edit"),
        _many(entry.evaluations, "evaluation"),
        words.duration(entry.seconds),
    ]
    return ", ".join(filter(None, parts))


def predicted(entry: Entry) -> str:
    """The predicted rise of the loss, summed over the choices; empty unless it was predicted of all of them."""
    losses = [choice.chosen.predicted_loss for choice in entry.choices.values()]
    known = [loss for loss in losses if loss is not None]
    return words.loss(sum(known)) if known and len(known) == len(losses) else ""


def notes(ledger: Ledger) -> tuple[str, ...]:
    """What holds for the whole ledger and the reader should know."""
    if not ledger.steps:
        return ()
    uncounted = dict.fromkeys((*ledger.before.uncounted, *ledger.after.uncounted))
    return (f"The costs leave out: {', '.join(map(words.plain, uncounted))}.",) if uncounted else ()


def check_table(ledger: Ledger) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    """Titles and rows of the exported files: two columns of words, then numbers; a column nobody fills is left out."""
    score, shown = Score.of(ledger), ledger.checks
    ratios = [min(check.signal_to_noise_db) if check.signal_to_noise_db else None for check in shown]
    columns: dict[str, list[Cell]] = {
        "format": [Cell(words.plain(check.format)) for check in shown],
        "file": [Cell(words.plain(check.file)) for check in shown],
        "size": [Cell(words.size(check.bytes), check.bytes) for check in shown],
        "greatest relative difference": [Cell(words.loss(check.difference), check.difference) for check in shown],
    }
    if any(ratio is not None for ratio in ratios):
        columns["signal to noise"] = [Cell(words.decibels(ratio), ratio) for ratio in ratios]
    columns[score.name] = [
        Cell("not asked" if check.score is None else score.say(check.score), check.score) for check in shown
    ]
    if any(check.operations for check in shown):
        columns["on whole numbers"] = [
            Cell(f"{check.integer_operations} of {check.operations}" if check.operations else NOTHING)
            for check in shown
        ]
    times: tuple[tuple[str, Callable[[Check], float | None]], ...] = (
        ("latency", lambda check: check.latency_ms),
        ("in float32", lambda check: check.float32_ms),
        ("in bfloat16", lambda check: check.bfloat16_ms),
    )
    for title, time_of in times:
        if any(time_of(check) is not None for check in shown):
            taken = [time_of(check) for check in shown]
            columns[title] = [Cell(NOTHING if t is None else words.latency(t), t) for t in taken]
    return tuple(columns), tuple(zip(*columns.values(), strict=True))


def check_notes(ledger: Ledger) -> tuple[str, ...]:
    """What is to be known of the exported files, a sentence each."""
    return tuple(words.plain(f"{check.file}: {note}") for check in ledger.checks for note in check.notes)


def timings(ledger: Ledger) -> dict[str, dict[str, Timing]]:
    """Timings by conditions (``onnxruntime, batch 1, 2 threads``), then by network; the latest of each."""
    pairs: dict[str, dict[str, Timing]] = {}
    for timing in ledger.timings:
        threads = _many(timing.threads, "thread")
        conditions = f"{words.plain(timing.runtime)}, batch {timing.batch_size}, {threads}"
        pairs.setdefault(conditions, {})[timing.network] = timing
    return pairs


def provenance(ledger: Ledger) -> tuple[tuple[str, str], ...]:
    """Where the numbers come from: label and value."""
    versions = ", ".join(f"{package} {version}" for package, version in ledger.versions.items())
    facts = (
        ("model", ledger.model),
        ("fingerprint", ledger.fingerprint),
        ("scored by", ledger.scored_by),
        ("machine", ledger.machine),
        ("versions", versions),
        ("created", ledger.created),
    )
    return tuple((label, words.plain(value)) for label, value in facts if value)


def _layer(name: str, choice: Choice | None, before: Row | None, after: Row | None) -> Layer:
    kind = words.plain(before.kind) if before else ""
    chosen, curve = (choice.chosen, choice.curve) if choice else (None, ())
    return Layer(words.name(name), kind or NOTHING, chosen, curve, before, after)


def _cost(name: str, metric: Metric, before: float, after: float) -> Change:
    longest = max(before, after)
    lengths = (before / longest, after / longest) if longest else None
    change = words.change(before, after, metric.less, metric.more)
    return Change(name, metric.say(before), metric.say(after), change, lengths)


def _file(name: str, size: int, original: int) -> Change:
    kept = f"× {words.share(size / original)} of the original's bytes" if original else NOTHING
    return Change(f"file {words.plain(name)}", NOTHING, words.size(size), kept)


def _latency(conditions: str, pair: Mapping[str, Timing]) -> Change:
    before, after = pair.get("before"), pair.get("after")
    name = f"latency, {conditions}"
    was, now = (words.latency(timing.median_ms) if timing else NOTHING for timing in (before, after))
    if not (before and after):
        return Change(name, was, now, NOTHING)
    longest = max(before.median_ms, after.median_ms)
    lengths = (before.median_ms / longest, after.median_ms / longest) if longest else None
    return Change(name, was, now, words.change(before.median_ms, after.median_ms, "faster", "slower"), lengths)


def _same_cost(before: Row, after: Row | None) -> bool:
    return after is not None and replace(before, kind="") == replace(after, kind="")


def _sum(a: Row, b: Row) -> Row:
    return Row(
        macs=a.macs + b.macs,
        params=a.params + b.params,
        bytes=a.bytes + b.bytes,
        activation_bytes=a.activation_bytes + b.activation_bytes,
        energy_joules=a.energy_joules + b.energy_joules,
        kind=a.kind,
    )


def _many(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
