"""Ledgers as real runs leave them: a ResNet of 14 layers, in one step and in two."""

from __future__ import annotations

import math
from dataclasses import replace

from featherweight.ledger import Check, Choice, Entry, Ledger, Point, Row, Snapshot, Timing

STRANGE = 'head<script>alert("|`*x*_y_")</script>&[b]'
"""A name that would break HTML, Markdown and rich's markup, were it not escaped."""


def row(macs: int, params: int, activations: int, kind: str = "", *, bits: int = 32) -> Row:
    stored = params * bits // 8
    return Row(macs, params, stored, activations, macs * 4.6e-12 + stored * 1.3e-10, kind)


def network(last: str = "fc") -> dict[str, Row]:
    """A stem, six residual blocks of two convolutions, and a classifier."""
    layers = {"stem.conv": row(442_368 * 16, 432, 65_536, "Conv2d")}
    for block in range(6):
        stage = block // 2
        width, side = 32 << stage, 32 >> stage
        for number in (1, 2):
            inputs = width // 2 if number == 1 and block % 2 == 0 and block else width
            params = inputs * width * 9
            layers[f"stages.{stage}.{block % 2}.conv{number}"] = row(
                params * side**2, params, 4 * width * side**2, "Conv2d"
            )
    layers[last] = row(1280, 1290, 40, "Linear")
    return layers


def snapshot(layers: dict[str, Row], score: float | None) -> Snapshot:
    rows = layers.values()
    total = Row(
        sum(r.macs for r in rows),
        sum(r.params for r in rows),
        sum(r.bytes for r in rows),
        sum(r.activation_bytes for r in rows),
        sum(r.energy_joules for r in rows),
    )
    return Snapshot(score, total, layers, max(r.activation_bytes for r in rows) * 2, ("aten::erf",))


def curve(number: int, ranks: int = 16) -> tuple[Point, ...]:
    scale = 0.004 * (1.7 + math.sin(number * number)) ** 3
    points = [
        Point(
            f"rank {2 * k}",
            round(k / ranks * 0.95, 4),
            scale * math.exp(-(4.5 + number % 4) * k / ranks) * (1 + 0.1 * math.sin(k)),
            max(0.1, 0.924 - scale * 18 * math.exp(-5 * k / ranks)),
        )
        for k in range(1, ranks + 1)
    ]
    return (*points, Point("as it is", 1.0, 0.0, 0.924))


def factorized(*, last: str = "fc", scored: bool = True) -> Entry:
    """Spatial SVD at half of the MACs: twelve convolutions replaced by pairs, the ends left."""
    before, after, choices = network(last), {}, {}
    picks = [9, 4, 6, 7, 5, 8, 11, 6, 5, 9, 7, 12]
    for number, (name, old) in enumerate(before.items()):
        if not 1 <= number <= 12:
            after[name] = old
            continue
        options = curve(number)
        chosen = options[picks[number - 1]]
        choices[name] = Choice(chosen, options)
        for part, kind in (("vertical", "Conv2d"), ("horizontal", "Conv2d")):
            half = chosen.share / 2
            after[f"{name}.{part}"] = row(
                int(old.macs * half), int(old.params * half), int(old.activation_bytes * 0.8), kind
            )
    return Entry(
        step="factorize.SpatialSVD",
        settings={"budget": {"macs": 0.5}, "ignore": ["stem.*"], "multiple_of": 2},
        edits=tuple({"replace": name, "rank": 8} for name in choices),
        left={
            "stem.conv": "ignored by the pattern 'stem.*'",
            last: "a Linear layer has no height and width to separate",
        },
        before=snapshot(before, 0.924 if scored else None),
        after=snapshot(after, 0.9231 if scored else None),
        choices=choices,
        selected_by="optimal",
        evaluations=6,
        seconds=21.4,
        notes=("Batch-norm statistics were estimated again on 512 samples.",),
    )


def quantized(previous: Entry) -> Entry:
    """Weights to 4 or 8 bits after the factorization: chosen by stored bytes, with nothing measured per layer."""
    before = dict(previous.after.layers)
    after, choices = {}, {}
    for number, (name, old) in enumerate(before.items()):
        bits = 4 if number % 3 else 8
        after[name] = replace(old, bytes=old.params * bits // 8, energy_joules=old.energy_joules * 0.4)
        options = tuple(Point(f"{b} bits", b / 32, 0.3 * 4.0**-b * (1 + number % 5)) for b in (2, 3, 4, 6, 8))
        choices[name] = Choice(next(p for p in options if p.setting == f"{bits} bits"), options)
    return Entry(
        step="quantize.Weights",
        settings={"budget": {"bytes": 0.2}},
        edits=tuple({"constrain": name} for name in choices),
        left={},
        before=previous.after,
        after=snapshot(after, 0.9188),
        choices=choices,
        metric="bytes",
        selected_by="greedy",
        evaluations=11,
        seconds=142.0,
    )


def ledger(*steps: Entry) -> Ledger:
    return Ledger(
        model="ResNet14",
        fingerprint="9f31c2a07be4",
        scored_by="accuracy",
        steps=steps,
        timings=(
            Timing("before", "torch", 4.21, 4.15, 4.40, 50, 1, 2),
            Timing("after", "torch", 3.02, 2.95, 3.31, 50, 1, 2),
            Timing("before", "onnxruntime", 2.48, 2.44, 2.53, 200, 8, 1),
            Timing("after", "onnxruntime", 1.37, 1.35, 1.44, 200, 8, 1),
        ),
        checks=(
            Check("onnx", "small.onnx", 2_345_678, 3.1e-6, 0.9231),
            Check("torch_export", "small.pt2", 2_512_000, 0.0),
        ),
        file_bytes={"small.fw": 1_903_211},
        machine="x86_64, Linux, 2 cores",
        versions={"featherweight": "0.1.0", "torch": "2.13.0"},
        created="2026-11-22 14:03",
    )


def one_step() -> Ledger:
    return ledger(factorized())


def two_steps() -> Ledger:
    first = factorized()
    return ledger(first, quantized(first))


def strange() -> Ledger:
    return ledger(factorized(last=STRANGE))


def unscored() -> Ledger:
    return replace(ledger(factorized(scored=False)), checks=(), timings=())


def unchanged() -> Ledger:
    """A step that did nothing."""
    whole = snapshot(network(), None)
    left = dict.fromkeys(whole.layers, "narrower than multiple_of=512")
    return ledger(Entry("prune.Channels", {}, (), left, whole, whole))


def empty() -> Ledger:
    return replace(ledger(), timings=(), checks=(), file_bytes={})
