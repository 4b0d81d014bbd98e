"""Streams of symbols, flags, bits and matrices: they come back, and take about what their entropy says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.code import histogram, huffman, lanes, mixing
from featherweight.code.binary import Decoder, Encoder
from featherweight.code.numbers import Reader

seeds = st.integers(0, 2**32 - 1)


def entropy(values: np.ndarray) -> float:
    """Bytes of order 0."""
    _, counts = np.unique(values, return_counts=True)
    return float((counts * np.log2(len(values) / counts)).sum() / 8)


def laplacian(count: int, spread: float, zeros: float, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    return np.where(drawn.random(count) < zeros, 0, drawn.laplace(0, spread, count).round()).astype(np.int64)


@contextmanager
def in_lanes(most: int) -> Iterator[None]:
    """Inside, streams have lanes that are otherwise too short for any: as many as fit, up to this."""
    with mock.patch.multiple(lanes, LANES=most, LEAST_LANES=1, BYTES_PER_LANE=1):
        yield


# Ranges


@given(seeds, st.integers(0, 3000), st.integers(1, 40), st.sampled_from(histogram.PRECISIONS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_symbols_come_back_whatever_their_number_and_tables(seed, count, alphabet, precision, few_lanes):
    drawn = np.random.default_rng(seed)
    contexts = drawn.integers(0, 3, count)
    symbols = drawn.integers(0, alphabet, count) ** 2 // max(1, alphabet)
    counts = np.bincount(contexts * alphabet + symbols, minlength=3 * alphabet).reshape(3, alphabet)
    tables = lanes.Tables(lanes.normalised(counts, precision), precision)
    assert (tables.frequencies.sum(1) == 1 << precision).all()
    assert (tables.frequencies[counts > 0] > 0).all()
    with in_lanes(64) if few_lanes else nullcontext():
        data = lanes.encode(symbols, tables, contexts)
        assert (lanes.decode(Reader(data), count, tables, contexts) == symbols).all()


@pytest.mark.parametrize("count", [1000, 60_000, 1_000_000])
def test_lanes_take_hardly_more_than_the_tables_say(count):
    symbols = abs(laplacian(count, 3.0, 0.3))
    counts = np.bincount(symbols)[None]
    tables = lanes.Tables(lanes.normalised(counts, 16), 16)
    assert len(lanes.encode(symbols, tables)) < 1.006 * tables.bits(counts) / 8 + 4


def test_carries_run_through_words_that_are_full():
    """The rarest symbol again and again at the upper end of the interval: every number of the lane is all ones."""
    tables = lanes.Tables(np.array([[65535, 1]]), 16)
    for ones in range(1, 200, 7):
        symbols = np.array([1] * ones + [0] * 80 + [1] * 3)
        with in_lanes(1):
            data = lanes.encode(symbols, tables)
            assert Reader(data).varint_to(1) == 1
            assert (lanes.decode(Reader(data), len(symbols), tables) == symbols).all()
        assert (lanes.decode(Reader(lanes.encode(symbols, tables)), len(symbols), tables) == symbols).all()


@given(seeds, st.integers(0, 2000))
@settings(max_examples=40, deadline=None)
def test_single_bits_come_back_under_any_probabilities(seed, count):
    drawn = np.random.default_rng(seed)
    probabilities = np.clip(np.exp(drawn.uniform(0, 11.1, count)).astype(np.int64), 1, 65535)
    bits = (drawn.random(count) * 65536 < probabilities).astype(np.int64)
    encoder = Encoder()
    for part in np.array_split(np.arange(count), 3):
        encoder.code(probabilities[part], bits[part])
    data = encoder.finish()
    least = -np.log2(np.where(bits, probabilities, 65536 - probabilities) / 65536).sum()
    assert len(data) <= least / 8 * 1.001 + 3
    decoder = Decoder(Reader(data))
    assert (decoder.code(probabilities, None) == bits).all()


# Numbers and flags


@given(st.lists(st.integers(-30, 30)), st.integers(-(2**60), 2**60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_numbers_come_back_wherever_they_lie(values, shift, by_huffman):
    numbers = np.array(values, np.int64) + shift
    data = histogram.encode(numbers, by_huffman)
    assert (histogram.decode(Reader(data), len(values), by_huffman) == numbers).all()


@given(seeds, st.integers(0, 5000), st.floats(0, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_flags_come_back_at_any_density(seed, count, density, by_huffman):
    flags = np.random.default_rng(seed).random(count) < density**3
    data = histogram.encode_flags(flags, by_huffman)
    assert (histogram.decode_flags(Reader(data), count, by_huffman) == flags).all()


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5])
def test_flags_take_what_their_density_says(density):
    flags = np.random.default_rng(1).random(400_000) < density
    assert len(histogram.encode_flags(flags)) < 1.02 * entropy(flags) + 30


def test_numbers_take_what_their_frequencies_say():
    values = laplacian(500_000, 3.0, 0.0)
    assert entropy(values) < len(histogram.encode(values)) < 1.01 * entropy(values)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_huffman_codes_are_complete_and_shorter_for_what_is_more_frequent(counts):
    bits = huffman.lengths(np.array(counts))
    used = [(count, int(length)) for count, length in zip(counts, bits, strict=True) if count]
    assert all(length > 0 for _, length in used)
    if len(used) > 1:
        assert sum(2.0**-length for _, length in used) == 1
        whole = sum(count for count, _ in used)
        least = sum(count * math.log2(whole / count) for count, _ in used)
        assert least <= sum(count * length for count, length in used) <= least + whole
    for one in used:
        assert all(one[1] <= other[1] for other in used if one[0] > other[0])


# Matrices


@given(
    seeds, st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.sampled_from([0.3, 2.0, 300.0]), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_matrices_come_back_with_and_without_a_mask(seed, rows, columns, zeros, spread, masked):
    values = laplacian(rows * columns, spread, zeros, seed).reshape(rows, columns) + seed % 7
    kept = np.random.default_rng(seed + 1).random((rows, columns)) < 0.3 if masked else None
    data = mixing.encode(values, kept)
    found = mixing.decode(Reader(data), (rows, columns), kept)
    assert (found == (values if kept is None else np.where(kept, values, 0))).all()


def test_surroundings_say_more_than_frequencies():
    """Columns that are used to different degrees, rows of different scale: order-0 entropy knows of neither."""
    drawn = np.random.default_rng(0)
    usage, scale = drawn.random(80) ** 4, np.exp(drawn.normal(size=(60, 1)))
    values = np.where(drawn.random((60, 80)) < usage, (scale * drawn.normal(size=(60, 80)) * 2).round(), 0)
    values = values.astype(np.int64)
    assert len(mixing.encode(values)) < 0.9 * entropy(values.ravel())


def test_nothing_to_learn_costs_little():
    values = laplacian(120 * 120, 1.5, 0.5).reshape(120, 120)
    assert len(mixing.encode(values)) < 1.06 * entropy(values.ravel())


def test_the_tables_of_the_mixer_are_what_they_were():
    """Files depend on them: the logistic function in whole numbers, against floating point."""
    exact = 65536 / (1 + np.exp(-np.arange(-mixing.TOP, mixing.TOP + 1) / mixing.UNIT))
    inner = slice(720, -720)  # where nothing is cut off
    assert (abs(mixing.LOGISTIC - exact)[inner] <= 1).all()
    assert (mixing.LOGISTIC[0], mixing.LOGISTIC[mixing.TOP], mixing.LOGISTIC[-1]) == (16, 32768, 65520)
    assert (np.diff(mixing.LOGIT) >= 0).all()
    assert int(mixing.LOGISTIC.sum()) == 186155008
    assert int(mixing.LOGIT.sum()) == 29912
