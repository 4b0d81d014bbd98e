"""One stream of symbols: it comes back, takes what its tables say, and is the same bytes on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.code import histogram, lanes, single
from featherweight.code.numbers import Reader
from featherweight.errors import ArtifactError

GOLDEN = "170a6948e36520f2"


def drawn_of(seed: int, count: int, alphabet: int, contexts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Symbols, rarer ones among them, their contexts, and how often each comes in each."""
    drawn = np.random.default_rng(seed)
    given_ = drawn.integers(0, contexts, count)
    symbols = drawn.integers(0, alphabet, count) ** 2 // alphabet
    counts = np.bincount(given_ * alphabet + symbols, minlength=contexts * alphabet).reshape(contexts, alphabet)
    return symbols, given_, counts


@given(st.integers(0, 2**32 - 1), st.integers(0, 4000), st.integers(1, 200), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_symbols_come_back_in_what_their_tables_say(seed, count, alphabet, contexts):
    symbols, given_, counts = drawn_of(seed, count, alphabet, contexts)
    tables = histogram.best_tables(counts)
    data = single.encode(symbols, tables, given_)
    assert (single.decode(Reader(data), count, tables, given_) == symbols).all()
    # What no symbol of a context needs still has a share of 2^-24 each: nothing beside the words at the end.
    assert len(data) <= 1.0005 * tables.bits(counts) / 8 + 8


@given(st.integers(0, 2**32 - 1), st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_damaged_streams_give_an_error_or_symbols_of_the_table(seed, data):
    symbols, given_, counts = drawn_of(seed, 500, 30, 2)
    tables = histogram.best_tables(counts)
    try:
        found = single.decode(Reader(data), len(symbols), tables, given_)
    except ArtifactError:
        return
    assert found.shape == symbols.shape
    assert int(found.max()) < 30


def test_the_bytes_are_the_same_everywhere():
    tables = lanes.Tables(np.array([[100, 20, 7, 1, 0, 128], [1, 250, 1, 1, 1, 2]]), 8)
    symbols = np.array([0, 5, 1, 5, 2, 0, 3, 1, 1, 4, 5, 1, 0, 2, 1, 1])
    contexts = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    data = bytes.fromhex(GOLDEN)
    assert single.encode(symbols, tables, contexts) == data
    assert (single.decode(Reader(data), len(symbols), tables, contexts) == symbols).all()


@pytest.mark.parametrize(("count", "lanes_"), [(100_000, 0), (8_000_000, 1024)])
def test_only_long_streams_have_lanes(count, lanes_):
    symbols, _, counts = drawn_of(0, count, 16, 1)
    tables = histogram.best_tables(counts)
    data = lanes.encode(symbols, tables)
    assert Reader(data).varint_to(lanes.LANES) >= lanes_
    assert (Reader(data).varint_to(lanes.LANES) == 0) == (lanes_ == 0)
    assert (lanes.decode(Reader(data), count, tables) == symbols).all()
