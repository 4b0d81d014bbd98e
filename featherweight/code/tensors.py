"""A tensor as bytes and back to the last bit: whole numbers by frequencies or surroundings, floats byte by byte."""

from __future__ import annotations

import math
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.code import histogram, mixing
from featherweight.code.numbers import Reader, unzigzag, varint, zigzag
from featherweight.errors import ArtifactError

Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]
Elements = NDArray[np.unsignedinteger]

# How hard to try: the least bytes, as far as they are worth their time; many times as fast, for some 10 to 30 % more
# where weights are pruned; Huffman's code as Deep Compression has it, to compare with.
Coding = Literal["small", "fast", "huffman"]
CODINGS = ("small", "fast", "huffman")

# The first byte of a stream, how it is written: the first five and the last are of whole numbers, the sixth is of
# every type, byte by byte.
TABLE, SPARSE, MIXED, HUFFMAN, SPARSE_HUFFMAN, PLANES, ABOVE = range(7)
# No stream holds more values a byte, so that a small file cannot ask for much memory; shorter ones begin with bytes of
# 255 that mean nothing.
VALUES_PER_BYTE = 1 << 16
FILLING = 255
# How a plane of bytes is written: as it is, by how often each byte comes, by how often it does beside that above it.
PLAIN, ALONE, GIVEN = range(3)
# Values that are coded with tables of their own: what coding takes of memory stays bounded.
BLOCK = 1 << 22
# Matrices of more values are never written by their surroundings, and above the second number not tried: that takes
# one to five seconds a million, each way.
MIXED_LIMIT = 1 << 22
MIXED_TRIED = 1 << 20
# Of matrices of more than twice so many values as many are tried first; their surroundings have to save so much there,
# for a hundred times the time. What a part saves is near to what the whole does.
MIXED_SAMPLE, MIXED_WORTH = 1 << 14, 0.98
# Of so large a share, the most frequent number is worth saying apart where it is.
SPARSE_SHARE = 0.6
# The saving for which a plane of bytes is coded at all.
WORTH = 0.995
# So few bytes are shorter as they are, whatever they are.
FEW = 3


# Whole numbers ----------------------------------------------------------------------------------------------------


def encode_whole(
    values: Whole, coding: Coding = "small", kept: Flags | None = None, center: int | None = None
) -> bytes | None:
    """Whole numbers as bytes, in the shortest of the ways that are tried; None where they are 2³² apart or more.

    Args:
        values: of any shape.
        coding: how hard to try.
        kept: of the same shape, which of them are written; None for all.
        center: the number that stands for nothing, where that is known.
    """
    coded = values.ravel() if kept is None else values[kept]
    span = int(coded.max()) - int(coded.min()) if len(coded) else 0
    if span >> 32:
        return None
    if span >= histogram.ALPHABET:
        return _filled(_above_least(coded, coding), len(coded))
    tried = [_by_table(coded, coding == "huffman")]
    if coding == "small" and span and values.size <= MIXED_TRIED:
        rows = matrix(values.shape)
        whole, mask = values.reshape(rows), None if kept is None else kept.reshape(rows)
        if _worth_mixing(whole, mask, center):
            tried.append(bytes([MIXED]) + mixing.encode(whole, mask, center))
    return _filled(min(tried, key=len), len(coded))


def _above_least(values: Whole, coding: Coding) -> bytes:
    """Numbers that lie far apart, (n,), by how far each is above the least, byte by byte."""
    least = int(values.min())
    above = (values - least).astype("<u4")
    above = above.astype("<u2") if int(above.max()) < 1 << 16 else above
    planes = [_encode_planes(above[begin : begin + BLOCK], coding) for begin in range(0, len(above), BLOCK)]
    return b"".join([bytes([ABOVE]), varint(zigzag(least)), bytes([above.itemsize]), *planes])


def _from_least(data: Reader, count: int) -> Whole:
    least, width = unzigzag(data.varint()), data.byte()
    if width not in (2, 4):
        raise ArtifactError("its coding makes no sense")
    found = np.empty(count, np.int64)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        found[begin : begin + size] = _decode_planes(data, size, width)
    data.end()
    return found + least


