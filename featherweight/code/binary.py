"""Arithmetic coding of single bits, each with a probability of its own. Whole numbers only.

Carryless as in Mahoney, Adaptive weighing of context models for lossless data compression, 2005: an interval of 48 bits
is cut in two at every bit, and its leading byte is written as soon as both ends have the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.code.numbers import Reader

Whole = NDArray[np.int64]

_ALL = (1 << 48) - 1


class Encoder:
    """Takes bits with their probabilities; `finish` gives the bytes."""

    def __init__(self) -> None:
        self._probabilities: list[Whole] = []
        self._bits: list[Whole] = []

    def code(self, probabilities: Whole, bits: Whole | None) -> Whole:
        """Add bits.

        Args:
            probabilities: (n,), that a bit is 1, in 65536ths, from 1 to 65535.
            bits: (n,), 0 or 1.
        Returns:
            The bits.
        """
        assert bits is not None
        self._probabilities.append(probabilities)
        self._bits.append(bits)
        return bits

    def finish(self) -> bytes:
        """All bits that were added, as bytes."""
        low, high, out = 0, _ALL, bytearray()
        if not self._bits:
            return b""
        probabilities, bits = np.concatenate(self._probabilities).tolist(), np.concatenate(self._bits).tolist()
        for probability, bit in zip(probabilities, bits, strict=True):
            middle = low + ((high - low) >> 16) * probability
            if bit:
                high = middle
            else:
                low = middle + 1
            while not (low ^ high) >> 40:
                out.append(high >> 40)
                low, high = low << 8 & _ALL, high << 8 & _ALL | 255
        for kept in range(8, 49, 8):  # the shortest number between low and high
            value = -(-low >> (48 - kept)) << (48 - kept)
            if value <= high:
                break
        out += value.to_bytes(6, "big")
        return bytes(out).rstrip(b"\0")


class Decoder:
    """Gives bits back for the probabilities that the encoder had.

    Args:
        data: what `Encoder.finish` made; zeros follow where it ends.
    """

    def __init__(self, data: Reader) -> None:
        self._bytes = iter(bytes(data.take(data.left)))
        self._low, self._high = 0, _ALL
        self._state = 0
        for _ in range(6):
            self._state = self._state << 8 | next(self._bytes, 0)

    def code(self, probabilities: Whole, bits: Whole | None) -> Whole:
        """The next bits.

        Args:
            probabilities: (n,), as they were for the encoder.
            bits: None.
        """
        low, high, state, rest, found = self._low, self._high, self._state, self._bytes, []
        for probability in probabilities.tolist():
            middle = low + ((high - low) >> 16) * probability
            if state <= middle:
                found.append(1)
                high = middle
            else:
                found.append(0)
                low = middle + 1
            while not (low ^ high) >> 40:
                low, high = low << 8 & _ALL, high << 8 & _ALL | 255
                state = state << 8 & _ALL | next(rest, 0)
        self._low, self._high, self._state = low, high, state
        return np.array(found, np.int64)
