"""Whole numbers of a matrix coded by what is around them: rows and columns learn how full they are on the way.

Several guesses at each bit, one for each thing that is known around it, are mixed by a small online-trained network in
the logistic domain (Mahoney, Adaptive weighing of context models for lossless data compression, 2005). The bits of a
number are whether it is 0, its sign, how many digits it has, and the digits, as in DeepCABAC (Wiedemann et al., 2020,
arxiv.org/abs/1907.11900), whose contexts are two neighbours.

A matrix is cut into tiles, some columns of one row each. Step t codes the tiles (row r, tile t − r) of all rows at
once: everything above and to the left is known by then, and numpy does some hundred numbers at a time. Nothing but
whole numbers is computed with, so that every machine decodes the same.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from featherweight.code.binary import Decoder, Encoder
from featherweight.code.numbers import Reader, unzigzag, varint, zigzag
from featherweight.errors import ArtifactError

Whole = NDArray[np.int64]

TILES = 16  # a row
UNIT = 256  # a logit of 1
TOP = 2840  # the greatest logit, of a probability of 1 − 1/65536
STEEPEST = 16  # in 65536ths: no bit is held for more certain than this
PRIOR = 4  # as much as so many bits seen, a new context trusts the average of all
MEMORY = 8192  # bits, after which what a context has seen counts half
BUCKETS = 24
LONGEST = 40  # binary digits of a number
MODELLED = 3  # leading digits with contexts; later ones are as good as random
SLOW = 2048  # divides the rate of learning


def _logistic() -> Whole:
    """65536 / (1 + e^(−x / 256)) for x from −2840 to 2840, by whole numbers of 160 bits."""
    one = 1 << 160
    step = term = one
    count = 1
    while term:
        term //= count * UNIT
        step += term
        count += 1
    upper, power = [], one
    for _ in range(TOP + 1):
        upper.append((one << 16) // (one + one * one // power))
        power = power * step >> 160
    half = np.array(upper, np.int64)
    both: Whole = np.clip(np.concatenate([65536 - half[:0:-1], half]), STEEPEST, 65536 - STEEPEST)
    return both


LOGISTIC = _logistic()
# The logit of every probability in 65536ths.
LOGIT = np.clip(np.searchsorted(LOGISTIC, np.arange(65537)) - TOP, -TOP, TOP).astype(np.int64)
# Buckets of averages in 16ths: half an octave each.
_STEPS = np.array([0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048])


class Coder(Protocol):
    """An `Encoder`, which is given the bits, or a `Decoder`, which gives them."""

    def code(self, probabilities: Whole, bits: Whole | None) -> Whole:
        """The bits, coded."""


class _Counter:
    """How often a bit was 1 in each of some contexts."""

    def __init__(self, contexts: int) -> None:
        self.seen, self.ones = np.zeros(contexts, np.int64), np.zeros(contexts, np.int64)

    def logits(self, context: Whole, average: int) -> Whole:
        """(n,), of the contexts, (n,); `average` is the probability where nothing was seen."""
        shares = ((self.ones[context] << 16) + PRIOR * average) // (self.seen[context] + PRIOR)
        found: Whole = LOGIT[shares]
        return found

    def learn(self, context: Whole, bits: Whole) -> None:
        size = len(self.seen)
        self.seen += np.bincount(context, minlength=size)
        self.ones += np.bincount(context[bits > 0], minlength=size)
        if (old := self.seen > MEMORY).any():
            self.seen[old] >>= 1
            self.ones[old] >>= 1


class _Bit:
    """One kind of bit: a counter for every thing that it may depend on, and the weights that mix them.

    Args:
        contexts: how many contexts each thing has.
    """

    def __init__(self, *contexts: int) -> None:
        self.seen, self.ones = 2, 1
        self.counters = [_Counter(size) for size in contexts]
        # The average of all stands in every guess: with several of them it is taken off again.
        first = [-13107] + [65536 * 3 // (2 * len(contexts) + 1)] * len(contexts)
        self.weights = np.array(first if len(contexts) > 1 else [0, 65536], np.int64)

    def code(self, coder: Coder, contexts: list[Whole], bits: Whole | None) -> Whole:
        """Code bits, (n,), each thing's contexts given as (n,), and learn from them."""
        average = (self.ones << 16) // self.seen
        logits = np.empty((len(contexts) + 1, len(contexts[0])), np.int64)
        logits[0] = LOGIT[average]
        for row, (counter, context) in enumerate(zip(self.counters, contexts, strict=True), start=1):
            logits[row] = counter.logits(context, average)
        mixed = (self.weights @ logits) >> 16
        probabilities = LOGISTIC[np.clip(mixed, -TOP, TOP) + TOP]
        bits = coder.code(probabilities, bits)
        missed = (bits << 16) - probabilities
        self.weights += (logits @ missed) * 3 // (SLOW * (64 + len(bits)))
        self.seen += len(bits)
        self.ones += int(bits.sum())
        for counter, context in zip(self.counters, contexts, strict=True):
            counter.learn(context, bits)
        return bits


