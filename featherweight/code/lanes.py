"""Range coding of symbols under fixed tables, many lanes side by side so that numpy does one step of all at once.

Martin, Range encoding: an algorithm for removing redundancy from a digitised message, 1979; interleaving as in Giesen,
Interleaved entropy coders, 2014, arxiv.org/abs/1402.3392. Whole numbers only: every machine decodes the same.

Symbol i goes to lane i mod L. A lane keeps an interval [low, low + extent) of 48 bits; a symbol narrows it to its
share, and whenever less than 32 bits of extent are left, the upper 16 bits of low are written. A lane ends with as few
bytes as name a number in its interval; what lies beyond its end reads as zeros. What is too short for many lanes has
none, and is coded as one stream (`single`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featherweight.code import single
from featherweight.code.numbers import Reader, packed, varint
from featherweight.errors import ArtifactError

Whole = NDArray[np.int64]

# A lane costs about 2.5 bytes beside what it codes, and a step of all lanes hardly less time for fewer lanes.
BYTES_PER_LANE = 600
LEAST_SYMBOLS = 64  # of a lane
LANES = 4096
# With fewer lanes a step does too little at once, and all symbols are coded as one stream instead.
LEAST_LANES = 1024
_WORD, _HALF, _MASK = np.uint64(16), np.uint64(32), np.uint64(2**32 - 1)
_LEAST, _ALL = np.uint64(2**32), np.uint64(2**48 - 1)


@dataclass(frozen=True)
class Tables:
    """How often symbols come, by context.

    Attributes:
        frequencies: (contexts, symbols) whole numbers from 0; each row sums to ``2^precision``.
        precision: bits, up to 16.
    """

    frequencies: Whole
    precision: int

    @property
    def starts(self) -> Whole:
        """(contexts, symbols), the sum of the frequencies before each."""
        return np.cumsum(self.frequencies, 1) - self.frequencies

    def lookup(self) -> NDArray[np.uint16]:
        """(contexts, 2^precision), the symbol whose share of a context's row each place belongs to."""
        contexts, symbols = self.frequencies.shape
        names = np.tile(np.arange(symbols, dtype=np.uint16), contexts)
        return np.repeat(names, self.frequencies.ravel()).reshape(contexts, -1)

    def bits(self, counts: Whole) -> float:
        """What symbols that come so often cost, (contexts, symbols)."""
        used = counts > 0
        return float((counts[used] * (self.precision - np.log2(self.frequencies[used]))).sum())


