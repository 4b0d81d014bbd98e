"""Whole numbers as bytes: of any length, packed to a few bits, and in codes that are shorter for smaller ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import ArtifactError

Whole = NDArray[np.int64]

_SHORT = tuple(bytes([value]) for value in range(128))


def varint(value: int) -> bytes:
    """A number from 0, seven bits a byte, the lowest first; the top bit says that more follow (LEB128)."""
    if value < 128:  # nearly always
        return _SHORT[value]
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """A number of either sign as one from 0: 0, −1, 1, −2, 2, … become 0, 1, 2, 3, 4, …"""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """The number that `zigzag` was given."""
    return value >> 1 if value & 1 == 0 else -((value + 1) >> 1)


def packed(values: Whole, width: int) -> bytes:
    """Numbers from 0 below ``2^width``, one after the other, highest bit first; filled up to whole bytes."""
    if not width:
        return b""
    bits = (values[:, None] >> np.arange(width - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def gamma(values: Whole) -> bytes:
    """Numbers from 1 below 2^31, each as one zero fewer than it has binary digits, then these (Elias, 1975)."""
    lengths = gamma_lengths(values)
    ends = np.cumsum(lengths)
    left = np.repeat(ends, lengths) - 1 - np.arange(ends[-1] if len(ends) else 0)  # bits of the same number
    return np.packbits((np.repeat(values, lengths) >> left & 1).astype(np.uint8)).tobytes()


def gamma_lengths(values: Whole) -> Whole:
    """How many bits `gamma` takes for each."""
    return 2 * np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1


class Reader:
    """Bytes, read from the front; whatever is asked for is checked against what is left.

    Args:
        data: the bytes.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at, self._end = memoryview(data), 0, len(data)

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return self._end - self._at

    def take(self, count: int) -> memoryview:
        """The next so many bytes.

        Raises:
            ArtifactError: there are fewer.
        """
        at = self._at
        found = self._data[at : at + count]
        if len(found) != count:
            raise ArtifactError(f"it ends {count - self.left} bytes too early")
        self._at = at + count
        return found

    def rest(self) -> memoryview:
        """All bytes that are left, which stay the next."""
        return self._data[self._at :]

    def peek(self) -> int:
        """The next byte, which stays the next."""
        value = self.byte()
        self._at -= 1
        return value

    def byte(self) -> int:
        """The next byte."""
        at = self._at
        if at >= self._end:
            self.take(1)  # raises
        self._at = at + 1
        return self._data[at]

    def varint(self) -> int:
        """A number that `featherweight.code.numbers.varint` wrote, below 2^70.

        Raises:
            ArtifactError: it is longer, or not over where the data is.
        """
        value = self.byte()
        if value < 128:  # nearly always
            return value
        value &= 127
        for shift in range(7, 70, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ArtifactError("a number in it has no end")

    def varint_to(self, most: int) -> int:
        """A `varint` that may not be greater.

        Raises:
            ArtifactError: it is.
        """
        if (value := self.varint()) > most:
            raise ArtifactError(f"it speaks of {value} of something where there can be {most} at most")
        return value

    def packed(self, count: int, width: int) -> Whole:
        """So many numbers that `packed` wrote, (count,)."""
        if not width:
            return np.zeros(count, np.int64)
        raw = np.frombuffer(self.take(-(-count * width // 8)), np.uint8)
        bits = np.unpackbits(raw, count=count * width).reshape(count, width).astype(np.int64)
        return bits @ (1 << np.arange(width - 1, -1, -1))

    def gamma(self, count: int) -> Whole:
        """So many numbers that `gamma` wrote, (count,), each below 2^32.

        Raises:
            ArtifactError: they are no such numbers.
        """
        bits = (np.unpackbits(np.frombuffer(self.rest(), np.uint8)[: 8 * count + 8]) + ord("0")).tobytes()
        at, found = 0, []
        for _ in range(count):
            one = bits.find(b"1", at, at + 32)
            end = 2 * one - at + 1
            if one < 0 or end > len(bits):
                raise ArtifactError("a table in it makes no sense")
            found.append(int(bits[one:end], 2))
            at = end
        self.take(-(-at // 8))
        return np.array(found, np.int64).reshape(count)

    def end(self) -> None:
        """See that nothing is left.

        Raises:
            ArtifactError: something is.
        """
        if self.left:
            raise ArtifactError(f"{self.left} bytes in it belong to nothing")
