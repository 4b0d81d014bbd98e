"""One way to say a number, so that the terminal, the README and the page agree to the letter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.ledger import Check, Ledger, Point, Row, Snapshot

NOTHING = "–"


def count(value: float) -> str:
    """A number of things: ``940``, ``12.3 k``, ``1.82 G``."""
    return f"{value:g}" if abs(value) < 1000 else _scaled(value, "")


def size(value: float) -> str:
    """Bytes in decimal units (1 MB is 1,000,000 bytes): ``512 B``, ``4.50 MB``."""
    return f"{value:g} B" if abs(value) < 1000 else _scaled(value, "B")


def energy(joules: float) -> str:
    """Energy from joules: ``35.0 µJ``."""
    return _scaled(joules, "J")


def latency(milliseconds: float) -> str:
    """Time of a call, from milliseconds: ``350 µs``, ``1.20 ms``."""
    return _scaled(milliseconds / 1000, "s")


def decibels(ratio: float | None) -> str:
    """A signal-to-noise ratio: ``41.2 dB``; ``exact`` from 200 dB on."""
    if ratio is None:
        return NOTHING
    return "exact" if ratio >= 200 else signed(f"{ratio:.1f} dB")


def duration(seconds: float) -> str:
    """Time spent, from seconds: ``0.42 s``, ``3 min 20 s``."""
    if round(seconds) < 120:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def share(value: float | None) -> str:
    """A part of a whole, as a number: ``0.50``, ``0.034``."""
    if value is None:
        return NOTHING
    return f"{value:.2f}" if value >= 0.0995 or value == 0 else f"{value:.2g}"


def loss(value: float | None) -> str:
    """A predicted rise of the loss, to three digits: ``0.0123``, ``4.10e-05``."""
    if value is None:
        return NOTHING
    return signed(f"{value:#.3g}".rstrip(".")) if value else "0"


def signed(text: str) -> str:
    """The same with a true minus sign in front, where there is a hyphen."""
    return "−" + text[1:] if text.startswith("-") else text


def change(before: float, after: float, less: str, more: str) -> str:
    """What became of a quantity, as a share and in words: ``× 0.50, 2.0× smaller``.

    Args:
        before, after: the quantity, in the same unit.
        less, more: what a fall and a rise are called, such as ``smaller`` and ``larger``.
    """
    if before == after:
        return "unchanged"
    if before <= 0:
        return NOTHING
    kept = after / before
    if 0.95 < kept < 1.05 or after <= 0:
        return f"× {share(kept)}"
    return f"× {share(kept)}, {_factor(before, after)} {less if kept < 1 else more}"


def plain(text: str) -> str:
    """The same text on one line, with unprintable characters spelled out: a name may contain anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name(layer: str) -> str:
    """A layer's name; the network itself, whose name is empty, is called ``(root)``."""
    return plain(layer) or "(root)"


def setting(value: Any) -> str:
    """A setting's value as JSON would write it."""
    return plain(json.dumps(value, ensure_ascii=False, default=str))


def call(step: str, settings: Mapping[str, Any]) -> str:
    """A step as it would be written: ``factorize.SpatialSVD(ratio=0.5)``."""
    return f"{plain(step)}({', '.join(f'{plain(key)}={setting(value)}' for key, value in settings.items())})"


@dataclass(frozen=True)
class Metric:
    """A cost: what it is called, where a row keeps it, and how its numbers and their change are said."""

    name: str
    of: Callable[[Row], float]
    say: Callable[[float], str]
    less: str
    more: str

    def pair(self, before: Row | None, after: Row | None) -> tuple[str, str]:
        """The cost before and after, in words; a layer that is no longer there is ``removed``."""
        return (
            self.say(self.of(before)) if before else NOTHING,
            self.say(self.of(after)) if after else "removed" if before else NOTHING,
        )


