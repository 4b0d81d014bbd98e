"""Weights as Core ML keeps them: whole numbers with scales, indices into tables, and of pruned ones what is left.

Of all forms that hold a weight's values, the smallest is taken. Nothing is clustered or rounded anew: tables hold the
values that are there, scales and whole numbers are the grid's. What Core ML has is described at
apple.github.io/coremltools/docs-guides/source/opt-overview.html, operation by operation in coremltools'
``iOS16/constexpr_ops.py`` and ``iOS18/compression.py`` (read in coremltools 9.0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.forms import Constrained, Grid, Gridded, Shared

WIDTHS = (1, 2, 3, 4, 6, 8)  # bits of an index into a table
BLOB = 64  # bytes: what the start of every array in a weight file is a multiple of, and what its description takes

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in a form that Core ML has.

    Attributes:
        codes: of the weight's shape, or of (kept,) where there is a mask: whole numbers, or, where there is neither
            table nor scale, values. With vectors, its axis 1 is that many times shorter than the weight's.
        bits: of each code; of values, 0: those have the type that the file computes in.
        table: (tables along axis 0, …, tables along the last axis, 2^bits, values of a vector).
        scale, offset: (scales along axis 0, …): values are ``scale · (code − offset)``.
        mask: of the weight's shape, where it is not zero; None where zeros are kept as any other value.
    """

    codes: Array
    bits: int = 0
    table: Array | None = None
    scale: Array | None = None
    offset: Array | None = None
    mask: Array | None = None

    @property
    def vector(self) -> int:
        """Values that share an index, along axis 1."""
        return 1 if self.table is None else self.table.shape[-1]

    @property
    def kind(self) -> str:
        """In a few words: ``4-bit tables``."""
        left = "" if self.mask is None else "sparse"
        if self.table is not None:
            of = f", {self.vector} weights an index" if self.vector > 1 else ""
            return f"{left} {self.bits}-bit tables{of}".strip()
        return f"{left} {self.bits}-bit linear".strip() if self.scale is not None else left

    @property
    def release(self) -> int:
        """The first release of iOS that has it: 16 or 18."""
        if self.table is not None:
            plain = self.mask is None and self.bits != 3 and self.table.size == 1 << self.bits
        elif self.scale is not None:
            lengths = [(many, size) for many, size in zip(self.scale.shape, self.codes.shape, strict=False) if many > 1]
            plain = self.mask is None and self.bits == 8 and len(lengths) < 2 and all(m == s for m, s in lengths)
        else:
            plain = True
        return 16 if plain else 18

    def parts(self, width: int) -> tuple[int, ...]:
        """Bytes of every array of it, in a file that computes in numbers of `width` bytes."""
        bits = [self.codes.size * (self.bits or 8 * width)]
        bits += [8 * width * part.size for part in (self.table, self.scale) if part is not None]
        if self.scale is not None and (self.offset is not None or self.release < 18):  # which has none without
            bits += [self.scale.size * self.bits]
        bits += [self.mask.size] if self.mask is not None else []
        return tuple(-(-count // 8) for count in bits)

    def values(self, kind: Any) -> Array:
        """The weight, as decompressed in float16 or float32."""
        codes = self.codes
        if self.mask is not None:
            codes = np.zeros(self.mask.shape, codes.dtype)
            codes[self.mask] = self.codes
        if self.table is not None:
            tables = self.table.shape[: codes.ndim]
            groups = _group_at(tables, codes.shape)
            found = self.table.astype(kind)[(*groups, codes)]  # (*codes, values of a vector)
            joined = np.moveaxis(found, -1, 2) if codes.ndim > 1 else found
            made: Array = joined.reshape(*codes.shape[:1], *(-1 for _ in codes.shape[1:2]), *codes.shape[2:])
        elif self.scale is not None:
            each, shift = (
                None if part is None else _spread(part, codes.shape).astype(kind) for part in (self.scale, self.offset)
            )
            made = codes.astype(kind)
            made = made * each if shift is None else (made - shift) * each
        else:
            made = codes.astype(kind)
        if self.mask is None:
            return made
        left: Array = np.where(self.mask, made, kind(0))
        return left


def blobs(parts: tuple[int, ...]) -> int:
    """Bytes in a weight file of arrays of so many bytes, at most: filled up, and with their descriptions."""
    return sum(BLOB + -(-part // BLOB) * BLOB for part in parts)


def pack(value: Array, constraint: Constrained, *, half: bool) -> Packed | None:
    """The smallest form of a confined weight that holds its values; None where none is smaller than the values.

    Args:
        value: the weight.
        constraint: the uppermost on it.
        half: whether the file computes in float16.
    """
    kind, width = (np.float16, 2) if half else (np.float32, 4)
    if value.ndim == 0 or not value.size or not np.isfinite(value).all():
        return None
    found = min(
        (form for form in _forms(value, constraint) if close(form.values(kind), value, half=half)),
        key=lambda form: blobs(form.parts(width)),
        default=None,
    )
    dense = blobs((width * value.size,))
    return found if found is not None and blobs(found.parts(width)) < dense else None


def close(found: Array, value: Array, *, half: bool) -> bool:
    """Whether values are those of a weight: in float32 equal, in float16 off by two roundings, of scale and product."""
    if found.shape != value.shape:
        return False
    if not half:
        return bool((found == value).all())
    exact = value.astype(np.float64)
    return bool((np.abs(found.astype(np.float64) - exact) <= np.abs(exact) * 2.0**-10 + 2.0**-24).all())


def _forms(value: Array, constraint: Constrained) -> Iterator[Packed]:
    """Every form that might hold a weight's values, whole ones before those of what is left."""
    mask = value != 0
    sparse = not mask.all()
    if isinstance(constraint, Gridded) and (linear := _linear(value, constraint)) is not None:
        yield linear
        if sparse:
            yield replace(linear, codes=linear.codes[mask], mask=mask)
    if isinstance(constraint, Shared) and (vectors := _vectors(value, constraint)) is not None:
        yield vectors
    for tables in _groups(value.shape, constraint):
        yield from _tables(value, tables, None)
        if sparse:
            yield from _tables(value, tables, mask)
    if sparse:
        yield Packed(value[mask], mask=mask)


def _linear(value: Array, constraint: Gridded) -> Packed | None:
    """A weight on a grid as its whole numbers, of 4 or 8 bits; None where they or their groups do not fit."""
    import torch

    form, shape = constraint.form, value.shape
    if form.bits > 8:
        return None
    parts = [part.detach().cpu().numpy() for part in (constraint.scale, constraint.zero_point)]
    scale, zero_point = (_over_axes(part, form, shape) for part in parts)
    if scale is None or zero_point is None:
        return None
    like = torch.from_numpy(value).to(constraint.scale.device)
    codes = constraint.codes(like).cpu().numpy() + form.low
    offset = zero_point.astype(np.int64) if zero_point.any() else None
    return Packed(codes, 4 if form.bits <= 4 else 8, scale=scale.astype(np.float32), offset=offset)


def _over_axes(each: Array, form: Grid, shape: tuple[int, ...]) -> Array | None:
    """Scales of a grid as (scales along axis 0, …), each for a block; None where its groups are no such blocks."""
    if form.axis is None:
        return each.reshape((1,) * len(shape))
    axis = form.axis % len(shape)
    others = [size for at, size in enumerate(shape) if at != axis]
    if not form.group:
        many = [1] * len(others)
    else:
        # Groups lie side by side in the other axes' order: one is a block where it fills all axes behind one of them,
        # and divides that one.
        many, left = [], form.group
        for size in reversed(others):
            if left >= size and left % size == 0:
                many.insert(0, 1)
                left //= size
            elif left < size and size % left == 0:
                many.insert(0, size // left)
                left = 1
            else:
                return None
        if left != 1:
            return None
    return np.moveaxis(each.reshape(shape[axis], *many), 0, axis)


def _vectors(value: Array, constraint: Shared) -> Packed | None:
    """A weight whose neighbours share an index; None where they are not neighbours along axis 1, or have too many."""
    form, shape = constraint.form, value.shape
    count = form.size + form.zero
    bits = next((bits for bits in WIDTHS if count <= 1 << bits), None)
    flat = len(shape) > 1 and math.prod(shape[2:]) == 1
    if form.vector == 1 or not flat or bits is None or (form.channels and shape[0] % form.channels):
        return None
    centroids = constraint.centroids.detach().cpu().float().numpy()
    table = np.zeros((len(centroids), 1 << bits, form.vector), np.float32)
    table[:, int(form.zero) : count] = centroids
    many = (1, len(table)) if form.product else (len(table), 1)
    ones = (1,) * (len(shape) - 2)
    codes = constraint.indices.cpu().numpy().astype(np.int64)
    return Packed(codes.reshape(*codes.shape, *ones), bits, table=table.reshape(*many, *ones, *table.shape[1:]))


def _groups(shape: tuple[int, ...], constraint: Constrained) -> list[tuple[int, ...]]:
    """How many tables there may be along every axis."""
    if isinstance(constraint, Gridded) and constraint.form.bits > 6:
        return []  # whole numbers are smaller
    ones = (1,) * len(shape)
    found = [ones]
    if isinstance(constraint, Shared) and (channels := constraint.form.channels) > 1 and shape[0] % channels == 0:
        found.append((shape[0] // channels, *ones[1:]))
    if isinstance(constraint, Gridded) and constraint.form.axis not in (None, 0):
        axis = (constraint.form.axis or 0) % len(shape)
        found.append(tuple(size if at == axis else 1 for at, size in enumerate(shape)))
    if isinstance(constraint, Shared) and constraint.form.product and math.prod(shape[2:]) == 1:
        found.append((1, *shape[1:]))
    return [*found, (shape[0], *ones[1:])]


def _tables(value: Array, tables: tuple[int, ...], mask: Array | None) -> Iterator[Packed]:
    """The weight as indices into tables of the values that are there, where those are few enough."""
    shape, count = value.shape, math.prod(tables)
    ids = np.zeros(shape, np.int64)
    for at, many in zip(_group_at(tables, shape), tables, strict=True):
        ids = ids * many + at
    flat, group = (value.ravel(), ids.ravel()) if mask is None else (value[mask], ids[mask])
    if not flat.size:
        return
    order = np.lexsort((flat, group))
    values, groups = flat[order], group[order]
    new = np.ones(len(flat), bool)
    new[1:] = (values[1:] != values[:-1]) | (groups[1:] != groups[:-1])
    rank = np.cumsum(new) - 1
    starts = np.full(count, len(flat))
    np.minimum.at(starts, groups, rank)
    code = rank - starts[groups]
    bits = next((bits for bits in WIDTHS if code.max() < 1 << bits), None)
    if bits is None:
        return
    table = np.zeros((count, 1 << bits), np.float32)
    table[groups, code] = values
    codes = np.empty(len(flat), np.int64)
    codes[order] = code
    yield Packed(
        codes.reshape(shape) if mask is None else codes, bits, table=table.reshape(*tables, 1 << bits, 1), mask=mask
    )


def _group_at(many: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Which of so many groups along every axis a place is in, as arrays that broadcast against each other."""
    at: Any = np.indices(shape, sparse=True)
    return tuple(i * groups // size for i, groups, size in zip(at, many, shape, strict=True))


def _spread(each: Array, shape: tuple[int, ...]) -> Array:
    for axis, (many, size) in enumerate(zip(each.shape, shape, strict=True)):
        each = np.repeat(each, size // many, axis)
    return each
