"""Whole numbers coded by how often each comes: one table for all of them, fast in both directions.

Where most are the same, as zeros are in a pruned tensor, it is said first where the others are: by a bit for every
place, eight to a symbol, or by the gaps between them, whichever comes out shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from featherweight.code import huffman, lanes
from featherweight.code.numbers import Reader, gamma, gamma_lengths, unzigzag, varint, zigzag
from featherweight.errors import ArtifactError

Whole = NDArray[np.int64]

# The greatest number of different symbols in one table; numbers that lie further apart are coded byte by byte.
ALPHABET = 4096
PRECISIONS = (8, 10, 12, 14, 16)
# A gap of this many and more is written as this symbol, and what is left of it as the next.
LONG_GAP = 255
# Gaps are tried where fewer than so many places are set: with more, bits for all places are shorter.
GAPS_BELOW = 0.08
POPULATION = np.array([byte.bit_count() for byte in range(256)])
CHOICES = np.array([comb(8, k) for k in range(9)])


# One stream of numbers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """Numbers of either sign, less than 4096 apart.

    Attributes:
        least: the least of them.
        symbols: (n,), how far each is above it.
        counts: how often each symbol comes, up to the greatest.
    """

    least: int
    symbols: Whole
    counts: Whole

    @staticmethod
    def of(values: Whole) -> Counted:
        """Numbers, (n,), of which there is one at the least."""
        least = int(values.min())
        symbols = values - least
        return Counted(least, symbols, np.bincount(symbols))


def encode(values: Whole | Counted, by_huffman: bool = False) -> bytes:
    """Numbers of either sign, less than 4096 apart, as bytes; `decode` needs how many they are.

    Args:
        values: (n,).
        by_huffman: code them by Huffman's method, not by ranges.
    """
    if not isinstance(values, Counted):
        if not len(values):
            return b""
        values = Counted.of(values)
    symbols, span = values.symbols, len(values.counts) - 1
    head = varint(zigzag(values.least)) + varint(span)
    if not span:
        return head
    counts = values.counts[None]
    if by_huffman:
        return head + huffman.encode(symbols, counts[0])
    plain = span.bit_length() * -(-len(symbols) // 8)
    if 8 * plain > _least_bits(counts):
        tables = best_tables(counts)
        written = _table(tables) + lanes.encode(symbols, tables)
        if len(written) <= plain:
            return head + written
    return head + bytes([0]) + _pack(symbols, span.bit_length())


def _least_bits(counts: Whole) -> float:
    """No fewer bits are taken by symbols that come so often, (1, symbols), and their table: see `gamma`."""
    often = counts[counts > 0]
    total = int(often.sum())
    return counts.size + 2 * len(often) + float((often * np.log2(total / often)).sum())


def decode(data: Reader, count: int, by_huffman: bool = False) -> Whole:
    """The numbers back, (count,); reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    if not count:
        data.end()
        return np.zeros(0, np.int64)
    least, span = unzigzag(data.varint()), data.varint()
    if not span:
        data.end()
        return np.full(count, least)
    if span >= ALPHABET:
        raise ArtifactError("its numbers lie too far apart")
    if by_huffman:
        return huffman.decode(data, count, span + 1) + least
    precision = data.byte()
    if not precision:
        return _unpack(data, count, span) + least
    tables = _read_table(data, precision, 1, span + 1)
    return lanes.decode(data, count, tables).astype(np.int64) + least


def _pack(symbols: Whole, width: int) -> bytes:
    """Symbols in so many bits each, as planes of bits, the highest first: numpy packs these fast."""
    bits = np.unpackbits(symbols.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)
    return np.packbits(bits[:, 16 - width :].T, axis=1).tobytes()