METRICS: Mapping[str, Metric] = {
    "params": Metric("parameters", lambda row: row.params, count, "fewer", "more"),
    "macs": Metric("MACs", lambda row: row.macs, count, "fewer", "more"),
    "bytes": Metric("stored bytes", lambda row: row.bytes, size, "smaller", "larger"),
    "activation_bytes": Metric("activations written", lambda row: row.activation_bytes, size, "smaller", "larger"),
    "energy": Metric("energy (estimate)", lambda row: row.energy_joules, energy, "less", "more"),
}
"""The costs of a row by the name a budget uses, in the order they are reported."""


@dataclass(frozen=True)
class Score:
    """How one ledger's scores are said: as percentages where all of them lie between 0 and 1.

    Attributes:
        name: what the score is, ``score`` where it is the user's own evaluate.
        percent: whether scores are said as percentages.
    """

    name: str
    percent: bool

    @classmethod
    def of(cls, ledger: Ledger) -> Score:
        """The way to say the scores of `ledger`."""
        name = "score" if ledger.scored_by in ("", "evaluate") else plain(ledger.scored_by)
        return cls(name, all(0 <= score <= 1 for score in _scores(ledger)))

    def say(self, value: float | None) -> str:
        """``92.4 %``, ``27.1`` or, where it was not asked, ``–``."""
        if value is None:
            return NOTHING
        return f"{100 * value:.1f} %" if self.percent else signed(f"{value:.4g}")

    def mark(self, value: float) -> str:
        """A round value on an axis, with as many digits as it has."""
        return f"{100 * value:g} %" if self.percent else signed(f"{value:g}")

    def change(self, before: float | None, after: float | None) -> str:
        """``−0.1 points``, ``+0.03`` or ``unchanged``."""
        if before is None or after is None:
            return NOTHING
        if before == after:
            return "unchanged"
        if not self.percent:
            return signed(f"{after - before:+.3g}")
        points = 100 * (after - before)
        return signed(f"{points:+.1f} points" if abs(points) >= 0.05 else f"{points:+.1g} points")


def headline(ledger: Ledger) -> str:
    """The outcome in one line: ``0.50 of the MACs, accuracy 92.4 % → 92.3 %``."""
    if not ledger.steps:
        return "No step was run, so nothing changed"
    before, after, score = ledger.before, ledger.after, Score.of(ledger)
    chosen_by = dict.fromkeys(entry.metric for entry in ledger.steps if entry.metric in METRICS) or {"macs": None}
    costs = [
        f"{share(METRICS[key].of(after.total) / METRICS[key].of(before.total))} of the {METRICS[key].name}"
        for key in chosen_by
        if METRICS[key].of(before.total)
    ]
    if before.score is None and after.score is None:
        return ", ".join([*costs, "score not asked"])
    return ", ".join([*costs, f"{score.name} {score.say(before.score)} → {score.say(after.score)}"])


def _scores(ledger: Ledger) -> list[float]:
    scored: list[Snapshot | Point | Check] = list(ledger.checks)
    for entry in ledger.steps:
        scored += (entry.before, entry.after)
        for choice in entry.choices.values():
            scored += (choice.chosen, *choice.curve)
    return [record.score for record in scored if record.score is not None]


def _factor(before: float, after: float) -> str:
    factor = max(before / after, after / before)
    return f"{factor:.1f}×" if factor < 9.95 else f"{factor:.0f}×"


def _scaled(value: float, unit: str) -> str:
    """Three digits and a prefix: 12_345_678 → ``12.3 M``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    exponent = int(f"{value:.2e}".split("e")[1])  # of the rounded number, so that 999.9 k becomes 1 M
    thousands = max(-5, min(exponent // 3, 5))
    digits = f"{float(f'{value:.2e}') / 1000.0**thousands:#.3g}".rstrip(".")
    return f"{digits} {'fpnµm kMGTP'[thousands + 5].strip()}{unit}".strip()
