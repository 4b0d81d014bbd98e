"""Numbers are said right, checked by reading them back."""

from dataclasses import replace

import pytest
import report_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.report import words

PREFIXES = {"f": 1e-15, "p": 1e-12, "n": 1e-9, "µ": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def read_back(text: str, unit: str) -> float:
    digits, _, prefixed = text.partition(" ")
    assert prefixed.endswith(unit)
    return float(digits) * PREFIXES[prefixed.removesuffix(unit)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**14))
def test_counts_and_sizes_are_right_to_three_digits(value: int) -> None:
    assert read_back(words.count(value), "") == pytest.approx(value, rel=0.00501)
    assert read_back(words.size(value), "B") == pytest.approx(value, rel=0.00501)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-14, 1e4))
def test_energies_and_times_are_right_and_no_longer_than_four_signs(value: float) -> None:
    assert read_back(words.energy(value), "J") == pytest.approx(value, rel=0.00501)
    assert read_back(words.latency(1000 * value), "s") == pytest.approx(value, rel=0.00501)
    assert len(words.energy(value).split(" ")[0]) <= 4


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.count(0), "0"),
        (words.count(999), "999"),
        (words.count(12_345_678), "12.3 M"),
        (words.count(999_950), "1.00 M"),
        (words.size(512), "512 B"),
        (words.size(4_500_000), "4.50 MB"),
        (words.energy(35e-6), "35.0 µJ"),
        (words.latency(1.2), "1.20 ms"),
        (words.latency(0.35), "350 µs"),
        (words.duration(0.42), "0.42 s"),
        (words.duration(200), "3 min 20 s"),
        (words.duration(7325), "2 h 2 min"),
        (words.share(0.5), "0.50"),
        (words.share(0.034), "0.034"),
        (words.loss(None), "–"),
        (words.loss(-0.002), "−0.00200"),
        (words.change(2, 1, "smaller", "larger"), "× 0.50, 2.0× smaller"),
        (words.change(350, 10, "smaller", "larger"), "× 0.029, 35× smaller"),
        (words.change(1, 1.2, "faster", "slower"), "× 1.20, 1.2× slower"),
        (words.change(100, 98, "fewer", "more"), "× 0.98"),
        (words.change(5, 5, "fewer", "more"), "unchanged"),
        (words.change(0, 5, "fewer", "more"), "–"),
        (words.plain("a\n\x1b[31mb"), "a\\n\\x1b[31mb"),
        (words.name(""), "(root)"),
    ],
)
def test_examples(said: str, expected: str) -> None:
    assert said == expected


def test_the_headline_says_cost_and_score() -> None:
    assert words.headline(samples.one_step()) == "0.54 of the MACs, accuracy 92.4 % → 92.3 %"
    assert words.headline(samples.two_steps()) == (
        "0.54 of the MACs, 0.094 of the stored bytes, accuracy 92.4 % → 91.9 %"
    )
    assert words.headline(samples.unscored()) == "0.54 of the MACs, score not asked"
    assert words.headline(samples.empty()) == "No step was run, so nothing changed"


def test_a_score_beyond_one_is_never_a_percentage() -> None:
    whole = samples.snapshot(samples.network(), -0.31)
    entry = replace(samples.factorized(), before=whole, after=replace(whole, score=-0.325), choices={})
    ledger = replace(samples.ledger(entry), checks=(), scored_by="evaluate")
    assert words.headline(ledger) == "1.00 of the MACs, score −0.31 → −0.325"
    assert words.Score.of(ledger).change(-0.31, -0.325) == "−0.015"


def test_a_small_fall_in_the_score_is_still_said() -> None:
    assert words.Score("accuracy", percent=True).change(0.9241, 0.9238) == "−0.03 points"
