"""Labels: joining, splitting and merging keep exactly the slices that may go, and fix what cannot be expressed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.graph.labels import Labels, Reason

ASKED = Reason("as asked", "model.py:3")


def kept(labels: Labels, rows: np.ndarray, lost: set[int]) -> list[bool]:
    return [not ({int(i) for i in row} & lost) for row in labels.resolve(rows)]


def test_joined_labels_go_together():
    labels = Labels()
    a, b, c = (labels.allocate(4, name) for name in "abc")
    labels.join(a, b)
    labels.join(b, c[::-1])
    assert (labels.resolve(a) == labels.resolve(b)).all()
    assert (labels.resolve(a) == labels.resolve(c)[::-1]).all()
    assert len(np.unique(labels.resolve(a))) == 4


def test_what_is_joined_to_fixed_labels_stays_for_their_reason():
    labels = Labels()
    a = labels.allocate(3, "a")
    b = labels.allocate(3, "b")
    labels.join(a, b)
    labels.join(b, labels.fixed(3, ASKED))
    assert not labels.resolve(a).any()
    assert labels.why(a) == [ASKED]
    assert str(ASKED) == "as asked (model.py:3)"


def test_a_split_gives_each_slice_an_outer_and_an_inner_label():
    labels = Labels()
    flat = labels.allocate(6, "a")
    outer, inner = labels.split(flat, 2, 3)
    again = labels.merge(outer, inner)
    labels.join(flat, again)
    head = int(labels.resolve(outer)[1, 0])
    assert kept(labels, flat, {head}) == [True, True, True, False, False, False]
    dim = int(labels.resolve(inner)[0, 0])
    assert kept(labels, flat, {dim}) == [False, True, True, False, True, True]
    assert kept(labels, again, {dim, head}) == [False, True, True, False, False, False]


def test_a_second_split_alike_meets_the_same_labels():
    labels = Labels()
    flat = labels.allocate(6, "a")
    first, second = labels.split(flat, 2, 3), labels.split(flat, 2, 3)
    for one, two in zip(first, second, strict=True):
        assert (labels.resolve(one) == labels.resolve(two)).all()


def test_a_split_of_rows_that_repeat_labels_them_once():
    labels = Labels()
    flat = labels.allocate(6, "channels")
    batched = labels.merge(labels.fixed(5, ASKED), flat)  # five samples of 2 × 3
    outer, inner = labels.split(batched, 10, 3)
    assert len(np.unique(labels.resolve(outer))) == 2
    assert (labels.resolve(outer)[:2] == labels.resolve(outer)[2:4]).all()
    assert len(np.unique(labels.resolve(inner))) == 3


def test_a_split_across_labels_that_go_together_keeps_the_same_inner_ones():
    labels = Labels()
    a = labels.allocate(4, "a")
    labels.join(a[:1], a[3:])
    outer, inner = labels.split(a, 2, 2)
    assert not labels.resolve(outer).any()
    assert len(np.unique(labels.resolve(inner))) == 1
    labels = Labels()
    a = labels.allocate(6, "a")
    labels.join(a[:1], a[3:4])
    outer, inner = labels.split(a, 2, 3)
    assert (labels.resolve(inner) == labels.resolve(a)[3:]).all()
    assert len(np.unique(labels.resolve(inner))) == 3


def test_products_of_different_sizes_settle_or_stay():
    labels = Labels()
    flat, other = labels.allocate(6, "a"), labels.allocate(6, "b")
    labels.split(flat, 2, 3)
    labels.split(other, 3, 2)
    labels.join(flat, other)  # heads of one meet head dims of the other
    assert (labels.resolve(flat) == labels.resolve(other)).all()


def test_lengths_must_agree():
    labels = Labels()
    with pytest.raises(ValueError, match="3 and 4 labels"):
        labels.join(labels.allocate(3, "a"), labels.allocate(4, "b"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_joined_agrees_whatever_goes(data):
    labels = Labels()
    pool = [labels.allocate(12, "a") for _ in range(4)]
    joined = []
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["join", "split", "merge", "fix", "reverse"]))
        one = data.draw(st.sampled_from(pool))
        if action == "join":
            other = data.draw(st.sampled_from(pool))
            labels.join(one, other)
            joined.append((one, other))
        elif action == "split":
            outer = data.draw(st.sampled_from([2, 3, 4, 6]))
            first, second = labels.split(one, outer, 12 // outer)
            pool.append(labels.merge(first, second))
            joined.append((one, pool[-1]))
        elif action == "merge":
            half = one[:6]
            pool.append(labels.merge(half, labels.allocate(2, "b")))
        elif action == "fix":
            labels.fix(one[data.draw(st.integers(0, 11))][None], ASKED)
        else:
            pool.append(one[::-1])
    every = np.unique(np.concatenate([labels.resolve(rows).reshape(-1) for rows in pool]))
    lost = set(data.draw(st.lists(st.sampled_from(every.tolist()), max_size=6))) - {0}
    for one, other in joined:
        assert kept(labels, one, lost) == kept(labels, other, lost)