class _Matrix:
    """A matrix on its way through the coder.

    Args:
        coder: encoder or decoder.
        shape: rows and columns.
        kept: which places are coded; None for all. The others are 0.
        signed: whether some are below 0.
        digits: of the largest.
        lag: how many rows above another neighbour is.
    """

    def __init__(
        self, coder: Coder, shape: tuple[int, int], kept: NDArray[np.bool_] | None, signed: bool, digits: int, lag: int
    ) -> None:
        self.coder, self.shape, self.kept, self.signed, self.digits, self.lag = coder, shape, kept, signed, digits, lag
        rows, columns = shape
        self.above = lag + 1
        # With `above` rows of zeros before the first, and a column of them.
        self.values = np.zeros((rows + self.above, columns + 1), np.int64)
        self.in_row, self.in_column = np.zeros((2, rows), np.int64), np.zeros((2, columns), np.int64)
        self.recent = np.zeros(columns, np.int64)
        self.row_full, self.column_full = _Counter(rows), _Counter(columns)
        squares = BUCKETS * BUCKETS
        self.nonzero = _Bit(rows, columns, 8, 16, squares, 64, BUCKETS)
        self.negative = _Bit(9, 9)
        self.longer = [_Bit(BUCKETS, BUCKETS, BUCKETS, squares) for _ in range(digits)]
        self.digit = _Bit(LONGEST << MODELLED)

    def run(self, wanted: Whole | None) -> Whole:
        """Code all of it; `wanted` are the numbers, (rows, columns), for an encoder."""
        rows, columns = self.shape
        width = -(-columns // TILES)
        tiles = -(-columns // width)
        within = np.arange(width)
        for step in range(rows + tiles - 1):
            row = np.arange(max(0, step - tiles + 1), min(rows - 1, step) + 1)
            column = ((step - row)[:, None] * width + within).ravel()
            row = np.repeat(row, width)
            inside = column < columns
            if self.kept is not None:
                inside[inside] = self.kept[row[inside], column[inside]]
            if not inside.all():
                row, column = row[inside], column[inside]
            if len(row):
                found = self._tiles(row, column, None if wanted is None else wanted[row, column])
                self.values[row + self.above, column + 1] = found
        return self.values[self.above :, 1:]

    def _tiles(self, row: Whole, column: Whole, wanted: Whole | None) -> Whole:
        """The numbers at some places, (n,), no two of them in one column."""
        above = self.values[row + self.above - 1, column + 1]
        second = self.values[row + self.above - 2, column + 1]
        beside = self.values[row + self.above - 1, column]
        far = self.values[row + self.above - self.lag, column + 1]
        farther = self.values[row + self.above - self.lag - 1, column + 1]
        nearer = self.values[row + self.above - self.lag + 1, column + 1]
        by_row, by_column = _bucket(self.in_row, row), _bucket(self.in_column, column)
        square = by_row * BUCKETS + by_column
        around = np.searchsorted(_STEPS, 8 * abs(above) + 4 * (abs(second) + abs(far)), "right")
        one = (above != 0).astype(np.int64)
        local = one + 2 * (second != 0) + 4 * (beside != 0)
        there = one + 2 * (far != 0) + 4 * (farther != 0) + 8 * (nearer != 0)
        lately = np.minimum(self.recent[column] >> 10, 31) * 2 + one

        bits = None if wanted is None else (wanted != 0).astype(np.int64)
        bits = self.nonzero.code(self.coder, [row, column, local, there, square, lately, around], bits)
        self.recent[column] += (bits << 12) - (self.recent[column] >> 3)
        found = np.zeros(len(row), np.int64)
        at = np.flatnonzero(bits)
        if len(at):
            some = [by_row[at], by_column[at], around[at], square[at]]
            size = self._sizes(some, None if wanted is None else abs(wanted[at]))
            if self.signed:
                context = [3 * (np.sign(a[at]) + 1) + np.sign(b[at]) + 1 for a, b in ((above, second), (far, beside))]
                bits = None if wanted is None else (wanted[at] < 0).astype(np.int64)
                size = np.where(self.negative.code(self.coder, context, bits) > 0, -size, size)
            found[at] = size
        size = np.minimum(abs(found), 4095)
        self.in_row += (np.bincount(row, minlength=self.shape[0]), _sums(row, size, self.shape[0]))
        self.in_column[:, column] += (np.ones(len(column), np.int64), size)
        return found

    def _sizes(self, contexts: list[Whole], wanted: Whole | None) -> Whole:
        """Numbers from 1, (n,): how many digits more than one, then the digits after the first."""
        count = len(contexts[0])
        length = np.zeros(count, np.int64)
        target = None if wanted is None else _digits(wanted) - 1
        at = np.arange(count)
        for number in range(self.digits - 1):
            bits = None if target is None else (target[at] > number).astype(np.int64)
            bits = self.longer[number].code(self.coder, [context[at] for context in contexts], bits)
            at = at[bits > 0]
            if not len(at):
                break
            length[at] += 1
        found = np.ones(count, np.int64)
        for place in range(int(length.max())):
            at = np.flatnonzero(length > place)
            bits = None if wanted is None else wanted[at] >> (length[at] - place - 1) & 1
            if place < MODELLED:
                bits = self.digit.code(self.coder, [length[at] << MODELLED | found[at] & ((1 << MODELLED) - 1)], bits)
            else:
                bits = self.coder.code(np.full(len(at), 32768), bits)
            found[at] = found[at] << 1 | bits
        return found


def _bucket(seen: Whole, index: Whole) -> Whole:
    """The average size in some rows or columns, (n,), as one of 24 classes; the last where nothing was seen."""
    count, total = seen[0, index], seen[1, index]
    average = 16 * total // np.maximum(count, 1)
    return np.where(count > 0, np.searchsorted(_STEPS, average, "right") - 1, BUCKETS - 1)


def _sums(index: Whole, values: Whole, size: int) -> Whole:
    """The sum of the values at each index; exact: they stay far below 2^53."""
    return np.bincount(index, values, size).astype(np.int64)


def _digits(values: Whole) -> Whole:
    """The number of binary digits of numbers from 1 below 2^40."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def encode(values: Whole, kept: NDArray[np.bool_] | None = None, center: int | None = None) -> bytes:
    """A matrix of whole numbers as bytes.

    Args:
        values: (rows, columns), less than 2^39 apart.
        kept: which places are coded; None for all of them.
        center: the number that stands for nothing; the most frequent by default.
    """
    coded = values.ravel() if kept is None else values[kept]
    if not len(coded):
        return b""
    if center is None:
        different, counts = np.unique(coded, return_counts=True)
        center = int(different[counts.argmax()])
    values = values - center
    if kept is not None:
        values = np.where(kept, values, 0)
    signed, digits = bool((values < 0).any()), int(_digits(np.maximum(abs(values), 1)).max())
    head = varint(zigzag(center)) + bytes([signed << 6 | digits])
    if not values.any():
        return head[:-1] + b"\0"
    flat = _turned(values.shape)
    if flat:
        values, kept = values.T, None if kept is None else kept.T
    lag = _period(values != 0)
    coder = Encoder()
    shape = (values.shape[0], values.shape[1])
    _Matrix(coder, shape, kept, signed, digits, lag).run(np.ascontiguousarray(values))
    return head + bytes([lag]) + coder.finish()


def decode(data: Reader, shape: tuple[int, int], kept: NDArray[np.bool_] | None = None) -> Whole:
    """The matrix back; 0 where it was not coded. Reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    if not (shape[0] * shape[1] if kept is None else int(kept.sum())):
        data.end()
        return np.zeros(shape, np.int64)
    center, kind = unzigzag(data.varint()), data.byte()
    signed, digits = bool(kind >> 6), kind & 63
    if not digits:
        data.end()
        found = np.zeros(shape, np.int64)
    else:
        lag = data.byte()
        if kind > 127 or digits > LONGEST or not 2 <= lag <= 64:
            raise ArtifactError("its coding makes no sense")
        flat = _turned(shape)
        if flat:
            shape, kept = (shape[1], shape[0]), None if kept is None else kept.T
        found = _Matrix(Decoder(data), shape, kept, signed, digits, lag).run(None)
        if flat:
            found, kept = found.T, None if kept is None else kept.T
    return found + center if kept is None else np.where(kept, found + center, 0)


def _turned(shape: tuple[int, ...]) -> bool:
    """Whether a matrix is coded column after column: inputs of a layer lie in an order, outputs in none.

    Unless there are so many more inputs that it would take long.
    """
    rows, columns = shape
    return columns <= 4 * rows + 1024


def _period(filled: NDArray[np.bool_]) -> int:
    """The distance from 2 to 64 at which most rows are filled where one is: such as the width of an image."""
    rows = filled.shape[0]
    if rows < 8:
        return 2
    sample = filled[:, :: max(1, filled.size // 1_000_000)]
    alike = {lag: int((sample[lag:] & sample[:-lag]).sum()) / (rows - lag) for lag in range(2, min(64, rows // 2) + 1)}
    return max(alike, key=lambda lag: alike[lag])
