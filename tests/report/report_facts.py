"""What every report of a ledger has to tell, written down from the records themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator

from featherweight.ledger import Ledger
from featherweight.report import words


def facts(ledger: Ledger) -> Iterator[str]:
    """Every name, number and sentence of `ledger` a reader is owed, as text without line breaks."""
    yield from (ledger.model, ledger.fingerprint, ledger.scored_by, ledger.machine, ledger.created)
    yield from (f"{package} {version}" for package, version in ledger.versions.items())
    for entry in ledger.steps:
        yield entry.step
        yield from (key for key in entry.settings)
        yield from (json.dumps(value) for value in entry.settings.values())
        yield from (f"{len(entry.edits)} edit", f"{entry.evaluations} evaluation", words.duration(entry.seconds))
        yield entry.selected_by
        yield from entry.left
        yield from entry.left.values()
        yield from entry.notes
        for name, choice in entry.choices.items():
            yield from (name, entry.before.layers[name].kind, choice.chosen.setting, f"{choice.chosen.share:.2f}")
            yield words.loss(choice.chosen.predicted_loss)
            if choice.chosen.score is not None:
                yield f"{100 * choice.chosen.score:.1f} %"
            if entry.metric == "macs":
                after = sum(r.macs for key, r in entry.after.layers.items() if key.startswith(name))
                yield f"{words.count(entry.before.layers[name].macs)} → {words.count(after)}"
            else:
                rows = entry.before.layers[name], entry.after.layers[name]
                yield " → ".join(words.size(row.bytes) for row in rows)
    if ledger.steps:
        for snapshot in (ledger.before, ledger.after):
            yield from (words.count(snapshot.total.params), words.count(snapshot.total.macs))
            yield from (words.size(snapshot.total.bytes), words.size(snapshot.peak_activation_bytes))
            yield words.energy(snapshot.total.energy_joules)
            yield "–" if snapshot.score is None else f"{100 * snapshot.score:.1f} %"
            yield from snapshot.uncounted
        yield from ("energy (estimate)", words.headline(ledger))
        for file, size in ledger.file_bytes.items():
            yield from (file, words.size(size))
        for timing in ledger.timings:
            yield f"{timing.runtime}, batch {timing.batch_size}, {timing.threads} thread"
            yield words.latency(timing.median_ms)
    for check in ledger.checks:
        yield from (check.format, check.file, words.size(check.bytes), words.loss(check.difference))
        yield "not asked" if check.score is None else f"{100 * check.score:.1f} %"


LEDGERS = ("one_step", "two_steps", "strange", "unscored", "unchanged", "empty")
"""The names of the samples every report is tried on."""
