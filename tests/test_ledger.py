"""The ledger on disk: what is read is what was written, and what is no ledger is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import ArtifactError
from featherweight.ledger import Check, Choice, Entry, Ledger, Point, Row, Snapshot, Timing, machine

names = st.text(max_size=6)
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**60)
rows = st.builds(Row, counts, counts, counts, counts, numbers, names)
snapshots = st.builds(
    Snapshot, st.none() | numbers, rows, st.dictionaries(names, rows, max_size=2), counts, st.tuples(names)
)
points = st.builds(Point, names, numbers, st.none() | numbers, st.none() | numbers)
choices = st.builds(Choice, points, st.lists(points, max_size=2).map(tuple))
plain = st.recursive(
    st.none() | st.booleans() | numbers | names, lambda inner: st.lists(inner, max_size=2), max_leaves=3
)
records = st.dictionaries(names, plain, max_size=2)
entries = st.builds(
    Entry,
    step=names,
    settings=records,
    edits=st.lists(records, max_size=2).map(tuple),
    left=st.dictionaries(names, names, max_size=2),
    before=snapshots,
    after=snapshots,
    plan=st.dictionaries(names, records, max_size=2),
    choices=st.dictionaries(names, choices, max_size=2),
    seconds=numbers,
    notes=st.lists(names, max_size=2).map(tuple),
)
ledgers = st.builds(
    Ledger,
    model=names,
    fingerprint=names,
    scored_by=names,
    steps=st.lists(entries, max_size=2).map(tuple),
    timings=st.lists(
        st.builds(Timing, names, names, numbers, numbers, numbers, counts, counts, counts), max_size=1
    ).map(tuple),
    checks=st.lists(st.builds(Check, names, names, counts, numbers, st.none() | numbers), max_size=1).map(tuple),
    file_bytes=st.dictionaries(names, counts, max_size=2),
    versions=st.dictionaries(names, names, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(ledgers)
def test_every_ledger_survives_json(ledger: Ledger):
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


ROW = Row(1, 2, 3, 4, 5.0)
BEFORE = Snapshot(0.9, ROW, {"fc": ROW}, 6)
LEDGER = Ledger("Net", "abc", "evaluate", (Entry("a.B", {"ratio": 0.5}, (), {}, BEFORE, replace(BEFORE, score=0.8)),))


def test_before_is_the_first_steps_and_after_the_last(tmp_path):
    ledger = replace(LEDGER, steps=(*LEDGER.steps, Entry("a.C", {}, (), {}, BEFORE, replace(BEFORE, score=0.7))))
    assert (ledger.before.score, ledger.after.score) == (0.9, 0.7)
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == ledger


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("steps"),
        lambda data: data.pop("model"),
        lambda data: data.update(more=1),
        lambda data: data.update(steps=3),
        lambda data: data["steps"][0].pop("before"),
        lambda data: data["steps"][0]["before"].pop("total"),
        lambda data: data["steps"][0]["before"]["total"].update(flops=3),
        lambda data: data["steps"][0].update(choices=[1]),
        lambda data: data["steps"][0].update(edits=None),
    ],
)
def test_a_ledger_with_a_field_missing_or_too_many_is_refused(damage):
    data = json.loads(json.dumps(LEDGER.to_json()))
    damage(data)
    with pytest.raises(ArtifactError, match="this is not a ledger of this version"):
        Ledger.from_json(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a ledger: it is not JSON"),
        (b"{", "is not a ledger: it is not JSON"),
        (b"\xff\xfe\x00", "is not a ledger: it is not text"),
        (b"[]", "this is not a ledger of this version"),
        (b"null", "this is not a ledger of this version"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content, message):
    (tmp_path / "ledger.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        Ledger.load(tmp_path / "ledger.json")


def test_a_ledger_that_is_not_there_is_said(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(ArtifactError, match=r"cannot be read: (No such file|Is a directory)"):
            Ledger.load(path)


def test_the_machine_has_a_name():
    assert "cores" in machine()
