"""Huffman's code, the baseline: whole bits for every symbol, so never less than one.

Huffman, A method for the construction of minimum-redundancy codes, 1952; used for weights by Han et al., Deep
Compression, 2016, arxiv.org/abs/1510.00149. Codes are canonical: their lengths say all.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from featherweight.code.numbers import Reader
from featherweight.errors import ArtifactError

Whole = NDArray[np.int64]

LONGEST = 24  # bits; counts would have to grow like Fibonacci's numbers to reach it


def lengths(counts: Whole) -> Whole:
    """The number of bits of each symbol's code, (symbols,); 0 for what does not occur.

    Args:
        counts: (symbols,), how often each occurs.
    """
    found = np.zeros(len(counts), np.int64)
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    if len(heap) == 1:
        found[heap[0][1]] = 1
        return found
    heapq.heapify(heap)
    while len(heap) > 1:
        one, other = heapq.heappop(heap), heapq.heappop(heap)
        both = one[2] + other[2]
        found[both] += 1
        heapq.heappush(heap, (one[0] + other[0], min(one[1], other[1]), both))
    if int(found.max()) > LONGEST:
        return lengths(np.where(counts > 0, counts // 2 + 1, 0))
    return found


def codes(bits: Whole) -> Whole:
    """The canonical codes of symbols by their lengths, (symbols,): shorter first, then in the order of the symbols."""
    found = np.zeros(len(bits), np.int64)
    code = before = 0
    for symbol in np.lexsort((np.arange(len(bits)), bits)):
        if bits[symbol]:
            code <<= int(bits[symbol]) - before
            before = int(bits[symbol])
            found[symbol] = code
            code += 1
    return found


def encode(symbols: Whole, counts: Whole) -> bytes:
    """Symbols as the lengths of all codes, five bits each, and the codes.

    Args:
        symbols: (n,).
        counts: how often each symbol occurs.
    """
    from featherweight.code.numbers import packed

    bits = lengths(counts)
    code, size = codes(bits)[symbols], bits[symbols]
    ends = np.cumsum(size)
    place = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - size, size)
    stream = np.repeat(code, size) >> (np.repeat(size, size) - 1 - place) & 1
    return packed(bits, 5) + np.packbits(stream.astype(np.uint8)).tobytes()


def decode(data: Reader, count: int, symbols: int) -> Whole:
    """The symbols back, (count,); reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    bits = data.packed(symbols, 5)
    if not bits.any() or int(bits.max()) > LONGEST or int((1 << (LONGEST - bits[bits > 0])).sum()) > 1 << LONGEST:
        raise ArtifactError("the lengths of its codes make no sense")
    code = codes(bits)
    known = {(int(bits[s]), int(code[s])): s for s in np.flatnonzero(bits).tolist()}
    found, size, value = [], 0, 0
    stream = np.unpackbits(np.frombuffer(data.take(data.left), np.uint8)).tolist()
    for bit in stream:
        size, value = size + 1, value << 1 | bit
        symbol = known.get((size, value))
        if symbol is not None:
            found.append(symbol)
            if len(found) == count:
                break
            size = value = 0
        elif size > LONGEST:
            break
    if len(found) < count:
        raise ArtifactError("it ends too early")
    return np.array(found, np.int64)