def _unpack(data: Reader, count: int, span: int) -> Whole:
    width = span.bit_length()
    planes = np.frombuffer(data.take(width * -(-count // 8)), np.uint8).reshape(width, -1)
    data.end()
    # Of the planes' bits whole bytes again, the highest with zeros behind: numpy's other way round.
    packed = np.packbits(np.unpackbits(planes, axis=1, count=count), axis=0).astype(np.int64)
    found: Whole = packed[0] if width <= 8 else packed[0] << 8 | packed[1]
    found >>= -width % 8
    if count and int(found.max()) > span:
        raise ArtifactError("it holds numbers beyond its range")
    return found


def best_tables(counts: Whole) -> lanes.Tables:
    """Frequencies in the precision in which they and what they code come out shortest.

    Args:
        counts: (contexts, symbols).
    """
    needed = int((counts > 0).sum(1).max()).bit_length()
    best, least = None, np.inf
    for precision in (p for p in PRECISIONS if p > needed):
        tables = lanes.Tables(lanes.normalised(counts, precision), precision)
        size = tables.bits(counts) + float(gamma_lengths(tables.frequencies + 1).sum())
        if best is not None and size > least:
            break  # finer tables take more than they save
        # The first that is as good as the best: small tables stay in the processor's nearest memory.
        if least > 1.0003 * size + 1:
            best, least = tables, size
    assert best is not None
    return best


def entropy_bytes(counts: Whole) -> float:
    """The bytes that symbols take which come so often, (contexts, symbols), and roughly what their tables do."""
    used = counts > 0
    total = np.broadcast_to(counts.sum(1, keepdims=True), counts.shape)
    bits = (counts[used] * np.log2(total[used] / counts[used])).sum() + 12 * used.sum()
    return float(bits) / 8


def _table(tables: lanes.Tables) -> bytes:
    return bytes([tables.precision]) + gamma(tables.frequencies.ravel() + 1)


def _read_table(data: Reader, precision: int, contexts: int, symbols: int) -> lanes.Tables:
    """Frequencies that `_table` wrote behind their precision.

    Raises:
        ArtifactError: they do not sum to what they should.
    """
    frequencies = data.gamma(contexts * symbols).reshape(contexts, symbols) - 1
    if precision not in PRECISIONS or not (frequencies.sum(1) == 1 << precision).all():
        raise ArtifactError("a table in it does not add up")
    return lanes.Tables(frequencies, precision)


# Bytes, each in the context of another --------------------------------------------------------------------------------

# Contexts that come less often share a table: one of its own would cost more than it saves.
RARE = 8192


def encode_bytes(values: NDArray[np.uint8], given: NDArray[np.uint8]) -> bytes:
    """Bytes, each coded by how often it comes beside the byte of the same place that the reader knows already.

    Args:
        values: (n,).
        given: (n,).
    """
    rows, contexts = _rows(given)
    counts = np.bincount(contexts * 256 + values, minlength=rows * 256).reshape(rows, 256)
    tables = best_tables(counts)
    return _table(tables) + lanes.encode(values.astype(np.int64), tables, contexts)


def decode_bytes(data: Reader, given: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes back, (n,); reads all that is left of the data."""
    rows, contexts = _rows(given)
    tables = _read_table(data, data.byte(), rows, 256)
    return lanes.decode(data, len(given), tables, contexts).astype(np.uint8)


def _rows(given: NDArray[np.uint8]) -> tuple[int, Whole]:
    """How many tables there are, and which one each place has."""
    often = np.bincount(given, minlength=256) >= RARE
    row = np.where(often, np.cumsum(often), 0)
    return int(often.sum()) + 1, row[given]


# Where something is ---------------------------------------------------------------------------------------------------


def encode_flags(flags: NDArray[np.bool_], by_huffman: bool = False) -> bytes:
    """Which places are set, as bytes; `decode_flags` needs how many places there are.

    Args:
        flags: (n,).
        by_huffman: code by Huffman's method the gaps between them, as Han et al. (Deep Compression, 2016) do.
    """
    if by_huffman:
        gaps = _gaps(flags)
        return bytes([2]) + varint(len(gaps)) + encode(gaps, by_huffman)
    symbols = np.packbits(flags).astype(np.int64)
    counts = np.bincount(symbols, minlength=256)[None]
    classes = np.bincount(POPULATION, counts[0], 9).astype(np.int64)
    ways = [(bytes([0]) + gamma(_shares(classes) + 1), _spread(_shares(classes)))]
    full = best_tables(counts)
    ways.append((bytes([1]) + _table(full), full))
    sizes = [len(head) + tables.bits(counts) / 8 for head, tables in ways]
    if flags.sum() < GAPS_BELOW * len(flags):
        gaps = _gaps(flags)
        by_gaps = bytes([2]) + varint(len(gaps)) + encode(gaps)
        if len(by_gaps) < min(sizes):
            return by_gaps
    head, tables = ways[sizes.index(min(sizes))]
    return head + lanes.encode(symbols, tables)


def decode_flags(data: Reader, count: int, by_huffman: bool = False) -> NDArray[np.bool_]:
    """Which places are set, (count,); reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    kind = data.byte()
    if kind == 2:
        gaps = decode(data, data.varint_to(count), by_huffman)
        places = np.cumsum(gaps + (gaps < LONG_GAP)) - 1
        places = places[gaps < LONG_GAP]
        if len(gaps) and (int(gaps.min()) < 0 or int(gaps.max()) > LONG_GAP):
            raise ArtifactError("its positions make no sense")
        if len(places) and int(places[-1]) >= count:
            raise ArtifactError("its positions lie beyond its end")
        flags = np.zeros(count, np.bool_)
        flags[places] = True
        return flags
    if kind == 0:
        shares = data.gamma(9) - 1
        if int(shares.max()) > 1 << 16:
            raise ArtifactError("a table in it does not add up")
        tables = _spread(shares)
    elif kind == 1:
        tables = _read_table(data, data.byte(), 1, 256)
    else:
        raise ArtifactError("its positions are written in no way that this version knows")
    symbols = lanes.decode(data, -(-count // 8), tables).astype(np.uint8)
    return np.unpackbits(symbols, count=count).astype(np.bool_)


def _gaps(flags: NDArray[np.bool_]) -> Whole:
    """How many places lie between one that is set and the next, cut into long gaps and a rest below one."""
    places = np.flatnonzero(flags)
    between = np.diff(places, prepend=-1) - 1
    long = between // LONG_GAP
    gaps = np.full(len(between) + int(long.sum()), LONG_GAP)
    gaps[np.cumsum(long + 1) - 1] = between % LONG_GAP
    return gaps


def _shares(classes: Whole) -> Whole:
    """The frequencies of bytes by their number of set bits, (9,), to 4096."""
    return np.asarray(lanes.normalised(classes[None], 12)[0])


def _spread(shares: Whole) -> lanes.Tables:
    """The frequencies of all bytes, where those of the same number of set bits are equally frequent."""
    each = (shares << 18) // CHOICES
    return lanes.Tables(lanes.normalised(each[POPULATION][None], 16), 16)