def normalised(counts: Whole, precision: int) -> Whole:
    """Counts scaled to sum to ``2^precision`` a row; what occurs keeps at least 1. A row without counts is its first.

    Args:
        counts: (contexts, symbols), from 0; no more symbols of a row may occur than ``2^precision``.
        precision: bits.
    """
    whole, total = 1 << precision, counts.sum(1, keepdims=True)
    scaled: Whole = (counts * whole) // np.maximum(total, 1)
    np.maximum(scaled, counts > 0, out=scaled)
    scaled[total[:, 0] == 0, 0] = whole
    missing = whole - scaled.sum(1)
    for index in missing.nonzero()[0].tolist():
        # What rounding left over goes to, or comes from, the most frequent.
        row, short = scaled[index], int(missing[index])
        while short:
            largest = int(row.argmax())
            most = int(row[largest])
            step = short if short > 0 else max(short, 1 - most, -max(1, most // 2))
            row[largest] += step
            short -= step
    return scaled


def encode(symbols: Whole, tables: Tables, contexts: Whole | None = None) -> bytes:
    """Symbols as bytes; `decode` needs their number, the tables and the contexts again.

    Args:
        symbols: (n,), each of a frequency above 0 in its context.
        tables: their frequencies.
        contexts: (n,), the row of each; the first where there is one.
    """
    count, width = len(symbols), tables.frequencies.shape[1]
    places = symbols if contexts is None else contexts * width + symbols
    lanes = min(LANES, count // LEAST_SYMBOLS)
    if lanes >= LEAST_LANES:
        each = np.bincount(places, minlength=tables.frequencies.size).reshape(tables.frequencies.shape)
        lanes = min(lanes, int(tables.bits(each) / 8 // BYTES_PER_LANE))
    if lanes < LEAST_LANES:
        return varint(0) + single.encode(symbols, tables, contexts)
    starts, frequencies = tables.starts.ravel().astype(np.uint64), tables.frequencies.ravel().astype(np.uint64)
    precision = np.uint64(tables.precision)
    low, extent = np.zeros(lanes, np.uint64), np.full(lanes, _ALL)
    written: list[tuple[NDArray[np.intp], NDArray[np.uint64]]] = []
    for begin in range(0, count, lanes):
        place = places[begin : begin + lanes]
        size = len(place)
        extent[:size] >>= precision
        low[:size] += extent[:size] * starts[place]
        extent[:size] *= frequencies[place]
        full = (extent < _LEAST).nonzero()[0]
        if len(full):
            before = low[full]
            written.append((full, before >> _HALF))  # of 17 bits: what is carried over is added at the end
            low[full] = (before & _MASK) << _WORD
            extent[full] <<= _WORD
    return varint(lanes) + _finished(low, extent, written)


def _finished(
    low: NDArray[np.uint64], extent: NDArray[np.uint64], written: list[tuple[NDArray[np.intp], NDArray[np.uint64]]]
) -> bytes:
    """The lanes one after the other, with their lengths, each ended with the shortest number of its interval."""
    lanes = len(low)
    lane = np.concatenate([lane for lane, _ in written]) if written else np.zeros(0, np.intp)
    each = np.bincount(lane, minlength=lanes)
    begins = np.concatenate([[0], np.cumsum(each + 2)])  # two words more for the end
    flat = np.zeros(begins[-1], np.int64)
    if written:
        order = np.argsort(lane, kind="stable")
        within = np.arange(len(lane)) - np.repeat(np.cumsum(each) - each, each)
        flat[begins[lane[order]] + within] = np.concatenate([word for _, word in written])[order].astype(np.int64)
    for index, (first, reach) in enumerate(zip(low.tolist(), extent.tolist(), strict=True)):
        for kept in (8, 16, 24, 32):  # bits
            value = -(-first >> (48 - kept)) << (48 - kept)
            if value < first + reach:
                break
        flat[begins[index + 1] - 2] += value >> 32
        flat[begins[index + 1] - 1] += value >> 16 & 0xFFFF
    while (over := flat >> 16).any():
        at = over.nonzero()[0]
        flat[at] &= 0xFFFF
        np.add.at(flat, at - 1, over[at])
    raw = flat.astype(">u2").tobytes()
    parts = [raw[2 * begins[i] : 2 * begins[i + 1]].rstrip(b"\0") for i in range(lanes)]
    if lanes == 1:
        return parts[0]  # as long as the stream is
    sizes = np.array([len(part) for part in parts])
    least, width = int(sizes.min()), int(sizes.max() - sizes.min()).bit_length()
    return b"".join([varint(least), bytes([width]), packed(sizes - least, width), *parts])


def decode(data: Reader, count: int, tables: Tables, contexts: Whole | None = None) -> NDArray[np.uint16]:
    """The symbols back, (count,); reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    lanes = data.varint_to(max(1, min(LANES, count // LEAST_SYMBOLS)))
    if not lanes:
        return single.decode(data, count, tables, contexts)
    if lanes == 1:
        sizes = np.array([data.left])
    else:
        least, width = data.varint_to(data.left), data.byte()
        if width > 32:
            raise ArtifactError("the lengths of its lanes make no sense")
        sizes = data.packed(lanes, width) + least
    if int(sizes.sum()) != data.left:
        raise ArtifactError("the lengths of its lanes do not add up")
    # Each lane's bytes, and zeros behind them: a lane that reads on stays at its last word, which is zero.
    ends = np.cumsum(-(-sizes // 2) + 4)
    pointer = np.concatenate([[0], ends[:-1]])
    flat = np.zeros(2 * int(ends[-1]), np.uint8)
    for at, size in zip((2 * pointer).tolist(), sizes.tolist(), strict=True):
        flat[at : at + size] = np.frombuffer(data.take(size), np.uint8)
    words = flat.view(">u2").astype(np.uint64)
    last = ends - 1
    state = words[pointer] << _HALF | words[pointer + 1] << _WORD | words[pointer + 2]
    pointer = pointer + 3
    extent = np.full(lanes, _ALL)
    width = tables.frequencies.shape[1]
    starts, frequencies = tables.starts.ravel().astype(np.uint64), tables.frequencies.ravel().astype(np.uint64)
    lookup, precision = tables.lookup().ravel(), np.uint64(tables.precision)
    top = np.uint64((1 << tables.precision) - 1)
    found = np.empty(count, np.uint16)
    for begin in range(0, count, lanes):
        if count - begin < lanes:
            rest = slice(0, count - begin)
            state, extent, pointer, last = state[rest], extent[rest], pointer[rest], last[rest]
        extent >>= precision
        slot = state // extent
        np.minimum(slot, top, out=slot)  # only what was damaged reaches beyond
        if contexts is None:
            place = symbol = lookup[slot.view(np.int64)]
        else:
            row = contexts[begin : begin + lanes]
            symbol = lookup[(row << tables.precision) + slot.view(np.int64)]
            place = row * width + symbol
        found[begin : begin + lanes] = symbol
        state -= starts[place] * extent
        extent *= frequencies[place]
        full = (extent < _LEAST).nonzero()[0]
        if len(full):
            at = pointer[full]
            state[full] = state[full] << _WORD | words[at]
            extent[full] <<= _WORD
            pointer[full] = np.minimum(at + 1, last[full])
    return found