def _worth_mixing(values: Whole, kept: Flags | None, center: int | None) -> bool:
    """Whether a matrix may be written by its surroundings: small ones may, large ones where their first rows gain."""
    if values.size <= 2 * MIXED_SAMPLE:
        return True
    rows = max(1, MIXED_SAMPLE // values.shape[1])
    part, mask = values[:rows], None if kept is None else kept[:rows]
    by_table = len(_by_table(part.ravel() if mask is None else part[mask], False))
    if by_table < MIXED_SAMPLE // 64:  # hardly anything is in them, which says nothing of the others
        return True
    return len(mixing.encode(part, mask, center)) < MIXED_WORTH * by_table


def decode_whole(data: Reader, shape: tuple[int, ...], kept: Flags | None = None) -> Whole:
    """The numbers back, of that shape; 0 where they were not kept. Reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    count = math.prod(shape) if kept is None else int(kept.sum())
    method = _opened(data, count)
    if method == MIXED:
        if math.prod(shape) > MIXED_LIMIT or not count:
            raise ArtifactError("its coding makes no sense")
        rows = matrix(shape)
        mixed = mixing.decode(data, rows, None if kept is None else kept.reshape(rows))
        return mixed.reshape(shape)
    if method not in (TABLE, SPARSE, HUFFMAN, SPARSE_HUFFMAN, ABOVE):
        raise ArtifactError(f"its numbers are written in a way that this version does not know ({method})")
    found = _from_least(data, count) if method == ABOVE else _from_table(data, method, count)
    if kept is None:
        return found.reshape(shape)
    placed = np.zeros(shape, np.int64)
    placed[kept] = found
    return placed


def _by_table(values: Whole, by_huffman: bool) -> bytes:
    """Numbers, (n,), block after block."""
    whole = histogram.Counted.of(values) if 0 < len(values) <= BLOCK else None
    sparse = len(values) > 1 and SPARSE_SHARE < _most_frequent(values, whole) / len(values) < 1
    method = (SPARSE_HUFFMAN if sparse else HUFFMAN) if by_huffman else (SPARSE if sparse else TABLE)
    parts = [bytes([method])]
    for begin in range(0, len(values), BLOCK):
        block = whole or histogram.Counted.of(values[begin : begin + BLOCK])
        if sparse:
            most = int(block.counts.argmax())
            others = block.symbols != most
            where = histogram.encode_flags(others, by_huffman)
            written = varint(zigzag(most + block.least)) + varint(len(where)) + where
            written += histogram.encode(block.symbols[others] + block.least, by_huffman)
        else:
            written = histogram.encode(block, by_huffman)
        parts += [varint(len(written)) if len(values) > BLOCK else b"", written]
    return b"".join(parts)


def _most_frequent(values: Whole, counted: histogram.Counted | None) -> int:
    """How often the most frequent of the numbers comes, which may have been counted."""
    return int((counted.counts if counted else np.bincount(values - values.min())).max())


def _from_table(data: Reader, method: int, count: int) -> Whole:
    if count <= BLOCK:
        return _block_from_table(data, method, count)
    found = np.empty(count, np.int64)
    for begin in range(0, count, BLOCK):
        part, size = Reader(data.take(data.varint())), min(BLOCK, count - begin)
        found[begin : begin + size] = _block_from_table(part, method, size)
    data.end()
    return found


def _block_from_table(data: Reader, method: int, count: int) -> Whole:
    """The numbers of one block, (count,); reads all of the data."""
    by_huffman = method in (HUFFMAN, SPARSE_HUFFMAN)
    if method in (TABLE, HUFFMAN):
        return histogram.decode(data, count, by_huffman)
    if not count:
        data.end()
        return np.zeros(0, np.int64)
    most = unzigzag(data.varint())
    others = histogram.decode_flags(Reader(data.take(data.varint())), count, by_huffman)
    found = np.full(count, most)
    found[others] = histogram.decode(data, int(others.sum()), by_huffman)
    return found


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that a tensor is coded as: outputs by all the rest; a vector as near to a square as it goes."""
    count = math.prod(shape)
    if len(shape) > 1:
        return shape[0], count // max(1, shape[0])
    rows = next((rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0), 1)
    return rows, count // rows


# Tensors of every type ------------------------------------------------------------------------------------------------


def encode(tensor: Tensor, coding: Coding = "small") -> bytes:
    """A tensor of any type as bytes; `decode` needs its type and shape again."""
    tensor = tensor.detach().cpu().contiguous()
    if _is_whole(tensor.dtype):
        written = encode_whole(tensor.to(torch.int64).numpy(), coding)
        if written is not None:
            return written
    elements = elements_of(tensor)
    parts = [bytes([PLANES])]
    for begin in range(0, len(elements), BLOCK):
        parts.append(_encode_planes(elements[begin : begin + BLOCK], coding))
    return _filled(b"".join(parts), tensor.numel())


def decode(data: Reader, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor back; reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    count = math.prod(shape)
    if _is_whole(dtype) and data.peek() != PLANES:
        found = decode_whole(data, shape)
        bounds = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if found.size and not bounds[0] <= int(found.min()) <= int(found.max()) <= bounds[1]:
            raise ArtifactError("it holds numbers that its type cannot")
        return torch.from_numpy(found.ravel()).to(dtype).reshape(shape)
    if _opened(data, count) != PLANES:
        raise ArtifactError("it is written in a way that this version does not know")
    parts = 2 if dtype.is_complex else 1
    width = dtype.itemsize // parts
    total = count * parts
    if 0 < total <= BLOCK:
        elements = _decode_planes(data, total, width)
    else:
        elements = np.empty(total, f"<u{width}")
        for begin in range(0, total, BLOCK):
            size = min(BLOCK, total - begin)
            elements[begin : begin + size] = _decode_planes(data, size, width)
    data.end()
    if dtype.is_floating_point or dtype.is_complex:
        elements = cast(Elements, elements >> 1 | (elements & 1) << (8 * width - 1))
    raw = torch.from_numpy(elements.view(np.uint8))
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def check_size(size: int, values: int) -> None:
    """See that a stream is no shorter than so many values may be.

    Raises:
        ArtifactError: it is.
    """
    if values > VALUES_PER_BYTE * size:
        raise ArtifactError(f"{values} values cannot be in {size} bytes")


def _filled(written: bytes, values: int) -> bytes:
    return bytes([FILLING]) * (-(-values // VALUES_PER_BYTE) - len(written)) + written


def _opened(data: Reader, values: int) -> int:
    """The first byte of a stream behind what fills it up."""
    check_size(data.left, values)
    while (method := data.byte()) == FILLING:
        pass
    return method


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.uint64


def elements_of(tensor: Tensor) -> Elements:
    """The tensor's elements as unsigned numbers, (n,); of floats the sign comes last, and the exponent first."""
    complex_ = tensor.is_complex()
    floating = complex_ or tensor.is_floating_point()
    width = tensor.element_size() // (2 if complex_ else 1)
    raw = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
    elements = cast(Elements, raw.view(f"<u{width}"))
    return cast(Elements, elements << 1 | elements >> (8 * width - 1)) if floating else elements


def _encode_planes(elements: Elements, coding: Coding) -> bytes:
    """Elements byte by byte, the highest first: exponents repeat much, the last digits hardly."""
    count, width = len(elements), elements.dtype.itemsize
    planes = elements.reshape(-1, 1).view(np.uint8)
    if count <= FEW:
        plain = np.full((width, count + 1), PLAIN, np.uint8)
        plain[:, 1:] = planes.T[::-1]
        return plain.tobytes()
    above: NDArray[np.uint8] | None = None
    parts: list[bytes] = []
    for place in range(width - 1, -1, -1):
        plane = np.ascontiguousarray(planes[:, place])
        tried = [(float(count), PLAIN)]
        if coding != "huffman" and plane.min() == plane.max():
            tried.append((0.0, ALONE))
        elif coding != "huffman":
            counts = np.bincount(plane, minlength=256)
            tried.append((histogram.entropy_bytes(counts[None]), ALONE))
            if above is not None and place == width - 2:
                together = np.bincount(above.astype(np.int64) << 8 | plane, minlength=65536)
                tried.append((histogram.entropy_bytes(together.reshape(256, 256)), GIVEN))
        method = PLAIN
        for size, other in tried:
            if size < WORTH * tried[0][0]:
                method, tried[0] = other, (size, other)
        written = plane.tobytes()
        if method == ALONE:
            written = histogram.encode(plane.astype(np.int64))
        elif method == GIVEN and above is not None:
            written = histogram.encode_bytes(plane, above)
        if len(written) >= count:
            method, written = PLAIN, plane.tobytes()
        parts += [bytes([method]), varint(len(written)) if method else b"", written]
        above = plane
    return b"".join(parts)


def _decode_planes(data: Reader, count: int, width: int) -> Elements:
    if data.left == width * (count + 1):  # as when all of them are as they are, which is most frequent
        whole = np.frombuffer(data.rest(), np.uint8).reshape(width, count + 1)
        if not whole[:, 0].any():
            data.take(data.left)
            return np.ascontiguousarray(whole[::-1, 1:].T).view(f"<u{width}").reshape(count)
    planes = np.empty((count, width), np.uint8)
    above: NDArray[np.uint8] | None = None
    for place in range(width - 1, -1, -1):
        method = data.byte()
        if method == PLAIN:
            plane = np.frombuffer(data.take(count), np.uint8)
        else:
            part = Reader(data.take(data.varint()))
            if method == ALONE:
                found = histogram.decode(part, count)
                if count and not 0 <= int(found.min()) <= int(found.max()) <= 255:
                    raise ArtifactError("it holds numbers that are no bytes")
                plane = found.astype(np.uint8)
            elif method == GIVEN and above is not None:
                plane = histogram.decode_bytes(part, above)
            else:
                raise ArtifactError(f"its bytes are written in a way that this version does not know ({method})")
        planes[:, place] = above = plane
    return planes.view(f"<u{width}").reshape(count)
