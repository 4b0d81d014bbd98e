"""Whole numbers as bytes, and what a reader says of bytes that are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.code.numbers import Reader, gamma, packed, unzigzag, varint, zigzag
from featherweight.errors import ArtifactError


@given(st.lists(st.integers(0, 2**64)))
def test_numbers_of_any_length(values):
    read = Reader(b"".join(map(varint, values)))
    assert [read.varint() for _ in values] == values
    read.end()


@given(st.integers(-(2**63), 2**63 - 1))
def test_numbers_of_either_sign(value):
    assert unzigzag(zigzag(value)) == value
    assert zigzag(value) in (2 * abs(value), 2 * abs(value) - 1)


@given(st.integers(0, 20).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1)))))
def test_numbers_of_a_few_bits(drawn):
    width, values = drawn
    data = packed(np.array(values, np.int64), width)
    assert len(data) == -(-width * len(values) // 8)
    read = Reader(data)
    assert read.packed(len(values), width).tolist() == values
    read.end()


@given(st.lists(st.integers(1, 2**31)))
def test_small_numbers_take_few_bits(values):
    data = gamma(np.array(values, np.int64))
    assert len(data) == -(-sum(2 * v.bit_length() - 1 for v in values) // 8)
    read = Reader(data)
    assert read.gamma(len(values)).tolist() == values
    read.end()


def test_what_is_not_there_is_said():
    with pytest.raises(ArtifactError, match="ends 2 bytes too early"):
        Reader(b"a").take(3)
    with pytest.raises(ArtifactError, match="a number in it has no end"):
        Reader(b"\xff" * 10).varint()
    with pytest.raises(ArtifactError, match="speaks of 300 of something where there can be 299 at most"):
        Reader(varint(300)).varint_to(299)
    with pytest.raises(ArtifactError, match="table in it makes no sense"):
        Reader(b"\0" * 9).gamma(1)
    with pytest.raises(ArtifactError, match="1 bytes in it belong to nothing"):
        Reader(b"a").end()
